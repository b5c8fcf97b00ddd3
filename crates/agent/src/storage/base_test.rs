use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::stream::BoxStream;
use hearth_snapshot::{
    Epoch, IndexedSource, ManifestSpec, ObjectStore, SnapshotKey, SnapshotUpload, StoreOptions, open_store,
};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result,
};

use hearth_proto::v1::{BaseSnapshot, HostVolume, KeyDomain};

use super::*;
use crate::state::Layout;
use crate::storage::working_set::{NOTED_FOR, QUIET};
use crate::storage::{Bases, Evicted, HostVolumes, Keyring};

const SNAPSHOT: &str = "snap-0123456789abcdef0";

/// Counts how often chunks are read, and can be out of service.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn ObjectStore>,
    chunks: AtomicU64,
    down: std::sync::atomic::AtomicBool,
    /// No manifest ever comes, and no error either.
    hangs: std::sync::atomic::AtomicBool,
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
        if self.hangs.load(Ordering::SeqCst) && location.as_ref().starts_with("snap/") {
            std::future::pending::<()>().await;
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
    store_in(chunks, false).await
}

fn domain(encrypt_on_hosts: bool) -> KeyDomain {
    KeyDomain { name: "one".into(), secret: vec![7; 32].into(), encrypt_on_hosts }
}

fn keyring(layout: &Layout) -> Arc<Keyring> {
    Keyring::of_domains(layout, &[domain(false)])
}

async fn store_in(chunks: u64, encrypt_on_hosts: bool) -> (Arc<Counting>, BaseSnapshot) {
    let inner = open_store("memory:", &StoreOptions::default()).unwrap();
    let counting = Counting { inner, chunks: AtomicU64::new(0), down: false.into(), hangs: false.into() };
    let store = Arc::new(counting);
    let objects: Arc<dyn ObjectStore> = store.clone();
    let key_domain = Some(domain(encrypt_on_hosts));
    let size_bytes = chunks * CHUNK_BYTES as u64;
    let spec = ManifestSpec { id: SnapshotKey::new(SNAPSHOT).unwrap(), size_bytes, epoch: Epoch(0) };
    let read = |chunk: u64| async move { Ok((chunk % 4 != 3).then(|| content(chunk))) }.boxed();
    let source = IndexedSource::new(0..chunks, Box::new(read));
    let nowhere = Layout::new("/nonexistent".as_ref(), "/nonexistent".as_ref());
    let chunks = keyring(&nowhere).chunk_store(&objects, key_domain.as_ref()).unwrap();
    let made = SnapshotUpload::new(chunks, spec, None).run(&source).await.unwrap();
    let root = made.manifest.root_hash.to_string();
    store.chunks.store(0, Ordering::SeqCst);
    (store, BaseSnapshot { snapshot_id: SNAPSHOT.into(), root, size_bytes, key_domain })
}

/// A host of its own.
fn host(store: &Arc<Counting>, boot: &str, folder: &std::path::Path, fill_rate: u64) -> Bases {
    let layout = Layout::new(&folder.join("state"), &folder.join("run"));
    let keyring = keyring(&layout);
    Bases::new(layout, store.clone(), keyring, boot.to_owned(), fill_rate)
}

fn on_disk(base: &Base, chunk: u64) -> Bytes {
    let mut bytes = vec![0; CHUNK_BYTES];
    let (data, _) = base.files().unwrap();
    data.read_exact_at(&mut bytes, chunk * CHUNK_BYTES as u64).unwrap();
    bytes.into()
}

