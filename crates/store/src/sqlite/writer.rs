//! The one thread that writes.
//!
//! It takes whatever requests are queued, applies them in one SQLite transaction, commits (one
//! fsync), shows the revisions to the watchers, and only then answers. A request is all or nothing by
//! its own checks, so requests need no savepoints; if SQLite fails, the whole group is rolled back
//! and every caller in it is told.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, TransactionBehavior, params};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shared;
use super::hub::Commit;
use super::read::Reader;
use super::schema::{sql_error, used_bytes};
use crate::error::{Error, Result};
use crate::model::{Event, EventKind, KeyValue, LeaseId, Op, Revision, Txn, TxnOutcome};

/// Requests in one group commit, at most.
const GROUP: usize = 512;
/// Bytes of transactions in one group commit, about.
const GROUP_BYTES: usize = 8 * 1024 * 1024;
/// Log rows dropped per group while history is being compacted.
const PURGE_ROWS: i64 = 1000;
/// Leases that expire in one group.
const EXPIRE: usize = 64;
/// Pause before a failed lease expiry is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What a caller wants.
#[derive(Debug)]
pub(super) enum Request {
    Txn(Txn, oneshot::Sender<Result<TxnOutcome>>),
    LeaseGrant(Duration, oneshot::Sender<Result<LeaseId>>),
    LeaseRevoke(LeaseId, oneshot::Sender<Result<Revision>>),
    Compact(Revision, oneshot::Sender<Result<()>>),
    Shutdown,
}

/// A queued request with its share of the queue's memory.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) request: Request,
    pub(super) size: usize,
    pub(super) _permit: Option<OwnedSemaphorePermit>,
}

/// Answers a caller once the group's fate is known: `Some` is the failure that met the group.
type Answer = Box<dyn FnOnce(Option<&Error>)>;

pub(super) struct Writer {
    conn: Connection,
    shared: Arc<Shared>,
    queue: Receiver<Queued>,
    /// Newest durable revision.
    revision: Revision,
    /// Oldest revision that can be read.
    compacted: Revision,
    /// The log may have rows that no reader can ask for.
    purge: bool,
    /// The last group failed for lack of space: do not purge in a hot loop.
    short_of_space: bool,
}

/// Changes of the group that is being applied.
struct Group<'a> {
    reader: Reader<'a>,
    /// Bytes used before the group, and how many there may be.
    used_bytes: u64,
    max_bytes: u64,
    revision: Revision,
    compacted: Revision,
    commits: Vec<Commit>,
    granted: Vec<(LeaseId, Duration)>,
    revoked: Vec<LeaseId>,
}

impl Writer {
    pub(super) fn new(
        conn: Connection,
        shared: Arc<Shared>,
        queue: Receiver<Queued>,
        revision: Revision,
        compacted: Revision,
    ) -> Self {
        Self { conn, shared, queue, revision, compacted, purge: true, short_of_space: false }
    }

    /// Works until it is told to shut down; what was queued before is still done.
    pub(super) fn run(mut self) {
        loop {
            let (requests, more) = self.gather();
            self.commit(requests);
            if !more {
                break;
            }
        }
        self.close();
    }

