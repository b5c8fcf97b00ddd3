//! Errors of opening and driving volumes, and of single requests.

use std::io;

use crate::Operation;

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
