//! Snapshots on the real engine: who has the volume changes while they are uploaded.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use hearth_block::{
    Cause, ChunkFetcher, Engine, FreezeState, LayeredVolume, OpenOptions, Operation, Request, Stage, Volume,
    VolumeEvents,
};
use hearth_snapshot::{ObjectStore, StoreOptions, open_store};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result as StoreResult,
};
use std::os::fd::OwnedFd;
use tokio::sync::Semaphore;

use super::*;
use crate::launch::{Disk, DiskControl, DiskLimits, FreezeDisk, LaunchError};
use crate::state::Layout;
use crate::storage::{Bases, Keyring};

const CHUNKS: u64 = 12;
const VOLUME: &str = "vol-0123456789abcdef0";
const INSTANCE: &str = "i-0123456789abcdef0";

/// A store that takes as many chunks as it is told.
#[derive(Debug)]
struct Gated {
    inner: Arc<dyn ObjectStore>,
    chunks: Semaphore,
}

impl std::fmt::Display for Gated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a gated store")
    }
}

#[async_trait]
impl ObjectStore for Gated {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> StoreResult<PutResult> {
        if location.as_ref().starts_with("chunk/") {
            self.chunks.acquire().await.unwrap().forget();
        }
        self.inner.put_opts(location, payload, opts).await
    }
    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.inner.get_opts(location, options).await
    }
    fn delete_stream(&self, locations: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        self.inner.delete_stream(locations)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

struct Silent;

impl ChunkFetcher for Silent {
    fn fetch(&self, _: u64) {}
}

impl VolumeEvents for Silent {
    fn impaired(&self, _: Cause) {}
    fn recovered(&self) {}
}

/// What of a VMM has to do with snapshots of one volume: the engine.
struct Guest {
    volume: Mutex<Option<LayeredVolume>>,
}

impl Guest {
    /// Starts as agents start VMMs: what snapshots need is set aside first.
    async fn start(world: &World) -> Arc<Self> {
        world.snapshots.settle(&VOLUME.parse().unwrap()).await;
        let placed = world.volumes.place(&volume()).await.unwrap();
        let options = OpenOptions {
            generation: 1,
            fetcher: Arc::new(Silent),
            events: Arc::new(Silent),
            engine: Engine::ThreadPool,
            direct: false,
        };
        let opened = LayeredVolume::open(placed.files().unwrap(), options).unwrap();
        let guest = Arc::new(Self { volume: Mutex::new(Some(opened)) });
        let running = Running { disks: guest.clone(), bundle_root: None };
        world.snapshots.running(&INSTANCE.parse().unwrap(), running);
        guest
    }

    /// Fills chunks with a byte, and flushes.
    fn write(&self, chunks: impl IntoIterator<Item = u64>, byte: u8) {
        let volume = self.volume.lock();
        let volume = volume.as_ref().unwrap();
        let mut queue = volume.open_queue(4).unwrap();
        let mut content = vec![byte; CHUNK_BYTES];
        let buffers = [libc::iovec { iov_base: content.as_mut_ptr().cast(), iov_len: content.len() }];
        let mut requests: Vec<(Operation, u64, &[libc::iovec])> =
            chunks.into_iter().map(|chunk| (Operation::Write, chunk * CHUNK_BYTES as u64, &buffers[..])).collect();
        requests.push((Operation::Flush, 0, &[]));
        for (operation, offset, buffers) in requests {
            // SAFETY: the buffer outlives the queue, which is empty before this function ends.
            unsafe { queue.submit(Request { operation, offset, length: 0, buffers, token: 1 }) }.unwrap();
            queue.kick().unwrap();
            let mut done = 0;
            while done == 0 {
                queue
                    .drain(&mut |completion| {
                        completion.result.unwrap();
                        done += 1;
                    })
                    .unwrap();
                std::thread::yield_now();
            }
        }
    }

    /// Ends in order, or as if it had been killed.
    fn end(&self, world: &World, in_order: bool) {
        let volume = self.volume.lock().take().unwrap();
        if in_order {
            volume.close_clean().unwrap();
        }
        drop(volume);
        world.snapshots.ended(&INSTANCE.parse().unwrap());
    }

    fn with<T>(&self, work: impl FnOnce(&LayeredVolume) -> T) -> Result<T, LaunchError> {
        match &*self.volume.lock() {
            Some(volume) => Ok(work(volume)),
            None => Err(LaunchError::Vmm("it has ended".to_owned())),
        }
    }
}

#[async_trait]
impl DiskControl for Guest {
    async fn attach(&self, _: Disk, _: u16) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn detach(&self, _: &str, _: bool) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn connect(&self, _: &str, _: OwnedFd) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn resize(&self, _: &str, _: u64) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn limit(&self, _: &str, _: DiskLimits) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn freeze(&self, disks: Vec<FreezeDisk>) -> Result<Vec<u64>, LaunchError> {
        let disk = disks.into_iter().next().unwrap();
        self.with(|volume| {
            let failed = |error: hearth_block::BlockError| LaunchError::Vmm(error.to_string());
            volume.freeze_prepare().map_err(failed)?;
            assert_eq!(volume.freeze_state(), FreezeState::Ready);
            let set = volume.freeze(Stage { file: disk.stage, staged: disk.staged }).map_err(failed)?;
            Ok(vec![set.len()])
        })?
    }
    async fn stage(&self, _: &str, chunks: Vec<u64>) -> Result<(), LaunchError> {
        self.with(|volume| chunks.iter().for_each(|chunk| volume.stage_chunk(*chunk).unwrap()))
    }
    async fn chunks_came(&self, _: &str) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn serials(&self) -> Result<Vec<String>, LaunchError> {
        Ok(vec![VOLUME.replace('-', "")])
    }
    async fn thaw(&self, _: &str, restore_dirty: bool) -> Result<(), LaunchError> {
        self.with(|volume| volume.thaw(restore_dirty))
    }
}

struct World {
    _folder: tempfile::TempDir,
    layout: Layout,
    store: Arc<Gated>,
    volumes: Arc<HostVolumes>,
    snapshots: Arc<Snapshots>,
    reports: Arc<Reports>,
}

fn domain() -> v1::KeyDomain {
    v1::KeyDomain { name: "plain".into(), secret: vec![7; 32].into(), encrypt_on_hosts: false }
}

fn volume() -> v1::HostVolume {
    v1::HostVolume {
        volume_id: VOLUME.into(),
        attach_generation: 1,
        size_bytes: CHUNKS * CHUNK_BYTES as u64,
        opened: true,
        ..v1::HostVolume::default()
    }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(&folder.path().join("state"), &folder.path().join("run"));
        std::fs::create_dir_all(layout.run_root()).unwrap();
        let inner = open_store("memory:", &StoreOptions::default()).unwrap();
        let store = Arc::new(Gated { inner, chunks: Semaphore::new(0) });
        let keyring = Keyring::of_domains(&layout, &[domain()]);
        let bases = Arc::new(Bases::new(layout.clone(), store.clone(), keyring, "boot".into(), 0));
        let volumes = Arc::new(HostVolumes::new(layout.clone(), bases).unwrap());
        let reports = Arc::new(Reports::default());
        let snapshots = Arc::new(Snapshots::new(layout.clone(), volumes.clone(), reports.clone()).unwrap());
        Self { _folder: folder, layout, store, volumes, snapshots, reports }
    }

    /// Asks for a snapshot.
    fn make(&self, name: &str, running: bool) {
        let snapshot_id = id_of(name);
        let wanted = v1::DesiredSnapshot {
            snapshot_id,
            volume: Some(volume()),
            key_domain: Some(domain()),
            ..v1::DesiredSnapshot::default()
        };
        let instance_id = if running { INSTANCE.into() } else { String::new() };
        self.snapshots.make(v1::DesiredSnapshotSet { set_id: name.into(), instance_id, snapshots: vec![wanted] });
    }

    fn state(&self, name: &str) -> Option<SnapshotReport> {
        self.reports.snapshot(&id_of(name))
    }

    /// Waits for a state of a snapshot; another end is none.
    async fn until(&self, name: &str, state: ObservedSnapshot) -> SnapshotReport {
        for _ in 0..3000 {
            match self.state(name) {
                Some(report) if report.state() == state => return report,
                Some(report) if report.state() == ObservedSnapshot::Failed => panic!("{name}: {}", report.error),
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("{name} is not {state:?}: {:?}", self.state(name));
    }

    /// Waits until its point in time is fixed; with little to upload it may be complete by then.
    async fn frozen(&self, name: &str) {
        for _ in 0..3000 {
            match self.state(name) {
                Some(report) if report.state() == ObservedSnapshot::Failed => panic!("{name}: {}", report.error),
                Some(_) => return,
                None => sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("the point in time of {name} is not fixed");
    }

    /// Lets chunks into the store.
    fn let_in(&self, chunks: usize) {
        self.store.chunks.add_permits(chunks);
    }

    async fn complete(&self, name: &str) -> SnapshotReport {
        self.let_in(1000);
        let report = self.until(name, ObservedSnapshot::Completed).await;
        self.store.chunks.forget_permits(usize::MAX >> 4);
        report
    }

    /// First byte of each chunk that a complete snapshot has.
    async fn content(&self, name: &str) -> BTreeMap<u64, u8> {
        let report = self.state(name).unwrap();
        let (key, root) = (SnapshotKey::new(id_of(name)).unwrap(), report.root.parse().unwrap());
        let manifest = Manifest::load(&*self.store, &key, Some(&root)).await.unwrap();
        let chunks = self.snapshots.chunk_store(Some(&domain())).unwrap();
        let mut found = BTreeMap::new();
        for chunk in manifest.chunks() {
            let content: Option<Bytes> = manifest.read_chunk(&chunks, chunk).await.unwrap();
            let content = content.unwrap();
            assert!(content.iter().all(|byte| *byte == content[0]), "{name}: chunk {chunk} is torn");
            found.insert(chunk, content[0]);
        }
        found
    }
}

fn id_of(name: &str) -> String {
    format!("snap-{:0>17}", hex::encode(name))
}

fn filled(parts: &[(std::ops::Range<u64>, u8)]) -> BTreeMap<u64, u8> {
    parts.iter().flat_map(|(chunks, byte)| chunks.clone().map(|chunk| (chunk, *byte))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_point_in_time_of_a_volume_that_nobody_has_is_fixed_at_once() {
    let world = World::new();
    let guest = Guest::start(&world).await;
    guest.write(0..CHUNKS, 1);
    guest.end(&world, true);
    // Nothing of it is uploaded or copied by then.
    world.make("a", false);
    world.frozen("a").await;
    assert_eq!(std::fs::metadata(world.layout.stages().join(id_of("a"))).unwrap().len(), 0);
    // Whoever wants to have it gets it, after the rest was set aside.
    world.let_in(3);
    let guest = Guest::start(&world).await;
    guest.write(0..6, 2);
    assert_eq!(world.state("a").unwrap().state(), ObservedSnapshot::Frozen);
    world.complete("a").await;
    assert_eq!(world.content("a").await, filled(&[(0..CHUNKS, 1)]));
    // The next one has what came after.
    world.make("b", true);
    world.frozen("b").await;
    guest.write(8..9, 3);
    let report = world.complete("b").await;
    assert_eq!(world.content("b").await, filled(&[(0..6, 2), (6..CHUNKS, 1)]));
    assert!(report.incremental_bytes <= 6 * CHUNK_BYTES as u64, "{report:?}: six chunks are new");
    guest.end(&world, true);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_read_again_of_a_volume_that_did_not_change() {
    let world = World::new();
    let guest = Guest::start(&world).await;
    guest.write(0..CHUNKS, 1);
    guest.end(&world, true);
    world.make("a", false);
    world.frozen("a").await;
    assert_eq!(world.complete("a").await.total_chunks, CHUNKS);
    world.make("b", false);
    world.frozen("b").await;
    assert_eq!(world.complete("b").await.total_chunks, 0);
    assert_eq!(world.content("b").await, filled(&[(0..CHUNKS, 1)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_outlives_the_vmm_whose_guest_it_is_of() {
    for in_order in [true, false] {
        let world = World::new();
        let guest = Guest::start(&world).await;
        guest.write(0..CHUNKS, 1);
        world.make("a", true);
        world.frozen("a").await;
        guest.write(2..4, 2);
        world.let_in(2);
        sleep(Duration::from_millis(100)).await;
        guest.end(&world, in_order);
        world.complete("a").await;
        assert_eq!(world.content("a").await, filled(&[(0..CHUNKS, 1)]), "in order: {in_order}");
        // What came after its point in time is not forgotten.
        world.make("b", false);
        world.frozen("b").await;
        world.complete("b").await;
        assert_eq!(world.content("b").await, filled(&[(0..2, 1), (2..4, 2), (4..CHUNKS, 1)]), "in order: {in_order}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_starts_again_while_its_snapshot_is_uploaded() {
    for in_order in [true, false] {
        let world = World::new();
        let guest = Guest::start(&world).await;
        guest.write(0..CHUNKS, 1);
        world.make("a", true);
        world.frozen("a").await;
        guest.write(2..4, 2);
        world.let_in(2);
        guest.end(&world, in_order);
        let again = Guest::start(&world).await;
        again.write(3..CHUNKS, 3);
        world.complete("a").await;
        assert_eq!(world.content("a").await, filled(&[(0..CHUNKS, 1)]), "in order: {in_order}");
        world.make("b", true);
        world.frozen("b").await;
        world.complete("b").await;
        assert_eq!(world.content("b").await, filled(&[(0..2, 1), (2..3, 2), (3..CHUNKS, 3)]), "in order: {in_order}");
        again.end(&world, true);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_snapshots_of_a_volume_are_made_at_a_time() {
    let world = World::new();
    let guest = Guest::start(&world).await;
    guest.write(0..CHUNKS, 1);
    world.make("a", true);
    world.frozen("a").await;
    guest.write(0..4, 2);
    world.make("b", true);
    world.frozen("b").await;
    guest.write(2..8, 3);
    world.make("c", true);
    world.frozen("c").await;
    guest.write(0..CHUNKS, 4);
    for name in ["a", "b", "c"] {
        assert_eq!(world.state(name).unwrap().state(), ObservedSnapshot::Frozen);
    }
    world.let_in(1000);
    world.until("a", ObservedSnapshot::Completed).await;
    world.until("c", ObservedSnapshot::Completed).await;
    assert_eq!(world.content("a").await, filled(&[(0..CHUNKS, 1)]));
    assert_eq!(world.content("b").await, filled(&[(0..4, 2), (4..CHUNKS, 1)]));
    assert_eq!(world.content("c").await, filled(&[(0..2, 2), (2..8, 3), (8..CHUNKS, 1)]));
    guest.end(&world, true);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_snapshot_after_one_that_was_called_off_has_everything() {
    let world = World::new();
    let guest = Guest::start(&world).await;
    guest.write(0..4, 1);
    world.make("a", true);
    world.frozen("a").await;
    world.complete("a").await;
    guest.write(2..6, 2);
    world.make("b", true);
    world.frozen("b").await;
    guest.write(5..7, 3);
    world.make("c", true);
    world.frozen("c").await;
    world.snapshots.cancel("b");
    guest.write(0..CHUNKS, 4);
    world.complete("c").await;
    assert_eq!(world.content("c").await, filled(&[(0..2, 1), (2..5, 2), (5..7, 3)]));
    guest.end(&world, true);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_lineage_a_volume_is_not_snapshotted_with_holes() {
    let world = World::new();
    let guest = Guest::start(&world).await;
    guest.write(0..4, 1);
    world.make("a", true);
    world.frozen("a").await;
    let first = world.complete("a").await;
    guest.write(6..7, 2);
    guest.end(&world, true);
    let lineage = world.layout.volume(&VOLUME.parse().unwrap()).join("lineage.json");
    let parent = v1::BaseSnapshot { snapshot_id: id_of("a"), root: first.root, ..v1::BaseSnapshot::default() };
    for damage in [Some("{"), None] {
        match damage {
            Some(text) => std::fs::write(&lineage, text).unwrap(),
            None => std::fs::remove_file(&lineage).unwrap(),
        }
        let name = if damage.is_some() { "d" } else { "m" };
        let wanted = v1::DesiredSnapshot {
            snapshot_id: id_of(name),
            volume: Some(volume()),
            parent: Some(parent.clone()),
            key_domain: Some(domain()),
            ..v1::DesiredSnapshot::default()
        };
        let set = v1::DesiredSnapshotSet { set_id: name.into(), snapshots: vec![wanted], ..Default::default() };
        world.let_in(1000);
        world.snapshots.make(set);
        while world.state(name).is_none_or(|report| report.state() != ObservedSnapshot::Failed) {
            sleep(Duration::from_millis(10)).await;
        }
        let error = world.state(name).unwrap().error;
        assert!(error.contains("lineage.json") && error.contains("another host"), "{error}");
    }
    // A volume that leaves is stored in full then.
    let desired = v1::DesiredVolume {
        volume: Some(volume()),
        generation: 7,
        wish: v1::VolumeWish::Released.into(),
        key_domain: Some(domain()),
        manifest_id: id_of("moved"),
        parent: Some(parent),
        ..v1::DesiredVolume::default()
    };
    world.snapshots.leave(desired);
    let report = loop {
        let found = world.reports.full().volumes.into_iter().next();
        match found {
            Some(report) if report.outcome() == v1::VolumeOutcome::Released => break report,
            _ => sleep(Duration::from_millis(10)).await,
        }
    };
    let (key, root) = (SnapshotKey::new(id_of("moved")).unwrap(), report.root.parse().unwrap());
    let manifest = Manifest::load(&*world.store, &key, Some(&root)).await.unwrap();
    assert_eq!(manifest.chunks().collect::<Vec<_>>(), [0, 1, 2, 3, 6]);
}

#[tokio::test(start_paused = true)]
async fn a_volume_whose_files_are_gone_is_told_and_not_made_anew() {
    let world = World::new();
    let guest = Guest::start(&world).await;
    guest.write(0..4, 1);
    guest.end(&world, true);
    let folder = world.layout.volume(&VOLUME.parse().unwrap());
    std::fs::remove_dir_all(&folder).unwrap();
    world.make("a", false);
    while world.state("a").is_none_or(|report| report.state() != ObservedSnapshot::Failed) {
        sleep(Duration::from_millis(100)).await;
    }
    let error = world.state("a").unwrap().error;
    assert!(error.contains("has lost it") && error.contains("not mounted"), "{error}");
    assert!(!folder.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_not_deleted_before_its_snapshot_is_complete() {
    let world = World::new();
    let guest = Guest::start(&world).await;
    guest.write(0..4, 1);
    world.make("a", true);
    world.frozen("a").await;
    guest.end(&world, true);
    let wish = v1::VolumeWish::Deleted.into();
    world.snapshots.leave(v1::DesiredVolume { volume: Some(volume()), generation: 7, wish, ..Default::default() });
    sleep(Duration::from_millis(300)).await;
    let folder = world.layout.volume(&VOLUME.parse().unwrap());
    assert!(folder.exists());
    world.complete("a").await;
    assert_eq!(world.content("a").await, filled(&[(0..4, 1)]));
    while folder.exists() {
        sleep(Duration::from_millis(50)).await;
    }
}
