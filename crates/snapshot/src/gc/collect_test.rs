use std::collections::BTreeMap;

use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use proptest::prelude::*;

use super::*;
use crate::chunk::{CHUNK_BYTES, ChunkStore};
use crate::gc::MemoryLedger;
use crate::manifest::{Manifest, ManifestSpec, store_prefetch};
use crate::objects::SnapshotKey;
use crate::testing::{Fault, FaultStore, chunk, domain, listing};
use crate::upload::{IndexedSource, SnapshotUpload};

/// A volume: chunk index → seed of its content.
type Model = BTreeMap<u64, u64>;

struct Cloud {
    objects: Arc<dyn ObjectStore>,
    ledger: Arc<MemoryLedger>,
}

fn key(number: usize) -> SnapshotKey {
    SnapshotKey::new(format!("snap-{number}")).unwrap()
}

impl Cloud {
    fn new() -> Self {
        Self { objects: Arc::new(InMemory::new()), ledger: Arc::default() }
    }

    fn store(&self) -> ChunkStore {
        ChunkStore::new(self.objects.clone(), domain("test"))
    }

    async fn load(&self, number: usize) -> Result<Manifest, StorageError> {
        Manifest::load(&*self.objects, &key(number), None).await
    }

    /// Everything between the opening and the close of an upload.
    async fn write(&self, number: usize, epoch: Epoch, parent: Option<usize>, dirty: Model) -> Manifest {
        let parent = match parent {
            Some(parent) => Some(Arc::new(self.load(parent).await.unwrap())),
            None => None,
        };
        let spec = ManifestSpec { id: key(number), size_bytes: 1200 * CHUNK_BYTES as u64, epoch };
        let indexes: Vec<u64> = dirty.keys().copied().collect();
        let source = IndexedSource::new(
            indexes,
            Box::new(move |index| {
                let seed = dirty[&index];
                Box::pin(async move { Ok(Some(chunk(seed))) })
            }),
        );
        SnapshotUpload::new(self.store(), spec, parent).run(&source).await.unwrap();
        self.load(number).await.unwrap()
    }

    async fn snapshot(&self, number: usize, parent: Option<usize>, dirty: Model) {
        let epoch = self.ledger.open(&key(number), parent.map(key).as_ref()).unwrap();
        let manifest = self.write(number, epoch, parent, dirty).await;
        self.ledger.close(&key(number), Some(manifest.root_hash()));
    }

    async fn collect(&self, options: CollectOptions) -> Result<Collected, StorageError> {
        Gc::new(self.objects.clone(), self.ledger.clone()).run(&options).await
    }

    async fn assert_reads(&self, number: usize, model: &Model) {
        let manifest = self.load(number).await.unwrap();
        for (index, seed) in model {
            let content = manifest.read_chunk(&self.store(), *index).await.unwrap();
            assert_eq!(content, (*seed != 0).then(|| chunk(*seed)), "chunk {index} of snapshot {number}");
        }
    }
}

fn now() -> CollectOptions {
    CollectOptions { now: true, ..CollectOptions::default() }
}

#[tokio::test]
async fn what_one_snapshot_needs_stays_when_the_others_are_deleted_in_any_order() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]] {
        let cloud = Cloud::new();
        let models: [Model; 3] = [[(0, 1), (1, 2), (1100, 3)].into(), [(0, 4)].into(), [(1100, 5), (1, 0)].into()];
        let mut whole = Vec::new();
        let mut model = Model::new();
        for (number, dirty) in models.iter().enumerate() {
            cloud.snapshot(number, number.checked_sub(1), dirty.clone()).await;
            model.extend(dirty.clone());
            whole.push(model.clone());
        }
        store_prefetch(&*cloud.objects, &key(1), &[1, 2]).await.unwrap();
        let mut left: Vec<usize> = vec![0, 1, 2];
        for victim in order {
            cloud.ledger.delete(&key(victim));
            left.retain(|number| *number != victim);
            let collected = cloud.collect(now()).await.unwrap();
            assert_eq!(collected.roots, if victim == 1 { 2 } else { 1 });
            for number in &left {
                cloud.assert_reads(*number, &whole[*number]).await;
            }
        }
        assert_eq!(listing(&*cloud.objects).await, [], "nothing is left when nothing is needed");
    }
}

