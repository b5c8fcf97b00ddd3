//! The pretended host. VMMs live here and outlive agents, as processes do.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use hearth_proto::v1::{self, DesiredHost, DesiredInstance, InstanceReport, ObservedState, RunState};
use hearth_types::{ImageId, InstanceId, Resources};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, watch};

use crate::boot::BootLoader;
use crate::boot::tests::support::{FS_UUID, Files, ext4, fake_kernel};
use crate::capacity::{Admission, Calibration};
use crate::images::{FetchError, ImageSource, Images, Piece};
use crate::instance::Host;
use crate::launch::{Found, LaunchError, LaunchSpec, Vmm, VmmEnd, VmmLauncher};
use crate::net::{HostNet, HostNetError, Metadata, NicRequest};
use crate::reports::Reports;
use crate::state::Layout;
use crate::supervisor::Supervisor;
use crate::volumes::RawVolumes;

pub const IMAGE: &str = "ami-0123456789abcdef0";
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
        let world = Self { folder: tempfile::tempdir().unwrap(), table: Mutex::default() };
        let images = world.folder.path().join("images-of-control");
        std::fs::create_dir(&images).unwrap();
        std::fs::write(images.join(format!("{IMAGE}.raw")), image()).unwrap();
        Arc::new(world)
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
                if disk.file.metadata().unwrap().len() == 0 {
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

struct NoSource;

#[async_trait]
impl ImageSource for NoSource {
    async fn fetch(&self, _: &ImageId, _: u64) -> Result<BoxStream<'static, Result<Piece, FetchError>>, FetchError> {
        Err(FetchError::Unreachable("no control plane".into()))
    }
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
        image_sha256: hex::encode(Sha256::digest(image())),
        image_bytes: image().len() as u64,
        instance_type: "h1.tiny".into(),
        resources: Some(v1::Resources { vcpus: 1, memory_mib: 128, ecu_milli: 0, instance_store_bytes: STORE_BYTES }),
        root_volume_id: "vol-0123456789abcdef0".into(),
        root_volume_bytes: image().len() as u64,
        instance_store: vec![v1::InstanceStoreDisk {
            virtual_name: "ephemeral0".into(),
            serial: "ephemeral0".into(),
            size_bytes: STORE_BYTES,
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

impl Agent {
    pub fn start(world: &Arc<World>) -> Self {
        let layout = world.layout();
        let folder = |path: &Path| std::fs::create_dir_all(path).unwrap();
        folder(layout.state_root());
        folder(layout.run_root());
        let local: PathBuf = world.folder.path().join("images-of-control");
        let crash = CrashPoint::default();
        let capacity = Resources { vcpus: 4, memory_mib: 512, ecu_milli: 0, instance_store_bytes: 1 << 30 };
        let host = Arc::new(Host {
            layout: layout.clone(),
            launcher: Arc::new(Launcher { world: world.clone(), crash: crash.clone() }),
            network: Arc::new(Network(world.clone())),
            volumes: Arc::new(RawVolumes),
            images: Images::new(layout.clone(), Some(local), Arc::new(NoSource)),
            boot: Arc::new(BootLoader::new(&layout.kernels()).unwrap()),
            admission: Admission::new(capacity, 100),
            calibration: Calibration { machine: "test".into(), threads: 4, ecu_milli_per_thread: 1000 },
            reports: Reports::default(),
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
        DesiredHost { instances: self.0.values().cloned().collect() }
    }
}
