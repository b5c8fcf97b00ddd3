//! Layered disks: what they ask of the agent, and what becomes of requests that wait when the disk has to go.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hearth_block::map::{self, Extent, MapBase, MapSpec};
use hearth_block::{BaseFiles, CHUNK_BYTES, FreezeState, RateLimits, Stage, VolumeFiles, XtsKey, staged_bytes};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::block_test::header;
use super::driver::*;
use super::machine::*;
use crate::events::MachineEvent;
use crate::virtio::{Backing, Disk, DiskCondition, DiskNews, DiskNotice, LayeredBacking};

const CHUNKS: u64 = 4;
const BYTES: u64 = CHUNKS * CHUNK_BYTES;
const OK: u8 = 0;
const IOERR: u8 = 1;

/// The agent's side of one volume whose chunks are all in the base.
struct Agent {
    folder: tempfile::TempDir,
    presence: File,
    wake: Arc<EventFd>,
}

fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

impl Agent {
    fn new() -> Self {
        let presence = memfd(16);
        presence.write_all_at(&Extent::of(0..CHUNKS).to_bytes(), 8).unwrap();
        fcntl(&presence, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let agent = Self { folder: tempfile::tempdir().unwrap(), presence, wake };
        agent.file("data").set_len(BYTES).unwrap();
        agent.file("base").set_len(BYTES).unwrap();
        let spec = MapSpec {
            filled: false,
            volume_id: "vol-a".into(),
            size_bytes: BYTES,
            base: Some(MapBase { root: [1; 32], extent: Extent::of(0..CHUNKS) }),
            generation: 1,
        };
        map::create(&agent.file("map"), spec).unwrap();
        agent
    }

    fn file(&self, name: &str) -> File {
        let path = self.folder.path().join(name);
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    fn disk(&self, key: Option<XtsKey>) -> Disk {
        let base = BaseFiles { data: self.file("base"), presence: self.presence.try_clone().unwrap(), key: None };
        let backing = LayeredBacking {
            files: VolumeFiles { data: self.file("data"), map: self.file("map"), base: Some(base), key },
            wake: self.wake.as_fd().try_clone_to_owned().unwrap(),
            generation: 1,
            limits: RateLimits::default(),
            direct: false,
        };
        Disk { serial: "vol-a".into(), backing: Backing::Layered(Box::new(backing)), read_only: false, queues: 1 }
    }

    fn bring(&self, chunk: u64) {
        self.file("base").write_all_at(&vec![0xb0 + chunk as u8; CHUNK_BYTES as usize], chunk * CHUNK_BYTES).unwrap();
        let mut byte = [0];
        self.presence.read_exact_at(&mut byte, 0).unwrap();
        self.presence.write_all_at(&[byte[0] | 1 << chunk], 0).unwrap();
        self.wake.write(1).unwrap();
    }

    fn clean(&self) -> bool {
        map::read_header(&self.file("map")).unwrap().clean
    }
}

impl Machine {
    /// Waits for news of the disk.
    pub(super) fn wait_news(&mut self) -> Vec<DiskNews> {
        let mut news = Vec::new();
        self.turn_until(|machine| {
            for event in machine.events.take() {
                let MachineEvent::Disk(event) = event else { panic!("{event:?}") };
                if let Some(DiskNotice { serial, news: told }) = machine.thread().note(event) {
                    assert_eq!(serial, "vol-a");
                    news.push(told);
                }
            }
            !news.is_empty()
        });
        news
    }

    pub(super) fn request(&mut self, queue: &mut DriverQueue, kind: u32, offset: u64) -> (u64, u64) {
        let (head, data, status) = (self.allocate(16), self.allocate(512), self.allocate(1));
        self.fill(head, &header(kind, offset / 512));
        self.fill(data, &[0x5a; 512]);
        self.fill(status, &[0xee]);
        let (readable, writable) = match kind {
            0 => (vec![(head, 16)], vec![(data, 512), (status, 1)]),
            4 => (vec![(head, 16)], vec![(status, 1)]),
            _ => (vec![(head, 16), (data, 512)], vec![(status, 1)]),
        };
        queue.add(self, &readable, &writable);
        queue.kick(self);
        (data, status)
    }

    pub(super) fn finish(&mut self, queue: &mut DriverQueue) {
        self.turn_until(|machine| queue.take_used(machine).is_some());
    }
}

fn start(agent: &Agent) -> (Machine, DriverQueue) {
    let mut machine = Machine::threaded(|_| {});
    machine.thread().attach_disk(agent.disk(None)).unwrap();
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    (machine, queues.remove(0))
}

#[test]
fn a_read_waits_for_its_chunk_and_a_new_agent_learns_of_it() {
    let agent = Agent::new();
    let (mut machine, mut queue) = start(&agent);
    let (data, status) = machine.request(&mut queue, 0, 2 * CHUNK_BYTES + 4096);
    assert_eq!(machine.wait_news(), [DiskNews::Fetch(2)]);
    let waiting = DiskCondition { serial: "vol-a".into(), chunks: vec![2], connect: false, impaired: None };
    assert_eq!(machine.thread().conditions(), [waiting]);
    machine.thread().pause().unwrap();
    machine.thread().resume().unwrap();
    assert_eq!(machine.bytes(status, 1), [0xee]);
    agent.bring(2);
    machine.finish(&mut queue);
    assert_eq!((machine.bytes(status, 1)[0], machine.bytes(data, 512)), (OK, vec![0xb2; 512]));
    assert!(machine.thread().conditions()[0].chunks.is_empty());
    // A part of a block needs the rest of it.
    let (_, status) = machine.request(&mut queue, 1, CHUNK_BYTES);
    assert_eq!(machine.wait_news(), [DiskNews::Fetch(1)]);
    agent.bring(1);
    machine.finish(&mut queue);
    assert_eq!(machine.bytes(status, 1), [OK]);
    let Io::Thread(io) = machine.io else { panic!() };
    io.stop().unwrap();
    assert!(agent.clean());
    let mut block = vec![0; 1024];
    agent.file("data").read_exact_at(&mut block, CHUNK_BYTES).unwrap();
    assert_eq!(block, [[0x5a; 512], [0xb1; 512]].concat());
}

#[test]
fn requests_that_wait_for_ever_do_not_hold_a_disk_back() {
    for force in [true, false] {
        let agent = Agent::new();
        let (mut machine, mut queue) = start(&agent);
        let (_, status) = machine.request(&mut queue, 0, 0);
        assert_eq!(machine.wait_news(), [DiskNews::Fetch(0)]);
        machine.thread().detach_disk("vol-a", force).unwrap();
        if !force {
            machine.hotplug.write(crate::acpi::hotplug::EJECT, &2u32.to_le_bytes());
        }
        assert_eq!(machine.wait_news(), [DiskNews::Detached { durable: true }]);
        assert!(agent.clean());
        if force {
            machine.finish(&mut queue);
            assert_eq!(machine.bytes(status, 1), [IOERR]);
            machine.request(&mut queue, 4, 0);
            machine.finish(&mut queue);
        } else {
            assert_eq!(machine.bytes(status, 1), [0xee]);
        }
    }
    // Nor a whole machine.
    let agent = Agent::new();
    let (mut machine, mut queue) = start(&agent);
    machine.request(&mut queue, 0, 0);
    machine.wait_news();
    let Io::Thread(io) = machine.io else { panic!() };
    io.stop().unwrap();
    assert!(agent.clean());
}

#[test]
fn a_disk_without_a_driver_freezes_and_stages() {
    let agent = Agent::new();
    let mut machine = Machine::threaded(|_| {});
    machine.thread().attach_disk(agent.disk(None)).unwrap();
    let volume = machine.thread().layered("vol-a").unwrap();
    volume.freeze_prepare().unwrap();
    machine.turn_until(|_| volume.freeze_state() != FreezeState::Preparing);
    assert_eq!(volume.freeze_state(), FreezeState::Ready);
    let stage = Stage { file: memfd(0), staged: memfd(staged_bytes(BYTES)) };
    assert!(volume.freeze(stage).unwrap().is_empty());
    volume.thaw(false);
    // With one written chunk.
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    agent.bring(3);
    let (_, status) = machine.request(&mut queues[0], 1, 3 * CHUNK_BYTES);
    machine.finish(&mut queues[0]);
    assert_eq!(machine.bytes(status, 1), [OK]);
    volume.freeze_prepare().unwrap();
    machine.turn_until(|_| volume.freeze_state() != FreezeState::Preparing);
    let stage = memfd(0);
    let copy = stage.try_clone().unwrap();
    let set = volume.freeze(Stage { file: stage, staged: memfd(staged_bytes(BYTES)) }).unwrap();
    assert_eq!(set.iter().collect::<Vec<_>>(), [3]);
    volume.stage_chunk(3).unwrap();
    assert_eq!(machine.wait_news(), [DiskNews::Staged(3)]);
    let mut chunk = vec![0; CHUNK_BYTES as usize];
    copy.read_exact_at(&mut chunk, 3 * CHUNK_BYTES).unwrap();
    assert!(chunk[..512].iter().all(|byte| *byte == 0x5a) && chunk[512..].iter().all(|byte| *byte == 0xb3));
    machine.thread().detach_disk("vol-a", true).unwrap();
    drop(volume);
    assert_eq!(machine.wait_news(), [DiskNews::Detached { durable: true }]);
}

#[test]
fn an_encrypted_disk_keeps_no_plain_text() {
    let agent = Agent::new();
    let mut machine = Machine::threaded(|_| {});
    let mut key = [7; 64];
    key[40] = 8;
    machine.thread().attach_disk(agent.disk(XtsKey::new(key))).unwrap();
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    agent.bring(0);
    let (_, status) = machine.request(&mut queues[0], 1, 0);
    machine.finish(&mut queues[0]);
    assert_eq!(machine.bytes(status, 1), [OK]);
    let (data, _) = machine.request(&mut queues[0], 0, 0);
    machine.finish(&mut queues[0]);
    assert_eq!(machine.bytes(data, 512), [0x5a; 512]);
    let Io::Thread(io) = machine.io else { panic!() };
    io.stop().unwrap();
    let mut stored = vec![0; 4096];
    agent.file("data").read_exact_at(&mut stored, 0).unwrap();
    assert!(stored.iter().any(|byte| *byte != 0));
    assert!(!stored.windows(16).any(|bytes| bytes == [0x5a; 16] || bytes == [0xb0; 16]));
}
