//! Watches.

use std::sync::Arc;

use super::{briefs, commit, next, put};
use crate::{Error, Store, Txn};

/// Live changes arrive in order, each once.
pub async fn it_delivers_changes_in_order(store: Arc<dyn Store>) {
    let mut watch = store.watch("/", 0).await.unwrap();
    let r1 = put(store.as_ref(), "/a", "1").await;
    let r2 = put(store.as_ref(), "/a", "2").await;
    let r3 = commit(store.as_ref(), Txn::new().delete("/a")).await;
    for (revision, event) in [(r1, "/a=1"), (r2, "/a=2"), (r3, "-/a")] {
        let batch = next(&mut watch).await;
        assert_eq!((batch.revision, briefs(&batch)), (revision, vec![event.to_owned()]));
    }
}

/// The past is replayed, then the present follows without a seam.
pub async fn it_starts_in_the_past(store: Arc<dyn Store>) {
    let first = put(store.as_ref(), "/a", "0").await;
    for i in 1..10 {
        put(store.as_ref(), "/a", &i.to_string()).await;
    }
    for from in first..first + 10 {
        let mut watch = store.watch("/", from).await.unwrap();
        for revision in from..first + 10 {
            let batch = next(&mut watch).await;
            assert_eq!((batch.revision, briefs(&batch)), (revision, vec![format!("/a={}", revision - first)]));
        }
        let marker = format!("/marker/{from}");
        let mut live = store.watch(&marker, 0).await.unwrap();
        let revision = put(store.as_ref(), &marker, "").await;
        assert_eq!(next(&mut live).await.revision, revision);
    }
}

/// 0 skips what has happened.
pub async fn zero_means_from_now_on(store: Arc<dyn Store>) {
    put(store.as_ref(), "/a", "before").await;
    let mut watch = store.watch("/", 0).await.unwrap();
    let revision = put(store.as_ref(), "/a", "after").await;
    let batch = next(&mut watch).await;
    assert_eq!((batch.revision, briefs(&batch)), (revision, vec!["/a=after".to_owned()]));
}

/// A watch can name a revision that does not exist yet.
pub async fn it_waits_for_a_future_revision(store: Arc<dyn Store>) {
    let now = store.revision().await.unwrap();
    let mut watch = store.watch("/", now + 3).await.unwrap();
    for i in 1..=4 {
        put(store.as_ref(), "/a", &i.to_string()).await;
    }
    for i in 3..=4 {
        let batch = next(&mut watch).await;
        assert_eq!((batch.revision, briefs(&batch)), (now + i, vec![format!("/a={i}")]));
    }
    let error = store.watch("/", -1).await.unwrap_err();
    assert_eq!(error, Error::InvalidRevision { requested: -1 });
}

/// Other keys are not seen, live or replayed.
pub async fn it_sees_only_its_prefix(store: Arc<dyn Store>) {
    let from = store.revision().await.unwrap() + 1;
    let mut live = store.watch("/a/", 0).await.unwrap();
    commit(store.as_ref(), Txn::new().put("/a", "").put("/a/1", "x").put("/a0", "").put("/b", "")).await;
    put(store.as_ref(), "/b", "").await;
    let last = commit(store.as_ref(), Txn::new().put("/a/é", "y").delete("/a0").delete("/a/1")).await;
    let mut replay = store.watch("/a/", from).await.unwrap();
    for watch in [&mut live, &mut replay] {
        let batch = next(watch).await;
        assert_eq!((batch.revision, briefs(&batch)), (from, vec!["/a/1=x".to_owned()]));
        let batch = next(watch).await;
        assert_eq!((batch.revision, briefs(&batch)), (last, vec!["/a/é=y".to_owned(), "-/a/1".to_owned()]));
    }
}

/// What one transaction did arrives together, in the order of its operations.
pub async fn one_revision_is_one_batch(store: Arc<dyn Store>) {
    let from = put(store.as_ref(), "/z", "").await;
    let mut live = store.watch("/", from).await.unwrap();
    let txn = (0..100).rev().fold(Txn::new().delete("/z"), |txn, i| txn.put(format!("/k/{i:02}"), ""));
    let revision = commit(store.as_ref(), txn).await;
    let mut replay = store.watch("/", from).await.unwrap();
    for watch in [&mut live, &mut replay] {
        assert_eq!(next(watch).await.revision, from);
        let batch = next(watch).await;
        let expected: Vec<_> =
            std::iter::once("-/z".to_owned()).chain((0..100).rev().map(|i| format!("/k/{i:02}="))).collect();
        assert_eq!((batch.revision, briefs(&batch)), (revision, expected));
    }
}