    /// Copies the write-ahead log back, so that one file is left when the last connection closes.
    fn close(self) {
        self.shared.idle_readers.lock().clear();
        if let Err(error) = self.conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())) {
            // The next open replays the log instead.
            tracing::warn!(%error, path = %self.shared.path.display(), "the store's log could not be copied back");
        }
    }

    /// Waits for work, then takes what is there. `false` after the last.
    fn gather(&mut self) -> (Vec<Queued>, bool) {
        let mut requests = Vec::new();
        let mut bytes = 0;
        let wait = self.idle_time();
        let first = if wait.is_zero() {
            self.queue.try_recv().map_err(|e| match e {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            })
        } else {
            self.queue.recv_timeout(wait)
        };
        let mut next = match first {
            Ok(queued) => Some(queued),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return (requests, false),
        };
        while let Some(queued) = next {
            if matches!(queued.request, Request::Shutdown) {
                return (requests, false);
            }
            bytes += queued.size;
            requests.push(queued);
            if requests.len() >= GROUP || bytes >= GROUP_BYTES {
                break;
            }
            next = self.queue.try_recv().ok();
        }
        (requests, true)
    }

    /// How long there is nothing to do but wait for requests.
    fn idle_time(&self) -> Duration {
        const LONG: Duration = Duration::from_secs(3600);
        if self.shared.stopped.get().is_some() {
            return LONG;
        }
        if self.purge {
            return if self.short_of_space { RETRY } else { Duration::ZERO };
        }
        self.shared
            .leases
            .next_deadline()
            .map_or(LONG, |deadline| deadline.saturating_duration_since(Instant::now()).min(LONG))
    }

    /// Applies a group durably and answers it.
    fn commit(&mut self, requests: Vec<Queued>) {
        if let Some(cause) = self.shared.stopped.get() {
            let error = Error::WritesStopped { path: self.shared.path.clone(), cause: cause.clone() };
            for queued in requests {
                refuse(queued.request, &error);
            }
            return;
        }
        let expired = self.shared.leases.take_expired(Instant::now(), EXPIRE);
        if requests.is_empty() && expired.is_empty() && !self.purge {
            return;
        }
        let mut answers = Vec::with_capacity(requests.len());
        // Memory of the requests stays accounted for until they are answered.
        let mut permits = Vec::with_capacity(requests.len());
        let mut pending = Vec::with_capacity(requests.len());
        for Queued { request, _permit, .. } in requests {
            pending.push(request);
            permits.push(_permit);
        }
        match self.apply(pending, &expired, &mut answers) {
            Ok(()) => {
                for answer in answers {
                    answer(None);
                }
            }
            Err(error) => {
                self.shared.leases.put_back(&expired, Instant::now() + RETRY);
                let error = self.fail(error);
                for answer in answers {
                    answer(Some(&error));
                }
            }
        }
    }

    /// Runs one SQLite transaction for a group. On failure it is rolled back, and `answers` covers
    /// every request.
    fn apply(&mut self, requests: Vec<Request>, expired: &[LeaseId], answers: &mut Vec<Answer>) -> Result<()> {
        let path = self.shared.path.clone();
        let failed = |action: &'static str| {
            let path = path.clone();
            move |e: rusqlite::Error| sql_error(&path, action, &e)
        };
        let mut requests = requests.into_iter();
        let mut step = || -> Result<_> {
            let transaction = self
                .conn
                .transaction_with_behavior(TransactionBehavior::Immediate)
                .map_err(failed("cannot begin a transaction in"))?;
            let mut group = Group {
                used_bytes: used_bytes(&transaction, &path)?,
                max_bytes: self.shared.options.max_bytes,
                reader: Reader { conn: &transaction, path: &path },
                revision: self.revision,
                compacted: self.compacted,
                commits: Vec::new(),
                granted: Vec::new(),
                revoked: Vec::new(),
            };
            for id in expired {
                match group.lease_revoke(*id)? {
                    Ok(_) | Err(Error::LeaseNotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            for request in requests.by_ref() {
                group.request(request, answers)?;
            }
            group.auto_compact(self.shared.options.keep_revisions);
            let purge = self.purge || group.compacted != self.compacted;
            let left = if purge { group.purge()? } else { false };
            group.write_meta(self.revision, self.compacted)?;
            let Group { revision, compacted, commits, granted, revoked, .. } = group;
            transaction.commit().map_err(failed("cannot commit to"))?;
            Ok((revision, compacted, commits, granted, revoked, left))
        };
        match step() {
            Ok((revision, compacted, commits, granted, revoked, left)) => {
                self.revision = revision;
                self.compacted = compacted;
                self.purge = left;
                self.short_of_space = false;
                let now = Instant::now();
                for (id, ttl) in granted {
                    self.shared.leases.add(id, ttl, now);
                }
                for id in revoked {
                    self.shared.leases.remove(id);
                }
                self.shared.hub.publish(commits);
                Ok(())
            }
            Err(error) => {
                for request in requests {
                    answers.push(Box::new(move |failure| {
                        if let Some(error) = failure {
                            refuse(request, error);
                        }
                    }));
                }
                Err(error)
            }
        }
    }

    /// Decides what a failed group means for the writes to come.
    fn fail(&mut self, error: Error) -> Error {
        // A full disk is found before the commit record is durable and the rollback is clean, so the
        // next group may try again. After anything else, above all a failed fsync, what is on the
        // disk is unknown.
        if matches!(error, Error::NoSpace { .. }) && self.conn.is_autocommit() {
            tracing::error!(%error, "write refused");
            self.short_of_space = true;
            return error;
        }
        let cause = error.to_string();
        tracing::error!(%error, "store stops accepting writes");
        let cause = self.shared.stopped.get_or_init(|| cause).clone();
        Error::WritesStopped { path: self.shared.path.clone(), cause }
    }
}

/// Answers a request that was not applied.
fn refuse(request: Request, error: &Error) {
    // A caller that went away needs no answer.
    match request {
        Request::Txn(_, reply) => drop(reply.send(Err(error.clone()))),
        Request::LeaseGrant(_, reply) => drop(reply.send(Err(error.clone()))),
        Request::LeaseRevoke(_, reply) => drop(reply.send(Err(error.clone()))),
        Request::Compact(_, reply) => drop(reply.send(Err(error.clone()))),
        Request::Shutdown => {}
    }
}

/// An answer that waits for the group's fate.
fn answer<T: Send + 'static>(reply: oneshot::Sender<Result<T>>, result: Result<T>) -> Answer {
    Box::new(move |failure| {
        let result = match failure {
            Some(error) => Err(error.clone()),
            None => result,
        };
        // A caller that went away needs no answer.
        drop(reply.send(result));
    })
}

