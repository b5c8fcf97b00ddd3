//! What the super block of the file system says about its journal.

use super::checksum::crc32c;
use super::error::JournalError;
use crate::boot::read_at::{ReadAt, le_u16, le_u32};

/// Byte of the file system at which the super block begins.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Its size.
pub const SUPERBLOCK_BYTES: usize = 1024;

const CHECKSUM_FIELD: usize = 0x3fc;
const INCOMPAT_FIELD: usize = 0x60;
const RO_COMPAT_FIELD: usize = 0x64;
/// 64 KiB.
const MAX_LOG_BLOCK_SIZE: u32 = 6;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_64BIT: u32 = 0x80;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;

/// The super block's fields that lead to the journal. All counts are as the disk says, unless noted.
#[derive(Clone, Copy, Debug)]
pub struct Volume {
    /// Bytes of a block: 1 KiB to 64 KiB, a power of two.
    pub block_size: u64,
    /// Blocks, not more than the disk has.
    pub blocks: u64,
    /// Inodes of each group, at least one.
    pub inodes_per_group: u32,
    /// Bytes of an inode: 128 to a block.
    pub inode_size: u64,
    /// Bytes of a group descriptor: 32 or more.
    pub descriptor_size: u64,
    /// The journal's inode, not zero.
    pub journal_inode: u32,
}

/// The super block as it is on the disk.
pub fn read_superblock(disk: &dyn ReadAt) -> Result<[u8; SUPERBLOCK_BYTES], JournalError> {
    let mut bytes = [0u8; SUPERBLOCK_BYTES];
    disk.read_exact_at(&mut bytes, SUPERBLOCK_OFFSET).map_err(|source| JournalError::Read {
        what: "the super block",
        block: 0,
        source,
    })?;
    Ok(bytes)
}

fn field(bytes: &[u8], offset: usize) -> u32 {
    le_u32(bytes, offset).unwrap_or_default()
}

/// The checksum that a super block should have; `None` when it has none.
fn expected_checksum(superblock: &[u8; SUPERBLOCK_BYTES]) -> Option<u32> {
    let covered = superblock.get(..CHECKSUM_FIELD)?;
    (field(superblock, RO_COMPAT_FIELD) & RO_COMPAT_METADATA_CSUM != 0).then(|| {
        let mut sum = crc32c();
        sum.update(covered);
        sum.finalize()
    })
}

fn checksum_is_right(superblock: &[u8; SUPERBLOCK_BYTES]) -> bool {
    expected_checksum(superblock).is_none_or(|sum| sum == field(superblock, CHECKSUM_FIELD))
}

/// Says in a super block that nothing is left to recover. A wrong checksum stays wrong: damage is not to be hidden.
pub fn clear_recovery(superblock: &mut [u8; SUPERBLOCK_BYTES]) {
    let was_right = checksum_is_right(superblock);
    let incompat = field(superblock, INCOMPAT_FIELD) & !INCOMPAT_RECOVER;
    put(superblock, INCOMPAT_FIELD, incompat);
    if let Some(sum) = expected_checksum(superblock) {
        put(superblock, CHECKSUM_FIELD, if was_right { sum } else { !sum });
    }
}

fn put(superblock: &mut [u8; SUPERBLOCK_BYTES], offset: usize, value: u32) {
    if let Some(place) = superblock.get_mut(offset..offset + 4) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

impl Volume {
    /// The file system in `disk` if its journal has to be replayed. `None` also for a super block whose checksum is wrong: who
    /// opens the file system tells that best.
    pub fn needing_recovery(disk: &dyn ReadAt) -> Result<Option<Self>, JournalError> {
        let superblock = read_superblock(disk)?;
        let (compat, incompat) = (field(&superblock, 0x5c), field(&superblock, INCOMPAT_FIELD));
        let needed = compat & COMPAT_HAS_JOURNAL != 0 && incompat & INCOMPAT_RECOVER != 0;
        if !needed || !checksum_is_right(&superblock) {
            return Ok(None);
        }
        let damaged = |what: &str, value: u64| JournalError::Filesystem(format!("{what} {value}"));
        let journal_inode = field(&superblock, 0xe0);
        if journal_inode == 0 {
            return Err(if field(&superblock, 0xe4) != 0 {
                JournalError::External
            } else {
                damaged("journal inode", 0)
            });
        }
        let log_size = field(&superblock, 0x18);
        let block_size = 1024u64 << log_size.min(MAX_LOG_BLOCK_SIZE);
        if log_size > MAX_LOG_BLOCK_SIZE {
            return Err(damaged("log block size", log_size.into()));
        }
        let wide = incompat & INCOMPAT_64BIT != 0;
        let blocks_high = if wide { field(&superblock, 0x150) } else { 0 };
        let blocks = u64::from(blocks_high) << 32 | u64::from(field(&superblock, 0x4));
        let inodes_per_group = field(&superblock, 0x28);
        if inodes_per_group == 0 {
            return Err(damaged("inodes per group", 0));
        }
        // Revision 0 has neither inode sizes nor a field for them.
        let inode_size = if field(&superblock, 0x4c) == 0 { 128 } else { half(&superblock, 0x58) };
        if !(128..=block_size).contains(&inode_size) {
            return Err(damaged("inode size", inode_size));
        }
        let descriptor_size = if wide { half(&superblock, 0xfe) } else { 32 };
        if !(32..=block_size).contains(&descriptor_size) {
            return Err(damaged("group descriptor size", descriptor_size));
        }
        let blocks = blocks.min(disk.size() / block_size);
        Ok(Some(Self { block_size, blocks, inodes_per_group, inode_size, descriptor_size, journal_inode }))
    }
}

fn half(bytes: &[u8], offset: usize) -> u64 {
    le_u16(bytes, offset).unwrap_or_default().into()
}
