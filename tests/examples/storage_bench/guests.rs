//! The same guest under hearth-vmm, QEMU and Firecracker, each with one disk of its own.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hearth_block::map::{self, MapSpec};
use hearth_tests::cloud::kill_now;
use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::vmm::{Vmm, open};
use hearth_vmm::control::protocol::{self, DiskBacking, DiskLimits, DiskSpec, LayeredSpec};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::eventfd::EventFd;
use serde_json::{Value, json};

/// What a VMM may use beside its guest's memory, page cache included: like on a host that is full of guests.
const MEMORY_MAX: &str = "268435456";
const MEMORY_MIB: u64 = 256;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// Kernel, initrd and where disks are made.
pub struct Setting {
    /// Has `vmlinux` and `initrd`.
    pub work: PathBuf,
    /// On a real file system with direct I/O.
    pub scratch: PathBuf,
    /// Bytes of each disk.
    pub bytes: u64,
    pub firecracker: Option<PathBuf>,
}

impl Setting {
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// A file with random content, so that no block of it is a hole.
    fn fill(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let mut from = File::open("/dev/urandom").unwrap();
        let mut block = vec![0; 1 << 20];
        std::io::Read::read_exact(&mut from, &mut block).unwrap();
        let file = File::create(&path).unwrap();
        for at in 0..self.bytes >> 20 {
            block[..8].copy_from_slice(&at.to_le_bytes());
            file.write_all_at(&block, at << 20).unwrap();
        }
        file.sync_all().unwrap();
        // In the page cache it would count as this process's, and be there for a VMM beyond its limit.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        path
    }
}

/// A disk as an agent has it: data and map, no base.
pub struct Volume {
    data: PathBuf,
    map: PathBuf,
    serial: String,
    direct: bool,
}

impl Volume {
    /// Of a file that has its content; with direct I/O, or through the page cache.
    pub fn new(data: PathBuf, number: u32, bytes: u64, direct: bool) -> Self {
        let (serial, map) = (format!("vol{number:017x}"), data.with_extension("map"));
        let file = File::create(&map).unwrap();
        let spec = MapSpec { filled: true, volume_id: serial.clone(), size_bytes: bytes, base: None, generation: 1 };
        map::create(&file, spec).unwrap();
        Self { data, map, serial, direct }
    }

    pub fn serial(&self) -> String {
        self.serial.clone()
    }

    /// Has the VMM open it and show it to the guest.
    pub fn attach(&self, vmm: &mut Vmm) {
        let wake = EventFd::new().unwrap();
        let fds: [OwnedFd; 3] = [open(&self.data), open(&self.map), wake.as_fd().try_clone_to_owned().unwrap()];
        let spec = LayeredSpec {
            data: 0,
            map: 1,
            base: None,
            wake: 2,
            key: None,
            generation: 1,
            limits: DiskLimits::default(),
            direct: self.direct,
        };
        let backing = DiskBacking::Layered(Box::new(spec));
        let disk = DiskSpec { serial: self.serial(), backing, read_only: false, queues: 1 };
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        vmm.client.call(protocol::Command::AttachDisk(Box::new(disk)), &borrowed, PATIENCE).unwrap();
    }
}

/// What serves a guest.
pub enum Server {
    Hearth(Box<Vmm>),
    Qemu(Child, Qmp),
    Firecracker(Child),
}

/// One guest that runs.
pub struct Guest {
    pub name: String,
    pub server: Server,
    pub console: Console,
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Server::Qemu(child, _) | Server::Firecracker(child) = &mut self.server {
            kill_now(child);
        }
    }
}

impl Guest {
    fn pid(&self) -> u32 {
        match &self.server {
            Server::Hearth(vmm) => vmm.child.id(),
            Server::Qemu(child, _) | Server::Firecracker(child) => child.id(),
        }
    }

    /// hearth-vmm with a volume. Its agent uses direct I/O; through the page cache is how Firecracker reads and writes.
    pub fn hearth(setting: &Setting, direct: bool) -> Self {
        let name = if direct { "hearth-vmm" } else { "hearth-vmm cached" };
        let mut vmm = Vmm::start();
        vmm.vcpus = 1;
        confine(if direct { "hearth" } else { "hearth-cached" }, vmm.child.id());
        vmm.boot(&setting.work.join("vmlinux"), Some(&setting.work.join("initrd")), None, CMDLINE);
        let mut console = vmm.console();
        console.wait_for("BENCH-READY");
        Volume::new(setting.fill(&format!("hearth-{direct}.data")), 0, setting.bytes, direct).attach(&mut vmm);
        console.wait_for("BENCH-DISK add vda");
        Self { name: name.into(), server: Server::Hearth(Box::new(vmm)), console }
    }

