//! Where the blocks of the journal's file lie: its inode, with extents or with a block map.

use super::error::JournalError;
use super::volume::Volume;
use crate::boot::read_at::{ReadAt, le_u16, le_u32};

/// Most pieces of a journal. They are contiguous as a rule; one made later in a full file system may have some thousand.
const MAX_RUNS: usize = 1 << 17;
/// Most blocks of an extent tree or block map.
const MAX_MAP_BLOCKS: u32 = 1 << 15;
/// Deepest extent tree that ext4 makes.
const MAX_DEPTH: u16 = 5;

/// Of an inode: all that is needed here.
const INODE_BYTES: u64 = 128;
const EXTENT_MAGIC: u16 = 0xf30a;
/// Longest extent; more means that it was never written.
const MAX_EXTENT: u16 = 32768;
/// Of an inode's i_block.
const DIRECT_BLOCKS: u64 = 12;

const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;
const MODE_KIND: u16 = 0xf000;
const MODE_REGULAR: u16 = 0x8000;

/// Blocks of the file that follow each other on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    logical: u64,
    physical: u64,
    length: u64,
}

/// The journal's file.
#[derive(Debug)]
pub struct JournalFile {
    /// Its size in whole blocks.
    pub blocks: u64,
    /// In ascending order, without overlaps.
    runs: Vec<Run>,
}

impl JournalFile {
    /// A file of so many blocks whose first one is block `physical` of the disk.
    #[cfg(test)]
    pub fn contiguous(physical: u64, blocks: u64) -> Self {
        Self { blocks, runs: vec![Run { logical: 0, physical, length: blocks }] }
    }

    /// Where a block of the file lies; `None` for a hole.
    pub fn physical(&self, logical: u64) -> Option<u64> {
        let after = self.runs.partition_point(|run| run.logical <= logical);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let inside = logical - run.logical;
        (inside < run.length).then(|| run.physical + inside)
    }
}

/// Finds the journal's inode and where its blocks lie.
pub fn journal_file(disk: &dyn ReadAt, volume: &Volume) -> Result<JournalFile, JournalError> {
    let inode = read(disk, volume, "the journal's inode", inode_place(disk, volume)?, INODE_BYTES)?;
    let half = |offset| le_u16(&inode, offset).unwrap_or_default();
    let word = |offset| le_u32(&inode, offset).unwrap_or_default();
    let damaged = |what: &str| JournalError::Damaged(format!("inode {}: {what}", volume.journal_inode));
    if half(0) & MODE_KIND != MODE_REGULAR || half(0x1a) == 0 {
        return Err(damaged("no regular file"));
    }
    let size = u64::from(word(0x6c)) << 32 | u64::from(word(0x4));
    let mut mapper = Mapper { disk, volume, runs: Vec::new(), blocks_read: 0, limit: size / volume.block_size };
    let root = inode.get(0x28..0x28 + 60).ok_or_else(|| damaged("too short"))?;
    let flags = word(0x20);
    if flags & FLAG_INLINE_DATA != 0 {
        return Err(damaged("its data is in the inode"));
    }
    if flags & FLAG_EXTENTS != 0 {
        let depth = le_u16(root, 6).unwrap_or_default();
        if depth > MAX_DEPTH {
            return Err(damaged("an extent tree that is too deep"));
        }
        mapper.extents(root, depth)?;
    } else {
        mapper.block_map(root)?;
    }
    Ok(JournalFile { blocks: mapper.limit, runs: mapper.runs })
}

/// At which byte the journal's inode begins.
pub fn inode_place(disk: &dyn ReadAt, volume: &Volume) -> Result<u64, JournalError> {
    let index = u64::from(volume.journal_inode.saturating_sub(1));
    let (group, index) = (index / u64::from(volume.inodes_per_group), index % u64::from(volume.inodes_per_group));
    // The group descriptors begin with the block after the super block's.
    let table = (1024 / volume.block_size + 1) * volume.block_size;
    let at = table + group * volume.descriptor_size;
    let descriptor = read(disk, volume, "the group descriptor of the journal", at, volume.descriptor_size)?;
    // Absent from descriptors of 32 bytes, hence zero.
    let high = le_u32(&descriptor, 0x28).unwrap_or_default();
    let inodes = u64::from(high) << 32 | u64::from(le_u32(&descriptor, 0x8).unwrap_or_default());
    if inodes == 0 || inodes >= volume.blocks {
        return Err(JournalError::Filesystem(format!("the inode table at block {inodes}")));
    }
    Ok(inodes * volume.block_size + index * volume.inode_size)
}

/// At most a block.
fn read(
    disk: &dyn ReadAt,
    volume: &Volume,
    what: &'static str,
    offset: u64,
    length: u64,
) -> Result<Vec<u8>, JournalError> {
    let mut bytes = vec![0u8; usize::try_from(length.min(volume.block_size)).unwrap_or_default()];
    let block = offset / volume.block_size;
    disk.read_exact_at(&mut bytes, offset).map_err(|source| JournalError::Read { what, block, source })?;
    Ok(bytes)
}

