//! One queue's state machine. It makes no system calls: an executor (ring, pool, inline, or a simulated disk) takes calls
//! from it, makes them, and hands back their results. Requests that wait for one another or for other queues are woken
//! through [`Coord`]'s mailboxes.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::buffer::BufferPool;
use super::clock::Clock;
use super::op::{FileId, Kind, Op, Purpose, Slab, Transfer};
use super::shared::{Cause, Coord, Effect, Mail, Shared, Signal, Waiter};
use crate::map::{BLOCK_BYTES, CHUNK_BYTES};
use crate::task::{Call, Verdict};
use crate::volume::SECTOR_BYTES;
use crate::{BlockError, Completion, IoError, Operation, Request};

/// Transfers one request may have in flight.
pub(super) const PIECES_MAX: usize = 8;
/// Most bytes of one bounced transfer.
pub(super) const BOUNCE_BYTES: u64 = 64 << 10;
/// Chunks copied to the stage at a time.
pub(super) const COPIES_MAX: usize = 4;
/// Of these for the agent: a guest's write does not wait for all that the agent has asked for.
pub(super) const DEMANDS_MAX: usize = 2;
/// Missing chunks asked for ahead of what a request needs first.
const FETCH_AHEAD: u64 = 64;
/// Pause before a write that found no space is tried again.
const STALL_RETRY_NS: u64 = 1_000_000_000;
/// How often parked requests look for their chunks without being told.
const RECHECK_NS: u64 = 1_000_000_000;
/// A chunk that takes longer impairs the volume and is asked for again.
const FETCH_PATIENCE_NS: u64 = 5_000_000_000;

pub(crate) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) id: usize,
    capacity: usize,
    /// Guest requests taken and not drained.
    taken: usize,
    pub(super) ops: Slab<Op>,
    pub(super) transfers: Slab<Transfer>,
    pub(super) ready: VecDeque<usize>,
    done: VecDeque<Completion>,
    pub(super) buffers: BufferPool,
    throttled: VecDeque<usize>,
    throttled_until: u64,
    stalled: Vec<usize>,
    retry_at: u64,
    pub(super) parked: usize,
    recheck_at: u64,
    /// Chunks the agent wants in the stage.
    pub(super) demands: VecDeque<u64>,
    mail: Vec<Mail>,
    pub(super) clock: Clock,
    pub(super) closing: bool,
}

