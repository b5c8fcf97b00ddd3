use std::collections::BTreeMap;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use proptest::prelude::*;

use super::*;
use crate::chunk::{CHUNK_BYTES, ChunkHash};
use crate::epoch::Epoch;
use crate::manifest::{PAGE_ENTRIES, changed};
use crate::objects::SnapshotKey;
use crate::testing::{Fault, FaultStore, chunk, domain, listing, memory_store};

/// A volume: chunk index → seed of its content.
type Model = BTreeMap<u64, u64>;

fn source(model: &Model) -> IndexedSource {
    let read = model.clone();
    let read: ReadChunk = Box::new(move |index| {
        let seed = read[&index];
        Box::pin(async move { Ok((seed != 9).then(|| chunk(seed))) })
    });
    IndexedSource::new(model.keys().copied(), read)
}

fn spec(id: &str, chunks: u64, epoch: u32) -> ManifestSpec {
    let id = SnapshotKey::new(id).unwrap();
    ManifestSpec { id, size_bytes: chunks * CHUNK_BYTES as u64, epoch: Epoch(epoch) }
}

async fn load(store: &ChunkStore, id: &str) -> Result<Manifest, StorageError> {
    Manifest::load(&**store.objects(), &SnapshotKey::new(id).unwrap(), None).await
}

/// What the manifest says, in the model's terms.
fn content(store: &ChunkStore, manifest: &Manifest) -> Model {
    let names: BTreeMap<ChunkHash, u64> = (1..20).map(|seed| (store.domain().name_of(&chunk(seed)), seed)).collect();
    manifest.entries().map(|(index, chunk)| (index, names[&chunk.hash])).collect()
}

/// What a model reads as: zeros are absent, seed 9 is handed out as "all zeros".
fn visible(model: &Model) -> Model {
    model.iter().filter(|(_, seed)| ![0, 9].contains(*seed)).map(|(index, seed)| (*index, *seed)).collect()
}

#[tokio::test]
async fn an_incremental_upload_writes_what_changed_and_nothing_else() {
    let store = memory_store();
    let mut model: Model = (0..40).map(|index| (index * 100, 1 + index % 8)).collect();
    let upload = SnapshotUpload::new(store.clone(), spec("snap-1", 5000, 0), None);
    let first = upload.run(&source(&model)).await.unwrap();
    assert_eq!((first.chunks.chunks_done, first.chunks.chunks_total), (40, 40));
    // Equal chunks may be under way at the same time; nothing is lost by writing one twice.
    assert_eq!(first.chunks.chunks_written + first.chunks.chunks_found, 40);
    assert_eq!((first.manifest.pages_written, first.manifest.present_chunks), (4, 40));
    let before = listing(&**store.objects()).await;
    assert_eq!(before.iter().filter(|(path, _)| path.starts_with("chunk/")).count(), 8);

    // Touched and unchanged, touched and zeroed, touched and changed.
    let dirty: Model = [(0, 1), (100, 0), (200, 9), (3000, 15)].into();
    let parent = Arc::new(load(&store, "snap-1").await.unwrap());
    assert_eq!(parent.root_hash(), first.manifest.root_hash);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let tell = seen.clone();
    let second = SnapshotUpload::new(store.clone(), spec("snap-2", 6000, 7), Some(parent.clone()))
        .with_parallel(3)
        .with_progress(Arc::new(move |progress: UploadProgress| tell.lock().push(progress.percent())))
        .run(&source(&dirty))
        .await
        .unwrap();
    let UploadProgress { chunks_zero, chunks_unchanged, chunks_found, chunks_written, stored_bytes, .. } =
        second.chunks;
    assert_eq!((chunks_zero, chunks_unchanged, chunks_found, chunks_written), (2, 1, 0, 1));
    assert_eq!(second.manifest.pages_written, 2);
    assert_eq!(seen.lock().last(), Some(&100));
    model.extend(dirty);
    let child = load(&store, "snap-2").await.unwrap();
    assert_eq!(content(&store, &child), visible(&model));
    assert_eq!(child.root().parent.as_ref(), Some(parent.id()));
    assert_eq!(changed(&parent, &child).iter().map(|change| change.index).collect::<Vec<_>>(), [100, 200, 3000]);
    let added: Vec<_> =
        listing(&**store.objects()).await.into_iter().filter(|object| !before.contains(object)).collect();
    assert_eq!(
        added.iter().filter(|(path, _)| path.starts_with("chunk/")).map(|(_, size)| size).sum::<u64>(),
        stored_bytes
    );
    assert_eq!(added.len(), 1 + 2 + 1, "a chunk, two pages, a root: {added:?}");
}

