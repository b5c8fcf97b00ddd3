//! The data of the contract: keys, revisions, ranges, transactions, events, leases.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;

use crate::limits;

/// Number of a committed write transaction: strictly increasing, one per transaction that changed
/// something. 0 is the empty store.
pub type Revision = i64;

/// Identifies a lease. Never used twice by one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A lease as the store sees it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    /// The lease.
    pub id: LeaseId,
    /// Time to live that every keep-alive restores.
    pub ttl: Duration,
    /// Time left until it expires.
    pub remaining: Duration,
    /// Keys that go with it, sorted.
    pub keys: Vec<String>,
}

/// A key with its value and history numbers, as etcd keeps them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Bytes,
    /// Revision that created the key (since its last deletion).
    pub create_revision: Revision,
    /// Revision of its last put.
    pub mod_revision: Revision,
    /// Puts since creation; 1 after the first.
    pub version: i64,
    /// Lease the key goes with.
    pub lease: Option<LeaseId>,
}

impl KeyValue {
    /// Bytes of key and value.
    #[must_use]
    pub fn size(&self) -> usize {
        self.key.len() + self.value.len()
    }
}

/// What to read. Keys come in byte order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeRequest {
    /// First key (inclusive).
    pub start: String,
    /// Bound above the last key (exclusive); `None` reads to the end.
    pub end: Option<String>,
    /// Most keys to return, at most [`limits::MAX_PAGE_KEYS`]; 0 means that limit.
    pub limit: usize,
    /// Page cursor: only keys above this one. Give the last key of the page before, and its
    /// [`RangeResponse::revision`] as `at`, for pages that belong together.
    pub after: Option<String>,
    /// Read as of this revision; `None` reads the newest.
    pub at: Option<Revision>,
}

impl RangeRequest {
    /// All keys that start with `prefix`.
    #[must_use]
    pub fn prefix(prefix: impl Into<String>) -> Self {
        let start = prefix.into();
        Self { end: limits::prefix_end(&start), start, limit: 0, after: None, at: None }
    }

    /// All keys in `start..end`.
    #[must_use]
    pub fn between(start: impl Into<String>, end: impl Into<String>) -> Self {
        Self { start: start.into(), end: Some(end.into()), limit: 0, after: None, at: None }
    }

    /// At most `limit` keys per page.
    #[must_use]
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Only keys above `key`.
    #[must_use]
    pub fn after(mut self, key: impl Into<String>) -> Self {
        self.after = Some(key.into());
        self
    }

    /// As of `revision`.
    #[must_use]
    pub fn at(mut self, revision: Revision) -> Self {
        self.at = Some(revision);
        self
    }
}

/// One page of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeResponse {
    /// Keys in byte order.
    pub kvs: Vec<KeyValue>,
    /// There are more keys after the last one.
    pub more: bool,
    /// Revision the page shows: the one asked for, else the newest.
    pub revision: Revision,
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key's last change has this revision; 0 = the key is absent.
    ModRevision {
        /// The key.
        key: String,
        /// Revision it must have.
        equals: Revision,
    },
    /// The key's creation has this revision; 0 = the key is absent.
    CreateRevision {
        /// The key.
        key: String,
        /// Revision it must have.
        equals: Revision,
    },
    /// The key exists with this value.
    Value {
        /// The key.
        key: String,
        /// Value it must have.
        equals: Bytes,
    },
    /// The key exists.
    Exists {
        /// The key.
        key: String,
    },
    /// The key does not exist.
    Absent {
        /// The key.
        key: String,
    },
}

impl Compare {
    /// The key it looks at.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::ModRevision { key, .. }
            | Self::CreateRevision { key, .. }
            | Self::Value { key, .. }
            | Self::Exists { key }
            | Self::Absent { key } => key,
        }
    }

    /// Whether it holds for the key's present state (`None` = absent).
    #[must_use]
    pub fn holds(&self, found: Option<&KeyValue>) -> bool {
        match self {
            Self::ModRevision { equals, .. } => found.map_or(0, |kv| kv.mod_revision) == *equals,
            Self::CreateRevision { equals, .. } => found.map_or(0, |kv| kv.create_revision) == *equals,
            Self::Value { equals, .. } => found.is_some_and(|kv| kv.value == *equals),
            Self::Exists { .. } => found.is_some(),
            Self::Absent { .. } => found.is_none(),
        }
    }
}

