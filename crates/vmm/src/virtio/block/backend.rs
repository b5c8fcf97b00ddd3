//! Requests from virtqueues to a volume queue and back.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use hearth_block::{BlockError, Completion, Operation, Request, VolumeQueue};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::RANGES_MAX;
use super::request::{Bounds, Work, decode};
use crate::control::protocol::DiskStats;
use crate::virtio::DeviceStats;
use crate::virtio::backend::{Backend, Broken, Wake};
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::volume::OpenVolume;

/// Volume requests in flight per disk: bounds host memory whatever the guest queues.
const IN_FLIGHT_MAX: usize = 256;
/// The token of a retiring disk's last flush; the guest's requests have slot numbers.
const LAST_FLUSH: u64 = u64::MAX;
/// Rounds over the queues before other devices get their turn.
const ROUNDS: usize = 8;

/// One request between its chain and its used entry.
struct Pending {
    queue: usize,
    head: u16,
    status_address: GuestAddress,
    /// Bytes stored in the chain when it succeeds.
    written: u32,
    operation: Operation,
    bytes: u64,
    /// Volume requests not completed yet.
    parts: usize,
    failed: bool,
    /// A write that must be durable before it completes, because the driver has no FLUSH.
    then_flush: bool,
}

/// How far a disk has given back its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Retirement {
    No,
    /// Requests in flight finish; new ones fail.
    Draining,
    /// The last flush is under way.
    Flushing,
    /// The volume is closed; `durable` as the last flush said.
    Released {
        durable: bool,
    },
    /// And that has been told.
    Over,
}

/// What of `bytes` a disk can offer.
fn whole_sectors(bytes: u64) -> u64 {
    bytes / hearth_block::SECTOR_BYTES * hearth_block::SECTOR_BYTES
}

/// A disk's I/O side.
pub(crate) struct BlockBackend {
    /// `None` once given back.
    volume: Option<OpenVolume>,
    retirement: Retirement,
    serial_text: String,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    bounds: Bounds,
    io: Option<Box<dyn VolumeQueue>>,
    /// Declared after `io`: dropped after it, so guest memory outlives requests in flight.
    chain: Chain,
    /// Reused by `decode`.
    ranges: Vec<(u64, u64)>,
    queues: Vec<Option<VirtQueue>>,
    in_flight: Vec<usize>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    completions: Vec<Completion>,
    write_through: bool,
    stats: DiskStats,
}

impl BlockBackend {
    pub(crate) fn new(open: OpenVolume, serial: &str, queues: usize, memory: &Arc<GuestMemoryMmap>) -> Self {
        let volume = &open.volume;
        let limits = volume.limits();
        let mut padded = [0; VIRTIO_BLK_ID_BYTES as usize];
        padded.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let bounds = Bounds {
            size: whole_sectors(volume.size_bytes()),
            read_only: volume.read_only(),
            max_discard: limits.max_discard_bytes,
            max_write_zeroes: limits.max_write_zeroes_bytes,
        };
        Self {
            volume: Some(open),
            retirement: Retirement::No,
            serial_text: serial.to_owned(),
            serial: padded,
            bounds,
            io: None,
            chain: Chain::new(memory),
            ranges: Vec::new(),
            queues: (0..queues).map(|_| None).collect(),
            in_flight: vec![0; queues],
            pending: Vec::new(),
            free: Vec::new(),
            completions: Vec::new(),
            write_through: false,
            stats: DiskStats::default(),
        }
    }

    /// Opens the volume's queue. Done before the I/O thread is confined: it may not make rings or threads afterwards.
    pub(crate) fn open(&mut self) -> Result<(), BlockError> {
        if let (None, Some(volume)) = (&self.io, &self.volume) {
            self.io = Some(volume.volume.open_queue(IN_FLIGHT_MAX)?);
        }
        Ok(())
    }

