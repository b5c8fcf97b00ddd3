//! The log: transactions of descriptor blocks with the data they describe, revocations, and a commit block each.

use std::collections::BTreeMap;

use super::checksum::{Sum, crc32_be, crc32c, without_field};
use super::error::JournalError;
use super::mapping::JournalFile;
use super::superblock::{Checksums, JournalSuperblock, MAGIC, be_u32};
use super::volume::Volume;
use crate::boot::read_at::ReadAt;

/// Most bytes of log that are followed: mke2fs makes at most 1 GiB unless told otherwise.
pub const MAX_LOG_BYTES: u64 = 4 << 30;
/// Most blocks that are served from the log.
const MAX_COPIES: usize = 1 << 20;
/// Most revocations of one transaction.
const MAX_REVOKED: usize = 1 << 20;

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;

const HEADER_BYTES: usize = 12;
const REVOKE_HEADER_BYTES: usize = 16;
/// The checksum at the end of descriptor and revocation blocks.
const TAIL_BYTES: usize = 4;
/// struct commit_header; what follows it in its block is zero.
const COMMIT_HEADER_BYTES: usize = 64;
/// h_chksum of a commit block.
const COMMIT_CHECKSUM_FIELD: usize = 16;
/// h_chksum_type and h_chksum_size of a CRC32.
const TRANSACTION_CRC32: [u8; 2] = [1, 4];
const UUID_BYTES: usize = 16;

// Flags of tags. There is also 4, "deleted", which nothing has ever set; as in jbd2, it changes nothing.
const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;

/// Where the newer content of a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// Block of the file system, inside the journal.
    pub place: u64,
    /// Its first four bytes were the journal's magic number and are zero in the log.
    pub escaped: bool,
}

/// What a log holds.
#[derive(Debug)]
pub struct Found {
    /// Blocks of the file system and where their content is.
    pub copies: BTreeMap<u64, Logged>,
    /// Whole transactions.
    pub transactions: u32,
    /// Why the log ends where it does.
    pub end: &'static str,
}

/// A data block that a descriptor block announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tag {
    /// Where it belongs.
    target: u64,
    flags: u32,
    /// As far as the log has it: 16 bits for version 2, else 32.
    checksum: u32,
}

/// Reads the blocks of a journal.
pub struct Log<'a> {
    disk: &'a dyn ReadAt,
    volume: &'a Volume,
    file: &'a JournalFile,
    buffer: Vec<u8>,
}

/// A transaction that is not committed yet.
struct Open {
    copies: Vec<(u64, Logged)>,
    revoked: Vec<u64>,
    /// Over descriptors and data, for [`Checksums::Transaction`].
    sum: Sum,
}

/// Goes around the ring.
struct Ring {
    next: u32,
    first: u32,
    last: u32,
    left: u32,
}

impl Ring {
    /// The next block; `None` when all were seen.
    fn step(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        let block = self.next;
        self.next = if block + 1 >= self.last { self.first } else { block + 1 };
        Some(block.into())
    }
}

impl<'a> Log<'a> {
    /// Of the journal `file`.
    pub fn new(disk: &'a dyn ReadAt, volume: &'a Volume, file: &'a JournalFile) -> Self {
        let block_size = usize::try_from(volume.block_size).unwrap_or_default();
        Self { disk, volume, file, buffer: vec![0; block_size] }
    }

    fn place(&self, block: u64) -> Result<u64, JournalError> {
        let unmapped = || JournalError::Damaged(format!("block {block} of it is nowhere"));
        self.file.physical(block).ok_or_else(unmapped)
    }

    /// Reads a block of the journal.
    pub fn block(&mut self, block: u64) -> Result<&[u8], JournalError> {
        let place = self.place(block)?;
        self.disk
            .read_exact_at(&mut self.buffer, place * self.volume.block_size)
            .map_err(|source| JournalError::Read { what: "the journal", block: place, source })?;
        Ok(&self.buffer)
    }

