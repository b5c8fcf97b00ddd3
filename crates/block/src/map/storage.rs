//! What the map and the volume's cold paths need from a file, so that a simulated disk can stand in for it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek};

/// A random-access file with explicit durability. All calls block.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Fills all of `buffer` from `offset`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Stores all of `bytes` at `offset`; durable after the next [`sync`](Self::sync).
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes everything written before durable (`fdatasync`).
    fn sync(&self) -> io::Result<()>;
    /// Where the first byte at or after `offset` stands that is not in a hole (or the first that may be); `None` = nowhere.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;
    /// Bytes in the file.
    fn length(&self) -> io::Result<u64>;
    /// Extends (with zeros) or cuts the file.
    fn set_length(&self, bytes: u64) -> io::Result<()>;
}

impl Storage for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        // Moves the descriptor's own position, which nobody uses.
        match lseek(self, offset.cast_signed(), Whence::SeekData) {
            Ok(found) => Ok(Some(found.cast_unsigned())),
            Err(nix::Error::ENXIO) => Ok(None),
            Err(nix::Error::EINVAL) => Ok(Some(offset)),
            Err(errno) => Err(errno.into()),
        }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_length(&self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)
    }
}
