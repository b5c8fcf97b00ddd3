//! Single keys.

use std::sync::Arc;

use super::{commit, put};
use crate::limits::MAX_VALUE_BYTES;
use crate::{Error, KeyValue, Store, Txn};

/// A first put has version 1, and its revision is the next one.
pub async fn a_new_key_counts_from_one(store: Arc<dyn Store>) {
    let before = store.revision().await.unwrap();
    assert_eq!(store.get("/a").await.unwrap(), None);
    let revision = put(store.as_ref(), "/a", "1").await;
    assert_eq!(revision, before + 1);
    let expected = KeyValue {
        key: "/a".into(),
        value: "1".into(),
        create_revision: revision,
        mod_revision: revision,
        version: 1,
        lease: None,
    };
    assert_eq!(store.get("/a").await.unwrap(), Some(expected));
    assert_eq!(store.revision().await.unwrap(), revision);
}

/// An overwrite raises version and mod revision only.
pub async fn an_overwrite_keeps_the_creation(store: Arc<dyn Store>) {
    let created = put(store.as_ref(), "/a", "1").await;
    put(store.as_ref(), "/b", "x").await;
    let changed = put(store.as_ref(), "/a", "2").await;
    let kv = store.get("/a").await.unwrap().unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (created, changed, 2));
    assert_eq!(kv.value, "2");
}

/// After a deletion a key begins a new life.
pub async fn a_deleted_key_starts_anew(store: Arc<dyn Store>) {
    put(store.as_ref(), "/a", "1").await;
    let deleted = commit(store.as_ref(), Txn::new().delete("/a")).await;
    assert_eq!(store.get("/a").await.unwrap(), None);
    let created = put(store.as_ref(), "/a", "3").await;
    assert_eq!(created, deleted + 1);
    let kv = store.get("/a").await.unwrap().unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (created, created, 1));
}

/// Values are any bytes, from none to the limit.
pub async fn values_may_be_empty_and_as_large_as_the_limit(store: Arc<dyn Store>) {
    let large: Vec<u8> = (0..MAX_VALUE_BYTES).map(|i| (i % 251) as u8).collect();
    commit(store.as_ref(), Txn::new().put("/empty", "").put("/large", large.clone())).await;
    assert_eq!(store.get("/empty").await.unwrap().unwrap().value, "");
    assert_eq!(store.get("/large").await.unwrap().unwrap().value, large);
    let too_large = Txn::new().put("/large", vec![0; MAX_VALUE_BYTES + 1]);
    let error = store.txn(too_large).await.unwrap_err();
    assert_eq!(error, Error::ValueTooLarge { key: "/large".into(), size: MAX_VALUE_BYTES + 1, limit: MAX_VALUE_BYTES });
}

/// A malformed key is an error in every call that takes one.
pub async fn keys_are_checked(store: Arc<dyn Store>) {
    for bad in ["", "a", "/a/", "/a//b", "/a\0"] {
        let calls = [
            store.get(bad).await.unwrap_err(),
            store.txn(Txn::new().put(bad, "")).await.unwrap_err(),
            store.txn(Txn::new().delete(bad)).await.unwrap_err(),
            store.txn(Txn::new().compare_absent(bad)).await.unwrap_err(),
        ];
        for error in calls {
            assert!(matches!(error, Error::InvalidKey { .. }), "{bad:?}: {error:?}");
        }
    }
    for bad in ["", "a/", "/a//"] {
        let error = store.watch(bad, 0).await.unwrap_err();
        assert!(matches!(error, Error::InvalidPrefix { .. }), "{bad:?}: {error:?}");
        let error = store.txn(Txn::new().delete_prefix(bad)).await.unwrap_err();
        assert!(matches!(error, Error::InvalidPrefix { .. }), "{bad:?}: {error:?}");
    }
}
