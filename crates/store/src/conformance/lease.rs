//! Leases. No case depends on how fast the machine is: waits are for events, not for times.

use std::sync::Arc;
use std::time::Duration;

use super::{briefs, commit, next, put};
use crate::limits::{MAX_LEASE_TTL, MIN_LEASE_TTL};
use crate::{Error, LeaseId, Store, Txn};

const LONG: Duration = Duration::from_secs(3600);

/// Revoking deletes all keys of the lease at once, and the lease is gone.
pub async fn revoking_deletes_its_keys_in_one_revision(store: Arc<dyn Store>) {
    let lease = store.lease_grant(LONG).await.unwrap();
    let other = store.lease_grant(LONG).await.unwrap();
    let txn = Txn::new().put_with_lease("/b", "", lease).put_with_lease("/a", "", lease).put("/c", "");
    commit(store.as_ref(), txn).await;
    let last = commit(store.as_ref(), Txn::new().put_with_lease("/d", "", other)).await;
    let info = store.lease_info(lease).await.unwrap();
    assert_eq!((info.id, info.keys), (lease, vec!["/a".to_owned(), "/b".to_owned()]));
    assert!(info.ttl >= LONG && info.remaining <= info.ttl);
    assert_eq!(store.get("/a").await.unwrap().unwrap().lease, Some(lease));

    let mut watch = store.watch("/", 0).await.unwrap();
    let revision = store.lease_revoke(lease).await.unwrap();
    assert_eq!(revision, last + 1);
    let batch = next(&mut watch).await;
    let mut events = briefs(&batch);
    events.sort();
    assert_eq!((batch.revision, events), (revision, vec!["-/a".to_owned(), "-/b".to_owned()]));
    assert!(store.get("/c").await.unwrap().is_some());
    assert!(store.get("/d").await.unwrap().is_some());
    assert_eq!(store.lease_revoke(lease).await.unwrap_err(), Error::LeaseNotFound { id: lease });
    assert_eq!(store.lease_info(lease).await.unwrap_err(), Error::LeaseNotFound { id: lease });
}

/// A lease that nobody keeps alive goes, with its keys.
pub async fn an_expired_lease_takes_its_keys(store: Arc<dyn Store>) {
    let lease = store.lease_grant(MIN_LEASE_TTL).await.unwrap();
    let mut watch = store.watch("/", 0).await.unwrap();
    commit(store.as_ref(), Txn::new().put_with_lease("/a", "", lease).put_with_lease("/b", "", lease)).await;
    assert_eq!(next(&mut watch).await.events.len(), 2);
    let batch = next(&mut watch).await;
    let mut events = briefs(&batch);
    events.sort();
    assert_eq!(events, ["-/a", "-/b"]);
    assert_eq!(store.get("/a").await.unwrap(), None);
    assert_eq!(store.lease_keep_alive(lease).await.unwrap_err(), Error::LeaseNotFound { id: lease });
}

/// A lease that is kept alive outlives one with a longer TTL that is not.
pub async fn keep_alive_keeps_it(store: Arc<dyn Store>) {
    let kept = store.lease_grant(Duration::from_secs(4)).await.unwrap();
    commit(store.as_ref(), Txn::new().put_with_lease("/kept", "", kept)).await;
    let clock = store.lease_grant(Duration::from_secs(6)).await.unwrap();
    commit(store.as_ref(), Txn::new().put_with_lease("/clock", "", clock)).await;
    let mut watch = store.watch("/", 0).await.unwrap();
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let batch = loop {
        tokio::select! {
            batch = next(&mut watch) => break batch,
            _ = tick.tick() => assert!(store.lease_keep_alive(kept).await.unwrap() >= Duration::from_secs(4)),
        }
    };
    assert_eq!(briefs(&batch), ["-/clock"]);
    // Left alone, it goes too.
    assert_eq!(briefs(&next(&mut watch).await), ["-/kept"]);
}

/// A put without a lease makes the key stay.
pub async fn a_put_without_lease_detaches_the_key(store: Arc<dyn Store>) {
    let lease = store.lease_grant(LONG).await.unwrap();
    commit(store.as_ref(), Txn::new().put_with_lease("/a", "1", lease)).await;
    let last = put(store.as_ref(), "/a", "2").await;
    assert_eq!(store.get("/a").await.unwrap().unwrap().lease, None);
    // It has no keys left, so its end is no revision.
    assert_eq!(store.lease_revoke(lease).await.unwrap(), last);
    assert_eq!(store.get("/a").await.unwrap().unwrap().value, "2");
}

/// A put with another lease moves the key there.
pub async fn a_put_moves_the_key_to_another_lease(store: Arc<dyn Store>) {
    let first = store.lease_grant(LONG).await.unwrap();
    let second = store.lease_grant(LONG).await.unwrap();
    commit(store.as_ref(), Txn::new().put_with_lease("/a", "1", first)).await;
    commit(store.as_ref(), Txn::new().put_with_lease("/a", "2", second)).await;
    store.lease_revoke(first).await.unwrap();
    assert_eq!(store.get("/a").await.unwrap().unwrap().lease, Some(second));
    store.lease_revoke(second).await.unwrap();
    assert_eq!(store.get("/a").await.unwrap(), None);
}

/// Unknown leases are errors; in a transaction only if its compares hold, and then nothing is done.
pub async fn unknown_leases_are_refused(store: Arc<dyn Store>) {
    let id = LeaseId(0x7fff_1234_5678_9abc);
    assert_eq!(store.lease_keep_alive(id).await.unwrap_err(), Error::LeaseNotFound { id });
    assert_eq!(store.lease_revoke(id).await.unwrap_err(), Error::LeaseNotFound { id });
    assert_eq!(store.lease_info(id).await.unwrap_err(), Error::LeaseNotFound { id });
    let revision = store.revision().await.unwrap();
    let txn = Txn::new().put("/first", "").put_with_lease("/a", "", id);
    assert_eq!(store.txn(txn.clone()).await.unwrap_err(), Error::LeaseNotFound { id });
    assert!(!store.txn(txn.compare_exists("/none")).await.unwrap().is_committed());
    assert_eq!(store.revision().await.unwrap(), revision);
    assert_eq!(store.get("/first").await.unwrap(), None);
}

/// TTLs have bounds.
pub async fn ttls_are_checked(store: Arc<dyn Store>) {
    for ttl in [Duration::ZERO, MIN_LEASE_TTL - Duration::from_millis(1), MAX_LEASE_TTL + Duration::from_secs(1)] {
        let error = store.lease_grant(ttl).await.unwrap_err();
        assert_eq!(error, Error::LeaseTtl { ttl, min: MIN_LEASE_TTL, max: MAX_LEASE_TTL });
    }
    store.lease_grant(MAX_LEASE_TTL).await.unwrap();
}

/// No two leases share an id, also after the first is gone.
pub async fn ids_are_not_reused(store: Arc<dyn Store>) {
    let mut seen = std::collections::HashSet::new();
    for _ in 0..20 {
        let id = store.lease_grant(LONG).await.unwrap();
        assert!(seen.insert(id), "{id} was given out twice");
        store.lease_revoke(id).await.unwrap();
    }
}
