//! What all queues of one layered volume share. Everything that must be seen consistently stands in [`Coord`] under one
//! mutex, which is held for bookkeeping only: no system call, no copying and no cipher runs under it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use super::buffer::Buffer;
use super::freeze::{Freeze, FreezeState, FrozenSet};
use super::sync::{Mutex, MutexGuard, Notice};
use crate::limit::Limiter;
use crate::map::log::{ENTRIES_MAX, LOG_BLOCKS, may_hold};
use crate::map::{BLOCK_BYTES, Bits, CHUNK_BYTES, Run};
use crate::xts::Xts;

/// Why a volume cannot make progress or lost its promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The host's file system is full: writes wait and are repeated.
    NoSpace,
    /// A chunk of the base did not come for some seconds: requests for it wait.
    ChunkUnavailable {
        /// The chunk.
        chunk: u64,
    },
    /// `fdatasync` or a map write failed: all further writes and flushes fail. Final.
    SyncFailed {
        /// Error number.
        errno: i32,
    },
    /// The connection to the volume's server is lost: requests wait for a new one.
    Disconnected,
    /// Copying to the stage failed: the snapshot in progress is lost, the volume goes on.
    StageFailed {
        /// Error number.
        errno: i32,
    },
}

/// Asks the agent for chunks of the base.
pub trait ChunkFetcher: Send + Sync {
    /// Have this chunk fetched and its presence bit set. Must not block and must not call back into the volume; the same
    /// chunk may be asked for again.
    fn fetch(&self, chunk: u64);
}

/// Learns of the volume's condition. Called from I/O threads: must not block and must not call back into the volume.
pub trait VolumeEvents: Send + Sync {
    /// Requests wait or fail.
    fn impaired(&self, cause: Cause);
    /// Nothing waits any more.
    fn recovered(&self);
    /// A chunk asked for with `stage_chunk`, or copied before a write, is complete in the stage.
    fn staged(&self, chunk: u64) {
        let _ = chunk;
    }
}

/// Which chunks of the base are there.
pub(crate) trait Presence: Send + Sync + fmt::Debug {
    /// Acquires: the chunk's bytes are readable when true.
    fn has(&self, chunk: u64) -> bool;
}

/// Ignores everything: for uses without an agent behind them.
#[derive(Debug)]
pub(crate) struct Nobody;

impl ChunkFetcher for Nobody {
    fn fetch(&self, _chunk: u64) {}
}

impl VolumeEvents for Nobody {
    fn impaired(&self, _cause: Cause) {}
    fn recovered(&self) {}
}

impl Presence for Nobody {
    fn has(&self, _chunk: u64) -> bool {
        false
    }
}

/// Alignments that direct I/O on `data` asks for, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of buffers and of each piece's length; 1 = buffered I/O.
    pub(crate) memory: usize,
    /// Of offsets: 512, or 4096 on disks without smaller sectors.
    pub(crate) offset: u64,
}

/// Where a stretch of the volume is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Data,
    Base,
    Missing,
}

/// A request that waits, on some queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiter {
    pub(crate) queue: usize,
    pub(crate) op: usize,
    /// Tells a later user of the same slot from the one that waited.
    pub(crate) birth: u64,
}

/// What one thread tells a queue of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mail {
    Wake {
        op: usize,
        birth: u64,
    },
    /// Prepare a freeze, by its number.
    Freeze {
        attempt: u64,
    },
    Stage {
        chunk: u64,
    },
    /// There may be room to copy what the agent asked for.
    Demands,
    LimitsChanged,
}

/// Makes a queue's completion descriptor readable, from any thread.
pub(crate) trait Signal: Send + Sync + fmt::Debug {
    fn signal(&self);
}

#[derive(Debug)]
pub(crate) struct Mailbox {
    pub(crate) mail: Vec<Mail>,
    signal: Option<Arc<dyn Signal>>,
}