#[tokio::test]
async fn runs_without_hurry_take_three_epochs() {
    let cloud = Cloud::new();
    cloud.snapshot(0, None, [(0, 1)].into()).await;
    cloud.ledger.delete(&key(0));
    for run in 1..=3 {
        let collected = cloud.collect(CollectOptions::default()).await.unwrap();
        assert_eq!(
            (collected.epoch, collected.chunks, collected.pages),
            (Epoch(run), u64::from(run == 3), u64::from(run == 3))
        );
    }
    assert_eq!(listing(&*cloud.objects).await, []);
}

#[tokio::test]
async fn an_open_upload_keeps_its_parent_and_what_it_wrote() {
    let cloud = Cloud::new();
    cloud.snapshot(0, None, [(0, 1), (1, 2)].into()).await;
    let epoch = cloud.ledger.open(&key(1), Some(&key(0))).unwrap();
    cloud.ledger.delete(&key(0));
    // An upload that is far: its chunks, pages and root stand there, the ledger does not know yet.
    let manifest = cloud.write(1, epoch, Some(0), [(5, 3)].into()).await;
    for _ in 0..6 {
        let collected = cloud.collect(now()).await.unwrap();
        assert_eq!((collected.chunks, collected.pages, collected.roots), (0, 0, 0));
        assert!(collected.epoch <= Epoch(epoch.0 + 1), "an open upload holds the epoch");
    }
    cloud.ledger.close(&key(1), Some(manifest.root_hash()));
    let collected = cloud.collect(now()).await.unwrap();
    assert_eq!((collected.chunks, collected.pages, collected.roots), (0, 1, 1), "only the parent's own page and root");
    cloud.assert_reads(1, &[(0, 1), (1, 2), (5, 3)].into()).await;
}

#[tokio::test]
async fn a_dry_run_tells_and_deletes_nothing() {
    let cloud = Cloud::new();
    cloud.snapshot(0, None, [(0, 1), (1, 2)].into()).await;
    cloud.ledger.delete(&key(0));
    for _ in 0..3 {
        cloud.ledger.advance().await.unwrap();
    }
    let before = listing(&*cloud.objects).await;
    let options = CollectOptions { dry_run: true, now: true, ..CollectOptions::default() };
    let told = cloud.collect(options).await.unwrap();
    assert_eq!((told.epoch, told.chunks, told.pages, told.roots), (Epoch(3), 2, 1, 1));
    assert_eq!(told.bytes, before.iter().map(|(_, size)| size).sum::<u64>());
    assert_eq!(listing(&*cloud.objects).await, before);
    assert_eq!(cloud.collect(CollectOptions::default()).await.unwrap().bytes, told.bytes);
}

#[tokio::test]
async fn nothing_is_deleted_while_a_live_manifest_cannot_be_read() {
    let cloud = Cloud::new();
    cloud.snapshot(0, None, [(0, 1)].into()).await;
    cloud.snapshot(1, None, [(0, 2)].into()).await;
    cloud.ledger.delete(&key(1));
    let page = listing(&*cloud.objects).await.into_iter().find(|(path, _)| path.starts_with("page/")).unwrap().0;
    let root = Path::from("snap/snap-0/root");
    for victim in [Path::from(page), root] {
        let whole = cloud.objects.get(&victim).await.unwrap().bytes().await.unwrap();
        let mut damaged = whole.to_vec();
        damaged[20] ^= 1;
        cloud.objects.put(&victim, PutPayload::from(damaged)).await.unwrap();
        let chunks = |all: Vec<(String, u64)>| all.into_iter().filter(|(path, _)| path.starts_with("chunk/")).count();
        if victim.as_ref().starts_with("snap/") {
            let error = cloud.collect(now()).await.unwrap_err();
            assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
        } else {
            // Perhaps the page of the deleted one: then it is not looked at.
            let _ = cloud.collect(CollectOptions::default()).await;
        }
        assert_eq!(chunks(listing(&*cloud.objects).await), 2);
        cloud.objects.put(&victim, PutPayload::from(whole)).await.unwrap();
    }
    cloud.collect(now()).await.unwrap();
    cloud.assert_reads(0, &[(0, 1)].into()).await;
}

