//! The control plane's transactional key-value store.
//!
//! One trait, [`Store`], with etcd's contract: multi-version keys, transactions that compare before
//! they write, ordered watches that can resume from any kept revision, leases, compaction. The
//! default backend is [`sqlite::SqliteStore`], one file on the control plane's disk.

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod error;
pub mod leader;
pub mod limits;
mod model;
pub mod sqlite;

mod store;
mod watch;

pub use bytes::Bytes;

pub use error::{Error, Result};
pub use leader::Leadership;
pub use model::{
    Compare, Event, EventKind, KeyValue, LeaseId, LeaseInfo, Op, RangeRequest, RangeResponse, Revision, Txn,
    TxnOutcome, WatchBatch,
};
pub use store::{Store, list};
pub use watch::WatchStream;
