//! RBD images of a real cluster, which `scripts/test-ceph` makes for these tests and takes down afterwards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hearth_block::nbd::{Connector, NbdError, NbdEvents, NbdOptions, NbdVolume, UnixConnector};
use hearth_block::{Completion, IoError, Operation, Request, Volume, VolumeQueue};
use hearth_driver::rbd::{Cluster, Export, Extent, Name, Parent};
use hearth_driver::{Backend, BackendSettings, DriverError, RbdSettings};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const BLOCK: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(120);

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn cluster() -> Cluster {
    let env = |key: &str| std::env::var(key).unwrap_or_else(|_| panic!("{key} is not set: run scripts/test-ceph"));
    Cluster {
        conf: Some(PathBuf::from(env("HEARTH_TEST_CEPH_CONF"))),
        user: None,
        pool: name(&env("HEARTH_TEST_CEPH_POOL")),
        namespace: None,
        patience: PATIENCE,
    }
}

#[derive(Default)]
struct Seen {
    lost: AtomicUsize,
    recovered: AtomicUsize,
}

impl NbdEvents for Seen {
    fn lost(&self, error: &NbdError) {
        eprintln!("lost: {error}");
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn recovered(&self) {
        self.recovered.fetch_add(1, Ordering::Relaxed);
    }
}

/// The VMM's end of an export.
struct Disk {
    volume: NbdVolume,
    queue: Box<dyn VolumeQueue>,
    seen: Arc<Seen>,
}

impl Disk {
    fn open(folder: &Path) -> Self {
        Self::open_with(Box::new(UnixConnector { path: folder.join("nbd.sock") }))
    }

    fn open_with(connector: Box<dyn Connector>) -> Self {
        let seen = Arc::new(Seen::default());
        let options = NbdOptions { export: Export::NAME.into(), ..NbdOptions::default() };
        let volume = NbdVolume::open(connector, seen.clone(), options).unwrap();
        let queue = volume.open_queue(32).unwrap();
        Self { volume, queue, seen }
    }

    fn submit(&mut self, operation: Operation, offset: u64, buffer: &mut [u8]) {
        let buffers = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
        let request = Request { operation, offset, length: buffer.len() as u64, buffers: &buffers, token: offset };
        // SAFETY: the tests' buffers live until `wait` has seen the completion.
        unsafe { self.queue.submit(request).unwrap() };
        self.queue.kick().unwrap();
    }

    /// Waits until at most `left` requests are in flight.
    fn wait(&mut self, left: usize) -> Vec<Completion> {
        let end = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        loop {
            self.queue.drain(&mut |completion| done.push(completion)).unwrap();
            if self.queue.in_flight() <= left {
                return done;
            }
            assert!(Instant::now() < end, "requests hang");
            let timeout = PollTimeout::try_from(Duration::from_secs(1)).unwrap();
            poll(&mut [PollFd::new(self.queue.completion_fd(), PollFlags::POLLIN)], timeout).unwrap();
        }
    }

    /// The answer of the only request in flight, if it comes within some seconds.
    fn answer(&mut self) -> Option<Result<(), IoError>> {
        let end = Instant::now() + Duration::from_secs(5);
        let mut answer = None;
        while Instant::now() < end && answer.is_none() {
            self.queue.drain(&mut |completion| answer = Some(completion.result)).unwrap();
            std::thread::sleep(Duration::from_millis(50));
        }
        answer
    }

    fn one(&mut self, operation: Operation, offset: u64, buffer: &mut [u8]) {
        self.submit(operation, offset, buffer);
        self.wait(0).pop().unwrap().result.unwrap();
    }

    fn write(&mut self, block: u64, byte: u8) {
        self.one(Operation::Write, block * BLOCK as u64, &mut vec![byte; BLOCK]);
    }

    fn flush(&mut self) {
        self.one(Operation::Flush, 0, &mut []);
    }

