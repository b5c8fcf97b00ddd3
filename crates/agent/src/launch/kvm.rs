//! The real launcher: cgroup, jail, clone, and the control socket.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hearth_types::InstanceId;
use hearth_vmm::control::client::Client;
use hearth_vmm::control::protocol::{
    BootSpec, Command, ConsoleSpec, FreezeSpec, MachineSpec, MachineState, NicSpec, Outcome,
};
use hearth_vmm::control::socket::listen_at;
use tokio::sync::mpsc;

use super::conversation::Conversation;
use super::disks::Fds;
use super::jail::Program;
use super::process::{Process, end_of, exit_code, open_pidfd};
use super::spawn::{Spawn, spawn};
use super::{
    Cgroups, Disk, DiskControl, DiskEvents, DiskLimits, Found, FreezeDisk, LaunchError, LaunchSpec, Vmm, VmmEnd,
    VmmLauncher,
};
use crate::state::Layout;

/// How long a VMM may take for an ordinary answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take to build a machine: it copies kernel and initrd, perhaps on a slow or busy host.
const BUILD: Duration = Duration::from_secs(120);
/// How long after `Kill` until SIGKILL.
const OBEY_KILL: Duration = Duration::from_secs(5);
/// How long fixing a point in time may take: writes in flight have to end.
const FREEZE: Duration = Duration::from_secs(15);
/// Largest log of one VMM; what it writes beyond is cut at its next start.
const MAX_LOG_BYTES: u64 = 1 << 20;

/// Starts real VMMs.
#[derive(Clone)]
pub struct KvmLauncher {
    shared: Arc<Shared>,
}

struct Shared {
    layout: Layout,
    cgroups: Cgroups,
    program: Program,
    jail: CString,
    kvm: File,
    random: File,
    null: File,
    uid_base: u32,
}

impl KvmLauncher {
    /// Opens what all VMMs share. `vmm_binary` is the hearth-vmm program, `uid_base` the uid of slot 0.
    pub fn new(layout: Layout, cgroups: Cgroups, vmm_binary: &Path, uid_base: u32) -> Result<Self, LaunchError> {
        let open = |path: &str, write: bool| {
            OpenOptions::new().read(true).write(write).open(path).map_err(LaunchError::host(format!("opening {path}")))
        };
        let program =
            Program::open(vmm_binary).map_err(LaunchError::host(format!("opening {}", vmm_binary.display())))?;
        if !program.libraries.is_empty() {
            tracing::warn!(
                program = %vmm_binary.display(),
                "hearth-vmm is linked dynamically: its jail shows the host's library folders, read-only"
            );
        }
        let jail = layout.jail();
        std::fs::create_dir_all(&jail).map_err(LaunchError::host(format!("creating {}", jail.display())))?;
        let jail = CString::new(jail.as_os_str().as_bytes())
            .map_err(|error| LaunchError::host("path of the jail")(error.into()))?;
        let (kvm, random, null) = (open("/dev/kvm", true)?, open("/dev/urandom", false)?, open("/dev/null", true)?);
        Ok(Self { shared: Arc::new(Shared { layout, cgroups, program, jail, kvm, random, null, uid_base }) })
    }
}

/// Runs blocking work off the runtime's own threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LaunchError> + Send + 'static,
) -> Result<T, LaunchError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| LaunchError::Vmm(format!("internal error: {error}")))?
}

struct KvmVmm {
    process: Process,
    lock: File,
    talk: Arc<Disks>,
    events: Option<DiskEvents>,
}

/// The connection of a VMM, as its disks' control.
struct Disks(Conversation);

impl Disks {
    async fn order(&self, command: Command, fds: Vec<OwnedFd>) -> Result<(), LaunchError> {
        match self.0.call(command, fds, ANSWER).await? {
            Outcome::Done => Ok(()),
            other => Err(LaunchError::Vmm(format!("unexpected answer {other:?}"))),
        }
    }
}

#[async_trait]
impl DiskControl for Disks {
    async fn attach(&self, disk: Disk, queues: u16) -> Result<(), LaunchError> {
        let mut fds = Fds::default();
        let spec = fds.disk(disk, queues);
        self.order(Command::AttachDisk(Box::new(spec)), fds.0).await
    }

    async fn detach(&self, serial: &str, force: bool) -> Result<(), LaunchError> {
        self.order(Command::DetachDisk { serial: serial.to_owned(), force }, Vec::new()).await
    }

