//! hearth-vmm as its agent sees it: the control socket, the console socket and ring, events, exit codes, confinement, cost.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::machine::{boot_files, copy_disk};
use hearth_tests::{program, scratch, tiny_image};
use hearth_vmm::console_ring;
use hearth_vmm::control::client::{Client, ClientError};
use hearth_vmm::control::protocol::{
    BootSpec, CONTROL_LISTENER_FD, Command, ConsoleSpec, DiskBacking, DiskSpec, Event, LOCK_FD, MachineSpec,
    MachineState, Outcome, Stats, exit,
};
use hearth_vmm::control::socket;
use hearth_vmm::memory_use;

/// A VMM process as an agent starts it: control listener and lock inherited, everything else by message.
struct Vmm {
    folder: tempfile::TempDir,
    child: Child,
    client: Client,
    lock: File,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open(path: impl AsRef<Path>) -> OwnedFd {
    let path = path.as_ref();
    OpenOptions::new().read(true).write(true).open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).into()
}

impl Vmm {
    fn start() -> Self {
        let folder = scratch();
        let control = folder.path().join("control");
        let listener = socket::listen_at(&control).unwrap();
        let lock = File::options().read(true).write(true).create_new(true).open(folder.path().join("lock")).unwrap();
        let (listener_fd, lock_fd) = (listener.as_raw_fd(), lock.as_raw_fd());
        let mut command = Program::new(program("hearth-vmm"));
        command.stdin(Stdio::null());
        // SAFETY: only async-signal-safe calls between fork and exec. The copies above 100 cannot be overwritten by dup2.
        unsafe {
            command.pre_exec(move || {
                for (from, to) in [(listener_fd, CONTROL_LISTENER_FD), (lock_fd, LOCK_FD)] {
                    nix::libc::fcntl(from, nix::libc::F_DUPFD, 100 + to);
                }
                for to in [CONTROL_LISTENER_FD, LOCK_FD] {
                    nix::libc::dup2(100 + to, to);
                    nix::libc::close(100 + to);
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        drop(listener);
        let (client, peer) = Client::connect(&control, PATIENCE).unwrap();
        assert_eq!(peer.state, MachineState::Empty);
        Self { folder, child, client, lock }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn call(&mut self, command: Command) -> Outcome {
        self.client.call(command, &[], PATIENCE).unwrap()
    }

    /// Builds and starts a machine with `kernel`; with `disk` it boots the test image.
    fn boot(&mut self, kernel: &Path, initrd: Option<&Path>, disk: Option<&Path>, cmdline: &str) {
        let ring = File::options().read(true).write(true).create_new(true).open(self.path("ring")).unwrap();
        console_ring::create(&ring, 64 << 10).unwrap();
        let listener = UnixListener::bind(self.path("console")).unwrap();
        let mut fds: Vec<OwnedFd> = vec![
            open("/dev/kvm"),
            File::open("/dev/urandom").unwrap().into(),
            ring.into(),
            listener.into(),
            File::open(kernel).unwrap().into(),
        ];
        let mut add = |fd: OwnedFd| {
            fds.push(fd);
            (fds.len() - 1) as u8
        };
        let spec = MachineSpec {
            instance_id: "i-0123456789abcdef0".into(),
            uuid: *b"\xec\x2a\0\0\0\0\x40\0\x80\0\0\0\0\0\0\x01",
            instance_type: "t3.micro".into(),
            vcpus: 2,
            memory_mib: 256,
            boot: BootSpec {
                kernel: 4,
                initrd: initrd.map(|path| add(File::open(path).unwrap().into())),
                cmdline: cmdline.into(),
            },
            disks: disk
                .map(|path| DiskSpec {
                    serial: "vol0123456789abcdef0".into(),
                    backing: DiskBacking::Raw { file: add(open(path)) },
                    read_only: false,
                    queues: 1,
                })
                .into_iter()
                .collect(),
            nics: vec![],
            console: ConsoleSpec { ring: 2, listener: 3 },
            kvm: 0,
            rng: Some(1),
        };
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let created = self.client.call(Command::Create(Box::new(spec)), &borrowed, PATIENCE).unwrap();
        assert_eq!(created, Outcome::Done);
        assert_eq!(self.call(Command::Start), Outcome::Done);
    }

    /// Boots the test image and waits for its shell.
    fn boot_tiny(&mut self) -> Console {
        let boot = boot_files(&tiny_image(), self.folder.path());
        copy_disk(&tiny_image(), &self.path("root.raw"));
        self.boot(&boot.kernel, Some(&boot.initrd), Some(&self.path("root.raw")), &boot.cmdline);
        let mut console = self.console();
        console.wait_for("HEARTH-GUEST ready");
        console
    }

    fn console(&self) -> Console {
        let stream = UnixStream::connect(self.path("console")).unwrap();
        Console::new(stream.try_clone().unwrap(), stream)
    }

    fn stats(&mut self) -> Stats {
        match self.call(Command::Stats) {
            Outcome::Stats(stats) => *stats,
            other => panic!("{other:?}"),
        }
    }

    fn event(&mut self) -> Event {
        self.client.next_event(PATIENCE).unwrap().expect("an event")
    }

    /// Waits for the end of the process; the exit code, which the lock file must tell too.
    fn exit_code(&mut self) -> i32 {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "the VMM does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        let code = status.code().unwrap_or_else(|| panic!("{status}"));
        let recorded = std::fs::read(self.path("lock")).unwrap();
        assert_eq!(recorded, code.to_le_bytes(), "the lock file tells the exit code");
        code
    }
}

fn sum(stats: &Stats, name: &str) -> u64 {
    stats.exits.iter().find(|(n, _)| n == name).map_or(0, |(_, count)| *count)
}

#[test]
fn an_agent_pauses_resumes_counts_leaves_comes_back_and_presses_the_button() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();

    assert_eq!(vmm.call(Command::Pause), Outcome::Done);
    let before = vmm.stats();
    console.send("echo still-\"here\"");
    let after = vmm.stats();
    assert_eq!(sum(&before, "kvm_exits"), sum(&after, "kvm_exits"), "a paused guest runs");
    assert!(sum(&after, "io_out") > 0 && after.start_ns > 0 && after.disks[0].read_ops > 0, "{after:?}");
    assert!(matches!(vmm.client.call(Command::Pause, &[], PATIENCE), Err(ClientError::Refused(_))));
    assert_eq!(vmm.call(Command::Resume), Outcome::Done);
    console.wait_for("still-here");

    // A second agent takes over, and the first one's connection ends.
    let (client, peer) = Client::connect(&vmm.path("control"), PATIENCE).unwrap();
    assert_eq!((peer.instance_id.as_str(), peer.state), ("i-0123456789abcdef0", MachineState::Running));
    let mut old = std::mem::replace(&mut vmm.client, client);
    assert!(old.call(Command::Stats, &[], PATIENCE).is_err());

    // A late console client gets the backlog.
    vmm.console().wait_for("HEARTH-GUEST ready");

    assert_eq!(vmm.call(Command::PowerButton), Outcome::Done);
    assert_eq!(vmm.event(), Event::PoweredOff);
    assert_eq!(vmm.exit_code(), exit::POWER_OFF);
    let ring = File::open(vmm.path("ring")).unwrap();
    let kept = String::from_utf8_lossy(&console_ring::read(&ring, 0).unwrap().bytes).into_owned();
    assert!(kept.contains("still-here") && kept.contains("Power down"), "{kept}");
}

#[test]
fn every_thread_is_confined_and_the_process_is_cheap() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    console.run("dd if=/dev/vda of=/dev/null bs=1M count=20 2>/dev/null; dd if=/dev/hwrng of=/dev/null bs=1k count=1");
    let tasks = format!("/proc/{}/task", vmm.child.id());
    let mut threads = 0;
    for task in std::fs::read_dir(tasks).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
        // The kernel's own io_uring workers come and go.
        threads += u32::from(!status.starts_with("Name:\tiou-wrk"));
    }
    assert_eq!(threads, 4, "control, I/O and two vCPUs");
    let stats = vmm.stats();
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.child.id())).unwrap();
    let cost = memory_use::parse(&smaps, &stats.guest_ram);
    assert!(cost.guest_rss > 20 << 20, "{cost:?}");
    assert!(cost.private_dirty < 2 << 20, "{cost:?}");
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}