/// What a run of a flush does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlushRun {
    /// Makes `data` durable, then the pages that changed. Nothing in the log is needed any more.
    All,
    /// Makes `data` durable: no LOCAL bit is new, and no block of the log was overwritten.
    Data,
    /// Puts what was written since the last run into the log.
    Log,
}

/// A small write that completed on `data`, with what it wrote.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) blocks: Range<u64>,
    pub(crate) buffer: Buffer,
    /// One of the blocks became LOCAL by it.
    first: bool,
}

/// The log in the map.
#[derive(Debug)]
pub(crate) struct LogState {
    /// Size, in blocks.
    pub(crate) blocks: u64,
    /// Where the next record goes, in blocks, and its sequence.
    pub(crate) at: u64,
    pub(crate) seq: u64,
    /// All of it was written once: writing to holes would cost a commit of the file system's journal.
    pub(crate) prepared: bool,
    /// Blocks with entries that count.
    pub(crate) holds: BTreeSet<u64>,
}

#[derive(Debug)]
pub(crate) struct FlushState {
    /// Runs begun and ended. A request is answered by the first run that begins after it came.
    pub(crate) started: u64,
    pub(crate) completed: u64,
    pub(crate) running: bool,
    pub(crate) waiting: Vec<Waiter>,
    /// Something completed on `data`, since the last run of all began, that `kept` does not have.
    pub(crate) unsynced: bool,
    /// What completed since the last run began, in that order, as long as it is little.
    pub(crate) kept: Vec<Kept>,
    pub(crate) log: LogState,
}

impl FlushState {
    fn new() -> Self {
        Self {
            started: 0,
            completed: 0,
            running: false,
            waiting: Vec::new(),
            // Whoever had the volume before may have left unsynced writes in the page cache.
            unsynced: true,
            kept: Vec::new(),
            log: LogState { blocks: LOG_BLOCKS, at: 0, seq: 1, prepared: false, holds: BTreeSet::new() },
        }
    }

    /// Blocks in `kept`.
    pub(crate) fn kept_blocks(&self) -> u64 {
        self.kept.iter().map(|kept| kept.blocks.end - kept.blocks.start).sum()
    }

    /// Whether a write of this many blocks can be kept.
    pub(crate) fn has_room(&self, blocks: u64) -> bool {
        !self.unsynced && self.kept_blocks() + blocks <= ENTRIES_MAX as u64
    }

    pub(crate) fn is_needed(&self) -> bool {
        self.unsynced || !self.kept.is_empty()
    }

    /// What the next run has to do.
    pub(crate) fn next_run(&self) -> FlushRun {
        let held = |kept: &Kept| kept.first || self.log.holds.range(kept.blocks.clone()).next().is_some();
        if self.unsynced {
            FlushRun::All
        } else if !self.kept.iter().any(held) {
            FlushRun::Data
        } else if self.log.at + 1 + self.kept_blocks() <= self.log.blocks {
            FlushRun::Log
        } else {
            FlushRun::All
        }
    }
}

/// Blocks that something in flight changes.
#[derive(Debug)]
struct Active {
    blocks: Range<u64>,
    /// What is written may be kept: nothing else changed these blocks meanwhile.
    keep: bool,
}

/// Calls to make once the mutex is released.
#[derive(Debug)]
pub(crate) enum Effect {
    Fetch(u64),
    Impaired(Cause),
    Recovered,
    Staged(u64),
}