/// A change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Creates or overwrites a key. `lease: None` detaches it from any lease.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Bytes,
        /// Lease the key is to go with.
        lease: Option<LeaseId>,
    },
    /// Deletes a key; an absent one is no error.
    Delete {
        /// The key.
        key: String,
    },
    /// Deletes every key that starts with `prefix`.
    DeletePrefix {
        /// The prefix.
        prefix: String,
    },
}

/// All-or-nothing: when every compare holds, every operation is applied in one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions, checked in order.
    pub compares: Vec<Compare>,
    /// Changes, applied in order.
    pub ops: Vec<Op>,
}

impl Txn {
    /// An empty transaction.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn compare(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Requires that `key` does not exist.
    #[must_use]
    pub fn compare_absent(self, key: impl Into<String>) -> Self {
        self.compare(Compare::Absent { key: key.into() })
    }

    /// Requires that `key` exists.
    #[must_use]
    pub fn compare_exists(self, key: impl Into<String>) -> Self {
        self.compare(Compare::Exists { key: key.into() })
    }

    /// Requires that the last change of `key` has revision `equals` (0 = absent).
    #[must_use]
    pub fn compare_mod_revision(self, key: impl Into<String>, equals: Revision) -> Self {
        self.compare(Compare::ModRevision { key: key.into(), equals })
    }

    /// Requires that `key` was created by revision `equals` (0 = absent).
    #[must_use]
    pub fn compare_create_revision(self, key: impl Into<String>, equals: Revision) -> Self {
        self.compare(Compare::CreateRevision { key: key.into(), equals })
    }

    /// Requires that `key` exists with value `equals`.
    #[must_use]
    pub fn compare_value(self, key: impl Into<String>, equals: impl Into<Bytes>) -> Self {
        self.compare(Compare::Value { key: key.into(), equals: equals.into() })
    }

    /// Adds a change.
    #[must_use]
    pub fn op(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }

    /// Puts `key`.
    #[must_use]
    pub fn put(self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.op(Op::Put { key: key.into(), value: value.into(), lease: None })
    }

    /// Puts `key`, to be deleted with `lease`.
    #[must_use]
    pub fn put_with_lease(self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.op(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) })
    }

    /// Deletes `key`.
    #[must_use]
    pub fn delete(self, key: impl Into<String>) -> Self {
        self.op(Op::Delete { key: key.into() })
    }

    /// Deletes every key that starts with `prefix`.
    #[must_use]
    pub fn delete_prefix(self, prefix: impl Into<String>) -> Self {
        self.op(Op::DeletePrefix { prefix: prefix.into() })
    }

    /// Bytes of all keys and values in it.
    #[must_use]
    pub fn size(&self) -> usize {
        let compares = self.compares.iter().map(|compare| {
            let value = match compare {
                Compare::Value { equals, .. } => equals.len(),
                _ => 0,
            };
            compare.key().len() + value
        });
        let ops = self.ops.iter().map(|op| match op {
            Op::Put { key, value, .. } => key.len() + value.len(),
            Op::Delete { key } => key.len(),
            Op::DeletePrefix { prefix } => prefix.len(),
        });
        compares.chain(ops).sum()
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Every compare held and every operation is applied and durable.
    Committed {
        /// Revision of the changes; the newest revision when nothing changed (no operations, or
        /// deletes that hit nothing), because such a transaction makes no revision.
        revision: Revision,
    },
    /// A compare did not hold; nothing was applied.
    Conflict {
        /// Index of the first compare that failed.
        index: usize,
        /// Revision at which it was checked.
        revision: Revision,
    },
}

impl TxnOutcome {
    /// Revision at which the transaction was decided.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Committed { revision } | Self::Conflict { revision, .. } => *revision,
        }
    }

    /// Whether it was applied.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        matches!(self, Self::Committed { .. })
    }
}

/// What happened to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// It was created or overwritten.
    Put(KeyValue),
    /// It was deleted, by a transaction or with its lease.
    Delete {
        /// The key.
        key: String,
    },
}

/// A change of one key. A key changes at most once per revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Revision of the change.
    pub revision: Revision,
    /// What happened.
    pub kind: EventKind,
    /// The key before the change, when it existed. A backend may leave it out for history that is
    /// being compacted.
    pub prev: Option<KeyValue>,
}

impl Event {
    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match &self.kind {
            EventKind::Put(kv) => &kv.key,
            EventKind::Delete { key } => key,
        }
    }
}

/// All watched changes of one revision, in the order of the transaction's operations. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// The revision.
    pub revision: Revision,
    /// Its events.
    pub events: Vec<Event>,
}