    /// Follows the log from its start to its end.
    pub fn scan(&mut self, superblock: &JournalSuperblock) -> Result<Found, JournalError> {
        let mut found = Found { copies: BTreeMap::new(), transactions: 0, end: "it is empty" };
        if superblock.start == 0 {
            return Ok(found);
        }
        let mut ring = Ring {
            next: superblock.start,
            first: superblock.first,
            last: superblock.last,
            left: superblock.last - superblock.first,
        };
        let most = MAX_LOG_BYTES / self.volume.block_size;
        let mut sequence = superblock.sequence;
        let mut seed = crc32c();
        seed.update(&superblock.uuid);
        let rules = Rules { superblock, seed };
        let mut open = Open::new();
        found.end = loop {
            let Some(at) = ring.step() else { break "the ring is full" };
            if u64::from(superblock.last - superblock.first - ring.left) > most {
                return Err(JournalError::TooLarge { what: "bytes of log", limit: MAX_LOG_BYTES });
            }
            let block = self.block(at)?.to_vec();
            if be_u32(&block, 0) != Some(MAGIC) {
                break "no block of the log";
            }
            if be_u32(&block, 8) != Some(sequence) {
                break "another transaction";
            }
            match be_u32(&block, 4) {
                Some(DESCRIPTOR) => {
                    if !rules.tail_is_right(&block) {
                        break "wrong checksum of a descriptor block";
                    }
                    open.sum.update(&block);
                    if let Some(end) = self.data(&rules, &block, sequence, &mut ring, &mut open)? {
                        break end;
                    }
                }
                Some(REVOKE) => {
                    if !rules.tail_is_right(&block) {
                        break "wrong checksum of a revocation block";
                    }
                    if !rules.revocations(&block, &mut open.revoked)? {
                        break "a revocation block that is too long";
                    }
                }
                Some(COMMIT) => {
                    if !rules.commit_is_right(&block, &open.sum) {
                        break "wrong checksum of a commit block";
                    }
                    std::mem::replace(&mut open, Open::new()).commit(&mut found.copies)?;
                    found.transactions += 1;
                    sequence = sequence.wrapping_add(1);
                }
                _ => break "a block of unknown kind",
            }
        };
        Ok(found)
    }

    /// The data behind a descriptor block; `Some` when the log ends there.
    fn data(
        &mut self,
        rules: &Rules<'_>,
        descriptor: &[u8],
        sequence: u32,
        ring: &mut Ring,
        open: &mut Open,
    ) -> Result<Option<&'static str>, JournalError> {
        for tag in rules.tags(descriptor) {
            let Some(at) = ring.step() else { return Ok(Some("the ring is full")) };
            if rules.superblock.checksums != Checksums::None {
                let data = self.block(at)?;
                if !rules.data_is_right(data, sequence, tag) {
                    return Ok(Some("wrong checksum of a data block"));
                }
                open.sum.update(data);
            }
            if open.copies.len() >= MAX_COPIES {
                return Err(JournalError::TooLarge { what: "blocks of a transaction", limit: MAX_COPIES as u64 });
            }
            let copy = Logged { place: self.place(at)?, escaped: tag.flags & TAG_ESCAPED != 0 };
            open.copies.push((tag.target, copy));
        }
        Ok(None)
    }
}

impl Open {
    fn new() -> Self {
        Self { copies: Vec::new(), revoked: Vec::new(), sum: crc32_be() }
    }

    /// A revocation holds for its own transaction and those before it, so that it comes last.
    fn commit(self, copies: &mut BTreeMap<u64, Logged>) -> Result<(), JournalError> {
        copies.extend(self.copies);
        for block in &self.revoked {
            copies.remove(block);
        }
        if copies.len() > MAX_COPIES {
            return Err(JournalError::TooLarge { what: "blocks to replay", limit: MAX_COPIES as u64 });
        }
        Ok(())
    }
}

/// How this log's blocks are to be read.
struct Rules<'a> {
    superblock: &'a JournalSuperblock,
    /// Over the journal's UUID.
    seed: Sum,
}