    /// QEMU's q35, the one of its fast machines that has hot-plug, with virtio-blk on an I/O thread.
    pub fn qemu(setting: &Setting) -> Self {
        let (disk, socket) = (setting.fill("qemu.data"), setting.path("qmp"));
        let words = [
            "-M q35 -accel kvm -cpu host -smp 1 -nodefaults -no-user-config -display none -no-reboot -serial stdio",
            "-object iothread,id=io -device virtio-blk-pci,drive=disk,iothread=io -device pcie-root-port,id=rp0,slot=1",
        ];
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(words.iter().flat_map(|words| words.split(' ')))
            .args(["-m", &MEMORY_MIB.to_string(), "-append", CMDLINE])
            .arg("-kernel")
            .arg(setting.work.join("vmlinux"))
            .arg("-initrd")
            .arg(setting.work.join("initrd"))
            .arg("-drive")
            .arg(format!("id=disk,if=none,file={},format=raw,cache=none,aio=io_uring", disk.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        let (child, console) = spawn("qemu", command);
        Self { name: "QEMU q35".into(), server: Server::Qemu(child, Qmp::connect(&socket)), console }
    }

    /// Firecracker with one of its two disk engines.
    pub fn firecracker(setting: &Setting, engine: &str) -> Option<Self> {
        let program = setting.firecracker.as_ref()?;
        let disk = setting.fill(&format!("firecracker-{engine}.data"));
        let config = json!({
            "boot-source": {
                "kernel_image_path": setting.work.join("vmlinux"),
                "initrd_path": setting.work.join("initrd"),
                "boot_args": format!("{CMDLINE} reboot=k"),
            },
            "drives": [{
                "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
                "io_engine": engine, "cache_type": "Writeback",
            }],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
        });
        let file = setting.path(&format!("firecracker-{engine}.json"));
        std::fs::write(&file, config.to_string()).unwrap();
        let mut command = Command::new(program);
        command.args(["--no-api", "--enable-pci", "--config-file"]).arg(file);
        let (child, console) = spawn(&format!("firecracker-{engine}"), command);
        Some(Self { name: format!("Firecracker {engine}"), server: Server::Firecracker(child), console })
    }

    /// KVM's counters of this guest alone.
    pub fn exits(&self) -> u64 {
        let own = format!("{}-", self.pid());
        let machines = std::fs::read_dir("/sys/kernel/debug/kvm").unwrap().flatten();
        let mine = machines.filter(|entry| entry.file_name().to_string_lossy().starts_with(&own));
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default().trim().parse::<u64>().unwrap_or(0);
        mine.map(|entry| read(entry.path().join("exits"))).sum()
    }
}

/// Starts a VMM with its console on pipes and waits for the guest.
fn spawn(group: &str, mut command: Command) -> (Child, Console) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    confine(group, child.id());
    let mut console = Console::new(child.stdin.take().unwrap(), child.stdout.take().unwrap());
    console.wait_for("BENCH-READY");
    (child, console)
}

/// A file without any VMM: what the host itself makes of the same load, by the guests' own program.
pub struct Bare {
    pub name: &'static str,
    program: PathBuf,
    file: PathBuf,
    direct: bool,
}

impl Bare {
    /// With direct I/O, or through a page cache as large as a VMM's memory.
    pub fn new(setting: &Setting, direct: bool) -> Self {
        let name = if direct { "no VMM, direct" } else { "no VMM, cached" };
        let file = setting.fill(&format!("bare-{direct}.data"));
        Self { name, program: setting.work.join("guest_load"), file, direct }
    }

    /// What the program said.
    pub fn load(&self, what: &str, depth: u32, seconds: f64) -> String {
        let what = if self.direct { what.to_owned() } else { format!("cached-{what}") };
        let mut command = Command::new(&self.program);
        command.args(["load", &what, &depth.to_string(), &seconds.to_string()]).arg(&self.file).stdout(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        confine("bare", child.id());
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{command:?}: {}", done.status);
        String::from_utf8(done.stdout).unwrap()
    }
}

/// Puts a process into a cgroup of its own with [`MEMORY_MAX`].
fn confine(name: &str, pid: u32) {
    let group = Path::new("/sys/fs/cgroup").join(format!("hearth-bench-{name}"));
    let _ = std::fs::create_dir(&group);
    std::fs::write(group.join("memory.max"), MEMORY_MAX).unwrap();
    std::fs::write(group.join("cgroup.procs"), pid.to_string()).unwrap();
}

/// QEMU's control socket.
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut qmp = Self { lines: BufReader::new(stream.try_clone().unwrap()), stream };
        qmp.next();
        qmp.call("qmp_capabilities", json!({}));
        qmp
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }

    /// A command that must succeed.
    pub fn call(&mut self, command: &str, arguments: Value) {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.write_all(format!("{text}\n").as_bytes()).unwrap();
        loop {
            let answer = self.next();
            if answer.get("event").is_none() {
                assert!(answer.get("return").is_some(), "{text}: {answer}");
                return;
            }
        }
    }

    /// Waits for an event.
    pub fn wait_for(&mut self, event: &str) {
        while self.next()["event"] != event {}
    }
}