#[tokio::test(start_paused = true)]
async fn a_base_that_does_not_come_keeps_nobody_waiting_for_another() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(8).await;
    let bases = Arc::new(host(&store, "a", folder.path(), 0));
    let base = bases.get(&wanted).await.unwrap();
    store.hangs.store(true, Ordering::SeqCst);
    let other = BaseSnapshot { snapshot_id: "snap-0fedcba9876543210".into(), root: "0".repeat(64), ..wanted.clone() };
    let waiting = tokio::spawn({
        let bases = bases.clone();
        async move { bases.get(&other).await.map(drop) }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let again = tokio::time::timeout(Duration::from_secs(5), bases.get(&wanted)).await.expect("it waits for the other");
    assert!(Arc::ptr_eq(&base, &again.unwrap()) && !waiting.is_finished());
    waiting.abort();
}

#[tokio::test(start_paused = true)]
async fn a_chunk_is_fetched_once_for_all_who_wait_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(8).await;
    let bases = host(&store, "a", folder.path(), 0);
    let base = bases.get(&wanted).await.unwrap();
    assert!(Arc::ptr_eq(&base, &bases.get(&wanted).await.unwrap()));
    let waiting = (0..20).map(|_| base.ensure(5, Reader::Launch));
    futures::future::join_all(waiting).await;
    assert_eq!((store.chunks.load(Ordering::SeqCst), on_disk(&base, 5)), (1, content(5)));
    // Zeros are nowhere and are not waited for.
    base.ensure(3, Reader::Launch).await;
    assert_eq!(store.chunks.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_told_when_the_store_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(4).await;
    let base = host(&store, "a", folder.path(), 0).get(&wanted).await.unwrap();
    store.down.store(true, Ordering::SeqCst);
    assert!(tokio::time::timeout(Duration::from_secs(60), base.ensure(1, Reader::Launch)).await.is_err());
    store.down.store(false, Ordering::SeqCst);
    base.ensure(1, Reader::Launch).await;
    assert_eq!(on_disk(&base, 1), content(1));
}

#[tokio::test(start_paused = true)]
async fn what_the_first_launch_reads_is_fetched_ahead_by_later_ones() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(64).await;
    let first = host(&store, "a", &folder.path().join("first"), 0);
    let base = first.get(&wanted).await.unwrap();
    base.ensure(40, Reader::Launch).await;
    base.want(50, Reader::Nobody);
    // A snapshot reads what no launch needs.
    base.ensure(52, Reader::Waiting).await;
    tokio::time::sleep(QUIET - LOOK).await;
    base.ensure(2, Reader::Launch).await;
    // A launch that waits for the object store is not over.
    store.down.store(true, Ordering::SeqCst);
    assert!(tokio::time::timeout(QUIET * 3, base.ensure(17, Reader::Launch)).await.is_err());
    store.down.store(false, Ordering::SeqCst);
    base.ensure(17, Reader::Launch).await;
    let key = SnapshotKey::new(SNAPSHOT).unwrap();
    assert_eq!(load_prefetch(&*store, &key).await.unwrap(), None);
    tokio::time::sleep(QUIET + LOOK * 2).await;
    // Read ahead, or later: no part of it.
    base.ensure(60, Reader::Launch).await;
    tokio::time::sleep(NOTED_FOR * 2).await;
    assert_eq!(load_prefetch(&*store, &key).await.unwrap(), Some(vec![40, 2, 17]));

    store.chunks.store(0, Ordering::SeqCst);
    let second = host(&store, "a", &folder.path().join("second"), 0);
    let base = second.get(&wanted).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(store.chunks.load(Ordering::SeqCst), 3);
    assert!([40, 2, 17].iter().all(|chunk| base.has(*chunk)) && !base.has(60));
    // Volumes that are not launched from change nothing, however long the base is there.
    base.ensure(61, Reader::Waiting).await;
    tokio::time::sleep(NOTED_FOR * 2).await;
    // This launch reads on from 4 to 6; somebody else had 5 fetched.
    base.ensure(4, Reader::Launch).await;
    base.note(5);
    base.ensure(6, Reader::Launch).await;
    tokio::time::sleep(QUIET + LOOK * 2).await;
    assert_eq!(load_prefetch(&*store, &key).await.unwrap(), Some(vec![40, 2, 17, 4, 5, 6]));
}

