//! Requests and their transfers inside one queue.

use super::buffer::Buffer;
use super::shared::{FlushRun, Kept};
use crate::Operation;
use crate::map::PageWrite;
use crate::map::log::Entry;
use crate::task::Task;

/// The file a transfer goes to; its number is its place among a ring's registered files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum FileId {
    Data = 0,
    Map = 1,
    Base = 2,
    Stage = 3,
    Staged = 4,
}

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One of the guest's.
    Guest(Operation),
    /// Makes durable what was written; answers all that wait for it.
    FlushRun(FlushRun),
    /// Copies one chunk to the stage.
    Copy { chunk: u64 },
    /// Prepares a freeze.
    Prepare(PrepareStep),
}

/// How far a freeze's preparation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrepareStep {
    /// The long flush, while writes go on.
    Flush,
    /// Writes wait; those in flight end.
    Drain,
    /// The short flush of what came meanwhile.
    FlushRest,
}

/// One request.
#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) kind: Kind,
    pub(crate) token: u64,
    /// The guest's request, in bytes of the volume.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// First byte without a transfer yet.
    pub(crate) next: u64,
    pub(crate) iovecs: Vec<libc::iovec>,
    /// The iovec that holds `next` and the bytes of it already used.
    pub(crate) cursor: (usize, usize),
    /// All iovecs satisfy direct I/O.
    pub(crate) aligned: bool,
    /// Transfers in flight.
    pub(crate) in_flight: usize,
    pub(crate) error: Option<i32>,
    /// Registered with a list of waiters.
    pub(crate) waiting: bool,
    /// ... of which this one is for chunks of the base.
    pub(crate) parked: bool,
    /// Identifies this use of the slot.
    pub(crate) birth: u64,
    /// Flush run that answers it.
    pub(crate) ticket: u64,
    /// The chunk being copied.
    pub(crate) buffer: Option<Buffer>,
    /// Where in `staged` its completion is marked (as of the freeze: the volume may grow).
    pub(crate) mark: u64,
    /// Pages of a flush run.
    pub(crate) pages: Vec<(PageWrite, Buffer)>,
    /// What a flush run puts into the log: place (in blocks) and sequence of the record, its contents and entries.
    pub(crate) record: (u64, u64),
    pub(crate) kept: Vec<Kept>,
    pub(crate) entries: Vec<Entry>,
}

impl Op {
    pub(crate) fn idle() -> Self {
        Self {
            kind: Kind::FlushRun(FlushRun::All),
            token: 0,
            start: 0,
            end: 0,
            next: 0,
            iovecs: Vec::new(),
            cursor: (0, 0),
            aligned: true,
            in_flight: 0,
            error: None,
            waiting: false,
            parked: false,
            birth: 0,
            ticket: 0,
            buffer: None,
            mark: 0,
            pages: Vec::new(),
            record: (0, 0),
            kept: Vec::new(),
            entries: Vec::new(),
        }
    }

    /// Makes the slot a new request; the iovec array keeps its memory.
    pub(crate) fn begin(&mut self, kind: Kind, birth: u64, start: u64, end: u64) {
        let mut iovecs = std::mem::take(&mut self.iovecs);
        let pages = std::mem::take(&mut self.pages);
        iovecs.clear();
        *self = Self { kind, birth, start, end, next: start, iovecs, pages, ..Self::idle() };
    }

    /// Moves iovecs for the next `length` bytes to `into`.
    pub(crate) fn take_iovecs(&mut self, mut length: usize, into: &mut Vec<libc::iovec>) {
        let (index, used) = &mut self.cursor;
        while length > 0 {
            let Some(iovec) = self.iovecs.get(*index) else { return };
            let left = iovec.iov_len - *used;
            let now = left.min(length);
            if now > 0 {
                let iov_base = iovec.iov_base.cast::<u8>().wrapping_add(*used).cast();
                into.push(libc::iovec { iov_base, iov_len: now });
            }
            length -= now;
            *used += now;
            if now == left {
                *index += 1;
                *used = 0;
            }
        }
    }

    /// The guest's operation, for error messages.
    pub(crate) fn operation(&self) -> Operation {
        match self.kind {
            Kind::Guest(operation) => operation,
            _ => Operation::Flush,
        }
    }
}

/// What happens when a transfer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The guest's buffers or the bounce buffer were filled.
    Read,
    /// Blocks were stored, discarded or zeroed.
    Write {
        active: usize,
        /// What is written is kept for the log, so it must not change meanwhile: it goes through a buffer.
        keep: bool,
    },
    /// The old content of a block that a request changes in part.
    FillRead {
        block: u64,
    },
    /// That block with the change.
    FillWrite {
        block: u64,
    },
    CopyRead,
    CopyWrite,
    CopyMark,
    FlushData,
    FlushPage,
    FlushMap,
    FlushLog,
}

/// One call, or a series of calls where the kernel does things in part.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) op: usize,
    pub(crate) purpose: Purpose,
    pub(crate) file: FileId,
    pub(crate) task: Task,
    pub(crate) bounce: Option<Buffer>,
    /// The guest's memory behind `bounce`; empty stands for zeros in writes.
    pub(crate) guest: Vec<libc::iovec>,
    /// Bytes of `bounce` before the guest's.
    pub(crate) skip: usize,
    /// Where the file is accessed.
    pub(crate) offset: u64,
    /// The guest's part, in bytes of the volume.
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// Waits for space.
    pub(crate) stalled: bool,
    /// Its call is set up.
    pub(crate) prepared: bool,
}

// SAFETY: the iovecs in `guest` refer to memory that the submitter keeps valid on all threads until completion
// (`VolumeQueue::submit`).
unsafe impl Send for Transfer {}
// SAFETY: as above.
unsafe impl Send for Op {}

impl Transfer {
    pub(crate) fn idle() -> Self {
        Self {
            op: 0,
            purpose: Purpose::Read,
            file: FileId::Data,
            task: Task::idle(),
            bounce: None,
            guest: Vec::new(),
            skip: 0,
            offset: 0,
            from: 0,
            to: 0,
            stalled: false,
            prepared: false,
        }
    }
}

/// Slots that are reused, so that what they own is allocated once.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<T>,
    free: Vec<usize>,
    idle: fn() -> T,
}

impl<T> Slab<T> {
    pub(crate) fn new(idle: fn() -> T) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), idle }
    }

    pub(crate) fn take(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push((self.idle)());
            self.slots.len() - 1
        })
    }

    pub(crate) fn give(&mut self, index: usize) {
        self.free.push(index);
    }

    pub(crate) fn get(&mut self, index: usize) -> Option<&mut T> {
        self.slots.get_mut(index)
    }

    /// Slots in use.
    pub(crate) fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut()
    }
}
