//! Volumes of a backend, from the agent to a real NBD server (nbdkit, which serves the files of a folder) and to a guest's end of
//! the VMM's NBD client.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hearth_block::nbd::{Connector, NbdError, NbdEvents, NbdOptions, NbdVolume};
use hearth_block::{Operation, Request, Volume};
use hearth_driver::{Backend, BackendSettings, NbdSettings};
use hearth_proto::v1::{self, DetachWish, ObservedAttachment};
use hearth_vmm::control::protocol::{Event, VolumeCause};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::world::World;
use crate::instance::Attachment;
use crate::instance::volumes::Slots;
use crate::launch::{Backing, Disk, DiskControl, DiskLimits, FreezeDisk, LaunchError};
use crate::storage::{Bases, HostVolumes, Keyring, NetworkVolumes, Snapshots};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const ID: &str = "vol-0123456789abcdef0";

/// What it was asked for stands in `calls`; connections of earlier generations are not ended, since there are none.
const PROVISIONER: &str = r#"#!/bin/sh
set -eu
folder=$(dirname "$0") export=$(dirname "$0")/exports/$2
echo "$*" >>"$folder/calls"
[ ! -e "$folder/broken" ] || { echo "the storage is on fire" >&2; exit 1; }
case $1 in
create) [ -e "$export" ] || truncate -s "$3" "$export" ;;
attach) [ -e "$export" ] || { echo "there is no $2" >&2; exit 1; }
    [ "$(stat -c %s "$export")" -ge "$4" ] || truncate -s "$4" "$export" ;;
delete) rm -f "$export" ;;
esac
"#;

/// A storage server and a host without KVM.
struct Site {
    world: Arc<World>,
    server: Option<Child>,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Site {
    fn new() -> Self {
        let mut site = Self { world: World::new(), server: None };
        std::fs::create_dir(site.path("exports")).unwrap();
        std::fs::write(site.path("provision"), PROVISIONER).unwrap();
        std::fs::set_permissions(site.path("provision"), PermissionsExt::from_mode(0o755)).unwrap();
        site.serve();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.world.folder.path().join(name)
    }

    fn serve(&mut self) {
        let socket = self.path("nbd.sock");
        let folder = format!("dir={}", self.path("exports").display());
        let mut command = Command::new("nbdkit");
        let child = command.args(["-f", "-U"]).arg(&socket).args(["file", &folder]).stdin(Stdio::null()).spawn();
        self.server =
            Some(child.unwrap_or_else(|error| panic!("cannot start nbdkit (Debian package nbdkit): {error}")));
        while UnixStream::connect(&socket).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
            let _ = std::fs::remove_file(self.path("nbd.sock"));
        }
    }

    /// What an agent has at its start.
    fn volumes(&self) -> HostVolumes {
        let layout = self.world.layout();
        for folder in [layout.state_root(), layout.run_root()] {
            std::fs::create_dir_all(folder).unwrap();
        }
        let settings = BackendSettings::Nbd(NbdSettings {
            name: "san".into(),
            uri: format!("nbd+unix:///{{volume}}?socket={}", self.path("nbd.sock").display()),
            provisioner: self.path("provision"),
            tls_authority: None,
            tls_certificate: None,
            tls_key: None,
        });
        let backend = Backend::new(&settings, tokio::runtime::Handle::current()).unwrap();
        let objects = hearth_snapshot::open_store("memory:", &hearth_snapshot::StoreOptions::default()).unwrap();
        let keyring = Keyring::of_domains(&layout, &[]);
        let bases = Arc::new(Bases::new(layout.clone(), objects, keyring, "boot".into(), 0));
        HostVolumes::new(layout.clone(), bases).unwrap().with_network(NetworkVolumes::new(layout, vec![backend]))
    }
}

/// The VMM's part: it has no way to the server but the sockets that it is given.
#[derive(Default)]
struct Guest {
    shared: Arc<Shared>,
    disk: Mutex<Option<NbdVolume>>,
}

#[derive(Default)]
struct Shared {
    socket: Mutex<Option<OwnedFd>>,
    events: Mutex<Vec<Event>>,
}