    async fn connect(&self, serial: &str, socket: OwnedFd) -> Result<(), LaunchError> {
        self.order(Command::ConnectVolume { serial: serial.to_owned(), socket: 0 }, vec![socket]).await
    }

    async fn resize(&self, serial: &str, bytes: u64) -> Result<(), LaunchError> {
        self.order(Command::ResizeDisk { serial: serial.to_owned(), bytes }, Vec::new()).await
    }

    async fn limit(&self, serial: &str, limits: DiskLimits) -> Result<(), LaunchError> {
        self.order(Command::SetDiskLimits { serial: serial.to_owned(), limits }, Vec::new()).await
    }

    async fn freeze(&self, disks: Vec<FreezeDisk>) -> Result<Vec<u64>, LaunchError> {
        let mut fds = Fds::default();
        let add = |disk: FreezeDisk| FreezeSpec {
            serial: disk.serial,
            stage: fds.add(disk.stage),
            staged: fds.add(disk.staged),
        };
        let disks = disks.into_iter().map(add).collect();
        match self.0.call(Command::Freeze { disks }, fds.0, FREEZE).await? {
            Outcome::Frozen { chunks, held_us } => {
                tracing::info!(frozen_chunks = chunks.iter().sum::<u64>(), held_us, "writes were held for a snapshot");
                Ok(chunks)
            }
            other => Err(LaunchError::Vmm(format!("unexpected answer {other:?}"))),
        }
    }

    async fn stage(&self, serial: &str, chunks: Vec<u64>) -> Result<(), LaunchError> {
        self.order(Command::StageChunks { serial: serial.to_owned(), chunks }, Vec::new()).await
    }

    async fn chunks_came(&self, serial: &str) -> Result<(), LaunchError> {
        self.order(Command::ChunksCame { serial: serial.to_owned() }, Vec::new()).await
    }

    async fn serials(&self) -> Result<Vec<String>, LaunchError> {
        match self.0.call(Command::Stats, Vec::new(), ANSWER).await? {
            Outcome::Stats(stats) => Ok(stats.disks.into_iter().map(|disk| disk.serial).collect()),
            other => Err(LaunchError::Vmm(format!("unexpected answer {other:?}"))),
        }
    }

    async fn thaw(&self, serial: &str, restore_dirty: bool) -> Result<(), LaunchError> {
        self.order(Command::Thaw { serial: serial.to_owned(), restore_dirty }, Vec::new()).await
    }
}

impl Shared {
    fn connect(&self, instance: &InstanceId) -> Result<(Client, hearth_vmm::control::client::Peer), LaunchError> {
        let path = self.layout.control_socket(instance);
        Client::connect(&short_path(&path)?.path, ANSWER).map_err(|error| LaunchError::Vmm(error.to_string()))
    }

    fn open_lock(&self, instance: &InstanceId) -> Result<File, LaunchError> {
        let path = self.layout.vmm_lock(instance);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(LaunchError::host(format!("opening {}", path.display())))
    }

    fn open_log(&self, instance: &InstanceId) -> Result<File, LaunchError> {
        let path = self.layout.vmm_log(instance);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(LaunchError::host(format!("opening {}", path.display())))?;
        if file.metadata().is_ok_and(|metadata| metadata.len() > MAX_LOG_BYTES) {
            file.set_len(0).map_err(LaunchError::host("shortening the VMM's log"))?;
        }
        Ok(file)
    }