struct Mapper<'a> {
    disk: &'a dyn ReadAt,
    volume: &'a Volume,
    runs: Vec<Run>,
    blocks_read: u32,
    /// Blocks of the file; what is mapped behind them is of no interest.
    limit: u64,
}

impl Mapper<'_> {
    fn damaged(&self, what: &str) -> JournalError {
        JournalError::Damaged(format!("inode {}: {what}", self.volume.journal_inode))
    }

    /// One block of the map itself.
    fn read(&mut self, block: u64) -> Result<Vec<u8>, JournalError> {
        self.blocks_read += 1;
        if self.blocks_read > MAX_MAP_BLOCKS {
            return Err(JournalError::TooLarge { what: "blocks of its map", limit: MAX_MAP_BLOCKS.into() });
        }
        if block == 0 || block >= self.volume.blocks {
            return Err(self.damaged("a map outside the file system"));
        }
        let (size, offset) = (self.volume.block_size, block * self.volume.block_size);
        read(self.disk, self.volume, "the journal's block map", offset, size)
    }

    /// Appends a run; they come in ascending order.
    fn add(&mut self, run: Run) -> Result<(), JournalError> {
        let end = run.physical.checked_add(run.length);
        if run.physical == 0 || end.is_none_or(|end| end > self.volume.blocks) {
            return Err(self.damaged("blocks outside the file system"));
        }
        if let Some(last) = self.runs.last_mut() {
            if run.logical < last.logical + last.length {
                return Err(self.damaged("extents out of order"));
            }
            if run.logical == last.logical + last.length && run.physical == last.physical + last.length {
                last.length += run.length;
                return Ok(());
            }
        }
        if self.runs.len() >= MAX_RUNS {
            return Err(JournalError::TooLarge { what: "pieces", limit: MAX_RUNS as u64 });
        }
        self.runs.push(run);
        Ok(())
    }

    /// A node of the extent tree. Its depth must be one less than its parent's, so that the walk ends.
    fn extents(&mut self, node: &[u8], depth: u16) -> Result<(), JournalError> {
        let half = |offset| le_u16(node, offset);
        let count = half(2).unwrap_or_default();
        if half(0) != Some(EXTENT_MAGIC) || half(6) != Some(depth) {
            return Err(self.damaged("no extent tree"));
        }
        for index in 0..usize::from(count) {
            let entry = node.get(12 + 12 * index..24 + 12 * index);
            let entry = entry.ok_or_else(|| self.damaged("more extents than fit"))?;
            let logical = u64::from(le_u32(entry, 0).unwrap_or_default());
            if depth > 0 {
                let high = le_u16(entry, 8).unwrap_or_default();
                let child = u64::from(high) << 32 | u64::from(le_u32(entry, 4).unwrap_or_default());
                let child = self.read(child)?;
                self.extents(&child, depth - 1)?;
                continue;
            }
            let length = le_u16(entry, 4).unwrap_or_default();
            let high = le_u16(entry, 6).unwrap_or_default();
            let physical = u64::from(high) << 32 | u64::from(le_u32(entry, 8).unwrap_or_default());
            // Extents that were never written hold no log: a hole.
            if (1..=MAX_EXTENT).contains(&length) {
                self.add(Run { logical, physical, length: length.into() })?;
            }
        }
        Ok(())
    }

    /// The twelve direct blocks and the three trees of an ext2 or ext3 inode.
    fn block_map(&mut self, root: &[u8]) -> Result<(), JournalError> {
        let per_block = self.volume.block_size / 4;
        let mut logical = 0;
        for (index, pointer) in (0u64..15).zip(root.chunks_exact(4)) {
            let level = index.saturating_sub(DIRECT_BLOCKS - 1) as u32;
            let pointer = le_u32(pointer, 0).unwrap_or_default();
            self.indirect(pointer, level, logical)?;
            logical += per_block.pow(level);
            if logical >= self.limit {
                break;
            }
        }
        Ok(())
    }

    fn indirect(&mut self, pointer: u32, level: u32, logical: u64) -> Result<(), JournalError> {
        if pointer == 0 || logical >= self.limit {
            return Ok(());
        }
        let Some(below) = level.checked_sub(1) else {
            return self.add(Run { logical, physical: pointer.into(), length: 1 });
        };
        let block = self.read(pointer.into())?;
        let each = (self.volume.block_size / 4).pow(below);
        for (index, pointer) in (0u64..).zip(block.chunks_exact(4)) {
            self.indirect(le_u32(pointer, 0).unwrap_or_default(), below, logical + index * each)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "mapping_test.rs"]
mod tests;