#[derive(Debug)]
pub(crate) struct Coord {
    pub(crate) bits: Bits,
    /// Block ranges of writes, discards and zeroings in flight, `None` where the slot is free.
    active: Vec<Option<Active>>,
    active_count: usize,
    /// Blocks in a read-modify-write.
    pub(crate) exclusive: Vec<u64>,
    /// Requests that wait for another one, for a chunk copy or for the end of a freeze's drain: all are looked at again
    /// whenever one of those ends.
    pub(crate) blocked: Vec<Waiter>,
    /// Requests that wait for chunks of the base.
    pub(crate) parked: Vec<Waiter>,
    /// Chunks asked for, with the time of the last asking in ns.
    pub(crate) fetches: BTreeMap<u64, u64>,
    pub(crate) flush: FlushState,
    pub(crate) freeze: Freeze,
    pub(crate) limiter: Limiter,
    /// Sticky errno of a failed sync.
    pub(crate) failed: Option<i32>,
    pub(crate) closed: bool,
    /// Transfers that wait for space.
    pub(crate) stalls: usize,
    pub(crate) chunk_impaired: bool,
    pub(crate) effects: Vec<Effect>,
    queues: Vec<Option<Mailbox>>,
    births: u64,
}

impl Coord {
    pub(crate) fn new(bits: Bits) -> Self {
        Self {
            bits,
            active: Vec::new(),
            active_count: 0,
            exclusive: Vec::new(),
            blocked: Vec::new(),
            parked: Vec::new(),
            fetches: BTreeMap::new(),
            flush: FlushState::new(),
            freeze: Freeze::default(),
            limiter: Limiter::default(),
            failed: None,
            closed: false,
            stalls: 0,
            chunk_impaired: false,
            effects: Vec::new(),
            queues: Vec::new(),
            births: 0,
        }
    }

    pub(crate) fn birth(&mut self) -> u64 {
        self.births += 1;
        self.births
    }

    pub(crate) fn add_queue(&mut self, signal: Option<Arc<dyn Signal>>) -> usize {
        let mailbox = Some(Mailbox { mail: Vec::new(), signal });
        match self.queues.iter().position(Option::is_none) {
            Some(free) => {
                if let Some(slot) = self.queues.get_mut(free) {
                    *slot = mailbox;
                }
                free
            }
            None => {
                self.queues.push(mailbox);
                self.queues.len() - 1
            }
        }
    }

    pub(crate) fn remove_queue(&mut self, queue: usize) {
        if let Some(slot) = self.queues.get_mut(queue) {
            *slot = None;
        }
        self.blocked.retain(|waiter| waiter.queue != queue);
        self.parked.retain(|waiter| waiter.queue != queue);
        self.flush.waiting.retain(|waiter| waiter.queue != queue);
    }

    /// The queue that does the volume's own work.
    pub(crate) fn any_queue(&self) -> Option<usize> {
        self.queues.iter().position(Option::is_some)
    }

    /// Puts mail into a queue's box; its thread is woken unless it is the one that calls (`from`).
    pub(crate) fn post(&mut self, queue: usize, mail: Mail, from: Option<usize>) {
        if let Some(Some(mailbox)) = self.queues.get_mut(queue) {
            mailbox.mail.push(mail);
            if from != Some(queue)
                && let Some(signal) = &mailbox.signal
            {
                signal.signal();
            }
        }
    }

    pub(crate) fn post_all(&mut self, mail: Mail) {
        for queue in 0..self.queues.len() {
            self.post(queue, mail, None);
        }
    }

    pub(crate) fn take_mail(&mut self, queue: usize, into: &mut Vec<Mail>) {
        if let Some(Some(mailbox)) = self.queues.get_mut(queue) {
            into.append(&mut mailbox.mail);
        }
    }

    fn wake(&mut self, waiters: &mut Vec<Waiter>, from: Option<usize>) {
        for Waiter { queue, op, birth } in waiters.drain(..) {
            self.post(queue, Mail::Wake { op, birth }, from);
        }
    }

    pub(crate) fn wake_blocked(&mut self, from: Option<usize>) {
        if !self.blocked.is_empty() {
            let mut waiters = std::mem::take(&mut self.blocked);
            self.wake(&mut waiters, from);
        }
    }

    pub(crate) fn wake_hindered(&mut self, from: Option<usize>) {
        for queue in std::mem::take(&mut self.freeze.hindered) {
            self.post(queue, Mail::Demands, from);
        }
    }

    pub(crate) fn wake_parked(&mut self, from: Option<usize>) {
        let mut waiters = std::mem::take(&mut self.parked);
        self.wake(&mut waiters, from);
    }

