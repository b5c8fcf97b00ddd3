//! Models of what queues on several threads do to one another, under schedules that shuttle chooses: a lost wake-up is a
//! deadlock that it reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;

use super::disk::SimDisk;
use super::world::{Agent, BASE, CHUNK_SECTORS, CHUNKS, SIZE, base_value, fill, open, value_of};
use crate::layered::buffer::{gather, scatter};
use crate::layered::clock::Clock;
use crate::layered::core::Core;
use crate::layered::freeze::{FrozenSet, encode_staged, staged_at};
use crate::layered::op::FileId;
use crate::layered::shared::{Alignment, Mail, Shared, Signal};
use crate::layered::sync::MODELLED;
use crate::layered::{mark_in_use, open_map};
use crate::map::{self, CHUNK_BYTES, Extent, MapBase, MapSpec, Storage};
use crate::task::Call;
use crate::{Operation, Request};

const SCHEDULES: usize = 1500;

#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Signal for Bell {
    fn signal(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl Bell {
    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.changed.wait(rung).unwrap();
        }
        *rung = false;
    }
}

#[derive(Clone)]
struct Volume {
    disk: Arc<SimDisk>,
    agent: Arc<Agent>,
    shared: Arc<Shared>,
}

impl Volume {
    fn new() -> Self {
        MODELLED.set(true);
        let (disk, agent) = (Arc::new(SimDisk::default()), Arc::new(Agent::default()));
        disk.storage(FileId::Data).set_length(SIZE).unwrap();
        let spec = MapSpec {
            filled: false,
            volume_id: "vol-0123456789abcdef0".into(),
            size_bytes: SIZE,
            base: Some(MapBase { root: [7; 32], extent: Extent::of(BASE) }),
            generation: 1,
        };
        map::create(&disk.storage(FileId::Map), spec).unwrap();
        let (mut header, shared) = open(&disk, &agent, Alignment { memory: 1, offset: 1 }, false, 1).unwrap();
        mark_in_use(&disk.storage(FileId::Map), &mut header).unwrap();
        MODELLED.set(false);
        // What an earlier process left is none of the models' business.
        shared.coord().flush.unsynced = false;
        Self { disk, agent, shared }
    }

    /// Writes to these chunks and freezes them.
    fn freeze(&self, queue: &mut Queue, chunks: &[u64]) {
        chunks.iter().for_each(|chunk| queue.write(chunk * CHUNK_SECTORS, 5));
        let mut coord = self.shared.coord();
        let set = FrozenSet::of(CHUNKS, &coord.bits.dirty_chunks());
        self.disk.write(FileId::Staged, 0, &encode_staged(SIZE, &set), true);
        coord.begin_freeze(set);
    }

    /// The agent asks for a chunk.
    fn demand(&self, chunk: u64) {
        let mut coord = self.shared.coord();
        let queue = coord.any_queue().unwrap();
        coord.post(queue, Mail::Stage { chunk }, None);
    }

    fn bring(&self, chunk: u64) {
        self.agent.present.lock().unwrap().insert(chunk);
        self.shared.presence_changed();
    }

    fn queue(&self) -> Queue {
        let bell = Arc::new(Bell::default());
        let signal = Arc::clone(&bell) as Arc<dyn Signal>;
        // Time stands still: nothing is found by looking again after a while.
        let clock = Clock::Manual(Arc::new(AtomicU64::new(1)));
        Queue { core: Core::new(Arc::clone(&self.shared), 8, Some(signal), clock), bell, volume: self.clone() }
    }
}

struct Queue {
    core: Core,
    bell: Arc<Bell>,
    volume: Volume,
}

impl Queue {
    /// One request from start to end, with the volume's own work meanwhile.
    fn run(&mut self, operation: Operation, first: u64, bytes: &mut [u8]) {
        let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        let buffers = if bytes.is_empty() { &[] } else { &buffers[..] };
        let request = Request { operation, offset: first * 512, length: bytes.len() as u64, buffers, token: 1 };
        // SAFETY: the buffer outlives this call.
        unsafe { self.core.submit(&request).unwrap() };
        self.work_until(Core::has_done);
        self.core.pop_done().unwrap().result.unwrap();
    }

