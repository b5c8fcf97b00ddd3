//! The log: small writes that a FLUSH made durable by one write, until all of `data` and the pages are made durable together. A
//! record is a head of one block and up to [`ENTRIES_MAX`] blocks of content; records follow one another from the log's
//! beginning, and the log begins anew whenever nothing in it is needed.
//!
//! An entry counts as long as the sector with its block's LOCAL bit has no higher sequence than the entry says: pages are only
//! written after `data` was made durable, so what writes the page supersedes the entry.

use super::format::{BLOCK_BYTES, LOG_BYTES, LOG_OFFSET, PAGE, PAGES_OFFSET};
use super::{Bits, Header, MapError, Storage};

const MAGIC: &[u8; 8] = b"HRTHLOG1";
/// Most blocks of one record.
pub(crate) const ENTRIES_MAX: usize = 16;
/// Blocks of the whole log.
pub(crate) const LOG_BLOCKS: u64 = LOG_BYTES / BLOCK_BYTES;
/// Bytes of a head before its entries: magic, crc32c, number of entries, sequence, tag, 4 zeros.
const FIXED: usize = 32;
/// Block (8), sequence of the block's page (4), crc32c of the content (4).
const ENTRY: usize = 16;
/// Read with one call.
const BATCH: u64 = 64 << 10;

/// A block in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) block: u64,
    /// Sequence of its page on disk.
    pub(crate) page_seq: u32,
}

/// Whether a block of the log may look like this: a guest must not be able to store what reads as a head.
pub(crate) fn may_hold(content: &[u8]) -> bool {
    !content.starts_with(MAGIC)
}

/// Binds a head to its volume and place.
fn tag(volume_id: &[u8; 32], at: u64) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(volume_id), &at.to_le_bytes())
}

/// Fills in the head of the record at block `at` of the log; the entries' contents stand behind it already.
pub(crate) fn encode(volume_id: &[u8; 32], at: u64, seq: u64, entries: &[Entry], record: &mut [u8]) {
    let Some((head, contents)) = record.split_at_mut_checked(PAGE) else { return };
    head.fill(0);
    let count = entries.len() as u32;
    let fields = [&MAGIC[..], &[0; 4], &count.to_le_bytes(), &seq.to_le_bytes(), &tag(volume_id, at).to_le_bytes()];
    let fields = fields.concat();
    for (to, from) in head.iter_mut().zip(fields) {
        *to = from;
    }
    let (_, list) = head.split_at_mut(FIXED);
    for ((to, entry), content) in list.chunks_exact_mut(ENTRY).zip(entries).zip(contents.chunks_exact(PAGE)) {
        let crc = crc32c::crc32c(content);
        let bytes = [&entry.block.to_le_bytes()[..], &entry.page_seq.to_le_bytes(), &crc.to_le_bytes()].concat();
        to.copy_from_slice(&bytes);
    }
    let crc = crc32c::crc32c(head.get(12..).unwrap_or_default());
    if let Some(to) = head.get_mut(8..12) {
        to.copy_from_slice(&crc.to_le_bytes());
    }
}

struct Head {
    seq: u64,
    /// With the crc32c of their contents.
    entries: Vec<(Entry, u32)>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|field| u32::from_le_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|field| u64::from_le_bytes(*field))
}

impl Head {
    /// `None` when no head of this place stands here.
    fn decode(volume_id: &[u8; 32], at: u64, block: &[u8]) -> Option<Self> {
        let whole = block.starts_with(MAGIC) && u32_at(block, 8)? == crc32c::crc32c(block.get(12..)?);
        if !whole || u32_at(block, 24)? != tag(volume_id, at) {
            return None;
        }
        let count = u32_at(block, 12)? as usize;
        let list = block.get(FIXED..)?.chunks_exact(ENTRY).take(count);
        let entry =
            |bytes: &[u8]| Some((Entry { block: u64_at(bytes, 0)?, page_seq: u32_at(bytes, 8)? }, u32_at(bytes, 12)?));
        let entries = list.map(entry).collect::<Option<Vec<_>>>()?;
        (entries.len() == count && (1..=ENTRIES_MAX).contains(&count))
            .then_some(Self { seq: u64_at(block, 16)?, entries })
    }
}

/// Contents that the log has and that `data` may lack, in the order in which they were written.
///
/// # Errors
/// A record before one that counts is not whole. (The last one may be: then a crash cut it off, and its flush was never
/// answered.)
pub(crate) fn read(file: &dyn Storage, header: &Header, bits: &Bits) -> Result<Vec<(u64, Vec<u8>)>, MapError> {
    decode(&contents(file)?, header, bits)
}

pub(super) fn decode(log: &[u8], header: &Header, bits: &Bits) -> Result<Vec<(u64, Vec<u8>)>, MapError> {
    let block = |at: u64| log.get(at as usize * PAGE..)?.get(..PAGE);
    let head = |at: u64| Head::decode(&header.volume_id, at, block(at)?);
    let counts =
        |entry: &Entry| entry.block < header.size_bytes / BLOCK_BYTES && bits.sector_seq(entry.block) <= entry.page_seq;
    let mut found = Vec::new();
    let (mut at, mut next) = (0, None);
    'records: while let Some(Head { seq, entries }) = head(at).filter(|head| next.is_none_or(|next| next == head.seq)) {
        let mut contents = Vec::new();
        for ((entry, crc), place) in entries.iter().zip(at + 1..) {
            match block(place) {
                Some(content) if crc32c::crc32c(content) == *crc => contents.push((entry, content)),
                _ => break 'records,
            }
        }
        found.extend(contents.into_iter().filter(|(e, _)| counts(e)).map(|(e, content)| (e.block, content.to_vec())));
        (at, next) = (at + 1 + entries.len() as u64, Some(seq.wrapping_add(1)));
    }
    let lost = (at + 1..LOG_BLOCKS).filter_map(head).any(|head| head.entries.iter().any(|(entry, _)| counts(entry)));
    if lost { Err(MapError::Log(LOG_OFFSET + (at + 1) * BLOCK_BYTES)) } else { Ok(found) }
}

/// The whole log; what was never written is not read.
pub(super) fn contents(file: &dyn Storage) -> Result<Vec<u8>, MapError> {
    let mut log = vec![0u8; LOG_BYTES as usize];
    let mut offset = LOG_OFFSET;
    while let Some(data) = file.next_data(offset).map_err(MapError::io("look for the log of"))? {
        let from = data.max(offset) / BLOCK_BYTES * BLOCK_BYTES;
        if from >= PAGES_OFFSET {
            break;
        }
        let to = (from + BATCH).min(PAGES_OFFSET);
        let part = log.get_mut((from - LOG_OFFSET) as usize..(to - LOG_OFFSET) as usize).unwrap_or_default();
        file.read_at(part, from).map_err(MapError::io("read the log of"))?;
        offset = to;
    }
    Ok(log)
}