impl Core {
    pub(crate) fn new(shared: Arc<Shared>, capacity: usize, signal: Option<Arc<dyn Signal>>, clock: Clock) -> Self {
        let id = shared.coord().add_queue(signal);
        Self {
            shared,
            id,
            capacity,
            taken: 0,
            ops: Slab::new(Op::idle),
            transfers: Slab::new(Transfer::idle),
            ready: VecDeque::new(),
            done: VecDeque::new(),
            buffers: BufferPool::default(),
            throttled: VecDeque::new(),
            throttled_until: 0,
            stalled: Vec::new(),
            retry_at: 0,
            parked: 0,
            recheck_at: 0,
            demands: VecDeque::new(),
            mail: Vec::new(),
            clock,
            closing: false,
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.taken
    }

    /// Takes a request, as `VolumeQueue::submit`.
    ///
    /// # Safety
    /// As `VolumeQueue::submit`.
    pub(crate) unsafe fn submit(&mut self, request: &Request<'_>) -> Result<(), BlockError> {
        if self.taken >= self.capacity {
            return Err(BlockError::QueueFull { capacity: self.capacity });
        }
        self.taken += 1;
        let length = match request.operation {
            Operation::Flush => Some(0),
            Operation::Read | Operation::Write => {
                request.buffers.iter().try_fold(0u64, |sum, iovec| sum.checked_add(iovec.iov_len as u64))
            }
            Operation::Discard | Operation::WriteZeroes { .. } => Some(request.length),
        };
        let start = if request.operation == Operation::Flush { 0 } else { request.offset };
        let end = length.and_then(|length| start.checked_add(length));
        let valid = |end: &u64| {
            *end <= self.shared.size() && start.is_multiple_of(SECTOR_BYTES) && end.is_multiple_of(SECTOR_BYTES)
        };
        let Some(end) = end.filter(valid) else {
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            let (operation, length) = (request.operation, length.unwrap_or(u64::MAX));
            let error = IoError { operation, offset: start, length, source };
            self.done.push_back(Completion { token: request.token, result: Err(error) });
            return Ok(());
        };
        self.with(|core, coord| {
            let index = core.ops.take();
            let birth = coord.birth();
            let memory = core.shared.alignment.memory;
            let Some(op) = core.ops.get(index) else { return };
            op.begin(Kind::Guest(request.operation), birth, start, end);
            op.token = request.token;
            if matches!(request.operation, Operation::Read | Operation::Write) {
                op.iovecs.extend_from_slice(request.buffers);
                let aligned = |iovec: &libc::iovec| (iovec.iov_base as usize | iovec.iov_len) & (memory - 1) == 0;
                op.aligned = memory == 1 || request.buffers.iter().all(aligned);
            }
            if coord.closed {
                op.error = Some(libc::ESHUTDOWN);
            } else if request.operation != Operation::Flush && (!core.throttled.is_empty() || !coord.limiter.is_off()) {
                core.throttled.push_back(index);
                core.run_throttled(coord);
                return;
            }
            core.pump(index, coord);
        });
        Ok(())
    }

    /// Takes the next call to make. It stays valid until [`finish`](Self::finish).
    pub(crate) fn next_call(&mut self) -> Option<usize> {
        let index = self.ready.pop_front()?;
        self.prepare(index);
        Some(index)
    }

    /// The call of a transfer that `next_call` gave.
    pub(crate) fn call(&mut self, index: usize) -> Option<(FileId, Call<'_>)> {
        let transfer = self.transfers.get(index)?;
        let file = transfer.file;
        transfer.task.call().map(|call| (file, call))
    }

    /// A call ended: bytes moved (0 for syncs and fallocate), or an errno.
    pub(crate) fn finish(&mut self, index: usize, result: Result<u64, i32>) {
        let Some(transfer) = self.transfers.get(index) else { return };
        let result = match transfer.task.advance(result) {
            Verdict::Again => {
                self.ready.push_back(index);
                return;
            }
            Verdict::Done(result) => result.map_err(|error| error.source.raw_os_error().unwrap_or(libc::EIO)),
        };
        let waits = matches!(
            transfer.purpose,
            Purpose::Write { .. } | Purpose::FillWrite { .. } | Purpose::FlushPage | Purpose::FlushLog
        );
        if waits && matches!(result, Err(libc::ENOSPC | libc::EDQUOT)) {
            self.stall(index);
            return;
        }
        if std::mem::take(&mut transfer.stalled) {
            self.with(|_, coord| {
                coord.stalls = coord.stalls.saturating_sub(1);
                if coord.stalls == 0 && !coord.chunk_impaired {
                    coord.effects.push(Effect::Recovered);
                }
            });
        }
        self.complete(index, result);
    }

    fn stall(&mut self, index: usize) {
        self.stalled.push(index);
        self.retry_at = self.clock.now() + STALL_RETRY_NS;
        let Some(transfer) = self.transfers.get(index) else { return };
        if !std::mem::replace(&mut transfer.stalled, true) {
            self.with(|_, coord| {
                coord.stalls += 1;
                if coord.stalls == 1 {
                    coord.effects.push(Effect::Impaired(Cause::NoSpace));
                }
            });
        }
    }

    /// Mails this queue itself, for queues that are used by the calling thread alone.
    pub(crate) fn post_to_self(&mut self, mail: Mail) {
        let id = self.id;
        self.with(|_, coord| coord.post(id, mail, Some(id)));
    }

    pub(crate) fn has_done(&mut self) -> bool {
        !self.done.is_empty()
    }

    pub(crate) fn pop_done(&mut self) -> Option<Completion> {
        let completion = self.done.pop_front()?;
        self.taken = self.taken.saturating_sub(1);
        Some(completion)
    }

    /// Transfers that the executor holds.
    pub(crate) fn outstanding(&self) -> usize {
        self.transfers.used() - self.ready.len() - self.stalled.len()
    }

    /// Transfers that the executor holds or is about to get.
    pub(crate) fn active(&self) -> usize {
        self.transfers.used() - self.stalled.len()
    }

    /// Time (ns, the core's clock) at which [`turn`](Self::turn) has something to do.
    pub(crate) fn next_wakeup(&self) -> Option<u64> {
        let stall = (!self.stalled.is_empty()).then_some(self.retry_at);
        let throttle = (!self.throttled.is_empty()).then_some(self.throttled_until);
        let recheck = (self.parked > 0).then_some(self.recheck_at);
        [stall, throttle, recheck].into_iter().flatten().min()
    }

    /// Does what is due by time, and what other threads asked for.
    pub(crate) fn turn(&mut self) {
        let due = self.next_wakeup().is_some();
        self.with(|core, coord| {
            if !due {
                return;
            }
            let now = core.clock.now();
            if now >= core.retry_at {
                core.ready.extend(core.stalled.drain(..));
            }
            if !core.throttled.is_empty() && now >= core.throttled_until {
                core.run_throttled(coord);
            }
            if core.parked > 0 && now >= core.recheck_at {
                core.recheck(coord, now);
            }
        });
    }

    /// Runs `f` with the volume's shared state, then what was mailed to this queue, then calls out.
    pub(super) fn with(&mut self, f: impl FnOnce(&mut Self, &mut Coord)) {
        let shared = Arc::clone(&self.shared);
        let mut coord = shared.coord();
        f(self, &mut coord);
        self.read_mail(&mut coord);
        if coord.effects.is_empty() {
            return;
        }
        let effects = std::mem::take(&mut coord.effects);
        drop(coord);
        shared.perform(effects);
    }

    fn read_mail(&mut self, coord: &mut Coord) {
        let mut mail = std::mem::take(&mut self.mail);
        loop {
            coord.take_mail(self.id, &mut mail);
            if mail.is_empty() {
                break;
            }
            for each in mail.drain(..) {
                match each {
                    Mail::Wake { op, birth } => self.wake(op, birth, coord),
                    Mail::Freeze { attempt } => self.begin_prepare(attempt, coord),
                    Mail::Stage { chunk } => {
                        self.demands.push_back(chunk);
                        self.run_demands(coord);
                    }
                    Mail::Demands => self.run_demands(coord),
                    Mail::LimitsChanged => self.run_throttled(coord),
                }
            }
        }
        self.mail = mail;
    }

    fn wake(&mut self, index: usize, birth: u64, coord: &mut Coord) {
        let Some(op) = self.ops.get(index) else { return };
        if op.birth != birth || !op.waiting {
            return;
        }
        op.waiting = false;
        if std::mem::take(&mut op.parked) {
            self.parked -= 1;
        }
        self.pump(index, coord);
    }

    fn waiter(&mut self, index: usize) -> Option<Waiter> {
        let queue = self.id;
        let op = self.ops.get(index)?;
        op.waiting = true;
        Some(Waiter { queue, op: index, birth: op.birth })
    }

    /// The request waits until something that it conflicts with ends.
    pub(super) fn block(&mut self, index: usize, coord: &mut Coord) {
        coord.blocked.extend(self.waiter(index));
    }

    /// The request waits for a flush run to end.
    pub(super) fn await_flush(&mut self, index: usize, coord: &mut Coord) {
        coord.flush.waiting.extend(self.waiter(index));
    }

    /// The request waits for base chunks; the missing ones of its range are asked for.
    pub(super) fn park(&mut self, index: usize, from: u64, to: u64, coord: &mut Coord) {
        let now = self.clock.now();
        let first = from / CHUNK_BYTES;
        let last = to.div_ceil(CHUNK_BYTES).min(first + FETCH_AHEAD);
        for chunk in first..last {
            let start = (chunk * CHUNK_BYTES).max(from);
            let stop = ((chunk + 1) * CHUNK_BYTES).min(to);
            let run = coord.bits.run(start / BLOCK_BYTES, stop.div_ceil(BLOCK_BYTES));
            let needed = !run.local || run.end < stop.div_ceil(BLOCK_BYTES);
            if needed && !self.shared.presence.has(chunk) && !coord.fetches.contains_key(&chunk) {
                coord.fetches.insert(chunk, now);
                coord.effects.push(Effect::Fetch(chunk));
            }
        }
        if self.parked == 0 {
            self.recheck_at = now + RECHECK_NS;
        }
        self.parked += 1;
        coord.parked.extend(self.waiter(index));
        if let Some(op) = self.ops.get(index) {
            op.parked = true;
        }
    }

    /// Parked requests look again, in case nobody told; chunks that take too long are asked for once more.
    fn recheck(&mut self, coord: &mut Coord, now: u64) {
        self.recheck_at = now + RECHECK_NS;
        let presence = &self.shared.presence;
        coord.fetches.retain(|chunk, _| !presence.has(*chunk));
        let Coord { fetches, effects, chunk_impaired, stalls, .. } = coord;
        for (chunk, asked) in fetches.iter_mut() {
            if now.saturating_sub(*asked) >= FETCH_PATIENCE_NS {
                *asked = now;
                effects.push(Effect::Fetch(*chunk));
                if !std::mem::replace(chunk_impaired, true) {
                    effects.push(Effect::Impaired(Cause::ChunkUnavailable { chunk: *chunk }));
                }
            }
        }
        if fetches.is_empty() && std::mem::take(chunk_impaired) && *stalls == 0 {
            effects.push(Effect::Recovered);
        }
        coord.wake_parked(Some(self.id));
    }

    fn run_throttled(&mut self, coord: &mut Coord) {
        while let Some(index) = self.throttled.front().copied() {
            let Some(op) = self.ops.get(index) else { return };
            let transfers = matches!(op.kind, Kind::Guest(Operation::Read | Operation::Write));
            let bytes = if transfers { op.end - op.start } else { 0 };
            match coord.limiter.admit(bytes, self.clock.now()) {
                Ok(()) => {
                    self.throttled.pop_front();
                    self.pump(index, coord);
                }
                Err(at) => {
                    self.throttled_until = at;
                    return;
                }
            }
        }
    }

    /// Starts what a request can do now.
    pub(super) fn pump(&mut self, index: usize, coord: &mut Coord) {
        let Some(op) = self.ops.get(index) else { return };
        let kind = op.kind;
        if self.closing && matches!(kind, Kind::Guest(_) | Kind::Prepare(_)) {
            return;
        }
        match kind {
            Kind::Guest(Operation::Read) => self.pump_read(index, coord),
            Kind::Guest(Operation::Flush) => self.pump_flush(index, coord),
            Kind::Guest(operation) => self.pump_write(index, operation, coord),
            Kind::Copy { .. } => self.pump_copy(index, coord),
            Kind::Prepare(step) => self.pump_prepare(index, step, coord),
            Kind::FlushRun(_) => {}
        }
    }

    /// Answers a guest's request when nothing of it is left to do.
    pub(super) fn settle(&mut self, index: usize) {
        let Some(op) = self.ops.get(index) else { return };
        if op.in_flight > 0 || (op.error.is_none() && op.next < op.end) || op.birth == 0 {
            return;
        }
        let failure = |errno| IoError {
            operation: op.operation(),
            offset: op.start,
            length: op.end - op.start,
            source: io::Error::from_raw_os_error(errno),
        };
        let result = op.error.map_or(Ok(()), |errno| Err(failure(errno)));
        self.done.push_back(Completion { token: op.token, result });
        self.release(index);
    }

    /// Frees the slot; who still knows it by its birth is ignored.
    pub(super) fn release(&mut self, index: usize) {
        let Some(op) = self.ops.get(index) else { return };
        op.birth = 0;
        op.waiting = false;
        if std::mem::take(&mut op.parked) {
            self.parked -= 1;
        }
        if let Some(buffer) = op.buffer.take() {
            self.buffers.give(buffer);
        }
        self.ops.give(index);
    }

    /// Stops taking new steps for the guest. The executor then finishes what is outstanding and calls [`close`](Self::close).
    pub(crate) fn begin_close(&mut self) {
        self.closing = true;
    }

    /// Nothing is outstanding: gives up what waits, so that other queues do not wait for this one.
    pub(crate) fn close(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut coord = shared.coord();
        let coord = &mut *coord;
        let waiting: Vec<usize> = self.ready.drain(..).chain(self.stalled.drain(..)).collect();
        for index in waiting {
            let Some(transfer) = self.transfers.get(index) else { continue };
            match transfer.purpose {
                Purpose::Write { active, .. } => {
                    coord.end_active(active);
                }
                Purpose::FillRead { block } | Purpose::FillWrite { block } => {
                    coord.exclusive.retain(|each| *each != block);
                }
                _ => {}
            }
            if std::mem::take(&mut transfer.stalled) {
                coord.stalls = coord.stalls.saturating_sub(1);
            }
        }
        for op in self.ops.iter_mut().filter(|op| op.birth != 0) {
            match op.kind {
                Kind::FlushRun(_) => {
                    op.pages.iter().for_each(|(write, _)| coord.bits.not_written(*write));
                    coord.flush.running = false;
                    coord.flush.unsynced = true;
                }
                Kind::Copy { chunk } => coord.freeze.copies.retain(|each| *each != chunk),
                Kind::Prepare(_) if op.token == coord.freeze.attempt => coord.freeze.abandon(libc::ECANCELED),
                Kind::Guest(_) | Kind::Prepare(_) => {}
            }
        }
        let mut orphans: Vec<Mail> = self.demands.drain(..).map(|chunk| Mail::Stage { chunk }).collect();
        coord.take_mail(self.id, &mut orphans);
        coord.remove_queue(self.id);
        for mail in orphans {
            match (coord.any_queue(), mail) {
                (Some(other), Mail::Freeze { .. } | Mail::Stage { .. }) => coord.post(other, mail, None),
                (None, Mail::Freeze { .. }) => coord.freeze.abandon(libc::ECANCELED),
                _ => {}
            }
        }
        coord.wake_blocked(None);
        coord.wake_hindered(None);
        coord.wake_flushes(None);
        self.shared.prepared.notify();
    }
}
