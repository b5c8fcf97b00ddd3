//! What can go wrong in the store, in words an operator can act on.

use std::path::PathBuf;
use std::time::Duration;

use crate::model::{LeaseId, Revision};

/// Result of a store operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every way a store call can fail.
///
/// A *conflict* (a compare that did not hold) is not an error: see
/// [`TxnOutcome::Conflict`](crate::TxnOutcome::Conflict).
///
/// The type is `Clone` because one failed group commit answers many callers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key breaks the key syntax (see [`limits::check_key`](crate::limits::check_key)).
    #[error("invalid key {key:?}: {reason}")]
    InvalidKey {
        /// The key as given, cut to a printable length.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A prefix or range bound breaks the key syntax.
    #[error("invalid key prefix or bound {prefix:?}: {reason}")]
    InvalidPrefix {
        /// The prefix as given, cut to a printable length.
        prefix: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A value exceeds [`limits::MAX_VALUE_BYTES`](crate::limits::MAX_VALUE_BYTES).
    #[error("value of key {key:?} has {size} bytes, the limit is {limit}")]
    ValueTooLarge {
        /// Key of the value.
        key: String,
        /// Size in bytes.
        size: usize,
        /// Limit in bytes.
        limit: usize,
    },
    /// A transaction has more operations than [`limits::MAX_TXN_OPS`](crate::limits::MAX_TXN_OPS).
    #[error("transaction has {count} operations, the limit is {limit}")]
    TooManyOps {
        /// Operations in the transaction.
        count: usize,
        /// Limit.
        limit: usize,
    },
    /// A transaction has more compares than [`limits::MAX_TXN_OPS`](crate::limits::MAX_TXN_OPS).
    #[error("transaction has {count} compares, the limit is {limit}")]
    TooManyCompares {
        /// Compares in the transaction.
        count: usize,
        /// Limit.
        limit: usize,
    },
    /// A transaction exceeds [`limits::MAX_REQUEST_BYTES`](crate::limits::MAX_REQUEST_BYTES) in all.
    #[error("request has {size} bytes, the limit is {limit}")]
    RequestTooLarge {
        /// Size in bytes, keys and values together.
        size: usize,
        /// Limit in bytes.
        limit: usize,
    },
    /// A range asked for pages above [`limits::MAX_PAGE_KEYS`](crate::limits::MAX_PAGE_KEYS).
    #[error("page of {requested} keys requested, the limit is {limit}")]
    PageTooLarge {
        /// Keys per page asked for.
        requested: usize,
        /// Limit.
        limit: usize,
    },
    /// A transaction changes one key twice.
    #[error("transaction changes key {key:?} more than once")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// The history asked for has been compacted away: list again and watch from there.
    #[error("the requested revision has been compacted, the oldest one kept is {oldest}")]
    Compacted {
        /// Oldest revision that can still be read or watched from.
        oldest: Revision,
    },
    /// A revision above the newest one was asked for.
    #[error("revision {requested} does not exist yet, the newest is {current}")]
    FutureRevision {
        /// Revision asked for.
        requested: Revision,
        /// Newest revision.
        current: Revision,
    },
    /// A negative revision was given.
    #[error("revision {requested} is negative")]
    InvalidRevision {
        /// Revision given.
        requested: Revision,
    },
    /// The lease has expired, was revoked, or never was.
    #[error("lease {id} not found: it has expired, was revoked or never existed")]
    LeaseNotFound {
        /// The lease.
        id: LeaseId,
    },
    /// A lease TTL is outside the permitted range.
    #[error("lease TTL of {ttl:?} is outside {min:?}..={max:?}")]
    LeaseTtl {
        /// TTL asked for.
        ttl: Duration,
        /// Shortest TTL.
        min: Duration,
        /// Longest TTL.
        max: Duration,
    },
    /// A candidate's name is unusable.
    #[error("invalid candidate name {name:?}: {reason}")]
    InvalidCandidate {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Leadership of this term is over; stop acting on it.
    #[error("leadership of term {term} is lost: {reason}")]
    LeadershipLost {
        /// The term that ended.
        term: Revision,
        /// How it was noticed.
        reason: String,
    },
    /// Another process has the store open.
    #[error("store {} is in use by {}", path.display(), holder(*pid))]
    InUse {
        /// Path of the store.
        path: PathBuf,
        /// The process that holds the lock, when it can be told.
        pid: Option<u32>,
    },
    /// The store was written by a newer release.
    #[error(
        "store {} has schema version {found}, this release reads up to {supported}: start the newer release or restore an older backup",
        path.display()
    )]
    NewerSchema {
        /// Path of the store.
        path: PathBuf,
        /// Schema version found.
        found: i64,
        /// Newest schema version this release knows.
        supported: i64,
    },
    /// The file is something else than a hearth store.
    #[error("{} is not a hearth store: {reason}", path.display())]
    NotAStore {
        /// Path of the file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The store's file is damaged.
    #[error("store {} is damaged: {detail}: restore it from a backup", path.display())]
    Corrupt {
        /// Path of the store.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// No room for the write. Nothing of it was applied; writes work again once there is room.
    #[error("store {} has no space left: {detail}", path.display())]
    NoSpace {
        /// Path of the store.
        path: PathBuf,
        /// Which space: the file system or the store's own size limit.
        detail: String,
    },
    /// A write failed in a way that leaves the disk's state unknown. Writes are refused until the
    /// store is opened again; reads go on. The write that met this error may or may not be there
    /// after the next open.
    #[error("store {} refuses writes until it is reopened: {cause}", path.display())]
    WritesStopped {
        /// Path of the store.
        path: PathBuf,
        /// The first failure.
        cause: String,
    },
    /// Any other failure of the file system.
    #[error("{action} {}: {detail}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's error text.
        detail: String,
    },
    /// Any other failure of the backend's database.
    #[error("{action} store {}: {detail}", path.display())]
    Backend {
        /// What was being done.
        action: &'static str,
        /// Path (or endpoint) of the store.
        path: PathBuf,
        /// The database's error text.
        detail: String,
    },
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
}

impl Error {
    /// Wraps a failure of the file system.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: &std::io::Error) -> Self {
        Self::Io { action, path: path.into(), detail: source.to_string() }
    }
}

/// Names the holder of a lock.
fn holder(pid: Option<u32>) -> String {
    match pid {
        Some(pid) if pid == std::process::id() => format!("this process ({pid})"),
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}