    /// Clones the jailed process. The lock that it inherits keeps a second one from being started.
    fn spawn(&self, spec: &LaunchSpec) -> Result<(super::spawn::Child, File), LaunchError> {
        let instance = &spec.instance_id;
        let lock = self.open_lock(instance)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(LaunchError::AlreadyRunning(instance.clone())),
            Err(std::fs::TryLockError::Error(error)) => return Err(LaunchError::host("locking the instance")(error)),
        }
        lock.set_len(0).map_err(LaunchError::host("emptying the instance's lock file"))?;
        let folder = self.layout.run(instance);
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(LaunchError::host(format!("creating {}", folder.display()))(error));
            }
            _ => {}
        }
        let socket = self.layout.control_socket(instance);
        remove_socket(&socket)?;
        let listener = listen_at(&short_path(&socket)?.path)
            .map_err(LaunchError::host(format!("listening on {}", socket.display())))?;
        let log = self.open_log(instance)?;
        let cgroup = self.cgroups.create(instance, &spec.limits)?;
        let child = spawn(&Spawn {
            program: &self.program,
            jail: &self.jail,
            cgroup: cgroup.as_fd(),
            uid: self.uid_base.saturating_add(spec.slot),
            fds: &[self.null.as_fd(), self.null.as_fd(), log.as_fd(), listener.as_fd(), lock.as_fd()],
        })?;
        // Ours is closed now: from here on the lock lives exactly as long as the VMM does.
        drop(lock);
        Ok((child, self.open_lock(instance)?))
    }

    /// Tells the new process what to be. The connection is kept.
    fn create_and_start(&self, spec: LaunchSpec) -> Result<Client, LaunchError> {
        let console = self.layout.console_socket(&spec.instance_id);
        remove_socket(&console)?;
        let listener = std::os::unix::net::UnixListener::bind(&short_path(&console)?.path)
            .map_err(LaunchError::host(format!("listening on {}", console.display())))?;
        let mut fds = Fds::default();
        let copied = |file: &File| file.try_clone().map_err(LaunchError::host("copying a descriptor"));
        let queues = disk_queues(spec.vcpus);
        let machine = MachineSpec {
            instance_id: spec.instance_id.to_string(),
            uuid: machine_uuid(&spec.instance_id),
            instance_type: spec.instance_type,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            boot: BootSpec {
                kernel: fds.add(spec.boot.kernel),
                initrd: spec.boot.initrd.map(|initrd| fds.add(initrd)),
                cmdline: spec.boot.cmdline,
            },
            disks: spec.disks.into_iter().map(|disk| fds.disk(disk, queues)).collect(),
            nics: spec
                .nics
                .into_iter()
                .map(|nic| NicSpec { mac: nic.mac, mtu: nic.mtu, tap: fds.add(nic.tap) })
                .collect(),
            console: ConsoleSpec { ring: fds.add(spec.console_ring), listener: fds.add(listener) },
            kvm: fds.add(copied(&self.kvm)?),
            rng: Some(fds.add(copied(&self.random)?)),
        };
        let (mut client, _) = self.connect(&spec.instance_id)?;
        let mut call = |command, fds: &[BorrowedFd<'_>], time| match client.call(command, fds, time) {
            Ok(Outcome::Done) => Ok(()),
            Ok(other) => Err(LaunchError::Vmm(format!("unexpected answer {other:?}"))),
            Err(error) => Err(LaunchError::Vmm(error.to_string())),
        };
        let borrowed: Vec<BorrowedFd<'_>> = fds.0.iter().map(AsFd::as_fd).collect();
        call(Command::Create(Box::new(machine)), &borrowed, BUILD)?;
        call(Command::Start, &[], ANSWER)?;
        Ok(client)
    }

    /// Goes on talking to a VMM over a connection.
    fn converse(
        self: &Arc<Self>,
        instance: &InstanceId,
        client: Option<Client>,
        process: Process,
        lock: File,
    ) -> Result<KvmVmm, LaunchError> {
        let (sender, events) = mpsc::unbounded_channel();
        let (shared, id) = (self.clone(), instance.clone());
        let connect = Box::new(move || {
            // Without a socket there is no VMM any more.
            shared.layout.control_socket(&id).exists().then(|| shared.connect(&id).map(|(client, _)| client))
        });
        let talk = Conversation::begin(instance.as_str(), client, connect, sender)?;
        Ok(KvmVmm { process, lock, talk: Arc::new(Disks(talk)), events: Some(events) })
    }
}

/// Request queues of a disk.
pub fn disk_queues(vcpus: u8) -> u16 {
    u16::from(vcpus).clamp(1, 4)
}

#[async_trait]
impl VmmLauncher for KvmLauncher {
    async fn launch(&self, spec: LaunchSpec) -> Result<Box<dyn Vmm>, LaunchError> {
        let shared = self.shared.clone();
        let instance = spec.instance_id.clone();
        let (child, lock, spec) =
            blocking(move || shared.spawn(&spec).map(|(child, lock)| (child, lock, spec))).await?;
        tracing::debug!(%instance, pid = child.pid, "hearth-vmm started");
        let process = Process::new(child.pidfd).map_err(LaunchError::host("watching the VMM"))?;
        let shared = self.shared.clone();
        match blocking(move || shared.create_and_start(spec)).await {
            Ok(client) => Ok(Box::new(self.shared.converse(&instance, Some(client), process, lock)?)),
            Err(error) => {
                process.kill();
                let end = process.wait(&lock).await;
                let log = self.last_words(&instance);
                Err(LaunchError::Vmm(format!("{error}; it ended as {end:?}{log}")))
            }
        }
    }

