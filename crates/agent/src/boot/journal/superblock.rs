//! The journal's own superblock.

use super::checksum::{crc32c, without_field};
use super::error::JournalError;

/// First word of each block of the log that is no data.
pub const MAGIC: u32 = 0xc03b_3998;

const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
/// Bytes of the superblock, whatever the block size.
const BYTES: usize = 1024;
const CHECKSUM_FIELD: usize = 0xfc;
const CHECKSUM_CRC32C: u8 = 4;

const COMPAT_CHECKSUM: u32 = 0x1;
const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_ASYNC_COMMIT: u32 = 0x4;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// All of the above and revocations (0x1), which are there or not.
const INCOMPAT_KNOWN: u32 = 0x3f;

/// Blocks for fast commits unless the superblock says otherwise (JBD2_DEFAULT_FAST_COMMIT_BLOCKS).
const DEFAULT_FAST_COMMIT_BLOCKS: u32 = 256;
/// The ring is never made smaller than this for their sake (JBD2_MIN_JOURNAL_BLOCKS).
const MIN_RING_BLOCKS: u32 = 1024;

/// How the log guards itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksums {
    /// Not at all.
    None,
    /// One CRC32 per transaction, in its commit block.
    Transaction,
    /// CRC32C of each block; the low 16 bits of it in the tags of data blocks.
    V2,
    /// CRC32C of each block.
    V3,
}

/// What the journal says about its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalSuperblock {
    /// First block of the ring.
    pub first: u32,
    /// The block after the ring's last: fast commits or the journal's end.
    pub last: u32,
    /// Where the oldest transaction starts; 0 when there is none.
    pub start: u32,
    /// The oldest transaction's number.
    pub sequence: u32,
    /// Block numbers of 64 bits.
    pub wide: bool,
    /// How blocks are guarded.
    pub checksums: Checksums,
    /// What all checksums of version 2 and 3 begin with.
    pub uuid: [u8; 16],
}

/// A big-endian word, as all of JBD2's.
pub fn be_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

impl JournalSuperblock {
    /// Reads and checks block 0 of a journal file of `file_blocks` blocks.
    pub fn parse(block: &[u8], block_size: u64, file_blocks: u64) -> Result<Self, JournalError> {
        let damaged = |what: String| JournalError::Damaged(what);
        let bytes = block.get(..BYTES).ok_or_else(|| damaged("no superblock".into()))?;
        let word = |offset| be_u32(bytes, offset).unwrap_or_default();
        let version_2 = word(4) == SUPERBLOCK_V2;
        if word(0) != MAGIC || !(version_2 || word(4) == SUPERBLOCK_V1) {
            return Err(damaged("no superblock".into()));
        }
        if u64::from(word(0xc)) != block_size {
            return Err(damaged(format!("blocks of {} bytes in a file system of {block_size}", word(0xc))));
        }
        let (length, first, start) = (word(0x10), word(0x14), word(0x1c));
        if u64::from(length) > file_blocks {
            return Err(damaged(format!("{length} blocks in a file of {file_blocks}")));
        }
        let (compat, incompat, ro_compat) = if version_2 { (word(0x24), word(0x28), word(0x2c)) } else { (0, 0, 0) };
        if incompat & !INCOMPAT_KNOWN != 0 || ro_compat != 0 {
            return Err(JournalError::Features { incompat: incompat & !INCOMPAT_KNOWN, ro_compat });
        }
        let has = |feature| incompat & feature != 0;
        let checksums = match (compat & COMPAT_CHECKSUM != 0, has(INCOMPAT_CSUM_V2), has(INCOMPAT_CSUM_V3)) {
            (false, false, false) => Checksums::None,
            (true, false, false) => Checksums::Transaction,
            (false, true, false) => Checksums::V2,
            (false, false, true) => Checksums::V3,
            _ => return Err(damaged("several kinds of checksums at once".into())),
        };
        if matches!(checksums, Checksums::V2 | Checksums::V3) {
            if bytes.get(0x50) != Some(&CHECKSUM_CRC32C) {
                return Err(damaged("checksums that are not CRC32C".into()));
            }
            if without_field(crc32c(), bytes, CHECKSUM_FIELD) != word(CHECKSUM_FIELD) {
                return Err(damaged("wrong checksum of its superblock".into()));
            }
        }
        if has(INCOMPAT_ASYNC_COMMIT) && checksums == Checksums::None {
            return Err(JournalError::AsyncWithoutChecksums);
        }
        let last = if has(INCOMPAT_FAST_COMMIT) {
            let fast = if word(0x54) == 0 { DEFAULT_FAST_COMMIT_BLOCKS } else { word(0x54) };
            length.checked_sub(fast).filter(|ring| *ring >= MIN_RING_BLOCKS).unwrap_or(length)
        } else {
            length
        };
        if first == 0 || first >= last || (start != 0 && !(first..last).contains(&start)) {
            return Err(damaged(format!("a log from {first} to {last} that starts at {start}")));
        }
        let mut uuid = [0u8; 16];
        uuid.copy_from_slice(bytes.get(0x30..0x40).unwrap_or(&[0; 16]));
        Ok(Self { first, last, start, sequence: word(0x18), wide: has(INCOMPAT_64BIT), checksums, uuid })
    }
}