    /// Takes chains off queue `index` while the volume queue has room. True when it took any.
    fn take(&mut self, index: usize) -> Result<bool, Broken> {
        let mut any = false;
        while self.has_room() {
            let Some(Some(queue)) = self.queues.get_mut(index) else { break };
            let Some(head) = queue.pop(&mut self.chain)? else { break };
            any = true;
            self.begin(index, head)?;
        }
        Ok(any)
    }

    /// True when a request can be begun. Without a volume it can always be refused.
    fn has_room(&self) -> bool {
        self.io.as_ref().map_or(self.retirement != Retirement::No, |io| io.in_flight() + RANGES_MAX <= io.capacity())
    }

    /// Goes on giving back the volume as far as requests in flight allow. True when something may have completed.
    fn turn_retirement(&mut self) -> Result<bool, Broken> {
        if matches!(self.retirement, Retirement::Draining | Retirement::Flushing) && self.is_hopeless() {
            // Nobody may ever bring what these requests wait for.
            self.give_up()?;
        }
        let idle = self.io.as_ref().is_none_or(|io| io.in_flight() == 0);
        if self.retirement != Retirement::Draining || !idle {
            return Ok(false);
        }
        let (Some(io), false) = (self.io.as_mut(), self.bounds.read_only) else {
            self.release(true);
            return Ok(false);
        };
        let request = Request { operation: Operation::Flush, offset: 0, length: 0, buffers: &[], token: LAST_FLUSH };
        // SAFETY: no buffers.
        let sent = unsafe { io.submit(request) }.and_then(|()| io.kick());
        self.retirement = Retirement::Flushing;
        if sent.is_err() {
            self.release(false);
        }
        sent?;
        Ok(true)
    }

    fn is_hopeless(&self) -> bool {
        self.volume.as_ref().is_some_and(OpenVolume::is_hopeless)
    }

    /// Ends every request in flight with an error, after the kernel is done with its buffers.
    fn give_up(&mut self) -> Result<(), Broken> {
        self.io = None;
        self.retirement = Retirement::Draining;
        self.free.clear();
        for mut pending in std::mem::take(&mut self.pending).into_iter().flatten() {
            pending.failed = true;
            self.finish(&pending)?;
        }
        Ok(())
    }

    fn release(&mut self, durable: bool) {
        self.io = None;
        self.volume = None;
        self.retirement = Retirement::Released { durable };
    }

    fn begin(&mut self, index: usize, head: u16) -> Result<(), Broken> {
        let status_address = self.chain.last_writable.ok_or(QueueError::Request(index))?;
        let work = decode(&mut self.chain, &self.bounds, &mut self.ranges).ok_or(QueueError::Request(index))?;
        let mut pending = Pending {
            queue: index,
            head,
            status_address,
            written: 1,
            operation: Operation::Flush,
            bytes: 0,
            parts: 1,
            failed: false,
            then_flush: false,
        };
        let work = match work {
            Work::Identify | Work::Refuse(_) => work,
            _ if self.retirement != Retirement::No => Work::Refuse(VIRTIO_BLK_S_IOERR as u8),
            _ => work,
        };
        match work {
            Work::Refuse(status) => {
                self.stats.errors += 1;
                self.answer(&pending, u32::from(status))
            }
            Work::Identify => {
                self.chain.writable.write(0, &self.serial);
                pending.written += self.serial.len() as u32;
                self.answer(&pending, VIRTIO_BLK_S_OK)
            }
            Work::Flush => self.submit(pending, Operation::Flush, &[(0, 0)]),
            Work::Ranges { operation } => {
                let ranges = std::mem::take(&mut self.ranges);
                pending.operation = operation;
                pending.parts = ranges.len();
                pending.then_flush = self.write_through;
                let result = self.submit(pending, operation, &ranges);
                self.ranges = ranges;
                result
            }
            Work::Transfer { operation, offset } => {
                pending.operation = operation;
                let reads = operation == Operation::Read;
                let data = if reads { &self.chain.writable } else { &self.chain.readable };
                pending.bytes = data.len();
                if reads {
                    pending.written = u32::try_from(data.len() + 1).unwrap_or(u32::MAX);
                }
                pending.then_flush = self.write_through && !reads;
                self.submit(pending, operation, &[(offset, 0)])
            }
        }
    }