#[tokio::test(start_paused = true)]
async fn only_what_was_written_is_read_before_it_is_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::options().read(true).write(true).create(true).truncate(false).open(folder.path().join("data"));
    let file = file.unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(&[1], (1 << 20) + 5000).unwrap();
    assert!(is_hole(&file, 0, 1 << 20) && is_hole(&file, 3 << 20, 1 << 20) && is_hole(&file, 2 << 20, 1 << 20));
    assert!(!is_hole(&file, 1 << 20, 1 << 20) && !is_hole(&file, 0, 2 << 20));
    // Beyond its end there is nothing either.
    assert!(is_hole(&file, 5 << 20, 1 << 20));
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
    base.ensure(0, Reader::Launch).await;
    base.ensure(1, Reader::Launch).await;
    // Another agent of the same boot believes the bits.
    let again = host(&store, "a", folder.path(), 0).get(&wanted).await.unwrap();
    assert!(again.has(0) && again.has(1));
    // The power failed, and one of the chunks was not on disk yet.
    let file = OpenOptions::new().write(true).open(&base.path).unwrap();
    file.write_all_at(&[0; 4096], CHUNK_BYTES as u64 + 8192).unwrap();
    store.chunks.store(0, Ordering::SeqCst);
    let later = host(&store, "b", folder.path(), 0).get(&wanted).await.unwrap();
    assert!(!later.has(0) && !later.has(1));
    later.ensure(0, Reader::Launch).await;
    assert_eq!(store.chunks.load(Ordering::SeqCst), 0, "it was whole");
    later.ensure(1, Reader::Launch).await;
    assert_eq!((store.chunks.load(Ordering::SeqCst), on_disk(&later, 1)), (1, content(1)));
}

