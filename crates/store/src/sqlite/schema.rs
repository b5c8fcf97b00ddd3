//! Files, connections and tables of the SQLite backend.
//!
//! Three tables carry the contract:
//! - `kv`: the present value of every key;
//! - `log`: one row per change with the key's state *before* it. A read at an old revision takes a
//!   key's first log row above that revision; a watch takes the state before the key's next change
//!   as the state after this one. So history is dropped by deleting the log's oldest rows, and
//!   nothing that is still readable ever depends on a dropped row;
//! - `lease`: the granted leases. Deadlines live in memory only.
//!
//! `meta` holds the schema version, the newest revision and the compacted revision.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension};

use super::files;
use crate::error::{Error, Result};
use crate::model::Revision;

/// Schema version that this release writes.
pub(super) const SCHEMA_VERSION: i64 = 1;
/// Marks the file as a hearth store (`PRAGMA application_id`, <https://sqlite.org/fileformat2.html>): "hrth".
const APPLICATION_ID: i64 = 0x6872_7468;
/// Page size in bytes: a power of two that holds a few typical objects.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Size of the write-ahead log, in pages, from which the writer itself copies it back into the
/// database file. Most of the work has been done beside it by then.
const CHECKPOINT_PAGES: u32 = 16_000;
/// Largest file that is checked page by page when it is opened: a second or two.
const CHECK_BYTES: u64 = 1024 * 1024 * 1024;
/// Pages beyond the size limit (and its sixteenth) for deletions, which need room before they make it.
const RESERVE_PAGES: u64 = 2048;