#[tokio::test]
async fn foreign_objects_are_left_alone() {
    let cloud = Cloud::new();
    for path in [
        "bundle/x.manifest.json",
        "chunk/README",
        "chunk/test/00000000/ab/notahash",
        "snap/some-id/notes",
        "snap/readme",
    ] {
        cloud.objects.put(&Path::from(path), PutPayload::from_static(b"mine")).await.unwrap();
    }
    let before = listing(&*cloud.objects).await;
    cloud.collect(now()).await.unwrap();
    assert_eq!(listing(&*cloud.objects).await, before);
}

#[tokio::test]
async fn a_local_store_loses_the_files_of_interrupted_writes() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let objects = crate::open_store(&url, &crate::StoreOptions::default()).unwrap();
    let cloud = Cloud { objects, ledger: Arc::default() };
    cloud.snapshot(0, None, [(0, 1)].into()).await;
    cloud.snapshot(1, None, [(0, 1), (1, 2)].into()).await;
    let chunk = listing(&*cloud.objects).await.into_iter().find(|(path, _)| path.starts_with("chunk/")).unwrap().0;
    let leftovers = [
        format!("{chunk}#1"),
        "snap/snap-0/root#12".into(),
        "chunk/test/00000009/ab/cd#1".into(),
        "snap/snap-2/root#1".into(),
    ];
    for leftover in &leftovers {
        let path = folder.path().join(leftover);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"half").unwrap();
    }
    cloud.ledger.open(&key(2), None).unwrap();
    cloud.ledger.close(&key(2), None);
    // One that may still be being written.
    let epoch = cloud.ledger.open(&key(3), None).unwrap();
    std::fs::create_dir_all(folder.path().join("snap/snap-3")).unwrap();
    std::fs::write(folder.path().join("snap/snap-3/root#1"), b"half").unwrap();
    let options = CollectOptions { local_root: Some(folder.path().to_owned()), now: true, ..CollectOptions::default() };
    cloud.collect(options.clone()).await.unwrap();
    assert!(folder.path().join(&leftovers[0]).exists(), "its epoch {epoch} is still in use");
    assert!(folder.path().join("snap/snap-3/root#1").exists());
    cloud.ledger.close(&key(3), None);
    cloud.ledger.delete(&key(0));
    let collected = cloud.collect(options).await.unwrap();
    assert_eq!(collected.leftovers, 2, "the chunk's and that of the snapshot that failed");
    let exists: Vec<bool> = leftovers.iter().map(|leftover| folder.path().join(leftover).exists()).collect();
    assert_eq!(exists, [false, false, true, false]);
    cloud.assert_reads(1, &[(0, 1), (1, 2)].into()).await;
}

/// Bundles and archives: what was abandoned goes, what is being written stays and becomes whole.
#[tokio::test]
async fn a_local_store_loses_bundles_and_archives_that_were_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let objects = crate::open_store(&format!("file://{}", folder.path().display()), &Default::default()).unwrap();
    let cloud = Cloud { objects, ledger: Arc::default() };
    let put = |path: &str, age: u64| {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, b"half").unwrap();
        let changed = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(changed).unwrap();
        path
    };
    const DAY: u64 = 24 * 60 * 60;
    let gone = [
        put("archive/123456789012/ami-1.bin#1", DAY + 60),
        put("bundle/123456789012/web.part.0003#2", 400 * DAY),
        put("bundle/123456789012/a/b/c/web.manifest.json#17", 2 * DAY),
    ];
    let stay = [
        put("archive/123456789012/ami-1.bin#2", DAY - 600),
        put("archive/123456789012/ami-0.bin", 400 * DAY),
        put("bundle/123456789012/web.part.0003", 400 * DAY),
        put("bundle/123456789012/not#a-number", 400 * DAY),
        put("elsewhere/web.part.0003#2", 400 * DAY),
    ];
    let place = Path::from("archive/123456789012/ami-2.bin");
    let mut upload = cloud.objects.put_multipart(&place).await.unwrap();
    upload.put_part(PutPayload::from_static(b"one ")).await.unwrap();
    let options = CollectOptions { local_root: Some(folder.path().to_owned()), now: true, ..CollectOptions::default() };
    let told = cloud.collect(CollectOptions { dry_run: true, ..options.clone() }).await.unwrap();
    assert!((told.leftovers, told.bytes) == (3, 12) && gone.iter().all(|path| path.exists()));
    let (one, other) = tokio::join!(cloud.collect(options.clone()), cloud.collect(options.clone()));
    assert_eq!(one.unwrap().leftovers + other.unwrap().leftovers, 3);
    assert!(gone.iter().all(|path| !path.exists()) && stay.iter().all(|path| path.exists()));
    upload.put_part(PutPayload::from_static(b"two")).await.unwrap();
    upload.complete().await.unwrap();
    assert_eq!(cloud.objects.get(&place).await.unwrap().bytes().await.unwrap(), "one two");

    // A writer that slept for longer than anybody waits publishes nothing.
    let mut upload = cloud.objects.put_multipart(&Path::from("archive/123456789012/ami-3.bin")).await.unwrap();
    upload.put_part(PutPayload::from_static(b"half")).await.unwrap();
    let file = folder.path().join("archive/123456789012/ami-3.bin#1");
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(2 * DAY);
    std::fs::File::options().write(true).open(&file).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(cloud.collect(options).await.unwrap().leftovers, 1);
    upload.complete().await.unwrap_err();
    assert!(!folder.path().join("archive/123456789012/ami-3.bin").exists());
}

