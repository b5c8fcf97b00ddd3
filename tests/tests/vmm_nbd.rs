//! NBD disks under a stock kernel: servers that are killed, slow or faulty, and the agent that connects the VMM to them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::vmm::Vmm;
use hearth_vmm::control::client::{Client, ClientError};
use hearth_vmm::control::protocol::{
    Command, DiskBacking, DiskLimits, DiskSpec, Event, NbdSpec, Outcome, VolumeCause, exit,
};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;
const SERIAL: &str = "vol00000000000000bd1";
/// What the guest writes at once.
const PIECE: usize = 64 << 10;

/// An NBD server of one raw file.
struct Server {
    socket: PathBuf,
    command: Vec<String>,
    child: Option<Child>,
}

impl Server {
    fn start(socket: PathBuf, command: Vec<String>) -> Self {
        let mut server = Self { socket, command, child: None };
        server.restart();
        server
    }

    fn restart(&mut self) {
        let child = Program::new(&self.command[0]).args(&self.command[1..]).stdin(Stdio::null()).spawn();
        self.child = Some(child.unwrap_or_else(|error| panic!("{:?}: {error}", self.command)));
    }

    /// kill -9.
    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::remove_file(&self.socket).unwrap();
    }

    fn connect(&self) -> OwnedFd {
        let end = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return stream.into(),
                Err(error) => assert!(Instant::now() < end, "{:?} does not listen: {error}", self.command),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn image(path: &Path) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file
}

fn attach(client: &mut Client, server: &Server, export: &str) -> Result<Outcome, ClientError> {
    let spec = NbdSpec { socket: 0, export: export.into(), limits: DiskLimits::default() };
    let backing = DiskBacking::Nbd(Box::new(spec));
    let disk = DiskSpec { serial: SERIAL.into(), backing, read_only: false, queues: 2 };
    client.call(Command::AttachDisk(Box::new(disk)), &[server.connect().as_fd()], PATIENCE)
}

/// What an agent does when it is asked for a connection.
fn connect(client: &mut Client, server: &Server) {
    let command = Command::ConnectVolume { serial: SERIAL.into(), socket: 0 };
    assert_eq!(client.call(command, &[server.connect().as_fd()], PATIENCE).unwrap(), Outcome::Done);
}

fn wait_for_disk(console: &mut Console) {
    console.run("while ! [ -b /dev/vdb ]; do usleep 20000; done");
}

/// What the guest writes as piece `number`.
fn piece(number: u64) -> Vec<u8> {
    format!("{number:07}\n").repeat(PIECE / 8).into_bytes()
}

fn is_written(file: &File, number: u64) -> bool {
    let mut found = vec![0; PIECE];
    file.read_exact_at(&mut found, number * PIECE as u64).unwrap();
    found == piece(number)
}

