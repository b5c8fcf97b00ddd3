//! Errors of opening and driving volumes, and of single requests.

use std::io;

use crate::layered::FreezeState;
use crate::{MapError, Operation};

/// A volume or one of its queues cannot be used (further).
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// `fstat`/`BLKGETSIZE64` failed.
    #[error("cannot learn the size of the volume's file: {0}")]
    Size(#[source] io::Error),
    /// Neither a regular file nor a block device.
    #[error("the volume's file is neither a regular file nor a block device")]
    NotAFile,
    /// Smaller than one sector.
    #[error("the volume's file has {bytes} bytes, less than one 512-byte sector")]
    TooSmall {
        /// Size found.
        bytes: u64,
    },
    /// Its size cannot be changed as asked.
    #[error("the volume has {from} bytes and cannot grow to {to}: {source}")]
    Grow {
        /// Size now.
        from: u64,
        /// Size asked for.
        to: u64,
        /// Cause.
        source: io::Error,
    },
    /// io_uring could not be set up and the caller insisted on it.
    #[error("cannot set up io_uring: {0}")]
    RingSetup(#[source] io::Error),
    /// The engine's threads or event descriptors could not be made.
    #[error("cannot set up the thread pool of the volume queue: {0}")]
    PoolSetup(#[source] io::Error),
    /// The kernel refuses submissions.
    #[error("the kernel refused a batch of {pending} volume requests: {source}")]
    Submit {
        /// Requests that were not accepted.
        pending: usize,
        /// Cause.
        source: io::Error,
    },
    /// As many requests in flight as [`crate::VolumeQueue::capacity`] allows.
    #[error("the volume queue is full ({capacity} requests in flight); drain completions first")]
    QueueFull {
        /// The bound.
        capacity: usize,
    },
    /// Making the file durable failed; its state on stable storage is unknown.
    #[error("cannot make the volume durable (fdatasync): {0}")]
    Sync(#[source] io::Error),
    /// The map cannot be used.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Somebody else has the volume open on this host.
    #[error("the volume is in use: its map is locked by another process")]
    InUse,
    /// The volume was attached again since.
    #[error("attachment generation {ours} is superseded by generation {theirs}")]
    Fenced {
        /// Generation of this attachment.
        ours: u64,
        /// Generation in the map.
        theirs: u64,
    },
    /// Data of the volume is gone.
    #[error("the volume's data file has {found} bytes instead of {expected}")]
    DataTooShort {
        /// Bytes found.
        found: u64,
        /// Size of the volume.
        expected: u64,
    },
    /// Blocks are to be read from a base that was not given.
    #[error("the volume needs its base file, which was not given")]
    BaseMissing,
    /// The presence bits cannot be mapped.
    #[error("cannot use the base's presence bits: {0}")]
    Presence(#[source] io::Error),
    /// A chunk of the base is needed and not there.
    #[error("chunk {chunk} of the volume's base is not present")]
    ChunkMissing {
        /// The chunk.
        chunk: u64,
    },
    /// Another freeze is under way, or none is.
    #[error("a freeze is {0:?}; this needs it to be {1:?}")]
    FreezeState(FreezeState, FreezeState),
    /// The flushes before the freeze failed or were called off.
    #[error("cannot freeze the volume: {0}")]
    Freeze(#[source] io::Error),
    /// The stage's files cannot be used.
    #[error("cannot use the files of the snapshot's stage: {0}")]
    Stage(#[source] io::Error),
    /// `data` could not be extended, or its properties could not be changed.
    #[error("cannot prepare the volume's data file: {0}")]
    Data(#[source] io::Error),
    /// The volume was closed.
    #[error("the volume is closed")]
    Closed,
    /// The NBD server cannot be reached or used.
    #[error(transparent)]
    Nbd(#[from] crate::nbd::NbdError),
    /// A read of a volume without a VMM failed.
    #[error(transparent)]
    Io(#[from] IoError),
}

/// One request failed; the volume goes on serving others.
#[derive(Debug, thiserror::Error)]
#[error("{operation} of {length} bytes at byte {offset} of the volume: {source}")]
pub struct IoError {
    /// What was asked.
    pub operation: Operation,
    /// First byte of the request.
    pub offset: u64,
    /// Bytes of the request that were not done.
    pub length: u64,
    /// Cause as the kernel told it.
    #[source]
    pub source: io::Error,
}
