//! A guest, a volume with several queues, a disk and an agent under one random schedule, beside a model of what the guest may
//! see.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::disk::{Covered, Rng, SECTOR, SimDisk};
use super::history::History;
use super::process::{Crashes, During};
use crate::layered::buffer::{Buffer, BufferPool, gather, scatter};
use crate::layered::clock::Clock;
use crate::layered::core::Core;
use crate::layered::freeze::FrozenSet;
use crate::layered::op::FileId;
use crate::layered::shared::{Alignment, Cause, ChunkFetcher, Parts, Presence, Shared, Signal, VolumeEvents};
use crate::layered::{claim, mark_in_use, open_map};
use crate::map::{self, CHUNK_BYTES, Extent, Header, MapBase, MapSpec, Storage};
use crate::task::Call;
use crate::xts::{Xts, XtsKey};
use crate::{BlockError, Operation, Request};

pub(super) const CHUNKS: u64 = 250;
pub(super) const CHUNK_SECTORS: u64 = CHUNK_BYTES / 512;
/// Two map pages; chunks 0, 1, 247 and 248 (a page's last and the next one's first) come from the base.
pub(super) const BASE: [u64; 4] = [0, 1, 247, 248];
/// Blocks of the log.
const LOG_BLOCKS: u64 = 24;
/// What volumes begin with.
pub(super) const SIZE: u64 = CHUNKS * CHUNK_BYTES;

/// Chunks that requests meet, however the volume has grown.
pub(super) fn is_met(chunk: u64) -> bool {
    !(4..247).contains(&chunk) && !(256..490).contains(&chunk)
}

/// Contents are numbers: 0 is zeros, others fill a sector so that a misplaced one is noticed.
pub(super) type Value = u64;

pub(super) fn base_value(sector: u64) -> Value {
    let blank = sector.is_multiple_of(29);
    if BASE.contains(&(sector / CHUNK_SECTORS)) && !blank { 1 << 60 | sector } else { 0 }
}

pub(super) fn fill(value: Value, sector: u64, into: &mut [u8]) {
    if value == 0 {
        return into.fill(0);
    }
    for (word, at) in into.chunks_exact_mut(8).zip(0u64..) {
        word.copy_from_slice(&(value ^ at << 40 ^ sector << 48).to_le_bytes());
    }
}

pub(super) fn value_of(sector: u64, bytes: &[u8]) -> Value {
    if bytes.iter().all(|byte| *byte == 0) {
        return 0;
    }
    let value = u64::from_le_bytes(bytes[..8].try_into().unwrap()) ^ sector << 48;
    let mut expected = [0u8; SECTOR];
    fill(value, sector, &mut expected);
    assert!(expected == bytes, "sector {sector} holds a mixture or another sector's bytes: {value:#x}");
    value
}

#[derive(Debug, Default)]
pub(super) struct Flag(pub(super) AtomicBool);