#[tokio::test]
async fn a_volume_of_another_key_domain_is_no_parent() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let a = ChunkStore::new(objects.clone(), domain("a"));
    let b = ChunkStore::new(objects, domain("b"));
    SnapshotUpload::new(a.clone(), spec("snap-1", 4, 0), None).run(&source(&[(1, 1)].into())).await.unwrap();
    let parent = Arc::new(load(&a, "snap-1").await.unwrap());
    let upload = SnapshotUpload::new(b.clone(), spec("snap-2", 4, 0), Some(parent.clone()));
    assert!(matches!(upload.run(&source(&Model::new())).await, Err(StorageError::KeyDomain { .. })));
    assert!(matches!(parent.read_chunk(&b, 1).await, Err(StorageError::KeyDomain { .. })));
    assert_eq!(parent.read_chunk(&a, 1).await.unwrap(), Some(chunk(1)));
    assert_eq!(parent.read_chunk(&a, 0).await.unwrap(), None);
    assert!(matches!(parent.read_chunk(&a, 4).await, Err(StorageError::Usage(_))));
}

#[tokio::test]
async fn a_copy_into_another_key_domain_is_whole_and_shares_nothing() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let a = ChunkStore::new(objects.clone(), domain("a"));
    let b = ChunkStore::new(objects.clone(), domain("b"));
    let model: Model = [(0, 1), (7, 2), (1500, 3)].into();
    SnapshotUpload::new(a.clone(), spec("snap-1", 2000, 0), None).run(&source(&model)).await.unwrap();
    let original = Arc::new(load(&a, "snap-1").await.unwrap());
    let from = crate::sources::ManifestSource::new(a, original.clone()).unwrap();
    let copied = SnapshotUpload::new(b.clone(), spec("snap-2", 2000, 0), None).run(&from).await.unwrap();
    assert_eq!((copied.chunks.chunks_written, copied.chunks.percent()), (3, 100));
    let copy = load(&b, "snap-2").await.unwrap();
    assert_eq!(content(&b, &copy), model);
    assert_eq!(changed(&original, &copy).len(), 3, "nobody can tell that they are the same");
}

#[tokio::test]
async fn one_id_has_one_content() {
    let store = memory_store();
    let upload = |seed| {
        let (store, model) = (store.clone(), Model::from([(0, seed)]));
        async move { SnapshotUpload::new(store, spec("snap-1", 4, 0), None).run(&source(&model)).await }
    };
    let first = upload(1).await.unwrap();
    assert_eq!(upload(1).await.unwrap().manifest.root_hash, first.manifest.root_hash, "the same again is a success");
    assert!(matches!(upload(2).await, Err(StorageError::RootExists { .. })));
    assert_eq!(content(&store, &load(&store, "snap-1").await.unwrap()), [(0, 1)].into());
}

#[tokio::test]
async fn a_source_that_fails_publishes_nothing() {
    let store = memory_store();
    let read: ReadChunk = Box::new(|index| {
        Box::pin(async move { if index == 2 { Err("the disk is gone".into()) } else { Ok(Some(chunk(1))) } })
    });
    let upload = SnapshotUpload::new(store.clone(), spec("snap-1", 4, 0), None);
    let error = upload.run(&IndexedSource::new(0..4, read)).await.unwrap_err();
    assert!(error.to_string().contains("the disk is gone"), "{error}");
    assert!(matches!(load(&store, "snap-1").await, Err(StorageError::Missing { .. })));
    // An index behind the volume's end is the source's mistake.
    let upload = SnapshotUpload::new(store.clone(), spec("snap-1", 4, 0), None);
    assert!(matches!(upload.run(&source(&[(4, 1)].into())).await, Err(StorageError::Usage(_))));
}

/// The first error ends an upload, whichever worker meets it: the others do not read on to the end.
#[tokio::test]
async fn one_failed_chunk_ends_the_upload_at_once() {
    let faulty =
        FaultStore::new(
            Arc::new(InMemory::new()),
            |call, _| if (60..80).contains(&call) { Fault::Refused } else { Fault::None },
        );
    let store = ChunkStore::new(faulty.clone(), domain("test"));
    let read: ReadChunk = Box::new(|index| Box::pin(async move { Ok(Some(chunk(index + 1))) }));
    let upload = SnapshotUpload::new(store, spec("snap-1", 2000, 0), None);
    upload.run(&IndexedSource::new(0..2000, read)).await.unwrap_err();
    assert!(faulty.calls() < 400, "{} calls", faulty.calls());
}

