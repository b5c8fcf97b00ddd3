//! Layered volumes under a stock kernel: chunks that come when they are asked for, agents that come and go, snapshots.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use hearth_block::map::{self, Extent, MapBase, MapSpec};
use hearth_block::{BaseFiles, CHUNK_BYTES, OfflineVolume, StagedView, VolumeFiles, presence_words, staged_bytes};
use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::vmm::{Vmm, open};
use hearth_vmm::control::client::{Client, ClientError};
use hearth_vmm::control::protocol::{
    BaseSpec, Command, DiskBacking, DiskLimits, DiskSpec, Event, FreezeSpec, LayeredSpec, Outcome, exit,
};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;
const CHUNKS: u64 = VOLUME_BYTES / CHUNK_BYTES;

/// A chunk of the base: lines of its number.
fn content(chunk: u64) -> Vec<u8> {
    format!("chunk {chunk:09}\n").repeat((CHUNK_BYTES / 16) as usize).into_bytes()
}

/// What an agent has of one volume.
struct Disk {
    folder: PathBuf,
    serial: String,
    generation: u64,
    presence: File,
    wake: EventFd,
    base: bool,
}

impl Disk {
    fn new(vmm: &Vmm, name: &str, base: bool) -> Self {
        let folder = vmm.path(name);
        std::fs::create_dir(&folder).unwrap();
        File::create(folder.join("data")).unwrap().set_len(VOLUME_BYTES).unwrap();
        File::create(folder.join("base")).unwrap().set_len(VOLUME_BYTES).unwrap();
        let map = File::create_new(folder.join("map")).unwrap();
        let spec = MapSpec {
            filled: false,
            volume_id: name.into(),
            size_bytes: VOLUME_BYTES,
            base: base.then(|| MapBase { root: [7; 32], extent: Extent::of(0..CHUNKS) }),
            generation: 1,
        };
        map::create(&map, spec).unwrap();
        let flags = MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC;
        let presence = File::from(memfd_create(c"presence", flags).unwrap());
        let half = presence_words(CHUNKS) * 8;
        presence.set_len(2 * half).unwrap();
        presence.write_all_at(&Extent::of(0..CHUNKS).to_bytes(), half).unwrap();
        fcntl(&presence, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        Self { folder, serial: name.into(), generation: 1, presence, wake, base }
    }

    fn files(&self) -> VolumeFiles {
        let base = BaseFiles {
            data: open(self.folder.join("base")).into(),
            presence: self.presence.try_clone().unwrap(),
            key: None,
        };
        let file = |name: &str| File::from(open(self.folder.join(name)));
        VolumeFiles { data: file("data"), map: file("map"), base: self.base.then_some(base), key: None }
    }

    fn attach(&self, client: &mut Client) -> Result<Outcome, ClientError> {
        let fds: [OwnedFd; 5] = [
            open(self.folder.join("data")),
            open(self.folder.join("map")),
            open(self.folder.join("base")),
            self.presence.try_clone().unwrap().into(),
            self.wake.as_fd().try_clone_to_owned().unwrap(),
        ];
        let spec = LayeredSpec {
            data: 0,
            map: 1,
            base: self.base.then_some(BaseSpec { data: 2, presence: 3, key: None }),
            wake: 4,
            key: None,
            generation: self.generation,
            limits: DiskLimits::default(),
            direct: true,
        };
        let backing = DiskBacking::Layered(Box::new(spec));
        let disk = DiskSpec { serial: self.serial.clone(), backing, read_only: false, queues: 2 };
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        client.call(Command::AttachDisk(Box::new(disk)), &borrowed, PATIENCE)
    }

    /// Brings chunks of the base.
    fn bring(&self, chunks: &[u64]) {
        let base = File::options().write(true).open(self.folder.join("base")).unwrap();
        for chunk in chunks {
            base.write_all_at(&content(*chunk), chunk * CHUNK_BYTES).unwrap();
            let mut byte = [0];
            self.presence.read_exact_at(&mut byte, chunk / 8).unwrap();
            self.presence.write_all_at(&[byte[0] | 1 << (chunk % 8)], chunk / 8).unwrap();
        }
        self.wake.write(1).unwrap();
    }
}

/// Serves fetches while `work` runs; the chunks that were asked for.
fn serve<T: Send>(client: &mut Client, disk: &Disk, work: impl FnOnce() -> T + Send) -> (T, Vec<u64>) {
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        let mut served = Vec::new();
        while !worker.is_finished() {
            match client.next_event(Duration::from_millis(20)).unwrap() {
                Some(Event::FetchChunks { serial, chunks }) => {
                    assert_eq!(serial, disk.serial);
                    disk.bring(&chunks);
                    served.extend(chunks);
                }
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        }
        (worker.join().unwrap(), served)
    })
}