    /// Hands one request's parts to the volume; buffers are the current chain's.
    fn submit(&mut self, pending: Pending, operation: Operation, ranges: &[(u64, u64)]) -> Result<(), Broken> {
        let Some(io) = self.io.as_mut() else { return Ok(()) };
        let buffers = match operation {
            Operation::Read => self.chain.writable.iovecs(),
            Operation::Write => self.chain.readable.iovecs(),
            _ => &[],
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        for (offset, length) in ranges {
            let request = Request { operation, offset: *offset, length: *length, buffers, token: slot as u64 };
            // SAFETY: the buffers are guest memory, checked by `GuestBuffers::append`; `self.chain` keeps the mapping alive and
            // is dropped after `self.io`, which waits for what is in flight.
            unsafe { io.submit(request)? };
        }
        if let Some(count) = self.in_flight.get_mut(pending.queue) {
            *count += 1;
        }
        if let Some(entry) = self.pending.get_mut(slot) {
            *entry = Some(pending);
        }
        Ok(())
    }

    /// Sends what was submitted and finishes what is complete. True when something completed.
    fn turn_volume(&mut self) -> Result<bool, Broken> {
        let Some(io) = self.io.as_mut() else { return Ok(false) };
        io.kick()?;
        let completions = &mut self.completions;
        io.drain(&mut |completion| completions.push(completion))?;
        let mut done = std::mem::take(&mut self.completions);
        let any = !done.is_empty();
        // All of them, whatever one runs into: a request that is never counted as done would hold up a reset for ever.
        let mut result = Ok(any);
        for completion in done.drain(..) {
            if let Err(error) = self.complete(completion) {
                result = Err(error);
            }
        }
        self.completions = done;
        result
    }

    fn complete(&mut self, completion: Completion) -> Result<(), Broken> {
        if completion.token == LAST_FLUSH {
            self.release(completion.result.is_ok());
            return Ok(());
        }
        let slot = completion.token as usize;
        let Some(Some(pending)) = self.pending.get_mut(slot) else { return Ok(()) };
        pending.failed |= completion.result.is_err();
        pending.parts = pending.parts.saturating_sub(1);
        if pending.parts > 0 {
            return Ok(());
        }
        if pending.then_flush && !pending.failed {
            pending.then_flush = false;
            pending.parts = 1;
            let request =
                Request { operation: Operation::Flush, offset: 0, length: 0, buffers: &[], token: slot as u64 };
            if let Some(io) = self.io.as_mut() {
                // SAFETY: no buffers.
                unsafe { io.submit(request)? };
                io.kick()?;
            }
            return Ok(());
        }
        let Some(pending) = self.pending.get_mut(slot).and_then(Option::take) else { return Ok(()) };
        self.free.push(slot);
        self.finish(&pending)
    }

    fn finish(&mut self, pending: &Pending) -> Result<(), Broken> {
        if let Some(count) = self.in_flight.get_mut(pending.queue) {
            *count = count.saturating_sub(1);
        }
        self.count(pending);
        self.answer(pending, if pending.failed { VIRTIO_BLK_S_IOERR } else { VIRTIO_BLK_S_OK })
    }

    fn count(&mut self, pending: &Pending) {
        let stats = &mut self.stats;
        if pending.failed {
            stats.errors += 1;
            return;
        }
        match pending.operation {
            Operation::Read => {
                stats.read_ops += 1;
                stats.read_bytes += pending.bytes;
            }
            Operation::Flush => stats.flush_ops += 1,
            _ => {
                stats.write_ops += 1;
                stats.write_bytes += pending.bytes;
            }
        }
    }

    /// Status byte and used entry; nothing when the queue was reset meanwhile.
    fn answer(&mut self, pending: &Pending, status: u32) -> Result<(), Broken> {
        if let Some(Some(queue)) = self.queues.get_mut(pending.queue) {
            queue.store_byte(pending.status_address, status as u8)?;
            queue.push_used(pending.head, pending.written)?;
        }
        Ok(())
    }

    fn signal(&mut self) -> Result<(), QueueError> {
        self.started().try_for_each(VirtQueue::signal_used)
    }

    fn started(&mut self) -> impl Iterator<Item = &mut VirtQueue> {
        self.queues.iter_mut().flatten()
    }
}

impl Backend for BlockBackend {
    fn activate(&mut self, features: u64) -> Result<(), Broken> {
        self.write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        Ok(self.open()?)
    }

