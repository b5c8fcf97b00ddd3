//! The pretended host. VMMs live here and outlive agents, as processes do.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use hearth_block::{Cause, ChunkFetcher, Engine, LayeredVolume, OpenOptions, Operation, Request, Volume, VolumeEvents};
use hearth_proto::v1::{self, DesiredHost, DesiredInstance, InstanceReport, ObservedState, RunState};
use hearth_snapshot::{CHUNK_BYTES, Epoch, IndexedSource, ManifestSpec, ObjectStore, SnapshotKey, SnapshotUpload};
use hearth_types::{InstanceId, Resources};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::boot::BootLoader;
use crate::boot::tests::support::{FS_UUID, Files, ext4, fake_kernel};
use crate::capacity::{Admission, Calibration};
use crate::instance::Host;
use crate::launch::{
    Backing, Disk, DiskControl, DiskEvents, DiskLimits, Found, FreezeDisk, LaunchError, LaunchSpec, Vmm, VmmEnd,
    VmmLauncher,
};
use crate::net::{HostNet, HostNetError, Metadata, NicRequest};
use crate::reports::Reports;
use crate::state::Layout;
use crate::storage::{Bases, Fills, HostVolumes, Keyring, Snapshots};
use crate::supervisor::Supervisor;

pub const IMAGE: &str = "ami-0123456789abcdef0";
const SNAPSHOT: &str = "snap-0123456789abcdef0";
/// Each instance has a root volume of its own.
static NEXT_VOLUME: AtomicU64 = AtomicU64::new(0x123456789abcdef0);
pub const STORE_BYTES: u64 = 1 << 20;

/// Stops an agent for good after so many steps.
#[derive(Clone, Default)]
pub struct CrashPoint(Arc<CrashState>);

#[derive(Default)]
struct CrashState {
    left: Mutex<Option<u32>>,
    dead: Notify,
}

impl CrashPoint {
    pub fn after(&self, steps: u32) {
        *self.0.left.lock() = Some(steps);
    }

    pub fn disarm(&self) {
        *self.0.left.lock() = None;
    }

    pub async fn pass(&self, _name: &'static str) {
        let dead = match &mut *self.0.left.lock() {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        if dead {
            self.0.dead.notify_one();
            std::future::pending::<()>().await;
        }
        tokio::task::yield_now().await;
    }

    /// Until the agent is dead, or so long.
    pub async fn dead_or(&self, time: Duration) {
        let _ = tokio::time::timeout(time, self.0.dead.notified()).await;
    }
}

pub struct FakeVmm {
    pub end: watch::Sender<Option<VmmEnd>>,
    /// Built but not started yet.
    half: bool,
}

#[derive(Default)]
pub struct Table {
    pub vmms: HashMap<InstanceId, FakeVmm>,
    /// What the lock files say.
    last_end: HashMap<InstanceId, VmmEnd>,
    pub violations: Vec<String>,
    pub launches: HashMap<InstanceId, u32>,
    pub registered: HashSet<InstanceId>,
    pub failing_launches: u32,
    pub guests_ignore_the_button: bool,
    pub presses: u32,
    pub lease: bool,
    /// Sizes in bytes that VMMs were told of their disks, by serial.
    pub sizes: HashMap<String, u64>,
}

/// What stays when an agent dies.
pub struct World {
    pub folder: tempfile::TempDir,
    pub table: Mutex<Table>,
}

#[derive(Clone)]
struct Launcher {
    world: Arc<World>,
    crash: CrashPoint,
}

struct Handle {
    world: Arc<World>,
    instance: InstanceId,
    end: watch::Receiver<Option<VmmEnd>>,
}

impl World {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { folder: tempfile::tempdir().unwrap(), table: Mutex::default() })
    }

    pub fn layout(&self) -> Layout {
        Layout::new(&self.folder.path().join("state"), &self.folder.path().join("run"))
    }

    /// Ends an instance's VMM as if by itself.
    pub fn end(&self, instance: &InstanceId, end: VmmEnd) {
        let mut table = self.table.lock();
        let Some(vmm) = table.vmms.remove(instance) else { return };
        if end == VmmEnd::Died {
            table.last_end.remove(instance);
        } else {
            table.last_end.insert(instance.clone(), end);
        }
        vmm.end.send_replace(Some(end));
    }

    pub fn runs(&self, instance: &InstanceId) -> bool {
        self.table.lock().vmms.contains_key(instance)
    }

    pub fn launches(&self, instance: &InstanceId) -> u32 {
        self.table.lock().launches.get(instance).copied().unwrap_or(0)
    }

    fn handle(self: &Arc<Self>, instance: &InstanceId, end: watch::Receiver<Option<VmmEnd>>) -> Box<dyn Vmm> {
        Box::new(Handle { world: self.clone(), instance: instance.clone(), end })
    }
}