fn serial() -> String {
    ID.replace('-', "")
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

#[derive(Debug)]
struct Passed(Arc<Shared>);

impl Connector for Passed {
    fn connect(&self) -> io::Result<OwnedFd> {
        self.0.socket.lock().take().ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

impl NbdEvents for Shared {
    fn lost(&self, _: &NbdError) {
        *self.socket.lock() = None;
        let serial = serial();
        let cause = VolumeCause::Disconnected;
        self.events
            .lock()
            .extend([Event::VolumeImpaired { serial: serial.clone(), cause }, Event::ConnectVolume { serial }]);
    }

    fn recovered(&self) {
        self.events.lock().push(Event::VolumeRecovered { serial: serial() });
    }
}

fn keep(shared: &Shared, socket: OwnedFd) {
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    *shared.socket.lock() = Some(socket);
}

#[async_trait]
impl DiskControl for Guest {
    async fn attach(&self, disk: Disk, _: u16) -> Result<(), LaunchError> {
        assert_eq!(disk.serial, serial());
        let Backing::Nbd(nbd) = disk.backing else { panic!("not of a backend") };
        assert_eq!((nbd.export.as_str(), nbd.limits.iops), (ID, 77));
        keep(&self.shared, nbd.socket);
        let options = NbdOptions { export: nbd.export, ..NbdOptions::default() };
        let opened = NbdVolume::open(Box::new(Passed(self.shared.clone())), self.shared.clone(), options);
        *self.disk.lock() = Some(opened.map_err(|error| LaunchError::Vmm(error.to_string()))?);
        Ok(())
    }
    async fn detach(&self, _: &str, _: bool) -> Result<(), LaunchError> {
        let volume = self.disk.lock().take().unwrap();
        let durable = volume.close().is_ok();
        self.shared.events.lock().push(Event::DiskDetached { serial: serial(), durable });
        Ok(())
    }
    async fn connect(&self, _: &str, socket: OwnedFd) -> Result<(), LaunchError> {
        keep(&self.shared, socket);
        self.disk.lock().as_ref().unwrap().connection_came();
        Ok(())
    }
    async fn resize(&self, _: &str, bytes: u64) -> Result<(), LaunchError> {
        let disk = self.disk.lock();
        disk.as_ref().unwrap().grow(bytes).map_err(|error| LaunchError::Vmm(error.to_string()))
    }
    async fn limit(&self, _: &str, _: DiskLimits) -> Result<(), LaunchError> {
        Ok(())
    }
    async fn freeze(&self, _: Vec<FreezeDisk>) -> Result<Vec<u64>, LaunchError> {
        Err(LaunchError::Vmm("no layered disk".into()))
    }
    async fn stage(&self, _: &str, _: Vec<u64>) -> Result<(), LaunchError> {
        Err(LaunchError::Vmm("no layered disk".into()))
    }
    async fn chunks_came(&self, _: &str) -> Result<(), LaunchError> {
        Err(LaunchError::Vmm("no layered disk".into()))
    }
    async fn serials(&self) -> Result<Vec<String>, LaunchError> {
        Ok(self.disk.lock().iter().map(|_| serial()).collect())
    }
    async fn thaw(&self, _: &str, _: bool) -> Result<(), LaunchError> {
        Err(LaunchError::Vmm("no layered disk".into()))
    }
}

impl Guest {
    /// Begins a write and a flush on a queue of their own; the thread ends when both are answered.
    fn write(&self, offset: u64, byte: u8) -> std::thread::JoinHandle<()> {
        let mut queue = self.disk.lock().as_ref().unwrap().open_queue(4).unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![byte; 4096];
            for (operation, length) in [(Operation::Write, 4096), (Operation::Flush, 0)] {
                let buffers = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: length }];
                let buffers = if length == 0 { &[][..] } else { &buffers[..] };
                let offset = if length == 0 { 0 } else { offset };
                let request = Request { operation, offset, length: length as u64, buffers, token: 1 };
                // SAFETY: the buffer lives until the completion was seen below.
                unsafe { queue.submit(request).unwrap() };
                queue.kick().unwrap();
                let mut done = None;
                while done.is_none() {
                    queue.drain(&mut |completion| done = Some(completion.result)).unwrap();
                    std::thread::sleep(Duration::from_millis(5));
                }
                done.unwrap().unwrap();
            }
        })
    }
}

/// One life of an agent's instance task.
struct Life {
    slots: Slots,
    volumes: Arc<HostVolumes>,
    snapshots: Snapshots,
}

impl Life {
    fn new(site: &Site) -> Self {
        let volumes = Arc::new(site.volumes());
        let snapshots = Snapshots::new(site.world.layout(), volumes.clone(), Arc::default()).unwrap();
        Self { slots: Slots::default(), volumes, snapshots }
    }

