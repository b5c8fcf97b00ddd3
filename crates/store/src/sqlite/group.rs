//! Applying requests within the SQLite transaction of one group commit.

use std::time::Duration;

use rusqlite::params;

use super::hub::Commit;
use super::read::Reader;
use super::schema::{sql_error, used_bytes};
use crate::error::{Error, Result};
use crate::model::{Event, EventKind, KeyValue, LeaseId, Op, Revision, Txn, TxnOutcome};

/// Log rows dropped per group while history is being compacted.
const PURGE_ROWS: i64 = 1000;

/// What a group has changed so far. It counts when the transaction is committed.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Newest revision.
    pub(super) revision: Revision,
    /// Oldest revision that can be read.
    pub(super) compacted: Revision,
    /// The new revisions.
    pub(super) commits: Vec<Commit>,
    /// Leases made.
    pub(super) granted: Vec<(LeaseId, Duration)>,
    /// Leases ended.
    pub(super) revoked: Vec<LeaseId>,
    /// Database pages changed, about.
    pub(super) pages: usize,
}

/// A group that is being applied.
pub(super) struct Group<'a> {
    reader: Reader<'a>,
    /// Bytes used before the group, and from how many on there are to be no more puts.
    used_bytes: u64,
    max_bytes: u64,
    pub(super) changes: Changes,
}

/// Outer error: the database failed, the group is lost. Inner: this request's own result.
pub(super) type Applied<T> = Result<Result<T>>;

impl<'a> Group<'a> {
    /// A group that begins after `revision`.
    pub(super) fn new(reader: Reader<'a>, max_bytes: u64, revision: Revision, compacted: Revision) -> Result<Self> {
        let used_bytes = used_bytes(reader.conn, reader.path)?;
        Ok(Self { reader, used_bytes, max_bytes, changes: Changes { revision, compacted, ..Changes::default() } })
    }