#[async_trait]
impl VmmLauncher for Launcher {
    async fn launch(&self, spec: LaunchSpec) -> Result<Box<dyn Vmm>, LaunchError> {
        let id = spec.instance_id.clone();
        let end = {
            let mut table = self.world.table.lock();
            if table.failing_launches > 0 {
                table.failing_launches -= 1;
                return Err(LaunchError::Vmm("told to fail".into()));
            }
            if table.vmms.contains_key(&id) {
                table.violations.push(format!("a second VMM of {id}"));
                return Err(LaunchError::AlreadyRunning(id));
            }
            for disk in &spec.disks {
                let file = match &disk.backing {
                    Backing::Raw(file) => file,
                    Backing::Layered(layered) => &layered.files.data,
                    Backing::Nbd(_) => continue,
                };
                if file.metadata().unwrap().len() == 0 {
                    table.violations.push(format!("an empty disk of {id}"));
                }
            }
            let (end, receiver) = watch::channel(None);
            table.vmms.insert(id.clone(), FakeVmm { end, half: true });
            table.last_end.remove(&id);
            receiver
        };
        std::fs::create_dir_all(self.world.layout().run(&id)).unwrap();
        self.crash.pass("inside launching").await;
        let mut table = self.world.table.lock();
        if let Some(vmm) = table.vmms.get_mut(&id) {
            vmm.half = false;
        }
        *table.launches.entry(id.clone()).or_default() += 1;
        drop(table);
        Ok(self.world.handle(&id, end))
    }

    async fn find(&self, instance: &InstanceId, _: bool) -> Result<Found, LaunchError> {
        let half = {
            let table = self.world.table.lock();
            match table.vmms.get(instance) {
                Some(vmm) if !vmm.half => {
                    return Ok(Found::Running(self.world.handle(instance, vmm.end.subscribe())));
                }
                found => found.is_some(),
            }
        };
        if half {
            self.world.end(instance, VmmEnd::Died);
        }
        Ok(Found::Ended(self.world.table.lock().last_end.get(instance).copied()))
    }

    async fn clean_up(&self, instance: &InstanceId) -> Result<(), LaunchError> {
        self.world.end(instance, VmmEnd::Died);
        let _ = std::fs::remove_dir_all(self.world.layout().run(instance));
        Ok(())
    }
}

#[async_trait]
impl Vmm for Handle {
    async fn wait(&mut self) -> VmmEnd {
        let end = self.end.wait_for(Option::is_some).await;
        end.ok().and_then(|end| *end).unwrap_or(VmmEnd::Died)
    }

    async fn power_button(&self) -> Result<(), LaunchError> {
        let ignored = {
            let mut table = self.world.table.lock();
            table.presses += 1;
            table.guests_ignore_the_button
        };
        if !ignored {
            tokio::time::sleep(Duration::from_millis(300)).await;
            self.world.end(&self.instance, VmmEnd::PoweredOff);
        }
        Ok(())
    }

    async fn kill(&self) {
        self.world.end(&self.instance, VmmEnd::Killed);
    }

    fn disks(&self) -> Arc<dyn DiskControl> {
        Arc::new(Obedient(self.world.clone()))
    }