    pub(crate) fn wake_flushes(&mut self, from: Option<usize>) {
        let mut waiters = std::mem::take(&mut self.flush.waiting);
        self.wake(&mut waiters, from);
    }

    /// Notes that blocks are being written; the result goes to [`end_active`](Self::end_active). Of several at a time, none
    /// is kept: nobody knows which one the disk ends up with.
    pub(crate) fn begin_active(&mut self, blocks: Range<u64>, keep: bool) -> usize {
        let mut new = Active { blocks, keep };
        if self.active_count > 0 {
            let meets =
                |other: &&mut Active| other.blocks.start < new.blocks.end && new.blocks.start < other.blocks.end;
            for other in self.active.iter_mut().flatten().filter(meets) {
                (other.keep, new.keep) = (false, false);
            }
        }
        self.active_count += 1;
        match self.active.iter().position(Option::is_none) {
            Some(free) => {
                if let Some(slot) = self.active.get_mut(free) {
                    *slot = Some(new);
                }
                free
            }
            None => {
                self.active.push(Some(new));
                self.active.len() - 1
            }
        }
    }

    /// Tells whether what was written may be kept.
    pub(crate) fn end_active(&mut self, slot: usize) -> bool {
        let ended = self.active.get_mut(slot).and_then(Option::take);
        self.active_count -= usize::from(ended.is_some());
        ended.is_some_and(|active| active.keep)
    }

    /// A write, discard or zeroing in flight touches the block.
    pub(crate) fn is_active(&self, block: u64) -> bool {
        self.active_count > 0 && self.active.iter().flatten().any(|active| active.blocks.contains(&block))
    }

    /// Blocks were stored: LOCAL, and kept for the log with what was written if that is given and little. Else what was given
    /// comes back.
    pub(crate) fn stored(&mut self, blocks: Range<u64>, content: Option<Buffer>) -> Option<Buffer> {
        let local = self.bits.run(blocks.start, blocks.end);
        let first = !local.local || local.end < blocks.end;
        if first {
            self.bits.set_local(blocks.clone());
        }
        let (count, room) = (blocks.end - blocks.start, self.flush.has_room(blocks.end - blocks.start));
        let holds = |buffer: &Buffer| buffer.content().chunks(BLOCK_BYTES as usize).take(count as usize).all(may_hold);
        match content {
            Some(buffer) if room && holds(&buffer) => {
                self.flush.kept.push(Kept { blocks, buffer, first });
                None
            }
            other => {
                self.flush.unsynced = true;
                other
            }
        }
    }

    /// The next flush makes `data` durable and writes all pages whose bits changed, DIRTY bits too.
    pub(crate) fn flush_everything(&mut self) {
        self.bits.include_dirty();
        self.flush.unsynced = true;
    }

    /// First block of `range` in a read-modify-write.
    pub(crate) fn first_exclusive(&self, range: Range<u64>) -> Option<u64> {
        self.exclusive.iter().copied().filter(|block| range.contains(block)).min()
    }

    /// Begins a preparation; the mail is for one of the queues.
    pub(crate) fn begin_prepare(&mut self) -> Mail {
        self.freeze.reset();
        self.freeze.state = FreezeState::Preparing;
        self.freeze.attempt += 1;
        Mail::Freeze { attempt: self.freeze.attempt }
    }

    /// Fixes the point in time: what is DIRTY becomes `set`.
    pub(crate) fn begin_freeze(&mut self, set: FrozenSet) {
        for chunk in set.iter() {
            self.bits.clear_dirty(chunk);
        }
        let staged = FrozenSet::of(set.chunks, &[]);
        self.freeze.reset();
        self.freeze.state = FreezeState::Frozen;
        (self.freeze.frozen, self.freeze.staged) = (set, staged);
    }

