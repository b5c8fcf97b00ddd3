//! Leader election with fencing.
//!
//! The leader is whoever created [`LEADER_KEY`]; its *term* is the key's create revision, which
//! grows with every election in every backend. A lease keeps the key alive, but safety never rests
//! on time: every write of a leader carries [`Txn::guard`], so a leader that was overtaken without
//! noticing (paused, partitioned) cannot write, and agents refuse commands of an older term.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::limits;
use crate::model::{Compare, EventKind, LeaseId, Revision, Txn, TxnOutcome};
use crate::store::Store;

/// The key that the leader holds; its value is the leader's name.
pub const LEADER_KEY: &str = "/leader";

/// Proof of one term as leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leadership {
    /// Term: create revision of [`LEADER_KEY`]. Greater than that of any earlier leader.
    pub term: Revision,
    /// Lease under which the key lives.
    pub lease: LeaseId,
    /// Name of the leader.
    pub name: String,
    /// TTL of the lease.
    pub ttl: Duration,
}

impl Txn {
    /// Makes the transaction valid only while `leadership` is. The compare is put first, so
    /// `Conflict { index: 0, .. }` on a guarded transaction means that leadership is lost.
    #[must_use]
    pub fn guard(mut self, leadership: &Leadership) -> Self {
        let compare = Compare::CreateRevision { key: LEADER_KEY.to_owned(), equals: leadership.term };
        self.compares.insert(0, compare);
        self
    }
}

/// Waits until this process is the leader.
///
/// `name` is to be unique among the control planes of a region and stable over restarts: a leader
/// found under the same name is an earlier life of this candidate, and is deposed at once instead of
/// waiting for its lease. In a one-process store every start thus gets a new, greater term without
/// delay.
///
/// # Errors
/// [`Error::InvalidCandidate`], [`Error::LeaseTtl`], and those of the store's calls. Dropping the
/// future leaves a lease behind that expires by itself.
pub async fn campaign(store: &dyn Store, name: &str, ttl: Duration) -> Result<Leadership> {
    check_name(name)?;
    loop {
        match store.get(LEADER_KEY).await? {
            Some(kv) if kv.value == name.as_bytes() => depose(store, kv.create_revision, kv.lease).await?,
            Some(kv) => wait_until_gone(store, kv.mod_revision + 1).await?,
            None => {}
        }
        let lease = store.lease_grant(ttl).await?;
        let claim =
            Txn::new().compare_absent(LEADER_KEY).put_with_lease(LEADER_KEY, name.to_owned().into_bytes(), lease);
        match store.txn(claim).await {
            Ok(TxnOutcome::Committed { revision: term }) => {
                return Ok(Leadership { term, lease, name: name.to_owned(), ttl });
            }
            // The fresh lease can only be missing after a stall of a whole TTL: try again.
            Err(Error::LeaseNotFound { .. }) => {}
            outcome => {
                discard(store, lease).await?;
                outcome?;
            }
        }
    }
}

impl Leadership {
    /// Keeps the lease alive until leadership is lost, and returns how: await it beside the work
    /// and stop the work when it returns. Failed keep-alives are retried until the TTL has passed.
    pub async fn hold(&self, store: &dyn Store) -> Error {
        let pause = self.ttl / 4;
        let mut good_until = Instant::now() + self.ttl;
        loop {
            tokio::time::sleep(pause).await;
            let asked = Instant::now();
            match tokio::time::timeout_at(good_until, store.lease_keep_alive(self.lease)).await {
                Ok(Ok(ttl)) => good_until = asked + ttl,
                Ok(Err(error @ (Error::LeaseNotFound { .. } | Error::Closed))) => {
                    return self.lost(error.to_string());
                }
                Ok(Err(error)) if Instant::now() >= good_until => {
                    return self.lost(error.to_string());
                }
                Ok(Err(error)) => {
                    tracing::warn!(term = self.term, %error, "leader lease could not be kept alive");
                }
                Err(_) => return self.lost("the store did not answer within the lease".to_owned()),
            }
        }
    }

    /// Gives leadership up, so that another candidate need not wait for the lease to expire.
    ///
    /// # Errors
    /// Those of [`Store::lease_revoke`]; a lease that is already gone is none.
    pub async fn resign(self, store: &dyn Store) -> Result<()> {
        discard(store, self.lease).await
    }

    fn lost(&self, reason: String) -> Error {
        Error::LeadershipLost { term: self.term, reason }
    }
}

fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "must not be empty"
    } else if name.len() > limits::MAX_KEY_BYTES {
        "is longer than 1024 bytes"
    } else {
        return Ok(());
    };
    Err(Error::InvalidCandidate { name: name.chars().take(80).collect(), reason })
}

/// Ends the term of an earlier life of this candidate. That term's guarded writes fail from here on.
async fn depose(store: &dyn Store, term: Revision, lease: Option<LeaseId>) -> Result<()> {
    let end = Txn::new().compare_create_revision(LEADER_KEY, term).delete(LEADER_KEY);
    store.txn(end).await?;
    match lease {
        Some(lease) => discard(store, lease).await,
        None => Ok(()),
    }
}

/// Revokes a lease that may be gone already.
async fn discard(store: &dyn Store, lease: LeaseId) -> Result<()> {
    match store.lease_revoke(lease).await {
        Ok(_) | Err(Error::LeaseNotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Waits for the deletion of the leader key at `from` or later.
async fn wait_until_gone(store: &dyn Store, from: Revision) -> Result<()> {
    let mut watch = match store.watch(LEADER_KEY, from).await {
        // So much happened that the deletion may be among it: look again.
        Err(Error::Compacted { .. }) => return Ok(()),
        watch => watch?,
    };
    while let Some(batch) = watch.next().await {
        let batch = match batch {
            Err(Error::Compacted { .. }) => return Ok(()),
            batch => batch?,
        };
        let gone = |kind: &EventKind| matches!(kind, EventKind::Delete { key } if key == LEADER_KEY);
        if batch.events.iter().any(|event| gone(&event.kind)) {
            return Ok(());
        }
    }
    Err(Error::Closed)
}
