//! Ranges, pages, old revisions, compaction.

use std::sync::Arc;

use super::{commit, put};
use crate::limits::{MAX_PAGE_KEYS, MAX_VALUE_BYTES};
use crate::{Error, KeyValue, RangeRequest, RangeResponse, Store, Txn, list};

fn keys(page: &RangeResponse) -> Vec<&str> {
    page.kvs.iter().map(|kv| kv.key.as_str()).collect()
}

async fn fill(store: &dyn Store, count: usize) {
    let names: Vec<String> = (0..count).map(|i| format!("/n/{i:05}")).collect();
    for chunk in names.chunks(100) {
        commit(store, chunk.iter().fold(Txn::new(), |txn, key| txn.put(key, "v"))).await;
    }
}

/// Keys sort by their bytes.
pub async fn keys_come_in_byte_order(store: Arc<dyn Store>) {
    let sorted = ["/A", "/a", "/a b", "/a-b", "/a/b", "/a0", "/aa", "/z", "/é", "/\u{FFFD}", "/\u{10000}"];
    for key in sorted.iter().rev() {
        put(store.as_ref(), key, "").await;
    }
    let page = store.range(RangeRequest::prefix("/")).await.unwrap();
    assert_eq!(keys(&page), sorted);
    assert!(!page.more);
    assert_eq!(page.revision, store.revision().await.unwrap());
}

/// Paging through shows every key once, whatever the page size.
pub async fn pages_cover_everything_once(store: Arc<dyn Store>) {
    fill(store.as_ref(), MAX_PAGE_KEYS + 5).await;
    put(store.as_ref(), "/m", "below").await;
    put(store.as_ref(), "/o", "above").await;
    let whole = store.range(RangeRequest::prefix("/n/")).await.unwrap();
    assert_eq!((whole.kvs.len(), whole.more), (MAX_PAGE_KEYS, true));
    let (all, _) = list(store.as_ref(), "/n/").await.unwrap();
    assert_eq!(all.len(), MAX_PAGE_KEYS + 5);
    for limit in [1, 67, 201, 335, MAX_PAGE_KEYS] {
        let mut request = RangeRequest::prefix("/n/").limit(limit);
        let mut seen = Vec::new();
        loop {
            let page = store.range(request.clone()).await.unwrap();
            assert!(page.kvs.len() <= limit);
            seen.extend(page.kvs);
            if !page.more {
                break;
            }
            request = request.after(seen.last().unwrap().key.clone());
        }
        assert_eq!(seen, all, "pages of {limit}");
    }
    let error = store.range(RangeRequest::prefix("/n/").limit(MAX_PAGE_KEYS + 1)).await.unwrap_err();
    assert_eq!(error, Error::PageTooLarge { requested: MAX_PAGE_KEYS + 1, limit: MAX_PAGE_KEYS });
    // A cursor before the range does not widen it, one behind it leaves nothing.
    let page = store.range(RangeRequest::prefix("/n/").after("/a").limit(1)).await.unwrap();
    assert_eq!(keys(&page), ["/n/00000"]);
    let page = store.range(RangeRequest::prefix("/n/").after("/z")).await.unwrap();
    assert_eq!((page.kvs.len(), page.more), (0, false));
}

/// Pages at one revision are of one piece while the store changes.
pub async fn pages_hold_together_while_keys_change(store: Arc<dyn Store>) {
    fill(store.as_ref(), 20).await;
    let (before, revision) = list(store.as_ref(), "/n/").await.unwrap();
    let mut request = RangeRequest::prefix("/n/").limit(3);
    let mut seen: Vec<KeyValue> = Vec::new();
    loop {
        let page = store.range(request.clone()).await.unwrap();
        assert_eq!(page.revision, revision);
        seen.extend(page.kvs);
        if !page.more {
            break;
        }
        request = request.after(seen.last().unwrap().key.clone()).at(revision);
        let index = seen.len();
        commit(
            store.as_ref(),
            Txn::new().delete(format!("/n/{:05}", index % 20)).put(format!("/n/{index:05}x"), "new"),
        )
        .await;
    }
    assert_eq!(seen, before);
}