/// An ELF kernel for the PVH entry with this code.
fn kernel_of(code: &[u8], path: &Path) {
    let entry = 0x10_0000u32;
    let mut file = vec![0u8; 0x1000];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[18] = 62;
    file[32] = 64;
    file[54] = 56;
    file[56] = 2;
    let mut put = |at: usize, value: u64| file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    for (at, kind, offset, size) in [(64, 1, 0x1000, code.len() as u64), (120, 4, 0x800, 20)] {
        put(at, kind);
        put(at + 8, offset);
        put(at + 24, u64::from(entry));
        put(at + 32, size);
        put(at + 40, size);
    }
    put(0x800, 4 | (4 << 32));
    put(0x808, 18 | (u64::from(u32::from_le_bytes(*b"Xen\0")) << 32));
    put(0x810, u64::from(entry));
    file.extend_from_slice(code);
    std::fs::write(path, file).unwrap();
}

#[test]
fn a_panic_is_told_before_the_reset() {
    let mut vmm = Vmm::start();
    let kernel = vmm.path("kernel");
    // Bit 0 to the pvpanic port, then 1 to the ACPI reset register, then halt.
    let out = |port: u16, value: u8| [0xba, port as u8, (port >> 8) as u8, 0, 0, 0xb0, value, 0xee];
    kernel_of(&[&out(0x505, 1)[..], &out(0x602, 1), &[0xf4, 0xeb, 0xfd]].concat(), &kernel);
    vmm.boot(&kernel, None, None, "");
    assert_eq!(vmm.event(), Event::GuestPanicked);
    assert_eq!(vmm.event(), Event::Reset);
    assert_eq!(vmm.exit_code(), exit::RESET);
}

