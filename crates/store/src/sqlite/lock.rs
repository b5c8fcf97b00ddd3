//! The lock that keeps a second process away from an open store.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::files;
use crate::error::{Error, Result};

/// An exclusive `flock(2)` on `<store>.lock`, held until dropped; the kernel drops it with the process.
///
/// The lock has a file of its own because closing any descriptor of the database file would drop
/// SQLite's POSIX locks on it (<https://sqlite.org/howtocorrupt.html>, section 2.2). The file stays
/// when the store closes: removing it would let two processes lock two different files.
#[derive(Debug)]
pub(super) struct StoreLock {
    _file: File,
}

impl StoreLock {
    /// Takes the lock of the store at `path`, or tells who has it.
    pub(super) fn take(path: &Path) -> Result<Self> {
        let lock_path = files::with_suffix(path, ".lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|e| Error::io("cannot open lock file", &lock_path, &e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::InUse { path: path.to_owned(), pid: read_pid(&mut file) });
            }
            Err(TryLockError::Error(e)) => return Err(Error::io("cannot lock", &lock_path, &e)),
        }
        write_pid(&mut file).map_err(|e| Error::io("cannot write lock file", &lock_path, &e))?;
        Ok(Self { _file: file })
    }
}

fn write_pid(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    writeln!(file, "{}", std::process::id())
}

/// The holder's process id; `None` while it is just being written.
fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