/// Folders vanish under the listing as they become empty.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_objects_go_from_a_local_store() {
    let folder = tempfile::tempdir().unwrap();
    let objects = crate::open_store(&format!("file://{}", folder.path().display()), &Default::default()).unwrap();
    let cloud = Cloud { objects, ledger: Arc::default() };
    for number in 0..3500u32 {
        let hash = blake3::hash(&number.to_le_bytes()).to_hex();
        let shard = folder.path().join("chunk/test/00000000").join(&hash[..2]);
        std::fs::create_dir_all(&shard).unwrap();
        std::fs::write(shard.join(hash.as_str()), b"x").unwrap();
    }
    let (one, other) = tokio::join!(cloud.collect(now()), cloud.collect(now()));
    assert!(one.unwrap().chunks + other.unwrap().chunks >= 3500);
    assert_eq!(listing(&*cloud.objects).await, []);
    assert!(!folder.path().join("chunk/test/00000000").exists());
}

/// Uploads, deletions and two collectors, all at the same time on all threads.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn collectors_and_uploads_at_the_same_time_lose_nothing() {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    let cloud = Arc::new(Cloud::new());
    let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let uploaders: Vec<_> = (0..3usize)
        .map(|uploader| {
            let (cloud, next) = (cloud.clone(), next.clone());
            tokio::spawn(async move {
                // Snapshot, what it must read as.
                let mut live: Vec<(usize, Model)> = Vec::new();
                for round in 0..40usize {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    let parent = live.last().filter(|_| round % 5 != 0).cloned();
                    let epoch =
                        cloud.ledger.open(&key(number), parent.as_ref().map(|(id, _)| key(*id)).as_ref()).unwrap();
                    // The same few contents again and again: what one deletes another finds.
                    let seed = (round / 4 + uploader) as u64 % 6;
                    let dirty: Model = [(round as u64 % 7, seed), (1100, 1 + round as u64 % 3)].into();
                    let mut model = parent.as_ref().map(|(_, model)| model.clone()).unwrap_or_default();
                    // The parent may be deleted while it is needed.
                    if let Some((id, _)) = parent.as_ref().filter(|_| round % 3 == 0) {
                        cloud.ledger.delete(&key(*id));
                        live.retain(|(other, _)| other != id);
                    }
                    let manifest = cloud.write(number, epoch, parent.map(|(id, _)| id), dirty.clone()).await;
                    model.extend(dirty);
                    let completed = round % 4 != 3;
                    cloud.ledger.close(&key(number), completed.then(|| manifest.root_hash()));
                    if completed {
                        live.push((number, model));
                    }
                    if live.len() > 4 {
                        cloud.ledger.delete(&key(live.remove(0).0));
                    }
                    if let Some((number, model)) = live.first() {
                        cloud.assert_reads(*number, model).await;
                    }
                }
                live
            })
        })
        .collect();
    let collectors: Vec<_> = (0..2)
        .map(|_| {
            let (cloud, done) = (cloud.clone(), done.clone());
            tokio::spawn(async move {
                let mut deleted = 0;
                while !done.load(Ordering::SeqCst) {
                    match cloud.collect(now()).await {
                        Ok(collected) => deleted += collected.chunks,
                        // The other one deleted the root of a snapshot that was live a moment ago: nothing is deleted on that ground.
                        Err(StorageError::Missing { path }) => {
                            assert!(path.starts_with("snap/") || path.starts_with("page/"), "{path}")
                        }
                        Err(error) => panic!("{error}"),
                    }
                    tokio::task::yield_now().await;
                }
                deleted
            })
        })
        .collect();
    let mut live = Vec::new();
    for uploader in uploaders {
        live.extend(uploader.await.unwrap());
    }
    done.store(true, Ordering::SeqCst);
    let mut deleted = 0;
    for collector in collectors {
        deleted += collector.await.unwrap();
    }
    assert!(deleted > 0, "the collectors had nothing to do");
    for (number, model) in &live {
        cloud.assert_reads(*number, model).await;
        cloud.ledger.delete(&key(*number));
    }
    cloud.collect(now()).await.unwrap();
    assert_eq!(listing(&*cloud.objects).await, []);
}