impl Signal for Flag {
    fn signal(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
pub(super) struct Agent {
    pub(super) present: Mutex<BTreeSet<u64>>,
    pub(super) asked: Mutex<BTreeSet<u64>>,
    pub(super) causes: Mutex<Vec<Cause>>,
    pub(super) impaired: AtomicBool,
}

impl ChunkFetcher for Agent {
    fn fetch(&self, chunk: u64) {
        assert!(BASE.contains(&chunk), "chunk {chunk} is not in the base");
        self.asked.lock().unwrap().insert(chunk);
    }
}

impl VolumeEvents for Agent {
    fn impaired(&self, cause: Cause) {
        self.causes.lock().unwrap().push(cause);
        self.impaired.store(true, Ordering::Relaxed);
    }

    fn recovered(&self) {
        self.impaired.store(false, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct SimPresence(Arc<Agent>);

impl Presence for SimPresence {
    fn has(&self, chunk: u64) -> bool {
        self.0.present.lock().unwrap().contains(&chunk)
    }
}

/// A call that the simulated kernel has taken.
pub(super) struct Outstanding {
    pub(super) index: usize,
    pub(super) file: FileId,
    pub(super) call: Call<'static>,
    pub(super) covered: Option<Covered>,
    /// Result and id of its changes, once it has taken effect.
    pub(super) applied: Option<(Result<u64, i32>, u64)>,
}

/// A guest's request.
pub(super) struct Pending {
    operation: Operation,
    first: u64,
    buffer: Buffer,
    skip: usize,
    sectors: u64,
    /// For a flush: the first value that was current before, of each sector.
    floor: HashMap<u64, usize>,
}

pub(super) struct Queue {
    pub(super) core: Core,
    pub(super) flag: Arc<Flag>,
    pub(super) outstanding: Vec<Outstanding>,
    pub(super) pending: BTreeMap<u64, Pending>,
}

/// What goes wrong by chance, one in so many (0 = never).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub(super) short: u64,
    pub(super) no_space: u64,
    pub(super) stage: u64,
    pub(super) sync: u64,
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) disk: Arc<SimDisk>,
    pub(super) agent: Arc<Agent>,
    pub(super) clock: Arc<AtomicU64>,
    pub(super) shared: Arc<Shared>,
    pub(super) queues: Vec<Queue>,
    pub(super) faults: Faults,
    pub(super) header: Header,
    /// Size of the volume as far as somebody was told, and what it is being grown to.
    pub(super) size: u64,
    pub(super) growing: Option<u64>,
    pub(super) generation: u64,
    /// DIRTY was cleared, and nothing has happened since.
    pub(super) cleared: bool,
    pub(super) during: During,
    /// The power may also fail while a process begins, ends or makes the volume larger, and the agent uses it between guests.
    pub(super) eventful: bool,
    pub(super) crashes: Crashes,
    pub(super) alignment: Alignment,
    pub(super) keys: bool,
    /// Sectors that a guest request in flight reads, with counts.
    pub(super) reading: HashMap<u64, usize>,
    pub(super) histories: HashMap<u64, History>,
    pub(super) values: u64,
    pub(super) tokens: u64,
    pub(super) completed: u64,
    /// Requests may fail, and then are no longer followed by the model.
    pub(super) expects_failure: bool,
    pub(super) failures: u64,
    /// What incremental snapshots have gathered, and the instant of the one in progress.
    pub(super) backup: HashMap<u64, Value>,
    pub(super) instant: Option<(FrozenSet, HashMap<u64, Vec<Value>>)>,
    pub(super) snapshots: u64,
    pub(super) buffers: BufferPool,
}

pub(super) fn key(seed: u8) -> XtsKey {
    let mut bytes = [seed; 64];
    bytes[63] ^= 1;
    XtsKey::new(bytes).unwrap()
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let disk = Arc::new(SimDisk::default());
        let keys = rng.chance(8);
        let alignment = match rng.below(4) {
            0 => Alignment { memory: 1, offset: 1 },
            1 => Alignment { memory: 512, offset: 4096 },
            _ => Alignment { memory: 512, offset: 512 },
        };
        let map = disk.storage(FileId::Map);
        disk.storage(FileId::Data).set_length(SIZE).unwrap();
        disk.storage(FileId::Data).sync().unwrap();
        let spec = MapSpec {
            filled: false,
            volume_id: "vol-0123456789abcdef0".into(),
            size_bytes: SIZE,
            base: Some(MapBase { root: [7; 32], extent: Extent::of(BASE) }),
            generation: 1,
        };
        map::create(&map, spec).unwrap();
        let agent = Arc::new(Agent::default());
        let clock = Arc::new(AtomicU64::new(1));
        let (mut header, shared) = open(&disk, &agent, alignment, keys, 1).unwrap();
        mark_in_use(&map, &mut header).unwrap();
        let mut world = Self {
            rng,
            disk,
            agent,
            clock,
            shared,
            queues: Vec::new(),
            faults: Faults::default(),
            header,
            size: SIZE,
            growing: None,
            generation: 1,
            cleared: false,
            during: During::Traffic,
            eventful: false,
            crashes: Crashes::default(),
            alignment,
            keys,
            reading: HashMap::new(),
            histories: HashMap::new(),
            values: 0,
            tokens: 0,
            completed: 0,
            expects_failure: false,
            failures: 0,
            backup: HashMap::new(),
            instant: None,
            snapshots: 0,
            buffers: BufferPool::default(),
        };
        world.add_queues();
        world
    }

    pub(super) fn add_queues(&mut self) {
        for _ in 0..1 + self.rng.below(2) {
            self.add_queue();
        }
    }

    pub(super) fn add_queue(&mut self) {
        let flag = Arc::new(Flag::default());
        let signal = Arc::clone(&flag) as Arc<dyn Signal>;
        let core = Core::new(Arc::clone(&self.shared), 16, Some(signal), Clock::Manual(Arc::clone(&self.clock)));
        self.queues.push(Queue { core, flag, outstanding: Vec::new(), pending: BTreeMap::new() });
    }

    fn history(&mut self, sector: u64) -> &mut History {
        self.histories.entry(sector).or_insert_with(|| History::new(base_value(sector)))
    }

    /// A place and length that requests meet at: chunk, page and volume ends, also what was the end before the volume grew, and
    /// one blank chunk.
    fn range(&mut self) -> (u64, u64) {
        let (end, first_end) = (self.size / 512, SIZE / 512);
        let last = if end > first_end && self.rng.chance(2) { first_end - 8 } else { end - 40 };
        let centres = [40, CHUNK_SECTORS, 2 * CHUNK_SECTORS + 40, 248 * CHUNK_SECTORS, last];
        let centre = centres[self.rng.below(centres.len() as u64) as usize];
        let mut first = (centre + self.rng.below(64) - 32).min(end - 1);
        let mut sectors = 1 + self.rng.below(24);
        if self.rng.chance(3) {
            first &= !7;
            sectors = (sectors + 7) & !7;
        }
        (first, sectors.min(end - first))
    }

    /// Submits a random request, if the ones in flight leave it room.
    pub(super) fn submit(&mut self) {
        let which = self.rng.below(self.queues.len() as u64) as usize;
        if self.queues[which].core.in_flight() >= 12 {
            return;
        }
        let (first, mut sectors) = self.range();
        let operation = match self.rng.below(20) {
            0..7 => Operation::Read,
            7..14 => Operation::Write,
            14..16 => Operation::Discard,
            16..18 => Operation::WriteZeroes { may_unmap: self.rng.chance(2) },
            _ => Operation::Flush,
        };
        if operation == Operation::Flush {
            sectors = 0;
        }
        let range = first..first + sectors;
        // A read that races has no one right answer; a write that does leaves one of two.
        let races = self.rng.chance(4);
        let writing = |sector: &u64| self.histories.get(sector).is_some_and(|history| history.writing > 0);
        let conflict = |sector: u64| match operation {
            Operation::Read => writing(&sector),
            _ => self.reading.contains_key(&sector) || (writing(&sector) && !races),
        };
        if range.clone().any(conflict) {
            return;
        }
        self.start(which, operation, first, sectors);
    }

    pub(super) fn start(&mut self, which: usize, operation: Operation, first: u64, sectors: u64) {
        let range = first..first + sectors;
        let skip = if self.rng.chance(4) { 8 } else { 512 * self.rng.below(2) as usize };
        let mut buffer = self.buffers.take(sectors as usize * SECTOR + skip + 1);
        let mut floor = HashMap::new();
        match operation {
            Operation::Write => {
                self.values += 1;
                let value = self.values;
                for (sector, bytes) in range.clone().zip(buffer.bytes()[skip..].chunks_exact_mut(SECTOR)) {
                    fill(value, sector, bytes);
                    self.history(sector).push(value);
                }
            }
            Operation::WriteZeroes { .. } => {
                range.for_each(|sector| self.history(sector).push(0));
            }
            Operation::Discard => {
                // Whole blocks read as zeros; the rest keeps its content.
                for sector in range.clone() {
                    if whole_block(sector, &range) {
                        self.history(sector).push(0);
                    }
                }
            }
            Operation::Read => range.for_each(|sector| *self.reading.entry(sector).or_default() += 1),
            Operation::Flush => {
                floor = self.histories.iter().map(|(sector, history)| (*sector, history.current)).collect()
            }
        }
        self.tokens += 1;
        let bytes = sectors as usize * SECTOR;
        let cut = self.rng.below(sectors.max(1)) as usize * SECTOR;
        let buffers = [buffer.iovec(skip, cut), buffer.iovec(skip + cut, bytes - cut)];
        let moves = matches!(operation, Operation::Read | Operation::Write);
        let request = Request {
            operation,
            offset: first * 512,
            length: bytes as u64,
            buffers: if moves { &buffers } else { &[] },
            token: self.tokens,
        };
        let queue = &mut self.queues[which];
        // SAFETY: the buffer lives in `pending` until the request is done or its queue is gone.
        unsafe { queue.core.submit(&request).unwrap() };
        queue.pending.insert(self.tokens, Pending { operation, first, buffer, skip, sectors, floor });
    }

    /// Moves calls of a queue into the simulated kernel.
    pub(super) fn issue(&mut self, which: usize, most: usize) {
        for _ in 0..most {
            let queue = &mut self.queues[which];
            let Some(index) = queue.core.next_call() else { return };
            let (file, call) = queue.core.call(index).unwrap();
            check_alignment(self.alignment, file, &call);
            // SAFETY: only the lifetime changes; the transfer keeps the iovecs until `finish`.
            let call = unsafe { std::mem::transmute::<Call<'_>, Call<'static>>(call) };
            let covered = matches!(call, Call::Fdatasync).then(|| self.disk.sync_begins(file));
            queue.outstanding.push(Outstanding { index, file, call, covered, applied: None });
        }
    }

    /// One call takes effect, unless the power fails during it.
    pub(super) fn apply(&mut self, which: usize) {
        if self.disk.died().is_some() {
            return;
        }
        let queue = &mut self.queues[which];
        let waiting: Vec<usize> =
            (0..queue.outstanding.len()).filter(|at| queue.outstanding[*at].applied.is_none()).collect();
        if waiting.is_empty() {
            return;
        }
        let at = waiting[self.rng.below(waiting.len() as u64) as usize];
        let Outstanding { file, call, .. } = &queue.outstanding[at];
        let reading = matches!(call, Call::Readv { .. });
        if !reading && self.disk.burn(*file, !matches!(call, Call::Fdatasync)).unwrap() {
            return;
        }
        let applied = self.effect(which, at);
        self.queues[which].outstanding[at].applied = Some(applied);
    }

    pub(super) fn effect(&mut self, which: usize, at: usize) -> (Result<u64, i32>, u64) {
        let Faults { short, no_space, stage, sync } = self.faults;
        let rng = &mut self.rng;
        let mut fails = |of: u64| of > 0 && rng.chance(of);
        let taken = &self.queues[which].outstanding[at];
        let file = taken.file;
        if file == FileId::Stage && fails(stage) {
            return (Err(libc::EIO), 0);
        }
        if matches!(file, FileId::Data | FileId::Map)
            && matches!(taken.call, Call::Writev { .. } | Call::Fallocate { .. })
            && fails(no_space)
        {
            return (Err(libc::ENOSPC), 0);
        }
        if matches!(taken.call, Call::Fdatasync) && fails(sync) {
            return (Err(libc::EIO), 0);
        }
        let total = |iovecs: &[libc::iovec]| iovecs.iter().map(|iovec| iovec.iov_len).sum::<usize>();
        match taken.call {
            Call::Readv { iovecs, offset } => {
                let mut bytes = vec![0; total(iovecs)];
                if bytes.len() > 4096 && fails(short) {
                    bytes.truncate(4096);
                }
                if file == FileId::Base {
                    self.read_base(offset, &mut bytes);
                } else {
                    self.disk.read(file, offset, &mut bytes);
                }
                // SAFETY: the request's buffers are alive while it is outstanding.
                unsafe { scatter(&bytes, iovecs) };
                (Ok(bytes.len() as u64), 0)
            }
            Call::Writev { iovecs, offset } => {
                let mut bytes = vec![0; total(iovecs)];
                if bytes.len() > 4096 && fails(short) {
                    bytes.truncate(4096);
                }
                // SAFETY: as above.
                unsafe { gather(iovecs, &mut bytes) };
                let id = self.disk.write(file, offset, &bytes, false);
                (Ok(bytes.len() as u64), id)
            }
            Call::Fdatasync => {
                self.disk.sync_ends(file, taken.covered.as_ref().unwrap());
                (Ok(0), 0)
            }
            Call::Fallocate { offset, length, .. } => (Ok(0), self.disk.zero(file, offset, length)),
        }
    }

    fn read_base(&self, offset: u64, into: &mut [u8]) {
        let present = self.agent.present.lock().unwrap();
        assert!(into.len().is_multiple_of(SECTOR) && offset.is_multiple_of(512));
        for (sector, bytes) in (offset / 512..).zip(into.chunks_exact_mut(SECTOR)) {
            assert!(present.contains(&(sector / CHUNK_SECTORS)), "sector {sector} of the base is not there");
            fill(base_value(sector), sector, bytes);
        }
        if self.keys {
            // Stored under the base's key; blank units are holes.
            for (unit, at) in into.chunks_exact_mut(SECTOR).zip((offset..).step_by(SECTOR)) {
                if unit.iter().any(|byte| *byte != 0) {
                    Xts::new(&key(2)).encrypt(unit, at);
                }
            }
        }
    }

    /// One call that took effect is answered; what the volume completes is checked.
    pub(super) fn answer(&mut self, which: usize) {
        if self.disk.died().is_some() {
            return;
        }
        let queue = &mut self.queues[which];
        let applied: Vec<usize> =
            (0..queue.outstanding.len()).filter(|at| queue.outstanding[*at].applied.is_some()).collect();
        if !applied.is_empty() {
            let at = applied[self.rng.below(applied.len() as u64) as usize];
            let taken = queue.outstanding.swap_remove(at);
            let (result, id) = taken.applied.unwrap();
            if id > 0 {
                self.disk.complete(taken.file, id);
            }
            queue.core.finish(taken.index, result);
        }
        self.drain(which);
    }

    /// A queue's thread sleeps until its descriptor is readable or its timer rings.
    pub(super) fn wake(&mut self, which: usize) -> bool {
        let now = self.clock.load(Ordering::Relaxed);
        let queue = &mut self.queues[which];
        let rung = queue.flag.0.swap(false, Ordering::Relaxed);
        if rung || queue.core.next_wakeup().is_some_and(|at| at <= now) {
            queue.core.turn();
            self.drain(which);
            return true;
        }
        false
    }

    pub(super) fn drain(&mut self, which: usize) {
        while let Some(completion) = self.queues[which].core.pop_done() {
            let pending = self.queues[which].pending.remove(&completion.token).unwrap();
            if self.expects_failure && completion.result.is_err() {
                self.failures += 1;
                continue;
            }
            assert!(completion.result.is_ok(), "{:?}", completion.result);
            self.check(pending);
            self.completed += 1;
        }
    }

    pub(super) fn check(&mut self, mut pending: Pending) {
        let range = pending.first..pending.first + pending.sectors;
        match pending.operation {
            Operation::Read => {
                let bytes = &pending.buffer.bytes()[pending.skip..];
                for (sector, bytes) in range.zip(bytes.chunks_exact(SECTOR)) {
                    let found = value_of(sector, bytes);
                    let possible = self.history(sector).possible();
                    assert!(possible.contains(&found), "read of sector {sector}: {found:#x} not in {possible:x?}");
                    if let Some(count) = self.reading.get_mut(&sector) {
                        *count -= 1;
                        if *count == 0 {
                            self.reading.remove(&sector);
                        }
                    }
                }
            }
            Operation::Flush => {
                // What was acknowledged before the flush was asked for can no longer be lost.
                for (sector, current) in &pending.floor {
                    self.history(*sector).raise(*current);
                }
            }
            operation => {
                for sector in range.clone() {
                    if operation != Operation::Discard || whole_block(sector, &range) {
                        self.history(sector).acknowledge();
                    }
                }
            }
        }
        self.buffers.give(pending.buffer);
    }
}

fn whole_block(sector: u64, range: &std::ops::Range<u64>) -> bool {
    range.start <= sector & !7 && (sector | 7) < range.end
}

fn check_alignment(alignment: Alignment, file: FileId, call: &Call<'_>) {
    let (Call::Readv { iovecs, offset } | Call::Writev { iovecs, offset }) = call else {
        return;
    };
    if !matches!(file, FileId::Data | FileId::Map) || alignment.memory == 1 {
        return;
    }
    let length: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
    let aligned = iovecs.iter().all(|i| (i.iov_base as usize | i.iov_len).is_multiple_of(alignment.memory));
    assert!(aligned, "unaligned buffers reach the disk");
    assert!((offset | length as u64).is_multiple_of(alignment.offset), "unaligned range reaches the disk");
}

/// As the engine opens a volume, for whomever.
pub(super) fn open(
    disk: &Arc<SimDisk>,
    agent: &Arc<Agent>,
    alignment: Alignment,
    keys: bool,
    generation: u64,
) -> Result<(Header, Arc<Shared>), BlockError> {
    let map = disk.storage(FileId::Map);
    let extent = Some(Extent::of(BASE));
    let (mut header, bits) = open_map(&map, &disk.storage(FileId::Data), generation, extent)?;
    claim(&map, &mut header, generation)?;
    let parts = Parts {
        volume_id: header.volume_id,
        bits,
        alignment,
        data_key: keys.then(|| Xts::new(&key(1))),
        base_key: keys.then(|| Xts::new(&key(2))),
        presence: Box::new(SimPresence(Arc::clone(agent))),
        fetcher: Arc::clone(agent) as Arc<dyn ChunkFetcher>,
        events: Arc::clone(agent) as Arc<dyn VolumeEvents>,
    };
    let shared = Shared::new(parts);
    // A small one, which begins anew often.
    shared.coord().flush.log.blocks = LOG_BLOCKS;
    Ok((header, Arc::new(shared)))
}