    /// Works until the volume's report is as wanted.
    async fn until(
        &mut self,
        guest: &Arc<Guest>,
        attachment: &Attachment,
        what: &str,
        wanted: impl Fn(&v1::AttachedVolumeReport) -> bool,
    ) -> v1::AttachedVolumeReport {
        let disks: Arc<dyn DiskControl> = guest.clone();
        let end = Instant::now() + PATIENCE;
        loop {
            for event in std::mem::take(&mut *guest.shared.events.lock()) {
                self.slots.hear(&event);
            }
            let attachments = std::slice::from_ref(attachment);
            self.slots.approach(attachments, &self.volumes, &self.snapshots, &disks, 1, |_| false).await;
            let report = self.slots.reports(true, false, attachments).pop().unwrap_or_default();
            if wanted(&report) {
                return report;
            }
            assert!(Instant::now() < end, "it never is {what}: {report:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn attachment(size_bytes: u64) -> Attachment {
    let volume = v1::HostVolume {
        volume_id: ID.into(),
        attach_generation: 3,
        size_bytes,
        iops: 77,
        backend: "san".into(),
        ..v1::HostVolume::default()
    };
    Attachment { id: ID.parse().unwrap(), volume, detach: DetachWish::Unspecified, detach_attempt: 0 }
}

fn is(state: ObservedAttachment) -> impl Fn(&v1::AttachedVolumeReport) -> bool {
    move |report| report.state() == state
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backends_volume_goes_through_all_that_can_happen_to_it() {
    let mut site = Site::new();
    let guest = Arc::new(Guest::default());
    let mut life = Life::new(&site);
    let mut wanted = attachment(4 * MIB);

    // It is not made by being attached; once it is there, it comes by itself.
    let report = life.until(&guest, &wanted, "refused", |report| report.error.contains("there is no")).await;
    assert_eq!(report.state(), ObservedAttachment::Attaching);
    life.volumes.network().create(&wanted.volume).await.unwrap();
    life.until(&guest, &wanted, "attached", is(ObservedAttachment::Attached)).await;
    guest.write(4096, 1).join().unwrap();

    // Its server dies: the guest waits, everybody is told, nothing is lost.
    site.kill();
    let writing = guest.write(8192, 2);
    let report = life.until(&guest, &wanted, "impaired", |report| report.impaired.contains(" No such file")).await;
    assert!(report.impaired.contains("connection"), "{}", report.impaired);
    assert!(!writing.is_finished());
    site.serve();
    life.until(&guest, &wanted, "well", |report| report.impaired.is_empty()).await;
    writing.join().unwrap();

    // The agent dies, and the server meanwhile: the next agent is asked again.
    drop(life);
    guest.shared.events.lock().clear();
    site.kill();
    site.serve();
    let writing = guest.write(12288, 3);
    while guest.shared.events.lock().len() < 2 {
        sleep(Duration::from_millis(10)).await;
    }
    let mut life = Life::new(&site);
    let disks: Arc<dyn DiskControl> = guest.clone();
    life.slots.adopt(&life.volumes, std::slice::from_ref(&wanted), &disks).await;
    life.until(&guest, &wanted, "well again", |report| report.impaired.is_empty() && writing.is_finished()).await;

    // It grows under the guest.
    wanted.volume.size_bytes = 8 * MIB;
    let grown = life.until(&guest, &wanted, "grown", |report| report.size_bytes == 8 * MIB).await;
    assert_eq!(grown.state(), ObservedAttachment::Attached);
    guest.write(8 * MIB - 4096, 4).join().unwrap();
    let content = std::fs::read(site.path("exports").join(ID)).unwrap();
    for (at, byte) in [(4096, 1), (8192, 2), (12288, 3), (8 * MIB as usize - 4096, 4)] {
        assert!(content[at..][..4096].iter().all(|there| *there == byte), "at {at}");
    }

    wanted.detach = DetachWish::Ask;
    life.until(&guest, &wanted, "detached", is(ObservedAttachment::Detached)).await;
    assert!(!site.world.layout().network_volume(&wanted.id).exists());
    life.volumes.network().delete(&wanted.volume).await.unwrap();
    assert!(!site.path("exports").join(ID).exists());
    let calls = std::fs::read_to_string(site.path("calls")).unwrap();
    let first = format!("attach {ID} 3 {}\n", 4 * MIB);
    assert!(calls.starts_with(&first) && calls.contains(&format!("create {ID} {}\n", 4 * MIB)), "{calls}");
    assert!(calls.ends_with(&format!("delete {ID}\n")), "{calls}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_never_came_can_be_detached_and_unknown_backends_are_named() {
    let site = Site::new();
    let guest = Arc::new(Guest::default());
    let mut life = Life::new(&site);
    let mut wanted = attachment(MIB);
    std::fs::write(site.path("broken"), "").unwrap();
    life.until(&guest, &wanted, "refused", |report| report.error.contains("the storage is on fire")).await;
    wanted.detach = DetachWish::Ask;
    life.until(&guest, &wanted, "detached", is(ObservedAttachment::Detached)).await;

    let mut life = Life::new(&site);
    let mut wanted = attachment(MIB);
    wanted.volume.backend = "tape".into();
    life.until(&guest, &wanted, "refused", |report| report.error.contains("no volume backend 'tape'")).await;
}