    fn work_until(&mut self, done: impl Fn(&mut Core) -> bool) {
        loop {
            while let Some(index) = self.core.next_call() {
                let (file, call) = self.core.call(index).unwrap();
                let result = self.volume.make(file, call);
                thread::yield_now();
                self.core.finish(index, Ok(result));
            }
            if done(&mut self.core) {
                return;
            }
            self.bell.wait();
            self.core.turn();
        }
    }

    /// A write that is not waited for.
    fn begin_write(&mut self, first: u64, bytes: &mut [u8]) {
        let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        let request =
            Request { operation: Operation::Write, offset: first * 512, length: 0, buffers: &buffers, token: 1 };
        // SAFETY: the callers' buffers outlive their queues' work.
        unsafe { self.core.submit(&request).unwrap() };
    }

    /// Makes the oldest call, if there is one.
    fn step(&mut self) -> bool {
        let Some(index) = self.core.next_call() else { return false };
        let (file, call) = self.core.call(index).unwrap();
        let result = self.volume.make(file, call);
        self.core.finish(index, Ok(result));
        true
    }

    fn write(&mut self, first: u64, value: u64) {
        let mut bytes = [0; 512];
        fill(value, first, &mut bytes);
        self.run(Operation::Write, first, &mut bytes);
    }

    fn read(&mut self, first: u64) -> u64 {
        let mut bytes = [0; 512];
        self.run(Operation::Read, first, &mut bytes);
        value_of(first, &bytes)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.core.begin_close();
            self.core.close();
        }
    }
}

impl Volume {
    /// Makes a call, and checks what must hold of it whatever the schedule.
    fn make(&self, file: FileId, call: Call<'_>) -> u64 {
        let total = |iovecs: &[libc::iovec]| iovecs.iter().map(|iovec| iovec.iov_len).sum::<usize>();
        match call {
            Call::Readv { iovecs, offset } => {
                let mut bytes = vec![0; total(iovecs)];
                if file == FileId::Base {
                    for (sector, bytes) in (offset / 512..).zip(bytes.chunks_exact_mut(512)) {
                        assert!(self.agent.present.lock().unwrap().contains(&(sector / CHUNK_SECTORS)));
                        fill(base_value(sector), sector, bytes);
                    }
                } else {
                    self.disk.read(file, offset, &mut bytes);
                }
                // SAFETY: the request's buffers are alive.
                unsafe { scatter(&bytes, iovecs) };
                bytes.len() as u64
            }
            Call::Writev { iovecs, offset } => {
                let mut bytes = vec![0; total(iovecs)];
                // SAFETY: as above.
                unsafe { gather(iovecs, &mut bytes) };
                if file == FileId::Data {
                    self.check_staged(offset / CHUNK_BYTES);
                }
                self.disk.write(file, offset, &bytes, true);
                bytes.len() as u64
            }
            Call::Fdatasync => {
                let covered = self.disk.sync_begins(file);
                thread::yield_now();
                self.disk.sync_ends(file, &covered);
                0
            }
            Call::Fallocate { offset, length, .. } => {
                let id = self.disk.zero(file, offset, length);
                self.disk.complete(file, id);
                0
            }
        }
    }

    /// No chunk of a frozen set changes before its mark.
    fn check_staged(&self, chunk: u64) {
        let coord = self.shared.coord();
        if coord.freeze.frozen.contains(chunk) {
            let mut mark = [0];
            self.disk.read(FileId::Staged, staged_at(CHUNKS, chunk), &mut mark);
            assert_eq!(mark, [1], "chunk {chunk} changes before it is in the stage");
        }
    }
}