    fn execute(&self, sql: &str, params: impl rusqlite::Params) -> Result<usize> {
        self.reader
            .conn
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(params))
            .map_err(|e| sql_error(self.reader.path, "cannot write to", &e))
    }

    pub(super) fn txn(&mut self, txn: &Txn) -> Applied<TxnOutcome> {
        for (index, compare) in txn.compares.iter().enumerate() {
            if !compare.holds(self.reader.get(compare.key())?.as_ref()) {
                return Ok(Ok(TxnOutcome::Conflict { index, revision: self.changes.revision }));
            }
        }
        for op in &txn.ops {
            let Op::Put { lease, .. } = op else { continue };
            if self.used_bytes >= self.max_bytes {
                return Ok(Err(self.full()));
            }
            if let Some(id) = *lease
                && !self.lease_exists(id)?
            {
                return Ok(Err(Error::LeaseNotFound { id }));
            }
        }
        let mut events = Vec::with_capacity(txn.ops.len());
        for op in &txn.ops {
            match op {
                Op::Put { key, value, lease } => {
                    let prev = self.reader.get(key)?;
                    let kv = KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: prev.as_ref().map_or(self.changes.revision + 1, |prev| prev.create_revision),
                        mod_revision: self.changes.revision + 1,
                        version: prev.as_ref().map_or(1, |prev| prev.version + 1),
                        lease: *lease,
                    };
                    self.put(kv, prev, &mut events)?;
                }
                Op::Delete { key } => {
                    if let Some(prev) = self.reader.get(key)? {
                        self.delete(prev, &mut events)?;
                    }
                }
                Op::DeletePrefix { prefix } => {
                    for prev in self.reader.under(prefix)? {
                        self.delete(prev, &mut events)?;
                    }
                }
            }
        }
        Ok(Ok(TxnOutcome::Committed { revision: self.seal(events) }))
    }

    fn put(&mut self, kv: KeyValue, prev: Option<KeyValue>, events: &mut Vec<Event>) -> Result<()> {
        self.execute(
            "INSERT INTO kv VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (key) DO UPDATE SET
                 value = excluded.value, create_revision = excluded.create_revision,
                 mod_revision = excluded.mod_revision, version = excluded.version, lease = excluded.lease",
            params![kv.key, &*kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease.map(|lease| lease.0)],
        )?;
        self.log(&kv.key, false, prev.as_ref(), events.len())?;
        events.push(Event { revision: self.changes.revision + 1, kind: EventKind::Put(kv), prev });
        Ok(())
    }

    fn delete(&mut self, prev: KeyValue, events: &mut Vec<Event>) -> Result<()> {
        self.execute("DELETE FROM kv WHERE key = ?1", [&prev.key])?;
        self.log(&prev.key, true, Some(&prev), events.len())?;
        let kind = EventKind::Delete { key: prev.key.clone() };
        events.push(Event { revision: self.changes.revision + 1, kind, prev: Some(prev) });
        Ok(())
    }

    fn log(&mut self, key: &str, deleted: bool, prev: Option<&KeyValue>, seq: usize) -> Result<()> {
        // A leaf of each of the three trees, and the overflow of large values.
        self.changes.pages += 3 + prev.map_or(0, |prev| prev.value.len() / 2048);
        self.execute(
            "INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            params![
                self.changes.revision + 1,
                i64::try_from(seq).unwrap_or(i64::MAX),
                key,
                deleted,
                prev.map(|prev| &*prev.value),
                prev.map(|prev| prev.create_revision),
                prev.map(|prev| prev.mod_revision),
                prev.map(|prev| prev.version),
                prev.and_then(|prev| prev.lease).map(|lease| lease.0),
            ],
        )?;
        Ok(())
    }

    /// Makes a revision of some events; none make none.
    fn seal(&mut self, events: Vec<Event>) -> Revision {
        if !events.is_empty() {
            self.changes.revision += 1;
            self.changes.commits.push(Commit::new(self.changes.revision, events));
        }
        self.changes.revision
    }

    fn lease_exists(&self, id: LeaseId) -> Result<bool> {
        self.reader
            .conn
            .prepare_cached("SELECT 1 FROM lease WHERE id = ?1")
            .and_then(|mut statement| statement.exists([id.0]))
            .map_err(|e| sql_error(self.reader.path, "cannot read", &e))
    }

    pub(super) fn lease_grant(&mut self, ttl: Duration) -> Applied<LeaseId> {
        let millis = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        self.execute("INSERT INTO lease (ttl_ms) VALUES (?1)", [millis])?;
        let id = LeaseId(self.reader.conn.last_insert_rowid());
        self.changes.granted.push((id, ttl));
        Ok(Ok(id))
    }

    pub(super) fn lease_revoke(&mut self, id: LeaseId) -> Applied<Revision> {
        if self.execute("DELETE FROM lease WHERE id = ?1", [id.0])? == 0 {
            return Ok(Err(Error::LeaseNotFound { id }));
        }
        let mut events = Vec::new();
        for prev in self.reader.leased(id)? {
            self.delete(prev, &mut events)?;
        }
        self.changes.revoked.push(id);
        Ok(Ok(self.seal(events)))
    }

    pub(super) fn compact(&mut self, at: Revision) -> Result<()> {
        if at > self.changes.revision {
            return Err(Error::FutureRevision { requested: at, current: self.changes.revision });
        }
        self.changes.compacted = self.changes.compacted.max(at);
        Ok(())
    }

    fn full(&self) -> Error {
        let detail = format!(
            "it uses {} of {} bytes: delete keys, compact it or raise its limit",
            self.used_bytes, self.max_bytes
        );
        Error::NoSpace { path: self.reader.path.to_owned(), detail }
    }

    /// Bounds the history when that is asked for, in steps of an eighth. History gives way before
    /// writes are refused.
    pub(super) fn auto_compact(&mut self, keep: Option<u64>) {
        let Some(mut keep) = keep.and_then(|keep| i64::try_from(keep).ok()) else { return };
        if self.used_bytes >= self.max_bytes - self.max_bytes / 8 {
            keep /= 8;
        }
        if self.changes.revision.saturating_sub(self.changes.compacted) > keep.saturating_add(keep / 8) {
            self.changes.compacted = self.changes.revision - keep;
        }
    }

    /// Drops some of the log that nobody can ask for, and tells whether there is more.
    pub(super) fn purge(&self) -> Result<bool> {
        let dropped = self.execute(
            "DELETE FROM log WHERE (revision, seq) IN
                 (SELECT revision, seq FROM log WHERE revision <= ?1 ORDER BY revision, seq LIMIT ?2)",
            [self.changes.compacted, PURGE_ROWS],
        )?;
        Ok(i64::try_from(dropped).unwrap_or(i64::MAX) >= PURGE_ROWS)
    }

    pub(super) fn write_meta(&self, revision: Revision, compacted: Revision) -> Result<()> {
        let changes = &self.changes;
        for (name, old, new) in [("revision", revision, changes.revision), ("compacted", compacted, changes.compacted)]
        {
            if old != new {
                self.execute("UPDATE meta SET value = ?2 WHERE name = ?1", params![name, new])?;
            }
        }
        Ok(())
    }
}