    async fn find(&self, instance: &InstanceId, was_running: bool) -> Result<Found, LaunchError> {
        let lock = self.shared.open_lock(instance)?;
        for pid in self.shared.cgroups.processes(instance)? {
            // Opened first and looked at again: a pidfd never turns into another process, a number may.
            let Ok(pidfd) = open_pidfd(pid) else { continue };
            if !self.shared.cgroups.holds(instance, pid)? {
                continue;
            }
            let process = Process::new(pidfd).map_err(LaunchError::host("watching the VMM"))?;
            let (shared, id) = (self.shared.clone(), instance.clone());
            let mut client = None;
            let adopt = match blocking(move || shared.connect(&id)).await {
                Ok((connected, peer)) => {
                    tracing::debug!(%instance, pid, ?peer, "found a VMM");
                    client = Some(connected);
                    peer.instance_id == instance.as_str()
                        && matches!(peer.state, MachineState::Running | MachineState::Paused)
                }
                // Busy, or from an older release: a guest is not ended for that.
                Err(error) => {
                    tracing::warn!(%instance, pid, %error, was_running, "found a VMM that does not answer");
                    was_running
                }
            };
            if adopt {
                let vmm = self.shared.converse(instance, client, process, lock)?;
                return Ok(Found::Running(Box::new(vmm)));
            }
            tracing::info!(%instance, pid, "ending a VMM whose guest was never started");
            process.kill();
            process.wait(&lock).await;
        }
        let code = exit_code(&lock);
        Ok(Found::Ended(code.map(|code| end_of(Some(code)))))
    }

    async fn clean_up(&self, instance: &InstanceId) -> Result<(), LaunchError> {
        self.shared.cgroups.remove(instance).await?;
        let folder = self.shared.layout.run(instance);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(LaunchError::host(format!("removing {}", folder.display()))(error))
            }
            _ => Ok(()),
        }
    }
}

impl KvmLauncher {
    /// The end of a VMM's log, for the reason of a failed start.
    fn last_words(&self, instance: &InstanceId) -> String {
        let text = std::fs::read(self.shared.layout.vmm_log(instance)).unwrap_or_default();
        let text =
            String::from_utf8_lossy(text.get(text.len().saturating_sub(2000)..).unwrap_or_default()).into_owned();
        text.lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .map(|line| format!("; its log: {line}"))
            .unwrap_or_default()
    }
}

#[async_trait]
impl Vmm for KvmVmm {
    async fn wait(&mut self) -> VmmEnd {
        self.process.wait(&self.lock).await
    }

    async fn power_button(&self) -> Result<(), LaunchError> {
        self.talk.order(Command::PowerButton, Vec::new()).await
    }

    async fn kill(&self) {
        let asked = self.talk.0.call(Command::Kill, Vec::new(), OBEY_KILL).await;
        if asked.is_ok() && tokio::time::timeout(OBEY_KILL, self.process.wait(&self.lock)).await.is_ok() {
            return;
        }
        self.process.kill();
    }

    fn disks(&self) -> Arc<dyn DiskControl> {
        self.talk.clone()
    }

    fn take_events(&mut self) -> Option<DiskEvents> {
        self.events.take()
    }
}

/// The SMBIOS UUID: starts with `ec2` as EC2's do, then 28 hex digits of a hash of the instance id, so that it stays the same.
fn machine_uuid(instance: &InstanceId) -> [u8; 16] {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(instance.as_str().as_bytes());
    let mut uuid = [0u8; 16];
    for (byte, hashed) in uuid.iter_mut().zip(digest) {
        *byte = hashed;
    }
    let [first, second, ..] = &mut uuid;
    *first = 0xec;
    *second = 0x20 | (*second & 0x0f);
    uuid
}

fn remove_socket(path: &Path) -> Result<(), LaunchError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(LaunchError::host(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// A name for a socket that fits into the 108 bytes of `sun_path` however deep its folder lies.
struct ShortPath {
    _folder: OwnedFd,
    path: std::path::PathBuf,
}

fn short_path(path: &Path) -> Result<ShortPath, LaunchError> {
    use std::os::fd::AsRawFd;
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(LaunchError::host("naming a socket")(io::ErrorKind::InvalidInput.into()));
    };
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(folder)
        .map_err(LaunchError::host(format!("opening {}", folder.display())))?;
    let folder = OwnedFd::from(opened);
    let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    Ok(ShortPath { _folder: folder, path })
}