fn check(model: impl Fn() + Send + Sync + 'static) {
    shuttle::check_random(model, SCHEDULES);
}

/// A model with one thread has one schedule.
fn check_once(model: impl Fn() + Send + Sync + 'static) {
    shuttle::check_random(model, 1);
}

/// Parts of one block that is not LOCAL, a whole block beside it, and readers: each write stays, and the rest is the base's.
#[test]
fn writers_of_one_block_do_not_lose_each_others_sectors() {
    check(|| {
        let volume = Volume::new();
        volume.bring(0);
        let threads: Vec<_> = (0..2u64)
            .map(|number| {
                let volume = volume.clone();
                thread::spawn(move || {
                    let mut queue = volume.queue();
                    queue.write(8 + number, 100 + number);
                    assert_eq!(queue.read(8 + number), 100 + number);
                    queue.write(10 + number, 200 + number);
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let mut queue = volume.queue();
        let found: Vec<u64> = (8..13).map(|sector| queue.read(sector)).collect();
        assert_eq!(found, [100, 101, 200, 201, base_value(12)]);
    });
}

/// Requests on two threads wait for a chunk that a third one brings: all are woken, whoever asked first.
#[test]
fn parked_requests_are_woken_wherever_they_wait() {
    check(|| {
        let volume = Volume::new();
        let threads: Vec<_> = (0..2u64)
            .map(|number| {
                let volume = volume.clone();
                thread::spawn(move || {
                    let mut queue = volume.queue();
                    if number == 0 {
                        queue.write(9, 5);
                    }
                    assert_eq!(queue.read(24 + number), base_value(24 + number));
                })
            })
            .collect();
        let agent = volume.clone();
        let agent = thread::spawn(move || agent.bring(0));
        threads.into_iter().chain([agent]).for_each(|thread| thread.join().unwrap());
        assert!(volume.shared.coord().fetches.is_empty());
    });
}

/// Two threads write to a frozen chunk while the agent asks for it: it is copied as it was before any of it changes, and all go on.
#[test]
fn a_frozen_chunk_is_handed_over_before_it_changes() {
    check(|| {
        let volume = Volume::new();
        let mut keeper = volume.queue();
        keeper.write(2 * CHUNK_SECTORS, 77);
        {
            let mut coord = volume.shared.coord();
            let set = FrozenSet::of(CHUNKS, &coord.bits.dirty_chunks());
            volume.disk.write(FileId::Staged, 0, &encode_staged(SIZE, &set), true);
            coord.begin_freeze(set);
        }
        let threads: Vec<_> = (0..2u64)
            .map(|number| {
                let volume = volume.clone();
                thread::spawn(move || {
                    let mut queue = volume.queue();
                    let sector = 2 * CHUNK_SECTORS + number * 8;
                    queue.write(sector, 300 + number);
                    assert_eq!(queue.read(sector), 300 + number);
                })
            })
            .collect();
        let asking = volume.clone();
        let agent = thread::spawn(move || {
            let mut coord = asking.shared.coord();
            let queue = coord.any_queue().unwrap();
            coord.post(queue, Mail::Stage { chunk: 2 }, None);
        });
        // The first queue does the volume's own work.
        let (bell, over) = (Arc::clone(&keeper.bell), Arc::new(AtomicBool::new(false)));
        let last = Arc::clone(&over);
        let keeper = thread::spawn(move || keeper.work_until(|_| last.load(Ordering::SeqCst)));
        threads.into_iter().chain([agent]).for_each(|thread| thread.join().unwrap());
        over.store(true, Ordering::SeqCst);
        bell.signal();
        keeper.join().unwrap();
        assert!(volume.shared.coord().freeze.copies.is_empty());
        let mut bytes = [0; 512];
        for (sector, value) in [(2 * CHUNK_SECTORS, 77), (2 * CHUNK_SECTORS + 8, 0)] {
            volume.disk.read(FileId::Stage, sector * 512, &mut bytes);
            assert_eq!(value_of(sector, &bytes), value);
        }
    });
}

/// The agent asks for many chunks, and the guest writes to another frozen one: its copy does not wait for all of those.
#[test]
fn a_write_does_not_wait_for_all_that_the_agent_asks_for() {
    check_once(|| {
        let volume = Volume::new();
        let mut queue = volume.queue();
        let frozen: Vec<u64> = (2..8).collect();
        volume.freeze(&mut queue, &frozen);
        frozen.iter().take(5).for_each(|chunk| volume.demand(*chunk));
        queue.core.turn();
        let mut bytes = [0; 512];
        queue.begin_write(7 * CHUNK_SECTORS, &mut bytes);
        while !queue.core.has_done() {
            assert!(queue.step(), "the write waits for nothing");
        }
        let staged = volume.shared.coord().freeze.staged.len();
        assert!(staged <= 3, "{staged} chunks came first");
        queue.core.pop_done().unwrap().result.unwrap();
        while queue.step() {}
        assert_eq!(volume.shared.coord().freeze.staged.len(), 6);
    });
}

/// What the agent asks one queue for while the guest's copies on another leave no room is done when these end.
#[test]
fn what_the_agent_asks_for_goes_on_when_another_queue_has_copied() {
    check_once(|| {
        let volume = Volume::new();
        let (mut asked, mut busy) = (volume.queue(), volume.queue());
        volume.freeze(&mut asked, &[2, 3, 4]);
        let mut bytes = [[0; 512]; 2];
        for (chunk, bytes) in (2..).zip(&mut bytes) {
            busy.begin_write(chunk * CHUNK_SECTORS, bytes);
        }
        volume.demand(4);
        asked.core.turn();
        assert!(!asked.step(), "there is no room");
        asked.bell.wait();
        while busy.step() {}
        asked.bell.wait();
        asked.core.turn();
        while asked.step() {}
        assert_eq!(volume.shared.coord().freeze.staged.len(), 3);
        while busy.core.pop_done().is_some() {}
    });
}

/// Each thread's flush makes that thread's write durable, however runs are shared.
#[test]
fn shared_flushes_cover_everyone() {
    static SHARED: AtomicU64 = AtomicU64::new(0);
    check(|| {
        let volume = Volume::new();
        volume.bring(0);
        let threads: Vec<_> = (0..3u64)
            .map(|number| {
                let volume = volume.clone();
                thread::spawn(move || {
                    let mut queue = volume.queue();
                    let mut bytes = vec![0; 4096];
                    let first = number * 8;
                    for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(512)) {
                        fill(400 + number, sector, bytes);
                    }
                    queue.run(Operation::Write, first, &mut bytes);
                    queue.run(Operation::Flush, 0, &mut []);
                    assert_eq!(volume.after_power_cut(first), Some(400 + number), "a flushed block");
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        SHARED.fetch_add(u64::from(volume.shared.coord().flush.started < 3), Ordering::Relaxed);
    });
    assert!(SHARED.load(Ordering::Relaxed) > 0, "no schedule shared a flush");
}

impl Volume {
    /// What the volume would hold in a LOCAL sector if the power failed now and took everything that it can.
    fn after_power_cut(&self, sector: u64) -> Option<u64> {
        let copy = Arc::new(SimDisk::default());
        for file in [FileId::Data, FileId::Map] {
            copy.storage(file).set_length(self.disk.storage(file).length().unwrap()).unwrap();
            for (sector, bytes) in self.disk.durable(file) {
                copy.write(file, sector * 512, &bytes, true);
            }
        }
        let (map, data) = (copy.storage(FileId::Map), copy.storage(FileId::Data));
        let (_, bits) = open_map(&map, &data, 1, Some(Extent::of(BASE))).unwrap();
        let mut bytes = [0; 512];
        copy.read(FileId::Data, sector * 512, &mut bytes);
        bits.is_local(sector / 8).then(|| value_of(sector, &bytes))
    }
}