    fn take_events(&mut self) -> Option<DiskEvents> {
        None
    }
}

/// Brings nothing, tells nothing.
struct Silent;

impl ChunkFetcher for Silent {
    fn fetch(&self, _: u64) {}
}

impl VolumeEvents for Silent {
    fn impaired(&self, _: Cause) {}
    fn recovered(&self) {}
}

/// Does at once what it is told.
struct Obedient(Arc<World>);

#[async_trait]
impl DiskControl for Obedient {
    async fn attach(&self, _: Disk, _: u16) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn detach(&self, _: &str, _: bool) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn connect(&self, _: &str, _: OwnedFd) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn resize(&self, serial: &str, bytes: u64) -> Result<(), LaunchError> {
        self.0.table.lock().sizes.insert(serial.to_owned(), bytes);
        Ok(())
    }
    async fn limit(&self, _: &str, _: DiskLimits) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn freeze(&self, disks: Vec<FreezeDisk>) -> Result<Vec<u64>, LaunchError> {
        Ok(vec![0; disks.len()])
    }
    async fn stage(&self, _: &str, _: Vec<u64>) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn chunks_came(&self, _: &str) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn serials(&self) -> Result<Vec<String>, LaunchError> {
        // What it was started with: the same that is wanted.
        Err(LaunchError::Vmm("it does not tell".to_owned()))
    }
    async fn thaw(&self, _: &str, _: bool) -> Result<(), LaunchError> {
        Ok(())
    }
}

struct Network(Arc<World>);

#[async_trait]
impl HostNet for Network {
    async fn attach(&self, _: NicRequest) -> Result<OwnedFd, HostNetError> {
        Ok(std::fs::File::open("/dev/null").unwrap().into())
    }
    async fn register(&self, metadata: Metadata) -> Result<(), HostNetError> {
        self.0.table.lock().registered.insert(metadata.instance_id);
        Ok(())
    }
    async fn unregister(&self, instance: &InstanceId) {
        self.0.table.lock().registered.remove(instance);
    }
    fn has_lease(&self, _: &InstanceId) -> bool {
        self.0.table.lock().lease
    }
}

fn domain() -> v1::KeyDomain {
    v1::KeyDomain { name: "plain".into(), secret: vec![7; 32].into(), encrypt_on_hosts: false }
}

/// An object store with one snapshot, of [`image`].
fn store() -> &'static (Arc<dyn ObjectStore>, v1::BaseSnapshot) {
    static STORE: OnceLock<(Arc<dyn ObjectStore>, v1::BaseSnapshot)> = OnceLock::new();
    STORE.get_or_init(|| {
        // On a thread of its own: the caller's runtime may have a clock that stands still.
        std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            runtime.block_on(async {
                let objects =
                    hearth_snapshot::open_store("memory:", &hearth_snapshot::StoreOptions::default()).unwrap();
                let nowhere = Layout::new(Path::new("/nonexistent"), Path::new("/nonexistent"));
                let keyring = Keyring::of_domains(&nowhere, &[domain()]);
                let chunks = keyring.chunk_store(&objects, Some(&domain())).unwrap();
                let size_bytes = image().len() as u64;
                let spec = ManifestSpec { id: SnapshotKey::new(SNAPSHOT).unwrap(), size_bytes, epoch: Epoch(0) };
                let read = |chunk: u64| {
                    let start = chunk as usize * CHUNK_BYTES;
                    let mut content = image()[start..image().len().min(start + CHUNK_BYTES)].to_vec();
                    content.resize(CHUNK_BYTES, 0);
                    async move { Ok(Some(content.into())) }.boxed()
                };
                let source = IndexedSource::new(0..size_bytes.div_ceil(CHUNK_BYTES as u64), Box::new(read));
                let made = SnapshotUpload::new(chunks, spec, None).run(&source).await.unwrap();
                let root = made.manifest.root_hash.to_string();
                let base =
                    v1::BaseSnapshot { snapshot_id: SNAPSHOT.into(), root, size_bytes, key_domain: Some(domain()) };
                (objects, base)
            })
        })
        .join()
        .unwrap()
    })
}

