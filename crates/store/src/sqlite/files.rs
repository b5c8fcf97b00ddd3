//! How the store's files come into being: whole, durable, readable by their owner only.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Builds a file under a provisional name with `build`, and gives it its name when it is whole and
/// durable. A crash leaves nothing under the final name.
pub(super) fn build<T>(target: &Path, build: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    if exists(target)? {
        let detail = "it exists already".to_owned();
        return Err(Error::Io { action: "cannot write", path: target.to_owned(), detail });
    }
    let partial = with_suffix(target, ".partial");
    let result = build_partial(&partial, target, build);
    if result.is_err() {
        // Best effort: the error that is returned says more than a failed clean-up.
        drop(std::fs::remove_file(&partial));
    }
    result
}

fn build_partial<T>(partial: &Path, target: &Path, build: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    remove(partial)?;
    // The mode is set before there is content. SQLite gives its side files the same.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(partial)
        .map_err(|e| Error::io("cannot create", partial, &e))?;
    let built = build(partial)?;
    File::open(partial)
        .and_then(|file| file.sync_all())
        .and_then(|()| std::fs::rename(partial, target))
        .map_err(|e| Error::io("cannot finish", target, &e))?;
    sync_directory(target)?;
    Ok(built)
}

/// Refuses to make a store where the write-ahead log of a lost one lies: SQLite would replay it into
/// the new file.
pub(super) fn refuse_orphaned_log(target: &Path) -> Result<()> {
    let log = with_suffix(target, "-wal");
    if size(&log)?.is_some_and(|size| size > 0) {
        return Err(Error::NotAStore {
            path: target.to_owned(),
            reason: format!(
                "it is missing, but its write-ahead log {} is there: put the store's file back, or remove the log",
                log.display()
            ),
        });
    }
    Ok(())
}

/// Size of a file in bytes; `None` when there is none.
pub(super) fn size(path: &Path) -> Result<Option<u64>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("cannot look for", path, &e)),
    }
}

/// Whether something has this name.
pub(super) fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|e| Error::io("cannot look for", path, &e))
}

/// `path` with `suffix` appended to its last component.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Removes a file that may be missing.
pub(super) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot remove", path, &e)),
        _ => Ok(()),
    }
}

/// Renames a file that may be missing.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    match std::fs::rename(from, to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot rename", from, &e)),
        _ => Ok(()),
    }
}

/// Makes a renamed file's directory entry durable.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    File::open(&parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| Error::io("cannot sync directory", parent, &e))
}