/// Outer error: the database failed, the group is lost. Inner: this request's own result.
type Applied<T> = Result<Result<T>>;

impl Group<'_> {
    fn request(&mut self, request: Request, answers: &mut Vec<Answer>) -> Result<()> {
        match request {
            Request::Txn(txn, reply) => self.answer(reply, answers, |group| group.txn(&txn)),
            Request::LeaseGrant(ttl, reply) => self.answer(reply, answers, |group| group.lease_grant(ttl)),
            Request::LeaseRevoke(id, reply) => self.answer(reply, answers, |group| group.lease_revoke(id)),
            Request::Compact(at, reply) => self.answer(reply, answers, |group| Ok(group.compact(at))),
            Request::Shutdown => Ok(()),
        }
    }

    fn answer<T: Send + 'static>(
        &mut self,
        reply: oneshot::Sender<Result<T>>,
        answers: &mut Vec<Answer>,
        work: impl FnOnce(&mut Self) -> Applied<T>,
    ) -> Result<()> {
        let (result, fate) = match work(self) {
            Ok(result) => (result, Ok(())),
            Err(error) => (Err(error.clone()), Err(error)),
        };
        answers.push(answer(reply, result));
        fate
    }

    fn execute(&self, sql: &str, params: impl rusqlite::Params) -> Result<usize> {
        self.reader
            .conn
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(params))
            .map_err(|e| sql_error(self.reader.path, "cannot write to", &e))
    }

    fn txn(&mut self, txn: &Txn) -> Applied<TxnOutcome> {
        for (index, compare) in txn.compares.iter().enumerate() {
            if !compare.holds(self.reader.get(compare.key())?.as_ref()) {
                return Ok(Ok(TxnOutcome::Conflict { index, revision: self.revision }));
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
                        create_revision: prev.as_ref().map_or(self.revision + 1, |prev| prev.create_revision),
                        mod_revision: self.revision + 1,
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

    fn put(&self, kv: KeyValue, prev: Option<KeyValue>, events: &mut Vec<Event>) -> Result<()> {
        self.execute(
            "INSERT INTO kv VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (key) DO UPDATE SET
                 value = excluded.value, create_revision = excluded.create_revision,
                 mod_revision = excluded.mod_revision, version = excluded.version, lease = excluded.lease",
            params![kv.key, &*kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease.map(|lease| lease.0)],
        )?;
        self.log(&kv.key, false, prev.as_ref(), events.len())?;
        events.push(Event { revision: self.revision + 1, kind: EventKind::Put(kv), prev });
        Ok(())
    }

    fn delete(&self, prev: KeyValue, events: &mut Vec<Event>) -> Result<()> {
        self.execute("DELETE FROM kv WHERE key = ?1", [&prev.key])?;
        self.log(&prev.key, true, Some(&prev), events.len())?;
        let kind = EventKind::Delete { key: prev.key.clone() };
        events.push(Event { revision: self.revision + 1, kind, prev: Some(prev) });
        Ok(())
    }

    fn log(&self, key: &str, deleted: bool, prev: Option<&KeyValue>, seq: usize) -> Result<()> {
        self.execute(
            "INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            params![
                self.revision + 1,
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
            self.revision += 1;
            self.commits.push(Commit::new(self.revision, events));
        }
        self.revision
    }

    fn lease_exists(&self, id: LeaseId) -> Result<bool> {
        self.reader
            .conn
            .prepare_cached("SELECT 1 FROM lease WHERE id = ?1")
            .and_then(|mut statement| statement.exists([id.0]))
            .map_err(|e| sql_error(self.reader.path, "cannot read", &e))
    }

    fn lease_grant(&mut self, ttl: Duration) -> Applied<LeaseId> {
        let millis = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        self.execute("INSERT INTO lease (ttl_ms) VALUES (?1)", [millis])?;
        let id = LeaseId(self.reader.conn.last_insert_rowid());
        self.granted.push((id, ttl));
        Ok(Ok(id))
    }

    fn lease_revoke(&mut self, id: LeaseId) -> Applied<Revision> {
        if self.execute("DELETE FROM lease WHERE id = ?1", [id.0])? == 0 {
            return Ok(Err(Error::LeaseNotFound { id }));
        }
        let mut events = Vec::new();
        for prev in self.reader.leased(id)? {
            self.delete(prev, &mut events)?;
        }
        self.revoked.push(id);
        Ok(Ok(self.seal(events)))
    }

    fn compact(&mut self, at: Revision) -> Result<()> {
        if at > self.revision {
            return Err(Error::FutureRevision { requested: at, current: self.revision });
        }
        self.compacted = self.compacted.max(at);
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
    fn auto_compact(&mut self, keep: Option<u64>) {
        let Some(mut keep) = keep.and_then(|keep| i64::try_from(keep).ok()) else { return };
        if self.used_bytes >= self.max_bytes - self.max_bytes / 8 {
            keep /= 8;
        }
        if self.revision.saturating_sub(self.compacted) > keep.saturating_add(keep / 8) {
            self.compacted = self.revision - keep;
        }
    }

    /// Drops some of the log that nobody can ask for, and tells whether there is more.
    fn purge(&self) -> Result<bool> {
        let dropped = self.execute(
            "DELETE FROM log WHERE (revision, seq) IN
                 (SELECT revision, seq FROM log WHERE revision <= ?1 ORDER BY revision, seq LIMIT ?2)",
            [self.compacted, PURGE_ROWS],
        )?;
        Ok(i64::try_from(dropped).unwrap_or(i64::MAX) >= PURGE_ROWS)
    }

    fn write_meta(&self, revision: Revision, compacted: Revision) -> Result<()> {
        for (name, old, new) in [("revision", revision, self.revision), ("compacted", compacted, self.compacted)] {
            if old != new {
                self.execute("UPDATE meta SET value = ?2 WHERE name = ?1", params![name, new])?;
            }
        }
        Ok(())
    }
}

/// Reads the leases of an opened store: id and TTL.
pub(super) fn load_leases(conn: &Connection, path: &Path) -> Result<Vec<(LeaseId, Duration)>> {
    let failed = |e: rusqlite::Error| sql_error(path, "cannot read", &e);
    let mut statement = conn.prepare("SELECT id, ttl_ms FROM lease").map_err(failed)?;
    let rows = statement
        .query_map([], |row| {
            let ttl: i64 = row.get(1)?;
            Ok((LeaseId(row.get(0)?), Duration::from_millis(u64::try_from(ttl).unwrap_or(0))))
        })
        .map_err(failed)?;
    rows.collect::<rusqlite::Result<_>>().map_err(failed)
}