fn wait_for_disk(console: &mut Console, name: &str) {
    console.run(&format!("while ! [ -b /dev/{name} ]; do usleep 20000; done"));
}

#[test]
fn a_disk_is_filled_on_demand_by_agents_that_come_and_go_and_left_clean() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    let mut disk = Disk::new(&vmm, "vol00000000000000aaa", true);
    disk.generation = 5;
    // The kernel looks for a partition table at once.
    disk.attach(&mut vmm.client).unwrap();
    let event = vmm.event();
    assert_eq!(event, Event::FetchChunks { serial: disk.serial.clone(), chunks: vec![0] });
    // This agent dies, and the next one is asked again.
    let (client, _) = Client::connect(&vmm.path("control"), PATIENCE).unwrap();
    vmm.client = client;
    assert_eq!(vmm.event(), event);
    // A stopped machine does not wait for chunks.
    assert_eq!(vmm.call(Command::Pause), Outcome::Done);
    assert_eq!(vmm.call(Command::Resume), Outcome::Done);
    disk.bring(&[0]);
    let ((), _) = serve(&mut vmm.client, &disk, || wait_for_disk(&mut console, "vdb"));

    let read = "dd if=/dev/vdb bs=1M skip=8 count=4 2>/dev/null | md5sum | cut -d ' ' -f 1";
    let (sum, mut served) = serve(&mut vmm.client, &disk, || console.run(read));
    served.sort_unstable();
    let wanted: Vec<u64> = (16..24).collect();
    assert!(wanted.iter().all(|chunk| served.contains(chunk)), "{served:?}");
    assert!(served.len() < 40, "the whole disk was fetched: {served:?}");
    let expected: Vec<u8> = (16..24).flat_map(content).collect();
    let md5 = vmm.path("expected");
    std::fs::write(&md5, &expected).unwrap();
    let host = std::process::Command::new("md5sum").arg(&md5).output().unwrap();
    assert_eq!(sum, String::from_utf8_lossy(&host.stdout).split(' ').next().unwrap());

    // Written without a fetch, whole blocks that they are.
    console
        .run("yes written | dd of=/dev/vdb bs=1M seek=40 count=2 iflag=fullblock oflag=direct conv=fsync 2>/dev/null");
    assert_eq!(vmm.client.next_event(Duration::from_millis(10)).unwrap(), None);
    let limits = DiskLimits { iops: 5000, bytes_per_second: 200 * MIB };
    assert_eq!(vmm.call(Command::SetDiskLimits { serial: disk.serial.clone(), limits }), Outcome::Done);
    let bytes = VOLUME_BYTES + 8 * MIB;
    assert_eq!(vmm.call(Command::ResizeDisk { serial: disk.serial.clone(), bytes }), Outcome::Done);
    console.run(&format!("while [ $(cat /sys/block/vdb/size) != {} ]; do usleep 20000; done", bytes / 512));
    console.run("yes grown | dd of=/dev/vdb bs=1M seek=71 count=1 iflag=fullblock oflag=direct conv=fsync 2>/dev/null");

    assert_eq!(vmm.call(Command::DetachDisk { serial: disk.serial.clone(), force: false }), Outcome::Done);
    assert_eq!(vmm.event(), Event::DiskDetached { serial: disk.serial.clone(), durable: true });
    let header = map::read_header(&File::open(disk.folder.join("map")).unwrap()).unwrap();
    assert!(header.clean && header.generation == 5 && header.size_bytes == bytes, "{header:?}");
    let volume = OfflineVolume::open(disk.files(), 5).unwrap();
    let mut chunk = vec![0; CHUNK_BYTES as usize];
    for (number, expected) in [(80, "written\n"), (83, "written\n"), (143, "grown\n"), (17, "chunk 000000017\n")] {
        volume.read_chunk(number, &mut chunk).unwrap();
        let text = String::from_utf8_lossy(&chunk);
        assert!(text.lines().skip(1).take(1000).all(|line| line == expected.trim()), "chunk {number}");
    }
    let dirty: Vec<u64> = volume.dirty_chunks().iter().collect();
    assert_eq!(dirty, [80, 81, 82, 83, 142, 143]);
    drop(volume);

    // An attachment older than one the map has seen.
    disk.generation = 4;
    match disk.attach(&mut vmm.client) {
        Err(ClientError::Refused(text)) => assert!(text.contains("generation"), "{text}"),
        other => panic!("{other:?}"),
    }
    // Force while the guest waits for a chunk that never comes.
    disk.generation = 6;
    disk.attach(&mut vmm.client).unwrap();
    let ((), _) = serve(&mut vmm.client, &disk, || wait_for_disk(&mut console, "vdb"));
    console.send("dd if=/dev/vdb bs=4k skip=13000 count=1 >/dev/null 2>&1; echo reader-\"over\" $?");
    loop {
        match vmm.event() {
            Event::FetchChunks { chunks, .. } if chunks.contains(&(13000 * 4096 / CHUNK_BYTES)) => break,
            Event::FetchChunks { chunks, .. } => disk.bring(&chunks),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(vmm.call(Command::DetachDisk { serial: disk.serial.clone(), force: true }), Outcome::Done);
    loop {
        match vmm.event() {
            Event::FetchChunks { .. } => {}
            other => {
                assert_eq!(other, Event::DiskDetached { serial: disk.serial.clone(), durable: true });
                break;
            }
        }
    }
    console.wait_for("reader-over 1");
    OfflineVolume::open(disk.files(), 6).unwrap();
    console.run("while [ -e /sys/block/vdb ]; do usleep 20000; done");
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}

/// A guest writes a counter to one disk, then to the other, again and again. At any instant the second is at most one behind.
#[test]
fn two_disks_are_frozen_at_one_instant_while_the_guest_writes() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    let disks = ["vol00000000000000001", "vol00000000000000002"].map(|name| Disk::new(&vmm, name, false));
    for (disk, name) in disks.iter().zip(["vdb", "vdc"]) {
        disk.attach(&mut vmm.client).unwrap();
        wait_for_disk(&mut console, name);
    }
    console.send(
        "(n=0; while [ $n -lt 100000 ]; do n=$((n+1)); for d in vdb vdc; do \
         printf '%08d' $n | dd of=/dev/$d bs=4096 seek=$((n%300*128)) conv=sync oflag=direct 2>/dev/null; \
         printf '%08d' $n | dd of=/dev/$d bs=4096 seek=64 conv=sync oflag=direct 2>/dev/null; done; done) &",
    );
    let counter = |file: &File| -> u64 {
        let mut text = [0; 8];
        file.read_exact_at(&mut text, 64 * 4096).unwrap();
        String::from_utf8_lossy(&text).parse().unwrap_or(0)
    };
    let data = disks.each_ref().map(|disk| File::open(disk.folder.join("data")).unwrap());
    let end = std::time::Instant::now() + PATIENCE;
    while counter(&data[1]) < 5 {
        assert!(std::time::Instant::now() < end, "{}", console.seen());
        std::thread::sleep(Duration::from_millis(50));
    }
    for round in 0..4 {
        let make = |disk: &Disk, name: &str| {
            let path = disk.folder.join(format!("{name}-{round}"));
            File::options().read(true).write(true).create_new(true).open(path).unwrap()
        };
        let stages = disks.each_ref().map(|disk| make(disk, "stage"));
        let staged = disks.each_ref().map(|disk| make(disk, "staged"));
        staged.iter().for_each(|file| file.set_len(staged_bytes(VOLUME_BYTES)).unwrap());
        let fds = [stages[0].as_fd(), staged[0].as_fd(), stages[1].as_fd(), staged[1].as_fd()];
        let spec =
            |n: usize| FreezeSpec { serial: disks[n].serial.clone(), stage: 2 * n as u8, staged: 2 * n as u8 + 1 };
        let command = Command::Freeze { disks: vec![spec(0), spec(1)] };
        let Outcome::Frozen { chunks, held_us } = vmm.client.call(command, &fds, PATIENCE).unwrap() else { panic!() };
        assert!(held_us > 0);
        let views = staged.each_ref().map(|file| StagedView::open(file.try_clone().unwrap()).unwrap());
        assert_eq!(chunks, views.each_ref().map(|view| view.frozen().len()));
        assert!(chunks.iter().all(|count| *count > 0), "round {round}: {chunks:?}");
        // The guest goes on, and the stage keeps what was.
        let then = counter(&data[1]);
        let end = std::time::Instant::now() + PATIENCE;
        while counter(&data[1]) < then + 3 {
            assert!(std::time::Instant::now() < end, "the guest does not write during a freeze");
            std::thread::sleep(Duration::from_millis(50));
        }
        for (disk, view) in disks.iter().zip(&views) {
            let chunks: Vec<u64> = view.frozen().iter().collect();
            assert_eq!(vmm.call(Command::StageChunks { serial: disk.serial.clone(), chunks }), Outcome::Done);
            let end = std::time::Instant::now() + PATIENCE;
            while !view.frozen().iter().all(|chunk| view.is_staged(chunk).unwrap()) {
                assert!(std::time::Instant::now() < end, "chunks are not staged");
                std::thread::sleep(Duration::from_millis(20));
            }
            assert!(!view.is_broken().unwrap());
        }
        let [first, second] = stages.each_ref().map(counter);
        assert!(first == second || first == second + 1, "round {round}: {first} and {second} are not of one instant");
        assert!(second <= counter(&data[1]) && first > 0);
        for disk in &disks {
            let restore_dirty = round == 1;
            assert_eq!(vmm.call(Command::Thaw { serial: disk.serial.clone(), restore_dirty }), Outcome::Done);
        }
    }
    let mut told = 0;
    while let Some(event) = vmm.client.next_event(Duration::from_millis(50)).unwrap() {
        match event {
            Event::ChunksStaged { chunks, .. } => told += chunks.len(),
            other => panic!("{other:?}"),
        }
    }
    assert!(told > 0);
    // One of the disks cannot be frozen: neither is.
    let mut short = File::from(memfd_create(c"staged", MFdFlags::MFD_CLOEXEC).unwrap());
    short.seek(SeekFrom::Start(0)).unwrap();
    short.write_all(b"short").unwrap();
    let good = File::from(memfd_create(c"staged", MFdFlags::MFD_CLOEXEC).unwrap());
    good.set_len(staged_bytes(VOLUME_BYTES)).unwrap();
    let stage = || File::from(memfd_create(c"stage", MFdFlags::MFD_CLOEXEC).unwrap());
    let (one, two) = (stage(), stage());
    let fds = [one.as_fd(), good.as_fd(), two.as_fd(), short.as_fd()];
    let spec = |n: usize| FreezeSpec { serial: disks[n].serial.clone(), stage: 2 * n as u8, staged: 2 * n as u8 + 1 };
    let refused = vmm.client.call(Command::Freeze { disks: vec![spec(0), spec(1)] }, &fds, PATIENCE);
    assert!(matches!(refused, Err(ClientError::Refused(_))), "{refused:?}");
    let refused = vmm.client.call(
        Command::Freeze { disks: vec![FreezeSpec { serial: "vol0123456789abcdef0".into(), stage: 0, staged: 1 }] },
        &fds,
        PATIENCE,
    );
    assert!(matches!(refused, Err(ClientError::Refused(_))), "the root disk is a raw file: {refused:?}");
    let then = counter(&data[1]);
    let end = std::time::Instant::now() + PATIENCE;
    while counter(&data[1]) < then + 2 {
        assert!(std::time::Instant::now() < end, "the guest does not write after a refused freeze");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
    for disk in &disks {
        let header = map::read_header(&File::open(disk.folder.join("map")).unwrap()).unwrap();
        assert!(header.clean, "killed, and left clean");
    }
}
