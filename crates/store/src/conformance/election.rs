//! Leader election and fencing.

use std::sync::Arc;
use std::time::Duration;

use super::{briefs, commit, next};
use crate::leader::{LAST_LEADER_KEY, LEADER_KEY, campaign};
use crate::limits::MIN_LEASE_TTL;
use crate::{Error, Store, Txn, TxnOutcome};

const LONG: Duration = Duration::from_secs(3600);

/// The winner holds the key; its term is the key's create revision and its guard holds.
pub async fn a_term_is_the_create_revision(store: Arc<dyn Store>) {
    let leader = campaign(store.as_ref(), "one", LONG).await.unwrap();
    let kv = store.get(LEADER_KEY).await.unwrap().unwrap();
    assert_eq!((kv.create_revision, &kv.value[..], kv.lease), (leader.term, &b"one"[..], Some(leader.lease)));
    commit(store.as_ref(), Txn::new().compare_absent("/a").put("/a", "").guard(&leader)).await;
    let error = campaign(store.as_ref(), "", LONG).await.unwrap_err();
    assert!(matches!(error, Error::InvalidCandidate { .. }), "{error:?}");
}

/// A candidate waits for the leader to go, and gets a greater term.
pub async fn a_resigned_leader_is_followed(store: Arc<dyn Store>) {
    let first = campaign(store.as_ref(), "one", LONG).await.unwrap();
    let waiting = {
        let store = Arc::clone(&store);
        tokio::spawn(async move { campaign(store.as_ref(), "two", LONG).await.unwrap() })
    };
    for i in 0..20 {
        commit(store.as_ref(), Txn::new().put("/work", i.to_string()).guard(&first)).await;
        // "/leaders" is under the prefix "/leader": its deletion must not wake the candidate for good.
        commit(store.as_ref(), Txn::new().put("/leaders", "")).await;
        commit(store.as_ref(), Txn::new().delete("/leaders")).await;
    }
    assert!(!waiting.is_finished());
    let term = first.term;
    first.resign(store.as_ref()).await.unwrap();
    let second = waiting.await.unwrap();
    assert!(second.term > term);
    assert_eq!(store.get(LEADER_KEY).await.unwrap().unwrap().value, "two");
}

/// The same name takes over at once, under a new term.
pub async fn a_restarted_candidate_deposes_its_earlier_life(store: Arc<dyn Store>) {
    let mut term = 0;
    let mut leases = Vec::new();
    for _ in 0..5 {
        let leader = campaign(store.as_ref(), "one", LONG).await.unwrap();
        assert!(leader.term > term);
        term = leader.term;
        leases.push(leader.lease);
    }
    let newest = leases.pop().unwrap();
    store.lease_keep_alive(newest).await.unwrap();
    for id in leases {
        assert_eq!(store.lease_keep_alive(id).await.unwrap_err(), Error::LeaseNotFound { id });
    }
}

/// A leader that lost its key without noticing changes nothing any more.
pub async fn an_overtaken_leader_cannot_write(store: Arc<dyn Store>) {
    let stale = campaign(store.as_ref(), "one", LONG).await.unwrap();
    let revision = store.lease_revoke(stale.lease).await.unwrap();
    let txn = || Txn::new().compare_absent("/never").put("/a", "stale").guard(&stale);
    assert_eq!(store.txn(txn()).await.unwrap(), TxnOutcome::Conflict { index: 0, revision });
    let fresh = campaign(store.as_ref(), "two", LONG).await.unwrap();
    assert!(matches!(store.txn(txn()).await.unwrap(), TxnOutcome::Conflict { index: 0, .. }));
    assert_eq!(store.get("/a").await.unwrap(), None);
    commit(store.as_ref(), Txn::new().put("/a", "fresh").guard(&fresh)).await;
}

