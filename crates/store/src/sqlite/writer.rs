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

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shared;
use super::checkpoint::Checkpointer;
use super::group::{Applied, Group};
use super::read::Reader;
use super::schema::sql_error;
use crate::error::{Error, Result};
use crate::model::{LeaseId, Revision, Txn, TxnOutcome};

/// Requests in one group commit, at most.
const GROUP: usize = 512;
/// Bytes of transactions in one group commit, about.
const GROUP_BYTES: usize = 8 * 1024 * 1024;
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
    checkpointer: Checkpointer,
    /// Newest durable revision.
    revision: Revision,
    /// Oldest revision that can be read.
    compacted: Revision,
    /// The log may have rows that no reader can ask for.
    purge: bool,
    /// The last group failed for lack of space: do not purge in a hot loop.
    short_of_space: bool,
}

impl Writer {
    pub(super) fn new(
        conn: Connection,
        shared: Arc<Shared>,
        queue: Receiver<Queued>,
        checkpointer: Checkpointer,
        revision: Revision,
        compacted: Revision,
    ) -> Self {
        Self { conn, shared, queue, checkpointer, revision, compacted, purge: true, short_of_space: false }
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
        self.checkpointer.stop();
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
            let options = &self.shared.options;
            let reader = Reader { conn: &transaction, path: &path };
            let mut group = Group::new(reader, options.max_bytes, self.revision, self.compacted)?;
            for id in expired {
                match group.lease_revoke(*id)? {
                    Ok(_) | Err(Error::LeaseNotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            for request in requests.by_ref() {
                apply(&mut group, request, answers)?;
            }
            group.auto_compact(options.keep_revisions);
            let purge = self.purge || group.changes.compacted != self.compacted;
            let left = if purge { group.purge()? } else { false };
            group.write_meta(self.revision, self.compacted)?;
            let changes = group.changes;
            transaction.commit().map_err(failed("cannot commit to"))?;
            Ok((changes, left))
        };
        match step() {
            Ok((changes, left)) => {
                self.revision = changes.revision;
                self.compacted = changes.compacted;
                self.purge = left;
                self.short_of_space = false;
                let now = Instant::now();
                for (id, ttl) in changes.granted {
                    self.shared.leases.add(id, ttl, now);
                }
                for id in changes.revoked {
                    self.shared.leases.remove(id);
                }
                self.checkpointer.written(changes.pages);
                self.shared.hub.publish(changes.commits);
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

/// Applies one request, and leaves its answer for when the group is durable.
fn apply(group: &mut Group<'_>, request: Request, answers: &mut Vec<Answer>) -> Result<()> {
    match request {
        Request::Txn(txn, reply) => settle(reply, group.txn(&txn), answers),
        Request::LeaseGrant(ttl, reply) => settle(reply, group.lease_grant(ttl), answers),
        Request::LeaseRevoke(id, reply) => settle(reply, group.lease_revoke(id), answers),
        Request::Compact(at, reply) => settle(reply, Ok(group.compact(at)), answers),
        Request::Shutdown => Ok(()),
    }
}

/// Keeps a request's own result for its answer. A failure of the database is everybody's.
fn settle<T: Send + 'static>(
    reply: oneshot::Sender<Result<T>>,
    applied: Applied<T>,
    answers: &mut Vec<Answer>,
) -> Result<()> {
    let (result, fate) = match applied {
        Ok(result) => (result, Ok(())),
        Err(error) => (Err(error.clone()), Err(error)),
    };
    answers.push(Box::new(move |failure| {
        let result = match failure {
            Some(error) => Err(error.clone()),
            None => result,
        };
        // A caller that went away needs no answer.
        drop(reply.send(result));
    }));
    fate
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