fn wait_written(file: &File, number: u64, console: &Console) {
    let end = Instant::now() + PATIENCE;
    while !is_written(file, number) {
        assert!(Instant::now() < end, "piece {number} is not written: {}", console.seen());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn lost() -> [Event; 2] {
    let impaired = Event::VolumeImpaired { serial: SERIAL.into(), cause: VolumeCause::Disconnected };
    [impaired, Event::ConnectVolume { serial: SERIAL.into() }]
}

fn recovered() -> Event {
    Event::VolumeRecovered { serial: SERIAL.into() }
}

fn detach(vmm: &mut Vmm) {
    assert_eq!(vmm.call(Command::DetachDisk { serial: SERIAL.into(), force: false }), Outcome::Done);
    assert_eq!(vmm.event(), Event::DiskDetached { serial: SERIAL.into(), durable: true });
}

#[test]
fn a_guest_goes_on_when_its_storage_daemon_is_killed() {
    const PIECES: u64 = 90;
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    let path = vmm.path("disk");
    let file = image(&path);
    let socket = vmm.path("nbd");
    let command = [
        "qemu-storage-daemon",
        "--blockdev",
        &format!("driver=file,node-name=disk,filename={},discard=unmap", path.display()),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={}", socket.display()),
        "--export",
        "type=nbd,id=export,node-name=disk,name=volume,writable=on",
    ];
    let mut server = Server::start(socket, command.map(str::to_owned).to_vec());
    match attach(&mut vmm.client, &server, "another") {
        Err(ClientError::Refused(text)) => assert!(text.contains("another"), "{text}"),
        other => panic!("{other:?}"),
    }
    attach(&mut vmm.client, &server, "volume").unwrap();
    wait_for_disk(&mut console);
    console.send(&format!(
        "(n=0; while [ $n -lt {PIECES} ]; do yes $(printf %07d $n) | \
         dd of=/dev/vdb bs={PIECE} seek=$n count=1 iflag=fullblock oflag=direct conv=fsync 2>/dev/null || echo write \"failed\"; \
         n=$((n+1)); done; echo writer-\"over\") &"
    ));

    wait_written(&file, 5, &console);
    server.kill();
    assert_eq!([vmm.event(), vmm.event()], lost());
    // This agent dies, and the next one is asked.
    let (client, _) = Client::connect(&vmm.path("control"), PATIENCE).unwrap();
    vmm.client = client;
    let mut told = [vmm.event(), vmm.event()];
    told.reverse();
    assert_eq!(told, lost());
    // The guest waits, the machine does not.
    assert_eq!(vmm.call(Command::Pause), Outcome::Done);
    assert_eq!(vmm.call(Command::Resume), Outcome::Done);
    assert!(!is_written(&file, PIECES - 1));
    server.restart();
    connect(&mut vmm.client, &server);
    assert_eq!(vmm.event(), recovered());

    // Again and again, with an agent that is quick.
    for number in [20, 35, 50] {
        wait_written(&file, number, &console);
        server.kill();
        server.restart();
        assert_eq!([vmm.event(), vmm.event()], lost());
        connect(&mut vmm.client, &server);
        assert_eq!(vmm.event(), recovered());
    }
    console.wait_for("writer-over");
    assert!(!console.seen().contains("write failed"), "{}", console.seen());
    assert!((0..PIECES).all(|number| is_written(&file, number)));

    // Read back past the page cache while the server is killed once more.
    let all: Vec<u8> = (0..PIECES).flat_map(piece).collect();
    std::fs::write(vmm.path("expected"), all).unwrap();
    let host = Program::new("md5sum").arg(vmm.path("expected")).output().unwrap();
    console.run("echo 3 > /proc/sys/vm/drop_caches");
    let read = format!("dd if=/dev/vdb bs={PIECE} count={PIECES} iflag=direct 2>/dev/null | md5sum | cut -d ' ' -f 1");
    server.kill();
    let sum = std::thread::scope(|scope| {
        let reader = scope.spawn(|| console.run(&read));
        server.restart();
        assert_eq!([vmm.event(), vmm.event()], lost());
        connect(&mut vmm.client, &server);
        reader.join().unwrap()
    });
    assert_eq!(sum, String::from_utf8_lossy(&host.stdout).split(' ').next().unwrap());
    assert_eq!(vmm.event(), recovered());
    assert_eq!(console.run("dmesg | grep -c 'I/O error' || true"), "0");
    assert_eq!(vmm.stats().disks[1].errors, 0);
    detach(&mut vmm);
    console.run("while [ -e /sys/block/vdb ]; do usleep 20000; done");
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}

#[test]
fn a_slow_and_faulty_server_is_waited_for_and_its_errors_reach_the_guest() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    let path = vmm.path("disk");
    let file = image(&path);
    let (socket, fault) = (vmm.path("nbd"), vmm.path("fault"));
    let command = [
        "nbdkit",
        "-f",
        "-U",
        &socket.display().to_string(),
        "--filter=error",
        "--filter=delay",
        "file",
        &path.display().to_string(),
        "rdelay=50ms",
        "wdelay=50ms",
        "error=EIO",
        "error-rate=100%",
        &format!("error-file={}", fault.display()),
    ];
    let mut server = Server::start(socket, command.map(str::to_owned).to_vec());
    attach(&mut vmm.client, &server, "").unwrap();
    wait_for_disk(&mut console);
    let write = |number: u64| {
        format!(
            "yes {number:07} | dd of=/dev/vdb bs={PIECE} seek={number} count=1 iflag=fullblock oflag=direct conv=fsync 2>/dev/null"
        )
    };
    console.run(&write(3));
    assert!(is_written(&file, 3));
    // An error of the server's is the guest's, for as long as it lasts.
    File::create(&fault).unwrap();
    assert_ne!(console.try_run(&write(4)).1, 0);
    std::fs::remove_file(&fault).unwrap();
    console.run(&write(4));
    assert!(is_written(&file, 4));

    // The export grows: a new connection shows it.
    let bytes = DISK_BYTES + 8 * MIB;
    let resize = Command::ResizeDisk { serial: SERIAL.into(), bytes };
    assert!(matches!(vmm.client.call(resize.clone(), &[], PATIENCE), Err(ClientError::Refused(_))));
    file.set_len(bytes).unwrap();
    connect(&mut vmm.client, &server);
    assert_eq!(vmm.call(resize), Outcome::Done);
    console.run(&format!("while [ $(cat /sys/block/vdb/size) != {} ]; do usleep 20000; done", bytes / 512));
    let last = bytes / PIECE as u64 - 1;
    console.run(&write(last));
    assert!(is_written(&file, last));
    let limits = DiskLimits { iops: 200, bytes_per_second: 20 * MIB };
    assert_eq!(vmm.call(Command::SetDiskLimits { serial: SERIAL.into(), limits }), Outcome::Done);
    console.run(&write(5));
    assert!(is_written(&file, 5));

    // Killed with the guest's buffered writes under way, which have no flush yet.
    console.run("yes buffered | dd of=/dev/vdb bs=1M seek=8 count=8 iflag=fullblock 2>/dev/null");
    console.send("sync; echo sync-\"over\"");
    server.kill();
    server.restart();
    assert_eq!([vmm.event(), vmm.event()], lost());
    connect(&mut vmm.client, &server);
    assert_eq!(vmm.event(), recovered());
    console.wait_for("sync-over");
    let mut found = vec![0; 8 * MIB as usize];
    file.read_exact_at(&mut found, 8 * MIB).unwrap();
    assert!(found.chunks(9).all(|line| b"buffered\n".starts_with(line)), "what was synced is not there");

    // By force, without a server: the guest gets errors, and nothing unflushed was lost.
    server.kill();
    assert_eq!([vmm.event(), vmm.event()], lost());
    console.send("dd if=/dev/vdb bs=4k skip=1000 count=1 iflag=direct >/dev/null 2>&1; echo reader-\"over\" $?");
    assert_eq!(vmm.call(Command::DetachDisk { serial: SERIAL.into(), force: true }), Outcome::Done);
    assert_eq!(vmm.event(), Event::DiskDetached { serial: SERIAL.into(), durable: true });
    console.wait_for("reader-over 1");
    console.run("while [ -e /sys/block/vdb ]; do usleep 20000; done");
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}
