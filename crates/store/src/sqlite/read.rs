//! Queries on one connection. Callers that need several to agree run them in one transaction.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, Row, ToSql, params};

use super::schema::{corrupt, read_meta, sql_error};
use crate::error::{Error, Result};
use crate::limits::{MAX_PAGE_BYTES, MAX_PAGE_KEYS, prefix_end};
use crate::model::{Event, EventKind, KeyValue, LeaseId, RangeRequest, RangeResponse, Revision, WatchBatch};

/// A connection and the path that its errors name.
pub(super) struct Reader<'a> {
    pub(super) conn: &'a Connection,
    pub(super) path: &'a Path,
}

/// The bound above a range. Every key starts with '/', so '0', the next character, bounds them all.
fn upper_bound(end: Option<&str>) -> String {
    end.unwrap_or("0").to_owned()
}

/// The first key a page may show. No key has a control character, so the least key above `after` is
/// not below `after` and a NUL.
fn lower_bound(start: &str, after: Option<&str>) -> String {
    match after {
        Some(after) if after >= start => format!("{after}\0"),
        _ => start.to_owned(),
    }
}

impl Reader<'_> {
    fn failed(&self, error: &rusqlite::Error) -> Error {
        sql_error(self.path, "cannot read", error)
    }

    /// The newest revision.
    pub(super) fn revision(&self) -> Result<Revision> {
        read_meta(self.conn, self.path, "revision")
    }

    /// The oldest revision that can be read; changes after it can be watched.
    pub(super) fn compacted(&self) -> Result<Revision> {
        read_meta(self.conn, self.path, "compacted")
    }

    /// The present state of a key.
    pub(super) fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        self.conn
            .prepare_cached("SELECT key, value, create_revision, mod_revision, version, lease FROM kv WHERE key = ?1")
            .and_then(|mut statement| statement.query_row([key], |row| key_value(row, 0)).optional())
            .map_err(|e| self.failed(&e))
    }

    /// Every key under a prefix, present state.
    pub(super) fn under(&self, prefix: &str) -> Result<Vec<KeyValue>> {
        let end = upper_bound(prefix_end(prefix).as_deref());
        self.collect(
            "SELECT key, value, create_revision, mod_revision, version, lease FROM kv
             WHERE key >= ?1 AND key < ?2 ORDER BY key",
            params![prefix, end],
        )
    }

    /// The keys that go with a lease.
    pub(super) fn leased(&self, lease: LeaseId) -> Result<Vec<KeyValue>> {
        self.collect(
            "SELECT key, value, create_revision, mod_revision, version, lease FROM kv WHERE lease = ?1 ORDER BY key",
            params![lease.0],
        )
    }

    fn collect(&self, sql: &str, params: impl rusqlite::Params) -> Result<Vec<KeyValue>> {
        let mut statement = self.conn.prepare_cached(sql).map_err(|e| self.failed(&e))?;
        let rows = statement.query_map(params, |row| key_value(row, 0)).map_err(|e| self.failed(&e))?;
        rows.collect::<rusqlite::Result<_>>().map_err(|e| self.failed(&e))
    }

    /// One page of keys, now or at an old revision. Needs a transaction.
    pub(super) fn range(&self, request: &RangeRequest) -> Result<RangeResponse> {
        let current = self.revision()?;
        let at = request.at.unwrap_or(current);
        if at > current {
            return Err(Error::FutureRevision { requested: at, current });
        }
        let oldest = self.compacted()?;
        if at < oldest {
            return Err(Error::Compacted { oldest });
        }
        let sql = if at == current {
            "SELECT key, value, create_revision, mod_revision, version, lease FROM kv
             WHERE key >= ?1 AND key < ?2 ORDER BY key"
        } else {
            "SELECT key, value, create_revision, mod_revision, version, lease FROM kv
             WHERE key >= ?1 AND key < ?2 AND mod_revision <= ?3
             UNION ALL
             SELECT key, prev_value, prev_create_revision, prev_mod_revision, prev_version, prev_lease FROM log AS l
             WHERE key >= ?1 AND key < ?2 AND revision > ?3 AND prev_value IS NOT NULL
               AND revision = (SELECT min(revision) FROM log WHERE key = l.key AND revision > ?3)
             ORDER BY key"
        };
        let limit = if request.limit == 0 { MAX_PAGE_KEYS } else { request.limit.min(MAX_PAGE_KEYS) };
        let start = lower_bound(&request.start, request.after.as_deref());
        let end = upper_bound(request.end.as_deref());
        let params: &[&dyn ToSql] = if at == current { &[&start, &end] } else { &[&start, &end, &at] };
        let mut page = RangeResponse { kvs: Vec::new(), more: false, revision: at };
        let mut statement = self.conn.prepare_cached(sql).map_err(|e| self.failed(&e))?;
        let mut rows = statement.query(params).map_err(|e| self.failed(&e))?;
        let mut bytes = 0;
        while let Some(row) = rows.next().map_err(|e| self.failed(&e))? {
            if page.kvs.len() >= limit || bytes >= MAX_PAGE_BYTES {
                page.more = true;
                break;
            }
            let kv = key_value(row, 0).map_err(|e| self.failed(&e))?;
            bytes += kv.size();
            page.kvs.push(kv);
        }
        Ok(page)
    }

    /// Checks that the log has all changes of revision `from` and later.
    pub(super) fn check_watchable(&self, from: Revision) -> Result<()> {
        let oldest = self.compacted()? + 1;
        if from < oldest { Err(Error::Compacted { oldest }) } else { Ok(()) }
    }

    /// Logged changes under `prefix` from revision `from` on, and the revision to go on from. Stops
    /// at a revision's end once `budget` bytes are gathered. Needs a transaction.
    pub(super) fn history(&self, prefix: &str, from: Revision, budget: usize) -> Result<(Vec<WatchBatch>, Revision)> {
        self.check_watchable(from)?;
        let newest = self.revision()?;
        let end = upper_bound(prefix_end(prefix).as_deref());
        let mut statement = self
            .conn
            .prepare_cached(
                "SELECT key, prev_value, prev_create_revision, prev_mod_revision, prev_version, prev_lease,
                        revision, deleted
                 FROM log WHERE revision >= ?1 AND key >= ?2 AND key < ?3 ORDER BY revision, seq",
            )
            .map_err(|e| self.failed(&e))?;
        let mut rows = statement.query(params![from, prefix, end]).map_err(|e| self.failed(&e))?;
        let mut batches: Vec<WatchBatch> = Vec::new();
        let mut bytes = 0;
        while let Some(row) = rows.next().map_err(|e| self.failed(&e))? {
            let revision: Revision = row.get(6).map_err(|e| self.failed(&e))?;
            let same = batches.last_mut().filter(|batch| batch.revision == revision);
            if same.is_none() && bytes >= budget {
                return Ok((batches, revision));
            }
            let event = self.event(row, revision)?;
            bytes += event_size(&event);
            match same {
                Some(batch) => batch.events.push(event),
                None => batches.push(WatchBatch { revision, events: vec![event] }),
            }
        }
        Ok((batches, from.max(newest + 1)))
    }

    fn event(&self, row: &Row<'_>, revision: Revision) -> Result<Event> {
        let key: String = row.get(0).map_err(|e| self.failed(&e))?;
        let existed = row.get_ref(1).map_err(|e| self.failed(&e))? != rusqlite::types::ValueRef::Null;
        let prev = if existed { Some(key_value(row, 0).map_err(|e| self.failed(&e))?) } else { None };
        let deleted: bool = row.get(7).map_err(|e| self.failed(&e))?;
        let kind = if deleted { EventKind::Delete { key } } else { EventKind::Put(self.state_after(&key, revision)?) };
        Ok(Event { revision, kind, prev })
    }

    /// The state that revision `revision` gave to `key`: what its next change found, or the present one.
    fn state_after(&self, key: &str, revision: Revision) -> Result<KeyValue> {
        let next = self
            .conn
            .prepare_cached(
                "SELECT key, prev_value, prev_create_revision, prev_mod_revision, prev_version, prev_lease
                 FROM log WHERE key = ?1 AND revision > ?2 ORDER BY revision LIMIT 1",
            )
            .and_then(|mut statement| statement.query_row(params![key, revision], |row| key_value(row, 0)).optional())
            .map_err(|e| self.failed(&e))?;
        let state = match next {
            Some(state) => Some(state),
            None => self.get(key)?,
        };
        state
            .filter(|state| state.mod_revision == revision)
            .ok_or_else(|| corrupt(self.path, format!("the log lacks the state of {key:?} at revision {revision}")))
    }
}

/// Bytes that an event weighs in memory, about.
pub(super) fn event_size(event: &Event) -> usize {
    let kept = match &event.kind {
        EventKind::Put(kv) => kv.size(),
        EventKind::Delete { key } => key.len(),
    };
    kept + event.prev.as_ref().map_or(0, KeyValue::size) + size_of::<Event>()
}

/// Reads a state from six columns: key, value, create revision, mod revision, version, lease.
fn key_value(row: &Row<'_>, first: usize) -> rusqlite::Result<KeyValue> {
    Ok(KeyValue {
        key: row.get(first)?,
        value: row.get::<_, Vec<u8>>(first + 1)?.into(),
        create_revision: row.get(first + 2)?,
        mod_revision: row.get(first + 3)?,
        version: row.get(first + 4)?,
        lease: row.get::<_, Option<i64>>(first + 5)?.map(LeaseId),
    })
}