fn image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let files = Files::from([("/sbin/init", b"i".to_vec()), ("/boot/vmlinuz-1", fake_kernel("k"))]);
        ext4(&files, 2, FS_UUID)
    })
}

pub fn id(number: u32) -> InstanceId {
    format!("i-{number:017x}").parse().unwrap()
}

/// A small instance of [`IMAGE`].
pub fn spec() -> v1::InstanceSpec {
    v1::InstanceSpec {
        image_id: IMAGE.into(),
        instance_type: "h1.tiny".into(),
        resources: Some(v1::Resources { vcpus: 1, memory_mib: 128, ecu_milli: 0, instance_store_bytes: STORE_BYTES }),
        root_device_name: "/dev/sda1".into(),
        volumes: vec![v1::AttachedVolume {
            detach_attempt: 0,
            device_name: "/dev/sda1".into(),
            volume: Some(v1::HostVolume {
                volume_id: format!("vol-{:017x}", NEXT_VOLUME.fetch_add(1, Ordering::Relaxed)),
                attach_generation: 1,
                size_bytes: (image().len() as u64).next_multiple_of(4096),
                base: Some(store().1.clone()),
                ..Default::default()
            }),
            detach: 0,
        }],
        instance_store: vec![v1::InstanceStoreDisk {
            virtual_name: "ephemeral0".into(),
            serial: "ephemeral0".into(),
            size_bytes: STORE_BYTES,
            device_name: "/dev/sdb".into(),
        }],
        network_interfaces: vec![v1::NetworkInterface {
            device_index: 0,
            mac_address: "02:00:00:00:00:01".into(),
            private_ip_address: "172.30.0.2".into(),
        }],
        ..v1::InstanceSpec::default()
    }
}

/// One life of an agent.
pub struct Agent {
    pub host: Arc<Host>,
    pub supervisor: Arc<Supervisor>,
    pub crash: CrashPoint,
}

/// A crash in a test ends the agent's tasks and not its threads, as a real one does: one may be making a volume in a folder that the
/// next agent would remove, and give the rest of it the volume's name. It ends soon.
fn volumes_after_a_crash(layout: &Layout, bases: &Arc<Bases>) -> HostVolumes {
    let end = std::time::Instant::now() + Duration::from_secs(20);
    let is_new = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(".new-");
    while std::fs::read_dir(layout.volumes()).into_iter().flatten().flatten().any(is_new) {
        assert!(std::time::Instant::now() < end, "a volume is not made in 20 s");
        std::thread::sleep(Duration::from_millis(1));
    }
    HostVolumes::new(layout.clone(), bases.clone()).unwrap()
}

impl Agent {
    pub fn start(world: &Arc<World>) -> Self {
        Self::start_with(world, store().0.clone())
    }

    pub fn start_with(world: &Arc<World>, objects: Arc<dyn ObjectStore>) -> Self {
        let layout = world.layout();
        let folder = |path: &Path| std::fs::create_dir_all(path).unwrap();
        folder(layout.state_root());
        folder(layout.run_root());
        let crash = CrashPoint::default();
        let capacity = Resources { vcpus: 4, memory_mib: 512, ecu_milli: 0, instance_store_bytes: 1 << 30 };
        let keyring = Keyring::of_domains(&layout, &[domain()]);
        let bases = Arc::new(Bases::new(layout.clone(), objects, keyring, "boot".into(), 0));
        let volumes = Arc::new(volumes_after_a_crash(&layout, &bases));
        let reports = Arc::new(Reports::default());
        let snapshots = Snapshots::new(layout.clone(), volumes.clone(), reports.clone()).unwrap();
        let fills = Fills::new(volumes.bases().clone(), reports.clone());
        let host = Arc::new(Host {
            layout: layout.clone(),
            launcher: Arc::new(Launcher { world: world.clone(), crash: crash.clone() }),
            network: Arc::new(Network(world.clone())),
            volumes,
            snapshots: Arc::new(snapshots),
            fills,
            boot: Arc::new(BootLoader::new(&layout.kernels()).unwrap()),
            admission: Admission::new(capacity, 100),
            calibration: Calibration { machine: "test".into(), threads: 4, ecu_milli_per_thread: 1000 },
            reports,
            starts: Arc::new(tokio::sync::Semaphore::new(2)),
            stop_timeout: Duration::from_secs(90),
            terminate_timeout: Duration::from_secs(10),
            mtu: 1500,
            crash: crash.clone(),
        });
        let supervisor = Supervisor::start(host.clone(), 16).unwrap();
        Self { host, supervisor, crash }
    }

