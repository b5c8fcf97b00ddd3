//! The seam between disk front-ends and volume engines.

use std::fmt;
use std::os::fd::BorrowedFd;

use crate::{BlockError, IoError};

/// The unit of virtio-blk addresses and the smallest logical block we offer.
pub const SECTOR_BYTES: u64 = 512;

/// What a volume can do, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Addressing granularity seen by the guest.
    pub logical_block_bytes: u32,
    /// Smallest write without read-modify-write underneath; a multiple of the logical block.
    pub physical_block_bytes: u32,
    /// Preferred multiple for large transfers, 0 = none.
    pub optimal_io_bytes: u32,
    /// Largest single [`Operation::Discard`], 0 = not offered.
    pub max_discard_bytes: u64,
    /// Discards that do not cover whole units of this may free nothing.
    pub discard_granularity_bytes: u32,
    /// Largest single [`Operation::WriteZeroes`], 0 = not offered.
    pub max_write_zeroes_bytes: u64,
}

/// A block volume, shared by all threads that do its I/O.
pub trait Volume: Send + Sync + fmt::Debug {
    /// Size in bytes; front-ends use whole sectors only.
    fn size_bytes(&self) -> u64;

    /// Writes, discards and zeroing are refused with `EROFS` when true.
    fn read_only(&self) -> bool;

    /// Offered capabilities.
    fn limits(&self) -> Limits;

    /// Opens a submission queue for one I/O thread with room for `capacity` requests in flight. The returned queue may be
    /// moved to another thread until its first [`VolumeQueue::kick`] and must stay on that thread from then on.
    fn open_queue(&self, capacity: usize) -> Result<Box<dyn VolumeQueue>, BlockError>;

    /// Makes the volume `bytes` long, or learns that its file already is; `size_bytes` says so afterwards.
    ///
    /// # Errors
    /// The volume cannot grow, or not to this size. It has its old size then.
    fn grow(&self, bytes: u64) -> Result<(), BlockError>;

    /// Makes all completed writes durable; blocks. For shutdown and pause paths, not for guest requests.
    fn sync(&self) -> Result<(), BlockError>;

    /// The orderly end, after all queues were dropped: everything becomes durable, and requests may fail afterwards. Blocks.
    fn close(&self) -> Result<(), BlockError> {
        self.sync()
    }
}

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffers from the volume.
    Read,
    /// Store the buffers to the volume.
    Write,
    /// Make every write completed before this request was submitted durable.
    Flush,
    /// The range's content is no longer needed; it may read as anything afterwards.
    Discard,
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Space may be given back to the host.
        may_unmap: bool,
    },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes { .. } => "write-zeroes",
        })
    }
}

/// One request. For `Read` and `Write` the length is the sum of `buffers`; for `Discard` and `WriteZeroes` it is `length`.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// What to do.
    pub operation: Operation,
    /// First byte on the volume.
    pub offset: u64,
    /// Bytes to discard or zero; ignored by the others.
    pub length: u64,
    /// Memory to fill or to store. The array itself is copied by `submit`.
    pub buffers: &'a [libc::iovec],
    /// Handed back in the [`Completion`].
    pub token: u64,
}

/// The outcome of one request.
#[derive(Debug)]
pub struct Completion {
    /// [`Request::token`].
    pub token: u64,
    /// All of it was done, or it failed; a failed read or write may have been done in part.
    pub result: Result<(), IoError>,
}

/// A queue of requests to one volume, used by one thread. Dropping it waits for everything in flight.
pub trait VolumeQueue: Send {
    /// Takes one request; it is sent at the next [`kick`](Self::kick).
    ///
    /// # Errors
    /// [`BlockError::QueueFull`] when [`capacity`](Self::capacity) requests are in flight; nothing was taken.
    ///
    /// # Safety
    /// The memory behind `request.buffers` must stay mapped (readable for `Write`, writable for `Read`) until the request's
    /// completion was drained or the queue was dropped. It may change at any time (it is guest memory).
    unsafe fn submit(&mut self, request: Request<'_>) -> Result<(), BlockError>;

    /// Sends everything taken since the last kick, with one system call where the engine can. Completions may be ready
    /// right after; drain them before sleeping.
    fn kick(&mut self) -> Result<(), BlockError>;

    /// Readable while completions wait to be drained.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Hands every finished request to `sink`. Continues requests the kernel did in part.
    fn drain(&mut self, sink: &mut dyn FnMut(Completion)) -> Result<(), BlockError>;

    /// Requests taken and not yet drained.
    fn in_flight(&self) -> usize;

    /// Requests and pieces of requests that the kernel or a thread works on now. The others in flight wait (for a chunk, for
    /// space, for their rate) and touch no memory before the next [`drain`](Self::drain): who stops calling it, to pause,
    /// needs only this to become 0.
    fn active(&self) -> usize {
        self.in_flight()
    }

    /// Most requests that may be in flight.
    fn capacity(&self) -> usize;
}