/// Every kept revision can be read as it was.
pub async fn old_revisions_can_be_read(store: Arc<dyn Store>) {
    let r0 = store.revision().await.unwrap();
    let r1 = put(store.as_ref(), "/a", "1").await;
    let r2 = commit(store.as_ref(), Txn::new().put("/a", "2").put("/b", "1")).await;
    let r3 = commit(store.as_ref(), Txn::new().delete("/a")).await;
    let r4 = commit(store.as_ref(), Txn::new().put("/a", "4").delete("/b")).await;
    let at = async |revision| {
        let page = store.range(RangeRequest::prefix("/").at(revision)).await.unwrap();
        assert_eq!(page.revision, revision);
        page.kvs
            .iter()
            .map(|kv| {
                let value = String::from_utf8_lossy(&kv.value);
                format!("{}={value} c{} m{} v{}", kv.key, kv.create_revision - r0, kv.mod_revision - r0, kv.version)
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(at(r1).await, ["/a=1 c1 m1 v1"]);
    assert_eq!(at(r2).await, ["/a=2 c1 m2 v2", "/b=1 c2 m2 v1"]);
    assert_eq!(at(r3).await, ["/b=1 c2 m2 v1"]);
    assert_eq!(at(r4).await, ["/a=4 c4 m4 v1"]);
}

/// Only revisions from the compacted one up to the newest exist.
pub async fn compacted_and_future_revisions_are_refused(store: Arc<dyn Store>) {
    put(store.as_ref(), "/a", "1").await;
    put(store.as_ref(), "/a", "2").await;
    let middle = put(store.as_ref(), "/a", "3").await;
    let newest = put(store.as_ref(), "/a", "4").await;
    store.compact(middle).await.unwrap();
    for at in [middle, newest] {
        assert_eq!(store.range(RangeRequest::prefix("/").at(at)).await.unwrap().kvs.len(), 1);
    }
    let error = store.range(RangeRequest::prefix("/").at(middle - 1)).await.unwrap_err();
    assert_eq!(error, Error::Compacted { oldest: middle });
    let error = store.range(RangeRequest::prefix("/").at(newest + 1)).await.unwrap_err();
    assert_eq!(error, Error::FutureRevision { requested: newest + 1, current: newest });
    let error = store.range(RangeRequest::prefix("/").at(-1)).await.unwrap_err();
    assert_eq!(error, Error::InvalidRevision { requested: -1 });
    let error = store.compact(newest + 1).await.unwrap_err();
    assert_eq!(error, Error::FutureRevision { requested: newest + 1, current: newest });
    // Going back does nothing.
    store.compact(middle - 1).await.unwrap();
    store.compact(middle).await.unwrap();
    assert!(store.range(RangeRequest::prefix("/").at(middle)).await.is_ok());
}

/// The start belongs to a range, the end does not.
pub async fn bounds_are_half_open(store: Arc<dyn Store>) {
    for key in ["/a", "/b", "/c", "/d"] {
        put(store.as_ref(), key, "").await;
    }
    let page = store.range(RangeRequest::between("/b", "/d")).await.unwrap();
    assert_eq!(keys(&page), ["/b", "/c"]);
    let page = store.range(RangeRequest::between("/b", "/b")).await.unwrap();
    assert!(page.kvs.is_empty());
    let page = store.range(RangeRequest::between("/c", "/b")).await.unwrap();
    assert!(page.kvs.is_empty());
    let open = RangeRequest { end: None, ..RangeRequest::between("/c", "") };
    assert_eq!(keys(&store.range(open).await.unwrap()), ["/c", "/d"]);
    let exact = store.range(RangeRequest::prefix("/b").limit(1)).await.unwrap();
    assert_eq!((keys(&exact), exact.more), (vec!["/b"], false));
}

/// Pages of large values end early and still lead through everything.
pub async fn large_pages_end_early(store: Arc<dyn Store>) {
    let value = vec![b'x'; MAX_VALUE_BYTES];
    for i in 0..40 {
        commit(store.as_ref(), Txn::new().put(format!("/large/{i:02}"), value.clone())).await;
    }
    let (all, _) = list(store.as_ref(), "/large/").await.unwrap();
    assert_eq!(all.len(), 40);
    assert!(all.iter().all(|kv| kv.value == value));
}

/// Compaction drops history, never a key, however long ago it was put.
pub async fn compaction_leaves_present_keys_alone(store: Arc<dyn Store>) {
    put(store.as_ref(), "/old", "kept").await;
    for i in 0..50 {
        put(store.as_ref(), "/busy", &i.to_string()).await;
    }
    put(store.as_ref(), "/gone", "x").await;
    let newest = commit(store.as_ref(), Txn::new().delete("/gone")).await;
    let (before, _) = list(store.as_ref(), "/").await.unwrap();
    store.compact(newest).await.unwrap();
    let (after, revision) = list(store.as_ref(), "/").await.unwrap();
    assert_eq!((after, revision), (before, newest));
    let next = put(store.as_ref(), "/busy", "last").await;
    assert_eq!(next, newest + 1);
    let page = store.range(RangeRequest::prefix("/").at(newest)).await.unwrap();
    assert_eq!(keys(&page), ["/busy", "/old"]);
    assert_eq!(page.kvs[0].value, "49");
}
