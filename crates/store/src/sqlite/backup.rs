//! Copies of a store, and how one becomes a store again.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::lock::StoreLock;
use super::schema;
use crate::error::{Error, Result};
use crate::model::Revision;

/// How far a restored store jumps ahead. More revisions than any store writes between two backups,
/// and far below what the counter holds.
const RESTORE_JUMP: Revision = 1_000_000_000;

/// Writes a consistent copy of the store at `source` to `target` while it is in use, and returns
/// the copy's revision. The copy appears under its name only when it is whole and durable.
pub(super) fn write(source: &Path, target: &Path) -> Result<Revision> {
    refuse_existing(target)?;
    let partial = partial_path(target);
    let result = write_partial(source, &partial).and_then(|revision| {
        publish(&partial, target)?;
        Ok(revision)
    });
    if result.is_err() {
        // Best effort: the error that is returned says more than a failed clean-up.
        drop(std::fs::remove_file(&partial));
    }
    result
}

fn write_partial(source: &Path, partial: &Path) -> Result<Revision> {
    remove_if_present(partial)?;
    let failed = |e: rusqlite::Error| match schema::sql_error(source, "cannot back up", &e) {
        Error::NoSpace { .. } => Error::NoSpace {
            path: partial.to_owned(),
            detail: "its file system is full, the backup was given up".to_owned(),
        },
        error => error,
    };
    let name = partial.to_str().ok_or_else(|| Error::Io {
        action: "cannot back up to",
        path: partial.to_owned(),
        detail: "its name is not UTF-8".to_owned(),
    })?;
    // The mode is set before there is content.
    schema::create_file(partial)?;
    schema::open_reader(source)?.execute("VACUUM INTO ?1", [name]).map_err(failed)?;
    let copy = schema::open_reader(partial)?;
    schema::read_meta(&copy, partial, "revision")
}

/// Makes a store at `target` out of the backup `source`. `target` must not exist.
///
/// The restored store's revision jumps far ahead, so that no revision, and no leader's term, that
/// was given out after the backup is ever given out again: agents that saw such a term still obey
/// the new leader. All history before it counts as compacted, so every watcher lists anew. Returns
/// the new revision.
///
/// # Errors
/// [`Error::NotAStore`], [`Error::NewerSchema`], [`Error::Corrupt`] for an unusable backup;
/// [`Error::InUse`] and [`Error::Io`] for the target.
pub fn restore(source: &Path, target: &Path) -> Result<Revision> {
    let _lock = StoreLock::take(target)?;
    refuse_existing(target)?;
    let partial = partial_path(target);
    remove_if_present(&partial)?;
    std::fs::copy(source, &partial).map_err(|e| Error::io("cannot copy", source, &e))?;
    let result = jump_ahead(&partial).and_then(|revision| {
        publish(&partial, target)?;
        Ok(revision)
    });
    if result.is_err() {
        // Best effort: the error that is returned says more than a failed clean-up.
        drop(std::fs::remove_file(&partial));
    }
    result
}

fn jump_ahead(partial: &Path) -> Result<Revision> {
    std::fs::set_permissions(partial, PermissionsExt::from_mode(0o600))
        .map_err(|e| Error::io("cannot set the mode of", partial, &e))?;
    if std::fs::metadata(partial).map_err(|e| Error::io("cannot read", partial, &e))?.len() == 0 {
        return Err(Error::NotAStore { path: partial.to_owned(), reason: "the file is empty".to_owned() });
    }
    let conn = schema::open_writer(partial, u64::MAX)?;
    let revision = schema::read_meta(&conn, partial, "revision")? + RESTORE_JUMP;
    let failed = |e: rusqlite::Error| schema::sql_error(partial, "cannot write to", &e);
    conn.execute("UPDATE meta SET value = ?1 WHERE name IN ('revision', 'compacted')", [revision]).map_err(failed)?;
    // Leaves one file without a write-ahead log beside it, to be renamed as a whole.
    conn.execute_batch("PRAGMA journal_mode = DELETE").map_err(failed)?;
    conn.close().map_err(|(_, e)| failed(e))?;
    Ok(revision)
}

fn partial_path(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

fn refuse_existing(target: &Path) -> Result<()> {
    let exists = target.try_exists().map_err(|e| Error::io("cannot look for", target, &e))?;
    if exists {
        let detail = "it exists already".to_owned();
        return Err(Error::Io { action: "cannot write", path: target.to_owned(), detail });
    }
    Ok(())
}

fn remove_if_present(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot remove", path, &e)),
        _ => Ok(()),
    }
}

/// Makes a finished file durable under its final name.
fn publish(partial: &Path, target: &Path) -> Result<()> {
    File::open(partial)
        .and_then(|file| file.sync_all())
        .and_then(|()| std::fs::rename(partial, target))
        .map_err(|e| Error::io("cannot finish", target, &e))?;
    schema::sync_directory(target)
}