/// Events carry the state they replaced.
pub async fn it_tells_the_state_before(store: Arc<dyn Store>) {
    let from = put(store.as_ref(), "/a", "1").await;
    let one = store.get("/a").await.unwrap().unwrap();
    put(store.as_ref(), "/a", "2").await;
    let two = store.get("/a").await.unwrap().unwrap();
    commit(store.as_ref(), Txn::new().delete("/a")).await;
    let mut watch = store.watch("/", from).await.unwrap();
    for prev in [None, Some(one), Some(two)] {
        assert_eq!(next(&mut watch).await.events[0].prev, prev);
    }
}

/// A watch that begins before the kept history is refused and told where it begins.
pub async fn compacted_history_is_refused(store: Arc<dyn Store>) {
    let first = put(store.as_ref(), "/a", "1").await;
    put(store.as_ref(), "/a", "2").await;
    let oldest = put(store.as_ref(), "/a", "3").await;
    store.compact(oldest).await.unwrap();
    let error = store.watch("/", first).await.unwrap_err();
    assert_eq!(error, Error::Compacted { oldest: oldest + 1 });
    let mut watch = store.watch("/", oldest + 1).await.unwrap();
    put(store.as_ref(), "/a", "4").await;
    assert_eq!(briefs(&next(&mut watch).await), ["/a=4"]);
}

/// Neither the writers nor the events of a watcher that does not read suffer.
pub async fn a_slow_watcher_loses_nothing(store: Arc<dyn Store>) {
    let mut idle = store.watch("/", 0).await.unwrap();
    let mut slow = store.watch("/", 0).await.unwrap();
    let first = put(store.as_ref(), "/n", "0").await;
    assert_eq!(next(&mut slow).await.revision, first);
    for i in 1..500 {
        put(store.as_ref(), "/n", &i.to_string()).await;
    }
    for i in 1..500 {
        let batch = next(&mut slow).await;
        assert_eq!((batch.revision, briefs(&batch)), (first + i, vec![format!("/n={i}")]));
    }
    for i in 0..500 {
        assert_eq!(next(&mut idle).await.revision, first + i);
    }
}

/// A replay shows each value as it was, not as it is.
pub async fn an_old_revision_is_replayed_with_the_values_of_its_time(store: Arc<dyn Store>) {
    let lease = store.lease_grant(std::time::Duration::from_secs(600)).await.unwrap();
    let from = commit(store.as_ref(), Txn::new().put_with_lease("/a", "1", lease)).await;
    let then = store.get("/a").await.unwrap().unwrap();
    put(store.as_ref(), "/a", "2").await;
    commit(store.as_ref(), Txn::new().delete("/a")).await;
    put(store.as_ref(), "/a", "3").await;
    let now = store.get("/a").await.unwrap().unwrap();
    let mut watch = store.watch("/a", from).await.unwrap();
    let batches = [next(&mut watch).await, next(&mut watch).await, next(&mut watch).await, next(&mut watch).await];
    assert_eq!(batches[0].events[0].kind, crate::EventKind::Put(then));
    assert_eq!(briefs(&batches[1]), ["/a=2"]);
    assert_eq!(briefs(&batches[2]), ["-/a"]);
    assert_eq!(batches[3].events[0].kind, crate::EventKind::Put(now));
}

/// Watches come and go while others go on.
pub async fn dropping_a_watch_is_harmless(store: Arc<dyn Store>) {
    let mut kept = store.watch("/", 0).await.unwrap();
    for i in 0..50 {
        let mut dropped = store.watch("/", 0).await.unwrap();
        let revision = put(store.as_ref(), "/a", &i.to_string()).await;
        if i % 2 == 0 {
            assert_eq!(next(&mut dropped).await.revision, revision);
        }
        drop(dropped);
        assert_eq!(next(&mut kept).await.revision, revision);
    }
}
