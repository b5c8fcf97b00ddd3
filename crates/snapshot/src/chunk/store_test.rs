use std::sync::Arc;

use object_store::ObjectStoreExt;
use object_store::memory::InMemory;

use super::*;
use crate::testing::{Fault, FaultStore, chunk, domain, listing, memory_store, noise};

fn text(seed: u64) -> Bytes {
    chunk(seed)
}

#[tokio::test]
async fn chunks_are_stored_once_and_read_back() {
    let store = memory_store();
    let first = store.put(Epoch(5), text(1), None).await.unwrap();
    let PutOutcome::Written { chunk, stored_bytes } = first else { panic!("{first:?}") };
    assert_eq!(store.get_chunk(&chunk).await.unwrap(), text(1));
    assert_eq!(
        listing(&**store.objects()).await,
        [(chunk_path(store.domain().id(), &chunk).to_string(), stored_bytes)]
    );
    assert_eq!(store.put(Epoch(5), text(1), None).await.unwrap(), PutOutcome::Found(chunk));
    assert_eq!(store.put(Epoch(5), text(0), Some(chunk)).await.unwrap(), PutOutcome::Zero);
    assert_eq!(store.put_chunk(Epoch(5), text(0)).await.unwrap(), None);
    // The parent's is used however old it is.
    assert_eq!(store.put(Epoch(9), text(1), Some(chunk)).await.unwrap(), PutOutcome::Unchanged(chunk));
    assert_eq!(listing(&**store.objects()).await.len(), 1);
}

#[tokio::test]
async fn only_the_last_epoch_is_looked_through() {
    let store = memory_store();
    let old = store.put_chunk(Epoch(5), text(1)).await.unwrap().unwrap();
    assert_eq!(store.put(Epoch(6), text(1), None).await.unwrap(), PutOutcome::Found(old));
    let written = store.put(Epoch(7), text(1), None).await.unwrap();
    assert!(matches!(written, PutOutcome::Written { chunk, .. } if chunk.epoch == Epoch(7)), "{written:?}");
    // Nor is a later one, should there ever be one.
    assert!(matches!(store.put(Epoch(4), text(1), None).await.unwrap(), PutOutcome::Written { .. }));
}

#[tokio::test]
async fn domains_share_nothing() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let a = ChunkStore::new(objects.clone(), domain("a"));
    let b = ChunkStore::new(objects.clone(), domain("b"));
    let in_a = a.put_chunk(Epoch(0), text(1)).await.unwrap().unwrap();
    let in_b = b.put_chunk(Epoch(0), text(1)).await.unwrap().unwrap();
    assert_ne!(in_a.hash, in_b.hash);
    assert!(matches!(b.get_chunk(&in_a).await, Err(StorageError::Missing { .. })));
    // Even when somebody puts the object there.
    let path = chunk_path(a.domain().id(), &in_a);
    let stolen = objects.get(&path).await.unwrap().bytes().await.unwrap();
    objects.put(&chunk_path(b.domain().id(), &in_b), stolen.into()).await.unwrap();
    assert!(matches!(b.get_chunk(&in_b).await, Err(StorageError::Damaged { damage: Damage::Decryption, .. })));
}

#[tokio::test]
async fn a_chunk_has_one_size() {
    let store = memory_store();
    for length in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES + 1] {
        let error = store.put_chunk(Epoch(0), Bytes::from(vec![1; length])).await.unwrap_err();
        assert!(matches!(error, StorageError::Usage(_)), "{error}");
    }
}

#[tokio::test]
async fn damage_missing_objects_and_giants_are_told_apart() {
    let store = memory_store();
    let chunk = store.put_chunk(Epoch(0), noise(1, CHUNK_BYTES).into()).await.unwrap().unwrap();
    let path = chunk_path(store.domain().id(), &chunk);
    let whole = store.objects().get(&path).await.unwrap().bytes().await.unwrap();
    let mut changed = whole.to_vec();
    changed[1000] ^= 1;
    for (content, sign) in
        [(changed, "checksum"), (vec![0; 2 << 20], "bytes instead of"), (whole[..40].to_vec(), "bytes")]
    {
        store.objects().put(&path, content.into()).await.unwrap();
        let error = store.get_chunk(&chunk).await.unwrap_err();
        assert!(matches!(error, StorageError::Damaged { .. }) && !error.is_transient(), "{error}");
        assert!(error.to_string().contains(sign), "{error}");
    }
    store.objects().delete(&path).await.unwrap();
    assert!(matches!(store.get_chunk(&chunk).await, Err(StorageError::Missing { .. })));
}

#[tokio::test]
async fn a_stump_of_a_chunk_is_written_again() {
    let store = memory_store();
    let chunk = store.put_chunk(Epoch(0), text(1)).await.unwrap().unwrap();
    let path = chunk_path(store.domain().id(), &chunk);
    let whole = store.objects().get(&path).await.unwrap().bytes().await.unwrap();
    for length in [0, 1, 20, 32, 33, whole.len() - 1] {
        store.objects().put(&path, whole.slice(..length).into()).await.unwrap();
        let again = store.put(Epoch(0), text(1), None).await.unwrap();
        assert!(matches!(again, PutOutcome::Written { .. }), "{length}");
        assert_eq!(store.get_chunk(&chunk).await.unwrap(), text(1));
    }
}

#[tokio::test]
async fn faults_of_the_store_are_errors_and_the_next_attempt_succeeds() {
    for fault in [Fault::Refused, Fault::LostAck, Fault::Torn] {
        let faulty =
            FaultStore::new(Arc::new(InMemory::new()), move |call, _| if call == 2 { fault } else { Fault::None });
        let store = ChunkStore::new(faulty, domain("test"));
        let content: Bytes = noise(1, CHUNK_BYTES).into();
        // At epoch 1 two places are looked at, then the object is put.
        let error = store.put_chunk(Epoch(1), content.clone()).await.unwrap_err();
        assert!(error.is_transient(), "{fault:?}: {error}");
        let again = store.put(Epoch(1), content.clone(), None).await.unwrap();
        assert_eq!(store.get_chunk(&again.chunk().unwrap()).await.unwrap(), content, "{fault:?}");
        assert_eq!(matches!(again, PutOutcome::Found(_)), fault == Fault::LostAck);
    }
}

#[tokio::test]
async fn a_read_that_ends_early_is_noticed() {
    let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let chunk = ChunkStore::new(inner.clone(), domain("test")).put_chunk(Epoch(0), text(1)).await.unwrap().unwrap();
    let faulty = FaultStore::new(inner, |call, _| if call == 0 { Fault::Torn } else { Fault::None });
    let store = ChunkStore::new(faulty, domain("test"));
    let error = store.get_chunk(&chunk).await.unwrap_err();
    assert!(matches!(error, StorageError::Damaged { damage: Damage::Size { .. }, .. }), "{error}");
    assert_eq!(store.get_chunk(&chunk).await.unwrap(), text(1));
}