#[derive(Clone, Debug)]
enum Step {
    /// Opens the next id on a live parent, if any, and uploads.
    Open {
        parent: Option<usize>,
        dirty: Model,
    },
    /// Closes the oldest open upload.
    Close {
        success: bool,
    },
    Delete(usize),
    Collect {
        now: bool,
        dies_at: Option<u64>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let dirty = proptest::collection::btree_map(prop_oneof![0u64..4, Just(1100u64)], 0u64..5, 0..4);
    prop_oneof![
        3 => (proptest::option::of(0usize..8), dirty).prop_map(|(parent, dirty)| Step::Open { parent, dirty }),
        2 => prop::bool::weighted(0.8).prop_map(|success| Step::Close { success }),
        2 => (0usize..8).prop_map(Step::Delete),
        4 => (any::<bool>(), proptest::option::weighted(0.3, 0u64..30)).prop_map(|(now, dies_at)| Step::Collect { now, dies_at }),
    ]
}

proptest! {
    #![proptest_config(crate::testing::cases(200))]

    /// Uploads, deletions and collectors that die, in any order: what is live can be read, and in the end nothing is left.
    #[test]
    fn no_history_loses_a_chunk(steps in proptest::collection::vec(step(), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let cloud = Cloud::new();
            let mut live: BTreeMap<usize, Model> = BTreeMap::new();
            let mut open: Vec<(usize, Model, Manifest)> = Vec::new();
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Open { parent, dirty } if open.len() < 3 => {
                        let parent = parent.filter(|parent| live.contains_key(parent));
                        let epoch = cloud.ledger.open(&key(next), parent.map(key).as_ref()).unwrap();
                        let mut model = parent.map(|parent| live[&parent].clone()).unwrap_or_default();
                        let manifest = cloud.write(next, epoch, parent, dirty.clone()).await;
                        model.extend(dirty);
                        open.push((next, model, manifest));
                        next += 1;
                    }
                    Step::Close { success } if !open.is_empty() => {
                        let (number, model, manifest) = open.remove(0);
                        cloud.ledger.close(&key(number), success.then(|| manifest.root_hash()));
                        if success {
                            live.insert(number, model);
                        }
                    }
                    Step::Delete(number) if live.contains_key(&number) => {
                        live.remove(&number);
                        cloud.ledger.delete(&key(number));
                    }
                    Step::Collect { now, dies_at } => {
                        let faulty = FaultStore::new(cloud.objects.clone(), move |call, _| {
                            if Some(call) == dies_at { Fault::DeathAfter } else { Fault::None }
                        });
                        let options = CollectOptions { now, ..CollectOptions::default() };
                        let result = Gc::new(faulty, cloud.ledger.clone()).run(&options).await;
                        assert!(result.is_ok() || dies_at.is_some(), "{result:?}");
                    }
                    _ => {}
                }
                for (number, model) in &live {
                    cloud.assert_reads(*number, model).await;
                }
                for (number, model, _) in &open {
                    cloud.assert_reads(*number, model).await;
                }
            }
            for (number, ..) in open {
                cloud.ledger.close(&key(number), None);
            }
            for number in live.into_keys() {
                cloud.ledger.delete(&key(number));
            }
            cloud.collect(now()).await.unwrap();
            assert_eq!(listing(&*cloud.objects).await, []);
        });
    }
}