/// Dies at every single call to the store, before and after it is done; then the same upload is done again.
#[tokio::test]
async fn an_upload_may_die_anywhere_and_be_done_again() {
    let parent_model: Model = [(0, 1), (1, 2), (1500, 3)].into();
    let dirty: Model = [(0, 4), (1, 2), (2, 0), (3, 5), (1500, 6), (2100, 7)].into();
    let prepare = || async {
        let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let store = ChunkStore::new(objects.clone(), domain("test"));
        let upload = SnapshotUpload::new(store, spec("snap-1", 2200, 3), None);
        upload.run(&source(&parent_model)).await.unwrap();
        objects
    };
    let attempt = |objects: Arc<dyn ObjectStore>| {
        let dirty = dirty.clone();
        async move {
            let store = ChunkStore::new(objects, domain("test"));
            let parent = Arc::new(load(&store, "snap-1").await?);
            SnapshotUpload::new(store, spec("snap-2", 2200, 4), Some(parent))
                .with_parallel(2)
                .run(&source(&dirty))
                .await
        }
    };
    let whole = prepare().await;
    let counted = FaultStore::new(whole.clone(), |_, _| Fault::None);
    let expected = attempt(counted.clone()).await.unwrap();
    let expected_listing = listing(&*whole).await;
    let calls = counted.calls();
    assert!(calls > 20, "{calls} calls");
    for call in 0..calls {
        for fault in [Fault::Refused, Fault::LostAck, Fault::Torn, Fault::DeathBefore, Fault::DeathAfter] {
            let objects = prepare().await;
            // A root is published atomically by every store that is supported.
            let torn_root =
                move |path: &object_store::path::Path| fault == Fault::Torn && path.as_ref().ends_with("/root");
            let faulty =
                FaultStore::new(
                    objects.clone(),
                    move |number, path| {
                        if number == call && !torn_root(path) { fault } else { Fault::None }
                    },
                );
            let died = attempt(faulty).await;
            let store = ChunkStore::new(objects.clone(), domain("test"));
            match load(&store, "snap-2").await {
                // It is there whole, or not at all.
                Ok(manifest) => assert_eq!(manifest.root_hash(), expected.manifest.root_hash),
                Err(error) => {
                    assert!(matches!(error, StorageError::Missing { .. }), "{fault:?} at {call}: {error}");
                    died.unwrap_err();
                }
            }
            let again = attempt(objects.clone()).await.unwrap();
            assert_eq!(again.manifest.root_hash, expected.manifest.root_hash, "{fault:?} at {call}");
            assert_eq!(listing(&*objects).await, expected_listing, "{fault:?} at {call}");
        }
    }
}

#[tokio::test]
async fn a_lost_acknowledgement_of_the_root_is_a_success() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    // Acknowledges nothing the first time, as a retrying client sees it: done, and then "exists already".
    let faulty = FaultStore::new(objects.clone(), |_, _| Fault::None);
    let store = ChunkStore::new(faulty, domain("test"));
    let upload = SnapshotUpload::new(store.clone(), spec("snap-1", 4, 0), None);
    let first = upload.run(&source(&[(0, 1)].into())).await.unwrap();
    let second = upload.run(&source(&[(0, 1)].into())).await.unwrap();
    assert_eq!(first.manifest.root_hash, second.manifest.root_hash);
    assert_eq!(second.manifest.pages_written, 0);
}

fn steps() -> impl Strategy<Value = Vec<(u64, Model)>> {
    let indexes = prop_oneof![0u64..12, 1020u64..1030, 2040u64..2060];
    let dirty = proptest::collection::btree_map(indexes, 0u64..12, 0..12);
    proptest::collection::vec((prop_oneof![Just(2060u64), Just(2500), Just(1024), Just(8)], dirty), 1..6)
}

proptest! {
    #![proptest_config(crate::testing::cases(48))]

    /// A chain of snapshots, each on the one before, grown and cut, against a map.
    #[test]
    fn manifests_are_what_a_map_says(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let store = memory_store();
            let mut model = Model::new();
            let mut parent: Option<Arc<Manifest>> = None;
            for (number, (chunks, mut dirty)) in steps.into_iter().enumerate() {
                dirty.retain(|index, _| *index < chunks);
                model.retain(|index, _| *index < chunks);
                let id = format!("snap-{number}");
                let upload = SnapshotUpload::new(store.clone(), spec(&id, chunks, number as u32), parent.clone());
                upload.run(&source(&dirty)).await.unwrap();
                let before = visible(&model);
                model.extend(dirty);
                let manifest = Arc::new(load(&store, &id).await.unwrap());
                assert_eq!(content(&store, &manifest), visible(&model));
                assert_eq!(manifest.present_chunks() as usize, visible(&model).len());
                assert_eq!(manifest.chunk_count(), chunks);
                assert!(manifest.chunks().eq(visible(&model).keys().copied()));
                if let Some(parent) = &parent {
                    let parent_model = content(&store, parent);
                    let all: std::collections::BTreeSet<u64> = parent_model.keys().chain(visible(&model).keys()).copied().collect();
                    let differ: Vec<u64> = all.into_iter().filter(|i| parent_model.get(i) != visible(&model).get(i)).collect();
                    let found: Vec<u64> = changed(parent, &manifest).iter().map(|change| change.index).collect();
                    assert_eq!(found, differ, "from {before:?}");
                }
                for (index, chunk) in manifest.entries() {
                    assert_eq!(manifest.entry(index), Some(chunk));
                    assert!(index / (PAGE_ENTRIES as u64) < 3);
                }
                parent = Some(manifest);
            }
        });
    }
}
