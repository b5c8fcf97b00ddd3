//! Transactions.

use std::sync::Arc;

use super::{commit, put};
use crate::limits::{MAX_REQUEST_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES};
use crate::{Compare, Error, RangeRequest, Store, Txn, TxnOutcome};

/// The first compare that fails is named.
pub async fn compares_decide_in_order(store: Arc<dyn Store>) {
    let revision = put(store.as_ref(), "/a", "1").await;
    let all_hold = [
        Compare::Exists { key: "/a".into() },
        Compare::Absent { key: "/b".into() },
        Compare::Value { key: "/a".into(), equals: "1".into() },
        Compare::ModRevision { key: "/a".into(), equals: revision },
        Compare::CreateRevision { key: "/a".into(), equals: revision },
    ];
    let fail = [
        Compare::Exists { key: "/b".into() },
        Compare::Absent { key: "/a".into() },
        Compare::Value { key: "/a".into(), equals: "2".into() },
        Compare::Value { key: "/b".into(), equals: "".into() },
        Compare::ModRevision { key: "/a".into(), equals: revision + 1 },
        Compare::ModRevision { key: "/a".into(), equals: 0 },
        Compare::CreateRevision { key: "/a".into(), equals: 0 },
        Compare::CreateRevision { key: "/b".into(), equals: revision },
    ];
    for failing in &fail {
        for index in 0..=all_hold.len() {
            let mut compares = all_hold.to_vec();
            compares.insert(index, failing.clone());
            // A later failure does not matter.
            compares.push(fail[0].clone());
            let txn = Txn { compares, ops: Vec::new() }.put("/c", "");
            let outcome = store.txn(txn).await.unwrap();
            assert_eq!(outcome, TxnOutcome::Conflict { index, revision }, "{failing:?}");
        }
    }
    let txn = Txn { compares: all_hold.to_vec(), ops: Vec::new() }.put("/c", "");
    assert_eq!(store.txn(txn).await.unwrap(), TxnOutcome::Committed { revision: revision + 1 });
}

/// Revision 0 in a compare means that the key is absent.
pub async fn an_absent_key_has_revision_zero(store: Arc<dyn Store>) {
    let txn = Txn::new().compare_mod_revision("/a", 0).compare_create_revision("/a", 0).put("/a", "1");
    commit(store.as_ref(), txn.clone()).await;
    assert!(matches!(store.txn(txn).await.unwrap(), TxnOutcome::Conflict { index: 0, .. }));
}

/// Nothing of a transaction that conflicts is applied.
pub async fn a_conflict_changes_nothing(store: Arc<dyn Store>) {
    let revision = put(store.as_ref(), "/a", "1").await;
    let txn = Txn::new().compare_absent("/a").put("/b", "1").delete("/a");
    assert_eq!(store.txn(txn).await.unwrap(), TxnOutcome::Conflict { index: 0, revision });
    assert_eq!(store.revision().await.unwrap(), revision);
    assert!(store.get("/a").await.unwrap().is_some());
    assert!(store.get("/b").await.unwrap().is_none());
}

/// A transaction without operations reports the newest revision.
pub async fn an_empty_transaction_makes_no_revision(store: Arc<dyn Store>) {
    let revision = put(store.as_ref(), "/a", "1").await;
    assert_eq!(store.txn(Txn::new()).await.unwrap(), TxnOutcome::Committed { revision });
    let check = Txn::new().compare_exists("/a");
    assert_eq!(store.txn(check).await.unwrap(), TxnOutcome::Committed { revision });
    assert_eq!(put(store.as_ref(), "/a", "2").await, revision + 1);
}

/// Deletions that hit nothing make no revision.
pub async fn deleting_nothing_makes_no_revision(store: Arc<dyn Store>) {
    let revision = put(store.as_ref(), "/a", "1").await;
    let txn = Txn::new().delete("/b").delete_prefix("/b/");
    assert_eq!(store.txn(txn).await.unwrap(), TxnOutcome::Committed { revision });
    let twice = Txn::new().delete("/a").delete("/a").delete_prefix("/a");
    assert_eq!(commit(store.as_ref(), twice).await, revision + 1);
}

