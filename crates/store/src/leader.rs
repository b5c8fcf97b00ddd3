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

/// Tells who was elected last, also when nobody leads; its modification revision is that leader's term.
pub const LAST_LEADER_KEY: &str = "/last-leader";

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
        if let Claim::Won(leadership) = claim(store, Txn::new(), name, ttl).await? {
            return Ok(leadership);
        }
    }
}

/// How a try to become leader ended.
enum Claim {
    Won(Leadership),
    /// There is a leader.
    Taken,
    /// A further compare did not hold.
    Refused,
}

/// Becomes leader if there is none and the compares of `only_if` hold.
async fn claim(store: &dyn Store, only_if: Txn, name: &str, ttl: Duration) -> Result<Claim> {
    loop {
        let lease = store.lease_grant(ttl).await?;
        let mut txn = only_if
            .clone()
            .put_with_lease(LEADER_KEY, name.to_owned().into_bytes(), lease)
            .put(LAST_LEADER_KEY, name.to_owned().into_bytes());
        txn.compares.insert(0, Compare::CreateRevision { key: LEADER_KEY.to_owned(), equals: 0 });
        match store.txn(txn).await {
            Ok(TxnOutcome::Committed { revision: term }) => {
                return Ok(Claim::Won(Leadership { term, lease, name: name.to_owned(), ttl }));
            }
            // The fresh lease can only be missing after a stall of a whole TTL: try again.
            Err(Error::LeaseNotFound { .. }) => {}
            Ok(TxnOutcome::Conflict { index, .. }) => {
                discard(store, lease).await?;
                return Ok(if index == 0 { Claim::Taken } else { Claim::Refused });
            }
            Err(error) => {
                discard(store, lease).await?;
                return Err(error);
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

    /// Takes leadership again, under a new and greater term, after it was lost to a stall: a lease that ran out although this
    /// process goes on. That happens only while nobody else has been elected since (not even an earlier or later life of the
    /// same name), so what the leader holds in memory beside the store is still the whole truth. What it wrote under the lost
    /// term and was refused may be written again under the new one.
    ///
    /// # Errors
    /// [`Error::LeadershipLost`] when another was elected since; those of the store's calls, a full disk excepted, which is
    /// waited out.
    pub async fn retake(&self, store: &dyn Store) -> Result<Leadership> {
        let nobody_since = Txn::new().compare_mod_revision(LAST_LEADER_KEY, self.term);
        loop {
            match claim(store, nobody_since.clone(), &self.name, self.ttl).await {
                Ok(Claim::Won(leadership)) => return Ok(leadership),
                Ok(Claim::Refused) => return Err(self.lost("another control plane has led since".to_owned())),
                Ok(Claim::Taken) => match store.get(LEADER_KEY).await? {
                    // Its expiry is under way, or it was given up too early.
                    Some(kv) if kv.create_revision == self.term => depose(store, self.term, kv.lease).await?,
                    Some(kv) => {
                        let leader = String::from_utf8_lossy(&kv.value).into_owned();
                        return Err(
                            self.lost(format!("control plane '{leader}' leads now, in term {}", kv.create_revision))
                        );
                    }
                    None => {}
                },
                Err(error @ Error::NoSpace { .. }) => {
                    tracing::warn!(term = self.term, %error, "leadership cannot be taken again yet");
                    tokio::time::sleep(self.ttl / 4).await;
                }
                Err(error) => return Err(error),
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