#[tokio::test(start_paused = true)]
async fn the_content_of_an_encrypted_snapshot_is_nowhere_in_clear_on_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store_in(8, true).await;
    let base = host(&store, "a", folder.path(), 0).get(&wanted).await.unwrap();
    base.ensure(5, Reader::Launch).await;
    let mut on_disk = on_disk(&base, 5).to_vec();
    let repeated = |bytes: &[u8]| bytes.windows(16).filter(|window| window.iter().all(|byte| *byte == 6)).count();
    assert_eq!(repeated(&on_disk), 0);
    base.key().unwrap().decrypt(&mut on_disk, 5 * CHUNK_BYTES as u64);
    assert_eq!(on_disk, content(5));
    // After a boot of the host it is taken for what it is.
    let base = host(&store, "b", folder.path(), 0).get(&wanted).await.unwrap();
    assert!(!base.has(5));
    base.ensure(5, Reader::Launch).await;
    assert_eq!(store.chunks.load(Ordering::SeqCst), 1, "it need not be fetched again");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_has_not_come_yet_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (store, mut wanted) = store_in(8, true).await;
    wanted.key_domain.as_mut().unwrap().name = "another".into();
    let error = host(&store, "a", folder.path(), 0).get(&wanted).await.err().unwrap();
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().contains("another has not come"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_is_wanted_whole_is_fetched_and_its_progress_told() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(200).await;
    store.down.store(true, Ordering::SeqCst);
    let bases = Arc::new(host(&store, "a", folder.path(), 0));
    let reports = Arc::new(crate::reports::Reports::default());
    let fills = crate::storage::Fills::new(bases.clone(), reports.clone());
    fills.want(vec![wanted.clone()]);
    let said = |present: u64, wrong: bool| {
        let reports = reports.clone();
        async move {
            loop {
                let found = reports.full().fills;
                if found.first().is_some_and(|one| one.present_chunks == present && one.error.is_empty() != wrong) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    said(0, true).await;
    store.down.store(false, Ordering::SeqCst);
    said(150, false).await;
    assert_eq!(reports.full().fills[0].total_chunks, 150, "zeros are nowhere");
    let base = bases.get(&wanted).await.unwrap();
    assert!((0..200).all(|chunk| chunk % 4 == 3 || on_disk(&base, chunk) == content(chunk)));
    assert_eq!(store.chunks.load(Ordering::SeqCst), 150, "each once");
    fills.want(Vec::new());
    assert_eq!(reports.full().fills, []);
}

/// How many bases are removed when room is short for ever.
fn evict_all(bases: &Bases) -> u64 {
    bases.evict(|| true).unwrap().bases
}

#[tokio::test(start_paused = true)]
async fn a_base_is_removed_when_room_is_short_and_nobody_uses_it() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(8).await;
    let bases = Arc::new(host(&store, "a", folder.path(), 0));
    let layout = Layout::new(&folder.path().join("state"), &folder.path().join("run"));
    let volumes = HostVolumes::new(layout.clone(), bases.clone()).unwrap();
    let volume = HostVolume {
        volume_id: "vol-0123456789abcdef0".into(),
        attach_generation: 1,
        size_bytes: wanted.size_bytes,
        base: Some(wanted.clone()),
        ..HostVolume::default()
    };
    let placed = volumes.place(&volume).await.unwrap();
    placed.base.as_ref().unwrap().ensure(5, Reader::Launch).await;
    assert_eq!(evict_all(&bases), 0, "somebody has it open");
    drop(placed);
    assert_eq!(evict_all(&bases), 0, "a volume here is made from it");
    // Another agent, which has opened nothing yet, sees that too.
    assert_eq!(evict_all(&host(&store, "a", folder.path(), 0)), 0);
    volumes.delete(&volume.volume_id.parse().unwrap()).unwrap();
    assert_eq!(bases.evict(|| false).unwrap(), Evicted::default(), "there is room");
    let evicted = bases.evict(|| true).unwrap();
    assert!(evicted.bases == 1 && evicted.bytes >= CHUNK_BYTES as u64, "{evicted:?}");
    assert_eq!(std::fs::read_dir(layout.bases()).unwrap().count(), 0);
    // It can be had again.
    store.chunks.store(0, Ordering::SeqCst);
    let base = bases.get(&wanted).await.unwrap();
    assert!(!base.has(5));
    base.ensure(5, Reader::Launch).await;
    assert_eq!((store.chunks.load(Ordering::SeqCst), on_disk(&base, 5)), (1, content(5)));
}

#[tokio::test(start_paused = true)]
async fn the_longest_unused_base_goes_first_and_a_damaged_map_keeps_all() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(8).await;
    let bases = host(&store, "a", folder.path(), 0);
    let layout = Layout::new(&folder.path().join("state"), &folder.path().join("run"));
    bases.get(&wanted).await.unwrap();
    for (root, seconds) in [("old", 1000), ("older", 500), ("new", 2000)] {
        std::fs::create_dir_all(layout.base(root)).unwrap();
        let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        File::open(layout.base(root)).unwrap().set_modified(time).unwrap();
    }
    let broken = layout.volumes().join("vol-0123456789abcdef0");
    std::fs::create_dir_all(&broken).unwrap();
    std::fs::write(broken.join("map"), "nonsense").unwrap();
    assert!(bases.evict(|| true).is_err(), "its base may be any of them");
    std::fs::remove_dir_all(broken).unwrap();
    // Short until two are gone.
    let left = || std::fs::read_dir(layout.bases()).unwrap().count();
    assert_eq!(bases.evict(|| left() > 2).unwrap().bases, 2);
    assert!(layout.base("new").exists() && layout.base(&wanted.root).exists());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_stops_reading_is_noted_for_two_minutes() {
    let folder = tempfile::tempdir().unwrap();
    let (store, wanted) = store(64).await;
    let base = host(&store, "a", folder.path(), 0).get(&wanted).await.unwrap();
    let began = Instant::now();
    let chunks = (0..64).filter(|chunk| chunk % 4 != 3);
    let mut before = Vec::new();
    for chunk in chunks {
        if began.elapsed() < NOTED_FOR {
            before.push(chunk as u32);
        }
        base.ensure(chunk, Reader::Launch).await;
        tokio::time::sleep(QUIET / 3).await;
    }
    let key = SnapshotKey::new(SNAPSHOT).unwrap();
    let noted = load_prefetch(&*store, &key).await.unwrap().expect("nothing was noted");
    // The last one may have come in the second in which the end was found.
    assert!(
        before.len() < 48 && noted.len().abs_diff(before.len()) <= 1 && before.starts_with(&noted[..before.len() - 1])
    );
}