/// A put of the same value is still a change.
pub async fn all_operations_share_one_revision(store: Arc<dyn Store>) {
    put(store.as_ref(), "/c", "old").await;
    let txn = (0..MAX_TXN_OPS - 1).fold(Txn::new(), |txn, i| txn.put(format!("/a/{i}"), "v")).delete("/c");
    let revision = commit(store.as_ref(), txn).await;
    let page = store.range(RangeRequest::prefix("/")).await.unwrap();
    assert_eq!(page.kvs.len(), MAX_TXN_OPS - 1);
    assert!(page.kvs.iter().all(|kv| kv.mod_revision == revision && kv.create_revision == revision));
    assert_eq!(put(store.as_ref(), "/a/0", "v").await, revision + 1);
}

/// As in etcd, one transaction changes a key once.
pub async fn duplicate_puts_are_refused(store: Arc<dyn Store>) {
    let revision = store.revision().await.unwrap();
    for txn in [
        Txn::new().put("/a/b", "1").put("/a/b", "2"),
        Txn::new().put("/a/b", "1").delete("/a/b"),
        Txn::new().delete_prefix("/a/").put("/a/b", "1"),
    ] {
        let error = store.txn(txn).await.unwrap_err();
        assert_eq!(error, Error::DuplicateKey { key: "/a/b".into() });
    }
    assert_eq!(store.revision().await.unwrap(), revision);
}

/// Each limit has its own error, and reaching it exactly is fine.
pub async fn limits_are_typed_errors(store: Arc<dyn Store>) {
    let puts = |n: usize| (0..n).fold(Txn::new(), |txn, i| txn.put(format!("/k/{i}"), ""));
    commit(store.as_ref(), puts(MAX_TXN_OPS)).await;
    let error = store.txn(puts(MAX_TXN_OPS + 1)).await.unwrap_err();
    assert_eq!(error, Error::TooManyOps { count: MAX_TXN_OPS + 1, limit: MAX_TXN_OPS });

    let compares = |n: usize| (0..n).fold(Txn::new(), |txn, i| txn.compare_absent(format!("/none/{i}")));
    assert!(store.txn(compares(MAX_TXN_OPS)).await.unwrap().is_committed());
    let error = store.txn(compares(MAX_TXN_OPS + 1)).await.unwrap_err();
    assert_eq!(error, Error::TooManyCompares { count: MAX_TXN_OPS + 1, limit: MAX_TXN_OPS });

    let value = vec![7; MAX_VALUE_BYTES];
    let six = (0..6).fold(Txn::new(), |txn, i| txn.put(format!("/{i}"), value.clone()));
    let error = store.txn(six).await.unwrap_err();
    assert!(matches!(error, Error::RequestTooLarge { limit: MAX_REQUEST_BYTES, .. }), "{error:?}");
    // Exactly at the limit.
    let five = (0..5).fold(Txn::new(), |txn, i| txn.put(format!("/{i}"), value.clone()));
    let rest = MAX_REQUEST_BYTES - five.size() - "/rest".len();
    let full = five.put("/rest", vec![7; rest]);
    assert_eq!(full.size(), MAX_REQUEST_BYTES);
    commit(store.as_ref(), full).await;
}

/// A prefix is a string prefix, nothing more and nothing less.
pub async fn delete_prefix_takes_exactly_the_prefix(store: Arc<dyn Store>) {
    let keys = ["/a", "/a/1", "/a/2", "/a/é", "/a/\u{10FFFF}", "/a0", "/b"];
    let txn = keys.iter().fold(Txn::new(), |txn, key| txn.put(*key, ""));
    commit(store.as_ref(), txn).await;
    commit(store.as_ref(), Txn::new().delete_prefix("/a/").put("/c", "")).await;
    let page = store.range(RangeRequest::prefix("/")).await.unwrap();
    let left: Vec<_> = page.kvs.iter().map(|kv| kv.key.as_str()).collect();
    assert_eq!(left, ["/a", "/a0", "/b", "/c"]);
    commit(store.as_ref(), Txn::new().delete_prefix("/")).await;
    assert!(store.range(RangeRequest::prefix("/")).await.unwrap().kvs.is_empty());
}