    /// Ends a freeze, or calls its preparation off.
    pub(crate) fn end_freeze(&mut self, restore_dirty: bool) {
        if restore_dirty && self.freeze.state == FreezeState::Frozen {
            for chunk in self.freeze.frozen.iter() {
                self.bits.set_dirty(chunk);
            }
        }
        self.freeze.reset();
        // Copies that wait for the base give up.
        self.wake_parked(None);
    }

    /// Nothing is changing the volume.
    pub(crate) fn is_quiet(&self) -> bool {
        self.active_count == 0 && self.exclusive.is_empty() && self.freeze.copies.is_empty()
    }
}

/// One volume's shared part.
pub(crate) struct Shared {
    pub(crate) volume_id: [u8; 32],
    coord: Mutex<Coord>,
    /// Signalled when a freeze's preparation ends.
    pub(crate) prepared: Notice,
    pub(crate) size: AtomicU64,
    pub(crate) alignment: Alignment,
    pub(crate) data_key: Option<Xts>,
    pub(crate) base_key: Option<Xts>,
    pub(crate) presence: Box<dyn Presence>,
    pub(crate) fetcher: Arc<dyn ChunkFetcher>,
    pub(crate) events: Arc<dyn VolumeEvents>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("size", &self.size).field("alignment", &self.alignment).finish_non_exhaustive()
    }
}

/// What a volume is made of besides its files.
pub(crate) struct Parts {
    pub(crate) volume_id: [u8; 32],
    pub(crate) bits: Bits,
    pub(crate) alignment: Alignment,
    pub(crate) data_key: Option<Xts>,
    pub(crate) base_key: Option<Xts>,
    pub(crate) presence: Box<dyn Presence>,
    pub(crate) fetcher: Arc<dyn ChunkFetcher>,
    pub(crate) events: Arc<dyn VolumeEvents>,
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            volume_id: parts.volume_id,
            size: AtomicU64::new(parts.bits.size_bytes()),
            coord: Mutex::new(Coord::new(parts.bits)),
            prepared: Notice::default(),
            alignment: parts.alignment,
            data_key: parts.data_key,
            base_key: parts.base_key,
            presence: parts.presence,
            fetcher: parts.fetcher,
            events: parts.events,
        }
    }

    pub(crate) fn coord(&self) -> MutexGuard<'_, Coord> {
        self.coord.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(crate) fn perform(&self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Fetch(chunk) => self.fetcher.fetch(chunk),
                Effect::Impaired(cause) => self.events.impaired(cause),
                Effect::Recovered => self.events.recovered(),
                Effect::Staged(chunk) => self.events.staged(chunk),
            }
        }
    }

    /// Where byte `from` is read from, and up to which byte (at most `to`) that holds.
    pub(crate) fn source(&self, coord: &Coord, from: u64, to: u64) -> (Source, u64) {
        let Run { local, end } = coord.bits.run(from / BLOCK_BYTES, to.div_ceil(BLOCK_BYTES));
        let end = end.saturating_mul(BLOCK_BYTES).min(to);
        if local {
            return (Source::Data, end);
        }
        let mut chunk = from / CHUNK_BYTES;
        let present = self.presence.has(chunk);
        let mut stop = (chunk + 1) * CHUNK_BYTES;
        while stop < end && self.presence.has(chunk + 1) == present {
            chunk += 1;
            stop += CHUNK_BYTES;
        }
        (if present { Source::Base } else { Source::Missing }, stop.min(end))
    }

    /// Agent set presence bits: what waits for chunks is looked at again.
    pub(crate) fn presence_changed(&self) {
        let mut coord = self.coord();
        coord.fetches.retain(|chunk, _| !self.presence.has(*chunk));
        if coord.fetches.is_empty() && coord.chunk_impaired {
            coord.chunk_impaired = false;
            if coord.stalls == 0 {
                coord.effects.push(Effect::Recovered);
            }
        }
        coord.wake_parked(None);
        let effects = std::mem::take(&mut coord.effects);
        drop(coord);
        self.perform(effects);
    }
}