const TABLES: &str = "
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE kv (
    key             TEXT PRIMARY KEY,
    value           BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    mod_revision    INTEGER NOT NULL,
    version         INTEGER NOT NULL,
    lease           INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX kv_lease ON kv (lease) WHERE lease IS NOT NULL;
CREATE TABLE log (
    revision             INTEGER NOT NULL,
    seq                  INTEGER NOT NULL,
    key                  TEXT NOT NULL,
    deleted              INTEGER NOT NULL,
    prev_value           BLOB,
    prev_create_revision INTEGER,
    prev_mod_revision    INTEGER,
    prev_version         INTEGER,
    prev_lease           INTEGER,
    PRIMARY KEY (revision, seq)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX log_key ON log (key, revision);
CREATE TABLE lease (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    ttl_ms INTEGER NOT NULL
) STRICT;
INSERT INTO meta VALUES ('schema_version', 1), ('revision', 0), ('compacted', 0);
";

/// Makes an empty store. It appears under its name as a whole, so that an empty file there is never
/// taken for a store that is yet to be filled.
pub(super) fn create(path: &Path) -> Result<()> {
    files::build(path, |partial| {
        files::refuse_orphaned_log(path)?;
        let conn = connect(partial, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let failed = |e: rusqlite::Error| sql_error(partial, "cannot create tables in", &e);
        conn.execute_batch(&format!(
            "PRAGMA page_size = {PAGE_BYTES}; BEGIN; {TABLES} PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
        ))
        .map_err(failed)?;
        conn.close().map_err(|(_, e)| failed(e))
    })
}

/// Opens the writer's connection and checks the store.
pub(super) fn open_writer(path: &Path, max_bytes: u64) -> Result<Connection> {
    refuse_cut_off(path)?;
    let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    identify(&conn, path)?;
    let failed = |e: rusqlite::Error| sql_error(path, "cannot configure", &e);
    let mode: String = conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(failed)?;
    if mode != "wal" {
        let detail = format!("its file system does not support write-ahead logging (mode {mode})");
        return Err(Error::Backend { action: "cannot configure", path: path.to_owned(), detail });
    }
    conn.execute_batch(&format!(
        "PRAGMA synchronous = FULL;
         PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};
         PRAGMA journal_size_limit = {};
         PRAGMA max_page_count = {};",
        u64::from(CHECKPOINT_PAGES) * PAGE_BYTES,
        (max_bytes.saturating_add(max_bytes / 16) / PAGE_BYTES).saturating_add(RESERVE_PAGES),
    ))
    .map_err(failed)?;
    check(&conn, path)?;
    Ok(conn)
}

/// Bytes of the file that hold content.
pub(super) fn used_bytes(conn: &Connection, path: &Path) -> Result<u64> {
    let pragma = |sql: &str| {
        conn.prepare_cached(sql)
            .and_then(|mut statement| statement.query_row([], |row| row.get::<_, i64>(0)))
            .map_err(|e| sql_error(path, "cannot read", &e))
    };
    let pages = pragma("PRAGMA page_count")? - pragma("PRAGMA freelist_count")?;
    Ok(u64::try_from(pages).unwrap_or(0).saturating_mul(PAGE_BYTES))
}

/// Opens the connection that copies the write-ahead log back.
pub(super) fn open_checkpointer(path: &Path) -> Result<Connection> {
    let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    conn.execute_batch("PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;")
        .map_err(|e| sql_error(path, "cannot configure", &e))?;
    Ok(conn)
}

/// Opens a connection for reading.
pub(super) fn open_reader(path: &Path) -> Result<Connection> {
    connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
}

fn connect(path: &Path, mode: OpenFlags) -> Result<Connection> {
    let conn = Connection::open_with_flags(path, mode | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(|e| sql_error(path, "cannot open", &e))?;
    conn.set_prepared_statement_cache_capacity(32);
    conn.busy_timeout(Duration::from_secs(10)).map_err(|e| sql_error(path, "cannot configure", &e))?;
    conn.execute_batch(
        "PRAGMA cache_size = -16384;
         PRAGMA temp_store = MEMORY;
         PRAGMA cell_size_check = ON;
         PRAGMA trusted_schema = OFF;",
    )
    .map_err(|e| sql_error(path, "cannot configure", &e))?;
    Ok(conn)
}

/// Refuses what is not a store.
fn identify(conn: &Connection, path: &Path) -> Result<()> {
    let reason = match conn.query_row("PRAGMA application_id", [], |row| row.get::<_, i64>(0)) {
        Ok(APPLICATION_ID) => return Ok(()),
        Ok(0) => "it is empty, or an SQLite database of something else".to_owned(),
        Ok(id) => format!("it is an SQLite database of something else (application id {id:#x})"),
        Err(e) => return Err(sql_error(path, "cannot read", &e)),
    };
    Err(Error::NotAStore { path: path.to_owned(), reason })
}

/// Refuses a file that ends within a page, which SQLite would fill up with zeros. Only a crash while
/// the write-ahead log is copied back may leave one, and then the log has the page.
fn refuse_cut_off(path: &Path) -> Result<()> {
    let size = files::size(path)?.unwrap_or(0);
    let logged = files::size(&files::with_suffix(path, "-wal"))?.unwrap_or(0);
    if size % PAGE_BYTES != 0 && logged == 0 {
        // What does not even begin like a database gets a better error later.
        let mut header = Vec::new();
        File::open(path)
            .and_then(|file| file.take(16).read_to_end(&mut header))
            .map_err(|e| Error::io("cannot read", path, &e))?;
        if header == b"SQLite format 3\0" {
            return Err(corrupt(path, format!("its {size} bytes are no whole number of pages, it was cut off")));
        }
    }
    Ok(())
}

/// Refuses a newer schema and a damaged file. Every page is looked at unless the file is so large
/// that this would hold up the start; then damage is found when it is met.
fn check(conn: &Connection, path: &Path) -> Result<()> {
    let found = read_meta(conn, path, "schema_version")?;
    if found > SCHEMA_VERSION {
        return Err(Error::NewerSchema { path: path.to_owned(), found, supported: SCHEMA_VERSION });
    }
    if found < 1 {
        return Err(corrupt(path, format!("schema version {found}")));
    }
    if files::size(path)?.unwrap_or(0) <= CHECK_BYTES {
        let verdict: String = conn
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|e| sql_error(path, "cannot check", &e))?;
        if verdict != "ok" {
            return Err(corrupt(path, verdict));
        }
    } else {
        tracing::info!(path = %path.display(), "the store is too large to be checked page by page at its start");
    }
    let revision = read_meta(conn, path, "revision")?;
    let compacted = read_meta(conn, path, "compacted")?;
    let logged: Option<Revision> = conn
        .query_row("SELECT max(revision) FROM log", [], |row| row.get(0))
        .map_err(|e| sql_error(path, "cannot check", &e))?;
    if !(0 <= compacted && compacted <= revision && logged.unwrap_or(0) <= revision) {
        let detail =
            format!("revision {revision}, compacted {compacted}, newest logged {logged:?} do not fit together");
        return Err(corrupt(path, detail));
    }
    Ok(())
}

/// Reads one number of the `meta` table.
pub(super) fn read_meta(conn: &Connection, path: &Path, name: &str) -> Result<i64> {
    conn.prepare_cached("SELECT value FROM meta WHERE name = ?1")
        .and_then(|mut statement| statement.query_row([name], |row| row.get(0)).optional())
        .map_err(|e| sql_error(path, "cannot read", &e))?
        .ok_or_else(|| corrupt(path, format!("it has no {name}")))
}

/// A damaged store.
pub(super) fn corrupt(path: &Path, detail: impl Into<String>) -> Error {
    Error::Corrupt { path: path.to_owned(), detail: detail.into() }
}

/// Sorts SQLite's errors by what the operator has to do.
pub(super) fn sql_error(path: &Path, action: &'static str, error: &rusqlite::Error) -> Error {
    let detail = error.to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt) => corrupt(path, detail),
        Some(ErrorCode::NotADatabase) => Error::NotAStore {
            path: path.to_owned(),
            reason: "it is no SQLite database, or its header is damaged".to_owned(),
        },
        Some(ErrorCode::DiskFull) => Error::NoSpace {
            path: path.to_owned(),
            detail: "its file system or its size limit is full: make room, or compact it".to_owned(),
        },
        _ => Error::Backend { action, path: path.to_owned(), detail },
    }
}