    fn holds(&mut self, block: u64, byte: u8) {
        let mut found = vec![0; BLOCK];
        self.one(Operation::Read, block * BLOCK as u64, &mut found);
        assert!(found.iter().all(|there| *there == byte), "block {block} holds {} and not {byte}", found[0]);
    }
}

#[test]
#[ignore = "needs a Ceph cluster: scripts/test-ceph"]
fn images_are_made_grown_snapshotted_cloned_and_deleted() {
    let cluster = cluster();
    let (image, child) = (name("vol-life"), name("vol-life-child"));
    cluster.create(&image, SIZE).unwrap();
    assert!(matches!(cluster.create(&image, SIZE), Err(DriverError::Exists { .. })));
    assert!(matches!(cluster.info(&child), Err(DriverError::NotFound { .. })));
    cluster.grow(&image, SIZE + MIB).unwrap();
    assert!(matches!(cluster.grow(&image, SIZE), Err(DriverError::Shrink { .. })));
    let info = cluster.info(&image).unwrap();
    assert_eq!((info.size_bytes, info.parent), (SIZE + MIB, None));
    assert!(info.features.iter().any(|feature| feature == "exclusive-lock"), "{:?}", info.features);
    assert!(cluster.list().unwrap().contains(&image.to_string()));

    let (first, second) = (name("snap-1"), name("snap-2"));
    cluster.snapshot(&image, &first).unwrap();
    assert!(matches!(cluster.snapshot(&image, &first), Err(DriverError::Exists { .. })));
    let folder = TempDir::new().unwrap();
    let export = Export::start(&cluster, &image, 1, false, folder.path()).unwrap();
    let mut disk = Disk::open(folder.path());
    disk.write(3, 7);
    disk.flush();
    cluster.snapshot(&image, &second).unwrap();
    // Served, it cannot be deleted.
    assert!(matches!(cluster.remove(&image), Err(DriverError::InUse { .. })));
    drop(disk);
    export.stop().unwrap();
    let names: Vec<String> = cluster.snapshots(&image).unwrap().into_iter().map(|snapshot| snapshot.name).collect();
    assert_eq!(names, ["snap-1", "snap-2"]);
    let covers = |extents: &[Extent]| {
        let at = 3 * BLOCK as u64;
        extents.iter().any(|extent| extent.exists && extent.offset <= at && at < extent.offset + extent.length)
    };
    assert_eq!(cluster.changed(&image, None, &first).unwrap(), []);
    assert!(covers(&cluster.changed(&image, Some(&first), &second).unwrap()));

    cluster.clone_snapshot(&image, &second, &child).unwrap();
    assert!(matches!(cluster.clone_snapshot(&image, &second, &child), Err(DriverError::Exists { .. })));
    let parent = Parent { image: image.to_string(), snapshot: second.to_string() };
    assert_eq!(cluster.info(&child).unwrap().parent, Some(parent));
    assert!(matches!(cluster.remove(&image), Err(DriverError::InUse { .. })));
    cluster.flatten(&child).unwrap();
    assert_eq!(cluster.info(&child).unwrap().parent, None);
    for snapshot in [&first, &second] {
        cluster.remove_snapshot(&image, snapshot).unwrap();
    }
    for image in [&image, &child] {
        cluster.remove(image).unwrap();
        assert!(matches!(cluster.remove(image), Err(DriverError::NotFound { .. })));
    }
}

#[test]
#[ignore = "needs a Ceph cluster: scripts/test-ceph"]
fn a_clone_has_what_was_flushed_before_the_snapshot_and_nothing_later() {
    let cluster = cluster();
    let (image, child, snapshot) = (name("vol-source"), name("vol-clone"), name("snap"));
    cluster.create(&image, SIZE).unwrap();
    let (folder, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let export = Export::start(&cluster, &image, 1, false, folder.path()).unwrap();
    let mut disk = Disk::open(folder.path());
    disk.write(1, 1);
    disk.write(900, 2);
    disk.flush();
    cluster.snapshot(&image, &snapshot).unwrap();
    disk.write(1, 3);
    disk.write(2, 4);
    disk.flush();
    cluster.clone_snapshot(&image, &snapshot, &child).unwrap();
    let clone = Export::start(&cluster, &child, 1, false, other.path()).unwrap();
    let mut cloned = Disk::open(other.path());
    cloned.holds(1, 1);
    cloned.holds(2, 0);
    cloned.holds(900, 2);
    cloned.write(2, 5);
    cloned.flush();
    disk.holds(1, 3);
    disk.holds(2, 4);
    // The snapshot goes, and the clone keeps what it has of it.
    cluster.remove_snapshot(&image, &snapshot).unwrap();
    cloned.holds(1, 1);
    drop((disk, cloned));
    clone.stop().unwrap();
    export.stop().unwrap();
    // Read-only, and of a daemon of its own.
    let export = Export::start(&cluster, &child, 2, true, other.path()).unwrap();
    let mut disk = Disk::open(other.path());
    assert!(disk.volume.read_only());
    disk.holds(2, 5);
    drop(disk);
    export.stop().unwrap();
    cluster.remove(&child).unwrap();
    cluster.remove(&image).unwrap();
}

#[test]
#[ignore = "needs a Ceph cluster: scripts/test-ceph"]
fn nothing_is_lost_when_the_storage_daemon_is_killed_in_the_middle_and_the_image_grows() {
    let cluster = cluster();
    let image = name("vol-killed");
    cluster.create(&image, SIZE).unwrap();
    let folder = TempDir::new().unwrap();
    let mut export = Export::start(&cluster, &image, 1, false, folder.path()).unwrap();
    let mut disk = Disk::open(folder.path());
    let mut model = [0u8; 64];
    let mut buffers: Vec<Vec<u8>> = vec![vec![0; BLOCK]; 64];
    for round in 0..4u8 {
        for turn in 0..160usize {
            // Each block is written by one request at a time: 16 in flight, of 64 blocks in turn.
            let block = (turn * 5) % 64;
            let byte = round * 50 + (turn % 49) as u8 + 1;
            disk.wait(15).into_iter().for_each(|completion| completion.result.unwrap());
            buffers[block].fill(byte);
            model[block] = byte;
            let mut buffer = std::mem::take(&mut buffers[block]);
            disk.submit(Operation::Write, (block * BLOCK) as u64, &mut buffer);
            buffers[block] = buffer;
            if turn == 80 {
                // This agent dies, and the storage daemon too.
                let pid = export.owner().unwrap().unwrap();
                drop(export);
                let adopted = Export::adopt(folder.path()).unwrap().expect("the daemon outlives who started it");
                assert_eq!(adopted.owner().unwrap(), Some(pid));
                kill(pid, Signal::SIGKILL).unwrap();
                while adopted.is_running().unwrap() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                assert!(Export::adopt(folder.path()).unwrap().is_none());
                export = Export::start(&cluster, &image, 1, false, folder.path()).unwrap();
            }
        }
        disk.wait(0).into_iter().for_each(|completion| completion.result.unwrap());
    }
    assert!(disk.seen.lost.load(Ordering::Relaxed) >= 4 && disk.seen.recovered.load(Ordering::Relaxed) >= 4);
    disk.flush();
    for (block, byte) in model.iter().enumerate() {
        disk.holds(block as u64, *byte);
    }
    // Larger: shown by a daemon that is started anew.
    cluster.grow(&image, 2 * SIZE).unwrap();
    assert!(disk.volume.grow(2 * SIZE).is_err(), "the daemon has the old size");
    export = Export::start(&cluster, &image, 1, false, folder.path()).unwrap();
    disk.volume.grow(2 * SIZE).unwrap();
    disk.write(2 * SIZE / BLOCK as u64 - 1, 9);
    disk.flush();
    disk.holds(0, model[0]);
    disk.holds(2 * SIZE / BLOCK as u64 - 1, 9);
    drop(disk);
    export.stop().unwrap();
    cluster.remove(&image).unwrap();
}

#[test]
#[ignore = "needs a Ceph cluster: scripts/test-ceph"]
fn a_host_that_was_fenced_changes_nothing_any_more() {
    let cluster = cluster();
    for asleep in [true, false] {
        let image = name(if asleep { "vol-fenced-asleep" } else { "vol-fenced-awake" });
        cluster.create(&image, SIZE).unwrap();
        let (old_folder, new_folder) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let old = Export::start(&cluster, &image, 1, false, old_folder.path()).unwrap();
        let mut given_up = Disk::open(old_folder.path());
        given_up.write(0, 1);
        given_up.flush();
        let pid = old.owner().unwrap().unwrap();
        let mut late = vec![2; BLOCK];
        if asleep {
            kill(pid, Signal::SIGSTOP).unwrap();
            // On its way when the host fell asleep.
            given_up.submit(Operation::Write, 0, &mut late);
        }
        let new = Export::start(&cluster, &image, 2, false, new_folder.path()).unwrap();
        assert_eq!(cluster.claimed(&image).unwrap(), Some(2));
        let mut disk = Disk::open(new_folder.path());
        disk.holds(0, 1);
        disk.write(0, 3);
        disk.flush();
        if asleep {
            kill(pid, Signal::SIGCONT).unwrap();
        } else {
            // This host never heard that it was given up. It would be handed the lock if it were not shut out.
            given_up.submit(Operation::Write, 0, &mut late);
        }
        // The storage daemon's cache may still take it, but it never becomes durable. Perhaps nothing is ever answered.
        if matches!(given_up.answer(), Some(Ok(()))) {
            given_up.submit(Operation::Flush, 0, &mut []);
            let flushed = given_up.answer();
            assert!(!matches!(flushed, Some(Ok(()))), "asleep {asleep}: a fenced client made a write durable");
        }
        disk.holds(0, 3);
        disk.write(1, 4);
        disk.flush();
        // Nor does it come in again.
        match Export::start(&cluster, &image, 1, false, old_folder.path()) {
            Err(DriverError::Fenced { ours: 1, theirs: 2, .. }) => {}
            other => panic!("{other:?}"),
        }
        disk.holds(0, 3);
        drop((given_up, old, disk));
        new.stop().unwrap();
        // As the next who opens it sees it.
        let new = Export::start(&cluster, &image, 3, true, new_folder.path()).unwrap();
        let mut disk = Disk::open(new_folder.path());
        disk.holds(0, 3);
        disk.holds(1, 4);
        drop(disk);
        new.stop().unwrap();
        cluster.remove(&image).unwrap();
    }
}

#[test]
#[ignore = "needs a Ceph cluster: scripts/test-ceph"]
fn what_cannot_be_served_says_why() {
    let cluster = cluster();
    let (image, folder) = (name("vol-nowhere"), TempDir::new().unwrap());
    let missing = Export::start(&cluster, &image, 1, false, folder.path());
    assert!(matches!(missing, Err(DriverError::NotFound { .. })), "{missing:?}");
    assert_eq!(cluster.claimed(&image).unwrap(), None);
    // Longer than the path of a Unix socket can be.
    cluster.create(&image, SIZE).unwrap();
    match Export::start(&cluster, &image, 1, false, &folder.path().join("x".repeat(120))) {
        Err(DriverError::Export { why, .. }) => assert!(why.contains("socket"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert!(Export::adopt(folder.path()).unwrap().is_none());
    // It ended without closing the image, which the cluster would believe for half a minute to be in use.
    cluster.fence(&image).unwrap();
    cluster.remove(&image).unwrap();
    assert_eq!(cluster.claimed(&image).unwrap(), None);
}

/// What a VMM's client gets from its agent.
#[derive(Debug)]
struct Reconnect {
    backend: Arc<Backend>,
    image: Name,
    bytes: u64,
    generation: u64,
    folder: PathBuf,
}

impl Connector for Reconnect {
    fn connect(&self) -> std::io::Result<OwnedFd> {
        let made = self.backend.reconnect(&self.image, self.bytes, self.generation, &self.folder);
        let socket = made.map_err(std::io::Error::other)?;
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(socket)
    }
}

#[test]
#[ignore = "needs a Ceph cluster: scripts/test-ceph"]
fn a_backend_makes_serves_moves_and_deletes_volumes() {
    let pool = cluster();
    let settings = BackendSettings::Rbd(RbdSettings {
        name: "ceph".into(),
        pool: pool.pool.to_string(),
        namespace: None,
        conf: pool.conf.clone(),
        user: None,
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let backend = Arc::new(Backend::new(&settings, runtime.handle().clone()).unwrap());
    let image = name("vol-of-backend");
    let run = TempDir::new().unwrap();
    let (here, there) = (run.path().join("here"), run.path().join("there"));
    // Attaching makes nothing.
    assert!(matches!(backend.open(&image, SIZE, 1, &here), Err(DriverError::NotFound { .. })));
    for _ in 0..2 {
        backend.create(&image, SIZE).unwrap();
    }
    let connector = |bytes, generation, folder: &Path| {
        let (backend, image, folder) = (backend.clone(), image.clone(), folder.to_owned());
        Box::new(Reconnect { backend, image, bytes, generation, folder })
    };
    let mut disk = Disk::open_with(connector(SIZE, 1, &here));
    disk.write(3, 7);
    disk.flush();
    let pid = Export::adopt(&here).unwrap().unwrap().owner().unwrap().unwrap();
    // The same one serves further connections: it is too young to have hung.
    drop(backend.reconnect(&image, SIZE, 1, &here).unwrap());
    assert_eq!(Export::adopt(&here).unwrap().unwrap().owner().unwrap(), Some(pid));

    // It dies: another one takes its place, with the same attachment.
    kill(pid, Signal::SIGKILL).unwrap();
    disk.write(4, 8);
    disk.flush();
    disk.holds(3, 7);
    assert!(disk.seen.lost.load(Ordering::Relaxed) > 0);

    // It grows; and it moves, after which the first host has no way back.
    drop(backend.open(&image, 2 * SIZE, 1, &here).unwrap());
    disk.volume.grow(2 * SIZE).unwrap();
    disk.write(2 * SIZE / BLOCK as u64 - 1, 9);
    disk.flush();
    let mut moved = Disk::open_with(connector(2 * SIZE, 2, &there));
    for (block, byte) in [(3, 7), (4, 8), (2 * SIZE / BLOCK as u64 - 1, 9)] {
        moved.holds(block, byte);
    }
    let late = backend.open(&image, 2 * SIZE, 1, &here).unwrap_err();
    assert!(matches!(late, DriverError::Fenced { ours: 1, theirs: 2, .. }), "{late}");
    drop(moved);
    hearth_driver::close(&there, 1).unwrap();
    assert!(Export::adopt(&there).unwrap().is_some(), "a later attachment uses it");
    hearth_driver::close(&there, 2).unwrap();
    assert!(Export::adopt(&there).unwrap().is_none() && !there.exists());
    for _ in 0..2 {
        backend.delete(&image, &there).unwrap();
    }
    assert!(!pool.list().unwrap().contains(&image.to_string()));
    hearth_driver::close(&here, 1).unwrap();
}
