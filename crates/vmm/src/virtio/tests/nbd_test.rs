//! NBD disks: connections that the agent passes, servers that die, and disks that go without their server.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hearth_block::{Cause, RateLimits};

use super::driver::*;
use super::machine::*;
use crate::virtio::{Backing, Disk, DiskCondition, DiskNews, NbdBacking, VirtioError};

const BYTES: u64 = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(60);

/// A server of one file, and the agent's side of it.
struct Agent {
    folder: tempfile::TempDir,
    server: Option<Child>,
}

impl Agent {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("disk")).unwrap().set_len(BYTES).unwrap();
        let mut agent = Self { folder, server: None };
        agent.serve();
        agent
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&mut self) {
        let server = Command::new("nbdkit")
            .args(["-f", "-U", self.path("socket").to_str().unwrap(), "file", self.path("disk").to_str().unwrap()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start nbdkit (Debian package nbdkit): {error}"));
        self.server = Some(server);
    }

    fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
        std::fs::remove_file(self.path("socket")).unwrap();
    }

    fn connect(&self) -> OwnedFd {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Ok(stream) = UnixStream::connect(self.path("socket")) {
                stream.set_nonblocking(true).unwrap();
                return stream.into();
            }
            assert!(Instant::now() < until, "the server does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn disk(&self) -> Disk {
        let backing = NbdBacking { socket: self.connect(), export: String::new(), limits: RateLimits::default() };
        Disk { serial: "vol-a".into(), backing: Backing::Nbd(Box::new(backing)), read_only: false, queues: 2 }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn start(agent: &Agent) -> (Machine, DriverQueue) {
    let mut machine = Machine::threaded(|_| {});
    machine.thread().attach_disk(agent.disk()).unwrap();
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    (machine, queues.remove(0))
}

impl Machine {
    /// Waits for this news after whatever other.
    fn wait_for_news(&mut self, wanted: DiskNews) {
        let until = Instant::now() + PATIENCE;
        while !self.wait_news().contains(&wanted) {
            assert!(Instant::now() < until, "no {wanted:?}");
        }
    }

    fn wait_lost(&mut self) {
        let mut news = Vec::new();
        while news.len() < 2 {
            news.extend(self.wait_news());
        }
        assert_eq!(news, [DiskNews::Impaired(Cause::Disconnected), DiskNews::ConnectionWanted]);
    }

    fn ask(&mut self, queue: &mut DriverQueue, kind: u32, offset: u64) -> (u8, Vec<u8>) {
        let (data, status) = self.request(queue, kind, offset);
        self.finish(queue);
        (self.bytes(status, 1)[0], self.bytes(data, 512))
    }
}

#[test]
fn requests_outlive_their_server_and_a_new_agent_learns_what_they_wait_for() {
    let mut agent = Agent::new();
    let (mut machine, mut queue) = start(&agent);
    assert_eq!(machine.ask(&mut queue, WRITE, 4096).0, OK);
    agent.kill();
    machine.wait_lost();
    let (data, status) = machine.request(&mut queue, READ, 4096);
    let condition = |connect, impaired| DiskCondition { serial: "vol-a".into(), chunks: vec![], connect, impaired };
    assert_eq!(machine.thread().conditions(), [condition(true, Some(Cause::Disconnected))]);
    // A stopped machine does not wait for servers.
    machine.thread().pause().unwrap();
    machine.thread().resume().unwrap();
    // A connection that ends at once is no good: another one is asked for.
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    ours.set_nonblocking(true).unwrap();
    machine.thread().connect_volume("vol-a", ours.into()).unwrap();
    machine.wait_for_news(DiskNews::ConnectionWanted);
    assert_eq!(machine.bytes(status, 1), [0xee]);
    agent.serve();
    machine.thread().connect_volume("vol-a", agent.connect()).unwrap();
    machine.finish(&mut queue);
    assert_eq!((machine.bytes(status, 1)[0], machine.bytes(data, 512)), (OK, vec![0x5a; 512]));
    machine.wait_for_news(DiskNews::Recovered);
    assert_eq!(machine.thread().conditions(), [condition(false, None)]);
    assert_eq!(machine.io.device_stats().disks[0].errors, 0);
    let Io::Thread(io) = machine.io else { panic!() };
    io.stop().unwrap();
}

#[test]
fn an_nbd_disk_grows_and_is_limited() {
    let agent = Agent::new();
    let (mut machine, mut queue) = start(&agent);
    assert!(machine.thread().resize_disk("vol-a", 2 * BYTES).is_err(), "the export is not longer, and cannot be asked");
    File::options().write(true).open(agent.path("disk")).unwrap().set_len(2 * BYTES).unwrap();
    machine.thread().connect_volume("vol-a", agent.connect()).unwrap();
    machine.thread().resize_disk("vol-a", 2 * BYTES).unwrap();
    assert_eq!(machine.ask(&mut queue, WRITE, 2 * BYTES - 512).0, OK);
    assert_eq!(machine.ask(&mut queue, FLUSH, 0).0, OK);
    let mut stored = [0; 512];
    File::open(agent.path("disk")).unwrap().read_exact_at(&mut stored, 2 * BYTES - 512).unwrap();
    assert_eq!(stored, [0x5a; 512]);
    // One operation overdraws the bucket for a second and more; the next waits until the limit is gone.
    machine.thread().set_rate_limits("vol-a", RateLimits { iops: 0, bytes_per_second: 1 }).unwrap();
    assert_eq!(machine.ask(&mut queue, READ, 0).0, OK);
    let (_, status) = machine.request(&mut queue, READ, 0);
    machine.turn();
    assert_eq!(machine.bytes(status, 1), [0xee]);
    machine.thread().set_rate_limits("vol-a", RateLimits::default()).unwrap();
    machine.finish(&mut queue);
    assert_eq!(machine.bytes(status, 1), [OK]);
    assert!(matches!(machine.thread().layered("vol-a"), Err(VirtioError::NotLayered(_))));
    machine.thread().detach_disk("vol-a", true).unwrap();
    machine.wait_for_news(DiskNews::Detached { durable: true });
}

#[test]
fn a_disk_goes_without_its_server() {
    for flushed in [true, false] {
        let mut agent = Agent::new();
        let (mut machine, mut queue) = start(&agent);
        assert_eq!(machine.ask(&mut queue, WRITE, 0).0, OK);
        if flushed {
            assert_eq!(machine.ask(&mut queue, FLUSH, 0).0, OK);
        }
        agent.kill();
        machine.wait_lost();
        let (_, status) = machine.request(&mut queue, READ, 0);
        machine.thread().detach_disk("vol-a", true).unwrap();
        std::thread::sleep(Duration::from_secs(5));
        // What the guest never saw flushed may be lost, and that is told.
        machine.wait_for_news(DiskNews::Detached { durable: flushed });
        machine.finish(&mut queue);
        assert_eq!(machine.bytes(status, 1), [IOERR]);
    }
    // Nor does a whole machine wait.
    let mut agent = Agent::new();
    let (mut machine, mut queue) = start(&agent);
    agent.kill();
    machine.wait_lost();
    machine.request(&mut queue, READ, 0);
    let Io::Thread(io) = machine.io else { panic!() };
    io.stop().unwrap();
}

#[test]
fn only_nbd_disks_take_connections() {
    let agent = Agent::new();
    let (machine, _) = start(&agent);
    let file = File::options().read(true).write(true).open(agent.path("disk")).unwrap();
    let raw = Disk { serial: "vol-b".into(), backing: Backing::Raw(file), read_only: false, queues: 1 };
    machine.thread().attach_disk(raw).unwrap();
    assert!(matches!(machine.thread().connect_volume("vol-b", agent.connect()), Err(VirtioError::NotNbd(_))));
    let limits = RateLimits { iops: 1, bytes_per_second: 1 };
    assert!(matches!(machine.thread().set_rate_limits("vol-b", limits), Err(VirtioError::NoLimits(_))));
    // A peer that is no server.
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let backing = NbdBacking { socket: ours.into(), export: String::new(), limits: RateLimits::default() };
    let disk = Disk { serial: "vol-c".into(), backing: Backing::Nbd(Box::new(backing)), read_only: false, queues: 1 };
    assert!(matches!(machine.thread().attach_disk(disk), Err(VirtioError::Volume { .. })));
}