    fn event_fd(&self) -> Option<RawFd> {
        self.io.as_ref().map(|io| io.completion_fd().as_raw_fd())
    }

    fn always_on(&self) -> bool {
        true
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.volume.as_ref().and_then(OpenVolume::wake_fd)
    }

    fn is_stuck(&self) -> bool {
        self.volume.as_ref().is_some_and(OpenVolume::is_stuck)
    }

    fn start_queue(&mut self, queue: VirtQueue) {
        let index = queue.index();
        if let Some(slot) = self.queues.get_mut(index) {
            *slot = Some(queue);
        }
    }

    fn stop_queue(&mut self, index: usize) {
        if let Some(slot) = self.queues.get_mut(index) {
            *slot = None;
        }
    }

    fn in_flight(&self, index: usize) -> usize {
        self.in_flight.get(index).copied().unwrap_or(0)
    }

    fn wake(&mut self, wake: Wake) {
        // Looking at every ring costs less than remembering which one was notified.
        if let (Wake::Outside, Some(volume)) = (wake, &self.volume) {
            volume.chunks_came();
        }
    }

    fn run(&mut self, accept: bool) -> Result<bool, Broken> {
        for _ in 0..ROUNDS {
            let mut more = false;
            if accept {
                for index in 0..self.queues.len() {
                    if let Some(Some(queue)) = self.queues.get_mut(index) {
                        queue.disable_notification()?;
                        more |= self.take(index)?;
                    }
                }
            }
            more |= self.turn_volume()?;
            more |= self.turn_retirement()?;
            if more {
                // Perhaps the driver has added to it meanwhile: one interrupt for all.
                continue;
            }
            // Notifications stay off until the thread sleeps.
            self.signal()?;
            return Ok(false);
        }
        self.signal()?;
        Ok(true)
    }

    fn rest(&mut self) -> Result<bool, Broken> {
        let mut more = false;
        // Without room, completions call again.
        if self.has_room() {
            for queue in self.started() {
                more |= queue.enable_notification()?;
            }
        }
        Ok(more)
    }

    fn has_chains(&self) -> bool {
        self.has_room() && self.queues.iter().flatten().any(VirtQueue::has_chains)
    }

    fn retire(&mut self) {
        if self.retirement == Retirement::No {
            self.retirement = Retirement::Draining;
        }
    }

    fn holds_host(&self) -> bool {
        self.volume.is_some()
    }

    fn take_released(&mut self) -> Option<bool> {
        let Retirement::Released { durable } = self.retirement else { return None };
        self.retirement = Retirement::Over;
        Some(durable)
    }

    fn resized(&mut self, bytes: u64) {
        self.bounds.size = whole_sectors(bytes);
    }

    fn collect(&self, stats: &mut DeviceStats) {
        if self.volume.is_some() {
            stats.disks.push(DiskStats { serial: self.serial_text.clone(), ..self.stats.clone() });
        }
    }
}