impl Rules<'_> {
    fn each_block(&self) -> bool {
        matches!(self.superblock.checksums, Checksums::V2 | Checksums::V3)
    }

    fn tail_bytes(&self) -> usize {
        if self.each_block() { TAIL_BYTES } else { 0 }
    }

    /// The checksum in the last four bytes of descriptor and revocation blocks.
    fn tail_is_right(&self, block: &[u8]) -> bool {
        let field = block.len().saturating_sub(TAIL_BYTES);
        !self.each_block() || be_u32(block, field) == Some(without_field(self.seed.clone(), block, field))
    }

    fn data_is_right(&self, data: &[u8], sequence: u32, tag: Tag) -> bool {
        let mut sum = self.seed.clone();
        sum.update(&sequence.to_be_bytes());
        sum.update(data);
        match self.superblock.checksums {
            Checksums::None | Checksums::Transaction => true,
            Checksums::V2 => sum.finalize() & 0xffff == tag.checksum,
            Checksums::V3 => sum.finalize() == tag.checksum,
        }
    }

    fn commit_is_right(&self, block: &[u8], transaction: &Sum) -> bool {
        let there = be_u32(block, COMMIT_CHECKSUM_FIELD).unwrap_or_default();
        match self.superblock.checksums {
            Checksums::None => true,
            Checksums::Transaction => {
                let kind = block.get(HEADER_BYTES..HEADER_BYTES + 2).unwrap_or_default();
                let unused = kind == [0, 0] && there == 0;
                unused || (kind == TRANSACTION_CRC32 && there == transaction.clone().finalize())
            }
            Checksums::V2 | Checksums::V3 => {
                // A disk writes sectors: the header may be there and the rest of its block still be something older.
                let mut torn = vec![0u8; block.len()];
                if let (Some(to), Some(from)) = (torn.get_mut(..COMMIT_HEADER_BYTES), block.get(..COMMIT_HEADER_BYTES))
                {
                    to.copy_from_slice(from);
                }
                let right = |block: &[u8]| without_field(self.seed.clone(), block, COMMIT_CHECKSUM_FIELD) == there;
                right(block) || right(&torn)
            }
        }
    }

    /// The blocks that a revocation block names; `false` when it claims more than fit.
    fn revocations(&self, block: &[u8], revoked: &mut Vec<u64>) -> Result<bool, JournalError> {
        let used = be_u32(block, HEADER_BYTES).and_then(|used| usize::try_from(used).ok()).unwrap_or(usize::MAX);
        if used > block.len().saturating_sub(self.tail_bytes()) {
            return Ok(false);
        }
        let width = if self.superblock.wide { 8 } else { 4 };
        for record in block.get(REVOKE_HEADER_BYTES..used).unwrap_or_default().chunks_exact(width) {
            if revoked.len() >= MAX_REVOKED {
                return Err(JournalError::TooLarge { what: "revocations", limit: MAX_REVOKED as u64 });
            }
            revoked.push(record.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
        }
        Ok(true)
    }

    /// The tags of a descriptor block, up to its last one or as many as fit.
    fn tags<'b>(&'b self, descriptor: &'b [u8]) -> impl Iterator<Item = Tag> + 'b {
        let end = descriptor.len().saturating_sub(self.tail_bytes());
        let mut at = Some(HEADER_BYTES);
        std::iter::from_fn(move || {
            let bytes = descriptor.get(at?..at?.checked_add(self.tag_bytes())?.min(end))?;
            let tag = self.tag(bytes)?;
            let uuid = if tag.flags & TAG_SAME_UUID == 0 { UUID_BYTES } else { 0 };
            let after = at? + self.tag_bytes() + uuid;
            at = (tag.flags & TAG_LAST == 0).then_some(after);
            Some(tag)
        })
    }

    /// Version 2 takes two bytes more than its fields: so the kernel has always written it.
    fn tag_bytes(&self) -> usize {
        match (self.superblock.checksums, self.superblock.wide) {
            (Checksums::V3, _) => 16,
            (Checksums::V2, true) => 14,
            (Checksums::V2, false) => 10,
            (_, true) => 12,
            (_, false) => 8,
        }
    }

    /// `None` when the bytes are too few.
    fn tag(&self, bytes: &[u8]) -> Option<Tag> {
        if bytes.len() < self.tag_bytes() {
            return None;
        }
        let low = be_u32(bytes, 0)?;
        // Version 3: flags of 32 bits at 4. Else: a checksum of 16 bits at 4, flags of 16 bits at 6.
        let second = be_u32(bytes, 4)?;
        let (flags, checksum) = match self.superblock.checksums {
            Checksums::V3 => (second, be_u32(bytes, 12)?),
            _ => (second & 0xffff, second >> 16),
        };
        let high = if self.superblock.wide { be_u32(bytes, 8)? } else { 0 };
        Some(Tag { target: u64::from(high) << 32 | u64::from(low), flags, checksum })
    }
}

#[cfg(test)]
#[path = "log_test.rs"]
mod tests;
