//! Copies of a store, and how one becomes a store again.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::lock::StoreLock;
use super::{files, schema};
use crate::error::{Error, Result};
use crate::model::Revision;

/// How far a restored store jumps ahead: more revisions than any store writes between two backups,
/// and far below what the counter holds.
const RESTORE_JUMP: Revision = 1_000_000_000;

/// Writes a consistent copy of the store at `source` to `target`, which must not exist, and returns the copy's revision. The
/// store may be in use, by this process or another one. The copy appears under its name only when it is whole and durable.
///
/// # Errors
/// [`Error::NotAStore`], [`Error::Corrupt`] and [`Error::Io`] for the source, [`Error::Io`] and [`Error::NoSpace`] for the
/// target.
pub fn backup(source: &Path, target: &Path) -> Result<Revision> {
    if !files::exists(source)? {
        return Err(Error::NotAStore { path: source.to_owned(), reason: "there is no such file".to_owned() });
    }
    files::build(target, |partial| {
        let name = partial.to_str().ok_or_else(|| Error::Io {
            action: "cannot back up to",
            path: partial.to_owned(),
            detail: "its name is not UTF-8".to_owned(),
        })?;
        let failed = |e: rusqlite::Error| match schema::sql_error(source, "cannot back up", &e) {
            Error::NoSpace { .. } => Error::NoSpace {
                path: target.to_owned(),
                detail: "the backup's file system is full, the backup was given up".to_owned(),
            },
            error => error,
        };
        schema::open_reader(source)?.execute("VACUUM INTO ?1", [name]).map_err(failed)?;
        let copy = schema::open_reader(partial)?;
        schema::read_meta(&copy, partial, "revision")
    })
}

/// Makes a store at `target` out of the backup `source`. `target` must not exist.
///
/// The restored store's revision jumps far ahead, so that no revision, leader's term or lease id that
/// was given out after the backup is ever given out again: agents that saw such a term still obey
/// the new leader. All history before it counts as compacted, so every watcher lists anew. Returns
/// the new revision.
///
/// # Errors
/// [`Error::NotAStore`], [`Error::NewerSchema`], [`Error::Corrupt`] for an unusable backup;
/// [`Error::InUse`] and [`Error::Io`] for the target.
pub fn restore(source: &Path, target: &Path) -> Result<Revision> {
    let _lock = StoreLock::take(target)?;
    files::refuse_orphaned_log(target)?;
    make(source, target)
}

/// Like [`restore`], also where a store is already, or what is left of one: its files are kept, under the name that is
/// returned. Nobody may have it open.
///
/// A crash on the way leaves either the store that was there, or no store and its write-ahead log, which is refused until this
/// is called again.
///
/// # Errors
/// Those of [`restore`]. An unusable backup leaves everything as it was.
pub fn restore_over(source: &Path, target: &Path) -> Result<(Revision, PathBuf)> {
    let _lock = StoreLock::take(target)?;
    let restored = files::with_suffix(target, ".restored");
    files::remove(&restored)?;
    let revision = make(source, &restored)?;
    let kept = free_name(target)?;
    // The database first: without it, its log is not taken for another one's.
    for suffix in ["", "-wal"] {
        files::rename(&files::with_suffix(target, suffix), &files::with_suffix(&kept, suffix))?;
    }
    files::remove(&files::with_suffix(target, "-shm"))?;
    files::rename(&restored, target)?;
    files::sync_directory(target)?;
    Ok((revision, kept))
}

/// A name beside `target` that neither a store nor a log has.
fn free_name(target: &Path) -> Result<PathBuf> {
    let mut number = 1u32;
    loop {
        let name = files::with_suffix(target, &format!(".replaced-{number}"));
        if !files::exists(&name)? && !files::exists(&files::with_suffix(&name, "-wal"))? {
            return Ok(name);
        }
        number = number.saturating_add(1);
    }
}

/// Makes a store that jumps ahead out of a backup.
fn make(source: &Path, target: &Path) -> Result<Revision> {
    files::build(target, |partial| {
        std::fs::copy(source, partial).map_err(|e| Error::io("cannot copy", source, &e))?;
        std::fs::set_permissions(partial, PermissionsExt::from_mode(0o600))
            .map_err(|e| Error::io("cannot set the mode of", partial, &e))?;
        let conn = schema::open_writer(partial, u64::MAX)?;
        let revision = schema::read_meta(&conn, partial, "revision")? + RESTORE_JUMP;
        let failed = |e: rusqlite::Error| schema::sql_error(partial, "cannot write to", &e);
        conn.execute("UPDATE meta SET value = ?1 WHERE name IN ('revision', 'compacted')", [revision])
            .map_err(failed)?;
        // Lease ids are not given out twice either.
        conn.execute_batch(&format!(
            "CREATE TEMP TABLE last AS SELECT coalesce(max(seq), 0) AS seq FROM sqlite_sequence WHERE name = 'lease';
             DELETE FROM sqlite_sequence WHERE name = 'lease';
             INSERT INTO sqlite_sequence SELECT 'lease', seq + {RESTORE_JUMP} FROM last;
             DROP TABLE last;"
        ))
        .map_err(failed)?;
        // Leaves one file without a write-ahead log beside it, to be renamed as a whole.
        conn.pragma_update(None, "journal_mode", "DELETE").map_err(failed)?;
        conn.close().map_err(|(_, e)| failed(e))?;
        Ok(revision)
    })
}
