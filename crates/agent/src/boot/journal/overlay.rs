//! The file system as it is after the replay.

use std::collections::BTreeMap;
use std::io;

use super::error::JournalError;
use super::log::Logged;
use super::superblock::MAGIC;
use super::volume::{SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET, clear_recovery, read_superblock};
use crate::boot::read_at::{ReadAt, Window};

/// A file system whose replayed blocks are read from the journal.
pub struct Overlay {
    disk: Window,
    block_size: u64,
    copies: BTreeMap<u64, Logged>,
    /// The super block without "needs recovery".
    superblock: Option<[u8; SUPERBLOCK_BYTES]>,
}

impl Overlay {
    /// `copies` tells for blocks of the file system where in it their newer content lies.
    pub fn new(disk: Window, block_size: u64, copies: BTreeMap<u64, Logged>) -> Result<Self, JournalError> {
        let mut overlay = Self { disk, block_size, copies, superblock: None };
        // The log may hold the super block too.
        let mut superblock = read_superblock(&overlay)?;
        clear_recovery(&mut superblock);
        overlay.superblock = Some(superblock);
        Ok(overlay)
    }

    /// Fills what `buffer`, at `offset`, has of the block.
    fn replace(&self, buffer: &mut [u8], offset: u64, block: u64, copy: Logged) -> io::Result<()> {
        let begin = block * self.block_size;
        let Some((part, skip)) = overlap(buffer, offset, begin, self.block_size) else { return Ok(()) };
        self.disk.read_exact_at(part, copy.place * self.block_size + skip)?;
        if copy.escaped {
            put(part, skip, 0, &MAGIC.to_be_bytes());
        }
        Ok(())
    }
}

/// The part of `buffer` (which is at `offset`) that lies in `begin..begin + length`, and how far in there it begins.
fn overlap(buffer: &mut [u8], offset: u64, begin: u64, length: u64) -> Option<(&mut [u8], u64)> {
    let from = begin.max(offset);
    let to = begin.checked_add(length)?.min(offset.checked_add(buffer.len() as u64)?);
    let range = usize::try_from(from.checked_sub(offset)?).ok()?..usize::try_from(to.checked_sub(offset)?).ok()?;
    Some((buffer.get_mut(range).filter(|part| !part.is_empty())?, from - begin))
}

/// Writes the part of `content` (which is at `begin`) that `buffer` (at `offset`) covers.
fn put(buffer: &mut [u8], offset: u64, begin: u64, content: &[u8]) {
    if let Some((part, skip)) = overlap(buffer, offset, begin, content.len() as u64) {
        let source = usize::try_from(skip).ok().and_then(|skip| content.get(skip..skip + part.len()));
        if let Some(source) = source {
            part.copy_from_slice(source);
        }
    }
}

impl ReadAt for Overlay {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_exact_at(buffer, offset)?;
        let Some(last) = (buffer.len() as u64).checked_sub(1).and_then(|length| offset.checked_add(length)) else {
            return Ok(());
        };
        for (block, copy) in self.copies.range(offset / self.block_size..=last / self.block_size) {
            self.replace(buffer, offset, *block, *copy)?;
        }
        if let Some(superblock) = &self.superblock {
            put(buffer, offset, SUPERBLOCK_OFFSET, superblock);
        }
        Ok(())
    }
}