#[test]
fn a_triple_fault_is_a_crash() {
    let mut vmm = Vmm::start();
    let kernel = vmm.path("kernel");
    // An undefined instruction without an interrupt table.
    kernel_of(&[0x0f, 0x0b], &kernel);
    vmm.boot(&kernel, None, None, "");
    assert_eq!(vmm.event(), Event::GuestCrashed);
    assert_eq!(vmm.exit_code(), exit::GUEST_CRASH);
}

#[test]
fn a_guest_that_never_yields_is_paused_and_killed() {
    let mut vmm = Vmm::start();
    let kernel = vmm.path("kernel");
    // Jumps to itself.
    kernel_of(&[0xeb, 0xfe], &kernel);
    vmm.boot(&kernel, None, None, "");
    assert_eq!(vmm.call(Command::Pause), Outcome::Done);
    assert_eq!(vmm.call(Command::Resume), Outcome::Done);
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
    assert_eq!(vmm.lock.metadata().unwrap().len(), 4);
}

#[test]
fn unanswered_console_clients_do_not_hold_up_the_guest() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    // Never reads; the guest must not notice.
    let lazy = UnixStream::connect(vmm.path("console")).unwrap();
    console.send("i=0; while [ $i -lt 400 ]; do echo 0123456789012345678901234567890123456789; i=$((i+1)); done");
    console.send("echo now-\"over\"");
    console.wait_for("now-over");
    assert_eq!(console.run("echo fine"), "fine");
    drop(lazy);
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}
