//! The map's header. Both copies are rewritten at every change, one after the other, each made durable before the next:
//! whichever is whole after a crash is either the new header or the old one of a change that nobody was told of.

use super::format::PAGE;
use super::{MapError, Storage};

const MAGIC: &[u8; 8] = b"HRTHMAP1";
const VERSION: u32 = 2;
const FLAG_CLEAN: u32 = 1;
const FLAG_BASE: u32 = 2;
const CRC_AT: usize = PAGE - 4;
/// 64 TiB, the largest volume of EBS. Volumes beyond this are nonsense, page arithmetic stays far from overflow, and what a header says
/// cannot make its reader ask for more than some 50 MiB of memory.
pub(crate) const SIZE_MAX: u64 = 64 << 40;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Counts changes of the header.
    pub sequence: u64,
    /// Closed in order: DIRTY bits on disk are exact.
    pub clean: bool,
    /// Id of the volume, padded with zeros.
    pub volume_id: [u8; 32],
    /// Size of the volume.
    pub size_bytes: u64,
    /// Attachment generation of the last one that opened it.
    pub generation: u64,
    /// Root hash of the snapshot that non-LOCAL blocks are read from.
    pub base_root: Option<[u8; 32]>,
    /// Chunks at the volume's beginning that the base may have: all when it was made. What came by growth is blank.
    pub extent_chunks: u64,
    /// crc32c of the base's extent (its first `extent_chunks` bits): pages that were never written mean nothing without it.
    pub extent_checksum: u32,
}

impl Header {
    fn encode(&self) -> [u8; PAGE] {
        let mut page = [0u8; PAGE];
        let flags = u32::from(self.clean) * FLAG_CLEAN + u32::from(self.base_root.is_some()) * FLAG_BASE;
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(to) = page.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
            at += bytes.len();
        };
        put(MAGIC);
        put(&VERSION.to_le_bytes());
        put(&flags.to_le_bytes());
        put(&self.sequence.to_le_bytes());
        put(&self.volume_id);
        put(&self.size_bytes.to_le_bytes());
        put(&self.generation.to_le_bytes());
        put(&self.base_root.unwrap_or_default());
        put(&self.extent_chunks.to_le_bytes());
        put(&self.extent_checksum.to_le_bytes());
        let (body, crc) = page.split_at_mut(CRC_AT);
        crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        page
    }

    fn decode(page: &[u8; PAGE]) -> Result<Self, MapError> {
        let (body, crc) = page.split_at(CRC_AT);
        if !body.starts_with(MAGIC) {
            return Err(MapError::Header("it does not begin with the format's magic"));
        }
        if crc != crc32c::crc32c(body).to_le_bytes() {
            return Err(MapError::Header("its checksum does not match"));
        }
        let mut fields = Fields(body.get(8..).unwrap_or_default());
        let version = u32::from_le_bytes(fields.take());
        if version != VERSION {
            return Err(MapError::Version(version));
        }
        let flags = u32::from_le_bytes(fields.take());
        if flags & !(FLAG_CLEAN | FLAG_BASE) != 0 {
            return Err(MapError::Header("it has unknown flags"));
        }
        let sequence = u64::from_le_bytes(fields.take());
        let volume_id = fields.take();
        let size_bytes = u64::from_le_bytes(fields.take());
        let generation = u64::from_le_bytes(fields.take());
        let root = fields.take();
        let extent_chunks = u64::from_le_bytes(fields.take());
        let extent_checksum = u32::from_le_bytes(fields.take());
        check_size(size_bytes)?;
        if extent_chunks > size_bytes.div_ceil(super::CHUNK_BYTES) {
            return Err(MapError::Header("it has more chunks of a base than of the volume"));
        }
        let base_root = (flags & FLAG_BASE != 0).then_some(root);
        let clean = flags & FLAG_CLEAN != 0;
        Ok(Self { sequence, clean, volume_id, size_bytes, generation, base_root, extent_chunks, extent_checksum })
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

pub(crate) fn check_size(size_bytes: u64) -> Result<(), MapError> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(super::BLOCK_BYTES) || size_bytes > SIZE_MAX {
        return Err(MapError::Size(size_bytes));
    }
    Ok(())
}

/// Reads the header: the copy with the higher sequence of those that are whole.
pub fn read_header(file: &dyn Storage) -> Result<Header, MapError> {
    let mut best: Result<Header, MapError> = Err(MapError::Header("the file is too short"));
    let length = file.length().map_err(MapError::io("learn the length of"))?;
    for copy in 0..2u64 {
        let mut page = [0u8; PAGE];
        if length < (copy + 1) * PAGE as u64 {
            continue;
        }
        file.read_at(&mut page, copy * PAGE as u64).map_err(MapError::io("read the header of"))?;
        match (Header::decode(&page), &best) {
            (Ok(header), Ok(other)) if header.sequence > other.sequence => best = Ok(header),
            (Ok(header), Err(_)) => best = Ok(header),
            // A newer program's header is not skipped in favour of an older copy.
            (Err(error @ MapError::Version(_)), _) => return Err(error),
            (Err(error), Err(_)) => best = Err(error),
            _ => {}
        }
    }
    best
}

/// Writes both copies of a new map's header with one sync: nothing is lost if that is cut off.
pub(super) fn write_first_header(file: &dyn Storage, header: &mut Header) -> Result<(), MapError> {
    header.sequence = header.sequence.wrapping_add(1);
    file.write_at(&[header.encode(); 2].concat(), 0).map_err(MapError::io("write the header of"))?;
    file.sync().map_err(MapError::io("make durable the header of"))
}

/// Makes both copies what [`read_header`] found, which must be durable. A crash between the two writes of a change leaves the second
/// one as it was before; once the change was acted upon, that one must not be what counts when the next change damages the first.
pub(crate) fn even_out(file: &dyn Storage, header: &Header) -> Result<(), MapError> {
    let right = header.encode();
    for copy in 0..2u64 {
        let mut page = [0u8; PAGE];
        file.read_at(&mut page, copy * PAGE as u64).map_err(MapError::io("read the header of"))?;
        if page != right {
            file.write_at(&right, copy * PAGE as u64).map_err(MapError::io("write the header of"))?;
            file.sync().map_err(MapError::io("make durable the header of"))?;
        }
    }
    Ok(())
}

/// Writes both copies with the next sequence number; durable on return.
pub(crate) fn write_header(file: &dyn Storage, header: &mut Header) -> Result<(), MapError> {
    header.sequence = header.sequence.wrapping_add(1);
    let page = header.encode();
    for copy in 0..2u64 {
        file.write_at(&page, copy * PAGE as u64).map_err(MapError::io("write the header of"))?;
        file.sync().map_err(MapError::io("make durable the header of"))?;
    }
    Ok(())
}
