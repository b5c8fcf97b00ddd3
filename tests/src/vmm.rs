//! One hearth-vmm as its agent sees it: control socket, console socket and ring, lock file.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use hearth_vmm::console_ring;
use hearth_vmm::control::client::Client;
use hearth_vmm::control::protocol::{
    BootSpec, CONTROL_LISTENER_FD, Command, ConsoleSpec, DiskBacking, DiskSpec, Event, LOCK_FD, MachineSpec,
    MachineState, Outcome, Stats,
};
use hearth_vmm::control::socket;

use crate::console::{Console, PATIENCE};
use crate::machine::{activity, boot_files, copy_disk};
use crate::{program, scratch, tiny_image};

/// A VMM process as an agent starts it: control listener and lock inherited, everything else by message.
pub struct Vmm {
    folder: tempfile::TempDir,
    /// The process.
    pub child: Child,
    /// The control connection.
    pub client: Client,
    /// The instance's lock file.
    pub lock: File,
    /// Virtual CPUs of the machine to boot.
    pub vcpus: u8,
    /// Words added to the image's kernel command line.
    pub more_cmdline: String,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Opens a file for reading and writing.
pub fn open(path: impl AsRef<Path>) -> OwnedFd {
    let path = path.as_ref();
    OpenOptions::new().read(true).write(true).open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).into()
}

impl Vmm {
    /// Starts the process; it has no machine yet.
    pub fn start() -> Self {
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
        Self { folder, child, client, lock, vcpus: 2, more_cmdline: String::new() }
    }

    /// A path in this VMM's own folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sends a command that must succeed.
    pub fn call(&mut self, command: Command) -> Outcome {
        self.client.call(command, &[], PATIENCE).unwrap()
    }

    /// Builds and starts a machine with `kernel`; with `disk` it boots the test image.
    pub fn boot(&mut self, kernel: &Path, initrd: Option<&Path>, disk: Option<&Path>, cmdline: &str) {
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
            vcpus: self.vcpus,
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
    pub fn boot_tiny(&mut self) -> Console {
        let boot = boot_files(&tiny_image(), self.folder.path());
        copy_disk(&tiny_image(), &self.path("root.raw"));
        self.boot(
            &boot.kernel,
            Some(&boot.initrd),
            Some(&self.path("root.raw")),
            &format!("{} {}", boot.cmdline, self.more_cmdline),
        );
        let mut console = self.console();
        let pid = self.child.id();
        console.on_silence(move || activity(pid));
        console.wait_for("HEARTH-GUEST ready");
        console
    }

    /// A new client of the console.
    pub fn console(&self) -> Console {
        let stream = UnixStream::connect(self.path("console")).unwrap();
        Console::new(stream.try_clone().unwrap(), stream)
    }

    /// Counters.
    pub fn stats(&mut self) -> Stats {
        match self.call(Command::Stats) {
            Outcome::Stats(stats) => *stats,
            other => panic!("{other:?}"),
        }
    }

    /// The next event.
    pub fn event(&mut self) -> Event {
        self.client.next_event(PATIENCE).unwrap().expect("an event")
    }

    /// Waits for the end of the process; the exit code, which the lock file must tell too.
    pub fn exit_code(&mut self) -> i32 {
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