/// A leader whose lease ran out leads again, under a greater term, if nobody else was elected since.
pub async fn a_lost_term_is_followed_by_a_new_one_unless_another_led(store: Arc<dyn Store>) {
    let store = store.as_ref();
    let lost = campaign(store, "one", LONG).await.unwrap();
    store.lease_revoke(lost.lease).await.unwrap();
    let second = lost.retake(store).await.unwrap();
    assert!(second.term > lost.term);
    assert_eq!((second.name.as_str(), second.ttl), ("one", LONG));
    let write = |leader: &crate::leader::Leadership| store.txn(Txn::new().put("/a", "").guard(leader));
    assert!(matches!(write(&lost).await.unwrap(), TxnOutcome::Conflict { index: 0, .. }));
    assert!(write(&second).await.unwrap().is_committed());

    // Given up before the store has noticed: the old term ends, and its lease.
    let third = second.retake(store).await.unwrap();
    assert!(third.term > second.term);
    assert_eq!(store.lease_keep_alive(second.lease).await.unwrap_err(), Error::LeaseNotFound { id: second.lease });
    assert!(matches!(write(&second).await.unwrap(), TxnOutcome::Conflict { index: 0, .. }));

    // Another one leads, has led, or has led under the same name.
    let is_lost = |result: crate::Result<_>| matches!(result, Err(Error::LeadershipLost { .. }));
    store.lease_revoke(third.lease).await.unwrap();
    let other = campaign(store, "two", LONG).await.unwrap();
    assert!(is_lost(third.retake(store).await));
    assert!(write(&other).await.unwrap().is_committed(), "the other one is left alone");
    other.clone().resign(store).await.unwrap();
    assert!(is_lost(third.retake(store).await));
    let fourth = other.retake(store).await.unwrap();
    fourth.resign(store).await.unwrap();
    let life = campaign(store, "one", LONG).await.unwrap();
    let next_life = campaign(store, "one", LONG).await.unwrap();
    assert!(is_lost(life.retake(store).await));
    next_life.clone().resign(store).await.unwrap();
    assert!(is_lost(life.retake(store).await));
    // No leases are left behind by all that.
    assert_eq!(store.get(LEADER_KEY).await.unwrap(), None);
    assert_eq!(store.get(LAST_LEADER_KEY).await.unwrap().unwrap().mod_revision, next_life.term);
}

/// `hold` keeps the lease for as long as it is awaited, and says when it is lost.
pub async fn hold_ends_when_the_lease_is_gone(store: Arc<dyn Store>) {
    let leader = campaign(store.as_ref(), "one", Duration::from_secs(4)).await.unwrap();
    let holding = {
        let (store, leader) = (Arc::clone(&store), leader.clone());
        tokio::spawn(async move { leader.hold(store.as_ref()).await })
    };
    // Another lease, unattended and longer, serves as the clock.
    let clock = store.lease_grant(Duration::from_secs(6)).await.unwrap();
    let mut watch = store.watch("/clock", 0).await.unwrap();
    commit(store.as_ref(), Txn::new().put_with_lease("/clock", "", clock)).await;
    watch.next().await.unwrap().unwrap();
    watch.next().await.unwrap().unwrap();
    assert!(!holding.is_finished());
    commit(store.as_ref(), Txn::new().put("/a", "").guard(&leader)).await;
    store.lease_revoke(leader.lease).await.unwrap();
    let error = holding.await.unwrap();
    assert!(matches!(error, Error::LeadershipLost { term, .. } if term == leader.term), "{error:?}");
}

/// Many candidates, some of which die without resigning: everybody gets a term of their own, and
/// there is never more than one leader.
pub async fn candidates_take_turns(store: Arc<dyn Store>) {
    const CANDIDATES: usize = 6;
    let mut watch = store.watch(LEADER_KEY, 0).await.unwrap();
    let tasks: Vec<_> = (0..CANDIDATES)
        .map(|i| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                // The short TTL ends the terms of those that do not resign.
                let leader = campaign(store.as_ref(), &format!("candidate-{i}"), MIN_LEASE_TTL).await.unwrap();
                let term = leader.term;
                if i % 3 != 0 {
                    leader.resign(store.as_ref()).await.unwrap();
                }
                term
            })
        })
        .collect();
    let mut terms = Vec::new();
    for task in tasks {
        terms.push(task.await.unwrap());
    }
    terms.sort_unstable();
    for term in terms {
        let elected = next(&mut watch).await;
        assert_eq!((elected.revision, &briefs(&elected)[0][..8]), (term, "/leader="));
        let ended = next(&mut watch).await;
        assert_eq!(briefs(&ended), ["-/leader"]);
    }
}
