use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::stream::BoxStream;
use hearth_snapshot::{Epoch, IndexedSource, ManifestSpec, SnapshotUpload, StoreOptions, open_store};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result,
};

use super::*;

const SNAPSHOT: &str = "snap-0123456789abcdef0";

/// Counts how often chunks are read, and can be out of service.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn ObjectStore>,
    chunks: AtomicU64,
    down: std::sync::atomic::AtomicBool,
}

impl std::fmt::Display for Counting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a counting store")
    }
}

#[async_trait]
impl ObjectStore for Counting {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(location, payload, opts).await
    }
    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if location.as_ref().starts_with("chunk/") {
            self.chunks.fetch_add(1, Ordering::SeqCst);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.down.load(Ordering::SeqCst) {
            return Err(object_store::Error::Generic { store: "counting", source: "503".into() });
        }
        self.inner.get_opts(location, options).await
    }
    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn content(chunk: u64) -> Bytes {
    vec![chunk as u8 + 1; CHUNK_BYTES].into()
}

/// A store with a snapshot of `chunks` chunks, of which each fourth is zeros.
async fn store(chunks: u64) -> (Arc<Counting>, BaseSnapshot) {
    let inner = open_store("memory:", &StoreOptions::default()).unwrap();
    let counting = Counting { inner, chunks: AtomicU64::new(0), down: false.into() };
    let store = Arc::new(counting);
    let objects: Arc<dyn ObjectStore> = store.clone();
    let key_domain = Some(hearth_proto::v1::KeyDomain { name: "plain".into(), secret: vec![7; 32].into() });
    let size_bytes = chunks * CHUNK_BYTES as u64;
    let spec = ManifestSpec { id: SnapshotKey::new(SNAPSHOT).unwrap(), size_bytes, epoch: Epoch(0) };
    let read = |chunk: u64| async move { Ok((chunk % 4 != 3).then(|| content(chunk))) }.boxed();
    let source = IndexedSource::new(0..chunks, Box::new(read));
    let chunks = chunk_store(&objects, key_domain.as_ref()).unwrap();
    let made = SnapshotUpload::new(chunks, spec, None).run(&source).await.unwrap();
    let root = made.manifest.root_hash.to_string();
    store.chunks.store(0, Ordering::SeqCst);
    (store, BaseSnapshot { snapshot_id: SNAPSHOT.into(), root, size_bytes, key_domain })
}

/// A host of its own.
fn host(store: &Arc<Counting>, boot: &str, folder: &std::path::Path, fill_rate: u64) -> Bases {
    let layout = Layout::new(&folder.join("state"), &folder.join("run"));
    Bases::new(layout, store.clone(), boot.to_owned(), fill_rate)
}

fn on_disk(base: &Base, chunk: u64) -> Bytes {
    let mut bytes = vec![0; CHUNK_BYTES];
    let (data, _) = base.files().unwrap();
    data.read_exact_at(&mut bytes, chunk * CHUNK_BYTES as u64).unwrap();
    bytes.into()
}

#[tokio::test(start_paused = true)]
async fn a_chunk_is_fetched_once_for_all_who_wait_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(8).await;
    let bases = host(&store, "a", folder.path(), 0);
    let base = bases.get(&wanted).await.unwrap();
    assert!(Arc::ptr_eq(&base, &bases.get(&wanted).await.unwrap()));
    let waiting = (0..20).map(|_| base.ensure(5));
    futures::future::join_all(waiting).await;
    assert_eq!((store.chunks.load(Ordering::SeqCst), on_disk(&base, 5)), (1, content(5)));
    // Zeros are nowhere and are not waited for.
    base.ensure(3).await;
    assert_eq!(store.chunks.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_told_when_the_store_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(4).await;
    let base = host(&store, "a", folder.path(), 0).get(&wanted).await.unwrap();
    store.down.store(true, Ordering::SeqCst);
    assert!(tokio::time::timeout(Duration::from_secs(60), base.ensure(1)).await.is_err());
    store.down.store(false, Ordering::SeqCst);
    base.ensure(1).await;
    assert_eq!(on_disk(&base, 1), content(1));
}

#[tokio::test(start_paused = true)]
async fn what_the_first_launch_reads_is_fetched_ahead_by_later_ones() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(64).await;
    let first = host(&store, "a", &folder.path().join("first"), 0);
    let base = first.get(&wanted).await.unwrap();
    for chunk in [40, 2, 17] {
        base.ensure(chunk).await;
    }
    base.want(50, false);
    tokio::time::sleep(NOTED_FOR * 2).await;
    // Read ahead, or later: no part of it.
    base.ensure(60).await;
    tokio::time::sleep(NOTED_FOR * 2).await;
    let key = SnapshotKey::new(SNAPSHOT).unwrap();
    assert_eq!(load_prefetch(&*store, &key).await.unwrap(), Some(vec![40, 2, 17]));

    store.chunks.store(0, Ordering::SeqCst);
    let second = host(&store, "a", &folder.path().join("second"), 0);
    let base = second.get(&wanted).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(store.chunks.load(Ordering::SeqCst), 3);
    assert!([40, 2, 17].iter().all(|chunk| base.has(*chunk)) && !base.has(60));
}

#[tokio::test(start_paused = true)]
async fn the_rest_comes_in_the_background_if_that_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(16).await;
    // Two chunks a second.
    let base = host(&store, "a", folder.path(), CHUNK_BYTES as u64 * 2).get(&wanted).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (here, all) = base.progress();
    assert!(all == 12 && (4..=8).contains(&here), "{here} of {all}");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(base.progress(), (12, 12));
    assert_eq!(store.chunks.load(Ordering::SeqCst), 12);
}

#[tokio::test(start_paused = true)]
async fn after_a_reboot_of_the_host_chunks_are_looked_at_before_they_count() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(4).await;
    let base = host(&store, "a", folder.path(), 0).get(&wanted).await.unwrap();
    base.ensure(0).await;
    base.ensure(1).await;
    // Another agent of the same boot believes the bits.
    let again = host(&store, "a", folder.path(), 0).get(&wanted).await.unwrap();
    assert!(again.has(0) && again.has(1));
    // The power failed, and one of the chunks was not on disk yet.
    let file = OpenOptions::new().write(true).open(&base.path).unwrap();
    file.write_all_at(&[0; 4096], CHUNK_BYTES as u64 + 8192).unwrap();
    store.chunks.store(0, Ordering::SeqCst);
    let later = host(&store, "b", folder.path(), 0).get(&wanted).await.unwrap();
    assert!(!later.has(0) && !later.has(1));
    later.ensure(0).await;
    assert_eq!(store.chunks.load(Ordering::SeqCst), 0, "it was whole");
    later.ensure(1).await;
    assert_eq!((store.chunks.load(Ordering::SeqCst), on_disk(&later, 1)), (1, content(1)));
}
