//! Replay of an ext4 journal without writing: a guest that lost its power leaves its newest metadata there.
//!
//! [`replayed`] reads the log of JBD2 (ext3's and ext4's journal) and gives a view of the file system in which every block
//! that the log holds is served from its place in the journal, and the flag "needs recovery" is gone. The disk itself is
//! never written; the guest's own kernel replays the same log when it mounts its root.
//!
//! Format: the kernel's `Documentation/filesystems/ext4/journal.rst`; the order of things: `fs/jbd2/recovery.c`. All
//! forms that Linux has written are read: superblocks of version 1 and 2, 32-bit and 64-bit block numbers, no checksums, one
//! checksum per transaction (`COMPAT_CHECKSUM`), `CSUM_V2`, `CSUM_V3`; the journal's inode may have extents or a block map.
//!
//! - The log ends at the first block that is not a valid next one. A transaction without valid commit block, or with a wrong
//!   checksum anywhere, is left out with all that follows it. Where the kernel refuses to mount because a *committed*
//!   transaction is damaged, discovery goes on with what came before: the guest's initrd is what repairs such a file system.
//! - The area of fast commits (`FAST_COMMIT`) at the journal's end is not part of the ring and is ignored. What is seen is
//!   then the file system at its last full commit (by default at most 5 s before the cut).
//! - Not handled, each with an error of its own: a journal on another device, asynchronous commits without any
//!   checksum, features that are not known.

mod checksum;
mod error;
mod log;
mod mapping;
mod overlay;
mod superblock;
mod volume;

use std::sync::Arc;

pub use error::JournalError;

use self::overlay::Overlay;
use self::superblock::JournalSuperblock;
use self::volume::Volume;
use super::read_at::{ReadAt, Window};

/// The file system in `disk` as it is after the replay of its journal; `disk` itself where nothing is to be replayed.
///
/// Reads the log once, at most [`log::MAX_LOG_BYTES`] of it, and keeps some 30 bytes of memory for each block that it holds; however
/// hostile the log, less than 100 MiB.
///
/// # Errors
/// [`JournalError`] when there is something to replay and it cannot be.
pub fn replayed(disk: Window) -> Result<Arc<dyn ReadAt>, JournalError> {
    let Some(volume) = Volume::needing_recovery(&disk)? else { return Ok(Arc::new(disk)) };
    let file = mapping::journal_file(&disk, &volume)?;
    let mut log = log::Log::new(&disk, &volume, &file);
    let superblock = JournalSuperblock::parse(log.block(0)?, volume.block_size, file.blocks)?;
    let found = log.scan(&superblock)?;
    tracing::debug!(
        transactions = found.transactions,
        blocks = found.copies.len(),
        end = found.end,
        "replaying a journal for boot discovery"
    );
    Ok(Arc::new(Overlay::new(disk, volume.block_size, found.copies)?))
}

#[cfg(test)]
pub(in crate::boot) mod tests;
