//! The contract.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;

use crate::error::{Error, Result};
use crate::model::{KeyValue, LeaseId, LeaseInfo, RangeRequest, RangeResponse, Revision, Txn, TxnOutcome};
use crate::watch::WatchStream;

/// A transactional key-value store with etcd's contract.
///
/// All calls are strictly serializable: a read sees every transaction that was answered before the
/// read began, and everything that any earlier read saw. An answered write is durable. A write call
/// that is dropped before its answer, or answered with [`Error::WritesStopped`], may or may not have
/// happened.
#[async_trait]
pub trait Store: Send + Sync {
    /// Reads one key.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>>;

    /// Reads one page of keys. Pages can be shorter than the limit (see
    /// [`limits::MAX_PAGE_BYTES`](crate::limits::MAX_PAGE_BYTES)): only
    /// [`more`](RangeResponse::more) tells whether there is another.
    ///
    /// # Errors
    /// [`Error::Compacted`] or [`Error::FutureRevision`] for a revision that cannot be read.
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse>;

    /// Applies a transaction if all its compares hold.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome>;

    /// Watches all keys that start with `prefix` for changes of revision `from` and later.
    ///
    /// After a range that answered revision `r`, watch from `r + 1`. As in etcd, `from` = 0 means
    /// "what happens from now on", and a `from` in the future waits for that revision.
    ///
    /// # Errors
    /// [`Error::Compacted`] when changes of revision `from` have been compacted.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream>;

    /// Makes a lease that lives for `ttl` after its grant and after each keep-alive. When the store
    /// restarts or changes its leader, every lease lives for its full `ttl` again.
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId>;

    /// Lets the lease live for its full TTL from now, and returns that TTL.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration>;

    /// Ends the lease and deletes its keys in one revision, which is returned (the newest revision
    /// when it had no keys). An expiring lease goes the same way.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    async fn lease_revoke(&self, id: LeaseId) -> Result<Revision>;

    /// Describes a lease.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    async fn lease_info(&self, id: LeaseId) -> Result<LeaseInfo>;

    /// Drops history up to `at`: revisions from `at` on can still be read, and the changes after
    /// `at` watched. Keys' present values are never touched. Compacting what is already compacted
    /// does nothing.
    ///
    /// # Errors
    /// [`Error::FutureRevision`].
    async fn compact(&self, at: Revision) -> Result<()>;

    /// The newest revision.
    async fn revision(&self) -> Result<Revision>;

    /// Writes a consistent copy to `path`, which must not exist, and returns the revision it holds.
    async fn backup(&self, path: &Path) -> Result<Revision>;
}

/// Reads every key under `prefix` as of one revision, page by page, and returns that revision too.
/// Starts over when compaction overtakes it.
///
/// # Errors
/// Those of [`Store::range`].
pub async fn list(store: &dyn Store, prefix: &str) -> Result<(Vec<KeyValue>, Revision)> {
    'anew: loop {
        let mut request = RangeRequest::prefix(prefix);
        let mut kvs = Vec::new();
        loop {
            let page = match store.range(request.clone()).await {
                Err(Error::Compacted { .. }) => continue 'anew,
                page => page?,
            };
            kvs.extend(page.kvs);
            match kvs.last() {
                Some(last) if page.more => {
                    request = request.after(last.key.clone()).at(page.revision);
                }
                _ => return Ok((kvs, page.revision)),
            }
        }
    }
}
