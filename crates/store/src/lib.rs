//! The control plane's transactional key-value store.
//!
//! One trait, [`Store`], with etcd's contract: multi-version keys, transactions that compare before
//! they write, ordered watches that can resume from any kept revision, leases, compaction. The
//! default backend is [`sqlite::SqliteStore`], one file on the control plane's disk. A backend is
//! good when it passes the `conformance` module (feature `conformance`).
//!
//! ```
//! use hearth_store::{Store, Txn, TxnOutcome, list, sqlite::SqliteStore};
//!
//! # #[tokio::main] async fn main() -> hearth_store::Result<()> {
//! let store = SqliteStore::open_temporary()?;
//! // Create: only if the key is not there yet.
//! let create = Txn::new().compare_absent("/host/h-1").put("/host/h-1", "up");
//! let TxnOutcome::Committed { revision } = store.txn(create).await? else { panic!("it exists") };
//! // Read everything, then follow from there: no change is missed or seen twice.
//! let (hosts, seen) = list(&store, "/host/").await?;
//! let mut changes = store.watch("/host/", seen + 1).await?;
//! // Change what was read, unless somebody else changed it in between.
//! let change = Txn::new().compare_mod_revision("/host/h-1", hosts[0].mod_revision).put("/host/h-1", "down");
//! assert!(store.txn(change.clone()).await?.is_committed());
//! assert_eq!(store.txn(change).await?, TxnOutcome::Conflict { index: 0, revision: revision + 1 });
//! assert_eq!(changes.next().await.unwrap()?.events[0].key(), "/host/h-1");
//! # Ok(()) }
//! ```
//!
//! # The contract in short
//! - Every transaction that changes something gets the next [`Revision`]; nothing else does. A key
//!   remembers the revisions of its creation and of its last change.
//! - All calls are strictly serializable, and an answered write is durable.
//! - A transaction changes a key once; [`limits`] bound it.
//! - A [`WatchStream`] delivers one batch per revision that touched its prefix. As revisions are only
//!   made by changes, a watch of `/` sees every revision: a cache fed by it knows exactly how far it is.
//! - [`leader`] elections give terms that grow, and [`Txn::guard`] makes a write valid in one term only.
//!
//! # What failures mean
//! | error | what happened | what to do |
//! |---|---|---|
//! | [`Error::Compacted`] | the history asked for is gone | [`list`] again, watch from there |
//! | [`Error::LeaseNotFound`] | the lease ran out | start over with a new one |
//! | [`Error::NoSpace`] | nothing was written | make room; writes then work again |
//! | [`Error::WritesStopped`] | a write failed half-way; it may be there after the next open | restart on a sound disk |
//! | [`Error::Corrupt`] | the file is damaged | [`sqlite::restore`] a backup |

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