    pub fn report(&self, instance: &InstanceId) -> InstanceReport {
        self.host.reports.get(instance).unwrap_or_default()
    }

    fn root_volume(&self, instance: &InstanceId) -> v1::HostVolume {
        let record = crate::state::InstanceRecord::load(&self.host.layout, instance).unwrap().unwrap();
        record.desired.spec.unwrap().volumes.remove(0).volume.unwrap()
    }

    /// Where an instance's root volume is.
    pub fn root_folder(&self, instance: &InstanceId) -> std::path::PathBuf {
        self.host.layout.volume(&self.root_volume(instance).volume_id.parse().unwrap())
    }

    /// Does what a guest does that zeroes its root disk.
    pub async fn wipe_root(&self, instance: &InstanceId) {
        let placed = self.host.volumes.place(&self.root_volume(instance)).await.unwrap();
        let options = OpenOptions {
            generation: 1,
            fetcher: Arc::new(Silent),
            events: Arc::new(Silent),
            engine: Engine::ThreadPool,
            direct: false,
        };
        let volume = LayeredVolume::open(placed.files().unwrap(), options).unwrap();
        let mut queue = volume.open_queue(4).unwrap();
        let length = volume.size_bytes();
        let operation = Operation::WriteZeroes { may_unmap: true };
        // SAFETY: there are no buffers.
        unsafe { queue.submit(Request { operation, offset: 0, length, buffers: &[], token: 1 }) }.unwrap();
        queue.kick().unwrap();
        let mut done = 0;
        while done == 0 {
            queue.drain(&mut |_| done += 1).unwrap();
        }
        drop(queue);
        volume.close_clean().unwrap();
    }

    /// Waits (in the clock's own time) until an instance is in a state at a generation.
    pub async fn until(&self, instance: &InstanceId, state: ObservedState, generation: u64) -> InstanceReport {
        for _ in 0..20_000 {
            let report = self.report(instance);
            if report.state() == state && report.observed_generation == generation {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("not {state:?} at {generation}: {:?}", self.report(instance));
    }
}

/// What a control plane wants.
#[derive(Default)]
pub struct Wanted(pub HashMap<InstanceId, DesiredInstance>);

impl Wanted {
    pub fn want(&mut self, instance: &InstanceId, run: RunState) -> DesiredInstance {
        let desired = self.0.entry(instance.clone()).or_insert_with(|| DesiredInstance {
            instance_id: instance.to_string(),
            spec: Some(spec()),
            ..DesiredInstance::default()
        });
        // Nothing brings a terminated instance back.
        if desired.run() != RunState::Terminated {
            desired.set_run(run);
            desired.force = false;
        }
        desired.generation += 1;
        desired.clone()
    }

    pub fn change(
        &mut self,
        instance: &InstanceId,
        change: impl FnOnce(&mut DesiredInstance),
    ) -> Option<DesiredInstance> {
        let desired = self.0.get_mut(instance)?;
        change(desired);
        desired.generation += 1;
        Some(desired.clone())
    }

    pub fn all(&self) -> DesiredHost {
        DesiredHost { instances: self.0.values().cloned().collect(), ..DesiredHost::default() }
    }
}
