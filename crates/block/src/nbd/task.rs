//! One request of a front-end on its way through one or more commands.

use std::io;

use super::error::ProtocolError;
use super::handshake::Export;
use super::link::{Command, Payload, Purpose, section};
use super::wire;
use crate::{IoError, Operation, Request};

/// Longest single TRIM. It carries no data, so the server's maximum does not bound it.
const MAX_TRIM_BYTES: u64 = 1 << 30;

#[derive(Debug)]
pub(super) struct Task {
    /// Order of arrival.
    pub(super) number: u64,
    pub(super) queue: usize,
    pub(super) token: u64,
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) iovecs: Vec<libc::iovec>,
    /// The rate limits let it through.
    pub(super) admitted: bool,
    /// Handed to a link.
    pub(super) dispatched: u64,
    /// Commands without an answer.
    pub(super) commands: usize,
    pub(super) error: Option<i32>,
    /// Bytes reserved in the log.
    pub(super) reserved: Option<usize>,
    /// Must be durable when it is complete: the log has no room.
    pub(super) through: bool,
    /// The flush that makes it so was sent.
    pub(super) settling: bool,
    /// Of the log, when the flush was sent.
    pub(super) mark: u64,
}

// SAFETY: the iovecs point to memory that the submitter keeps valid on all threads until completion (`VolumeQueue::submit`).
unsafe impl Send for Task {}

impl Task {
    pub(super) fn new(request: &Request<'_>, queue: usize) -> Self {
        let (offset, length, iovecs) = match request.operation {
            Operation::Flush => (0, 0, Vec::new()),
            Operation::Read | Operation::Write => {
                let length = request.buffers.iter().fold(0u64, |sum, iovec| sum.saturating_add(iovec.iov_len as u64));
                (request.offset, length, request.buffers.to_vec())
            }
            Operation::Discard | Operation::WriteZeroes { .. } => (request.offset, request.length, Vec::new()),
        };
        Self {
            number: 0,
            queue,
            token: request.token,
            operation: request.operation,
            offset,
            length,
            iovecs,
            admitted: false,
            dispatched: 0,
            commands: 0,
            error: None,
            reserved: None,
            through: false,
            settling: false,
            mark: 0,
        }
    }

    /// Starts over, on another connection.
    pub(super) fn reset(&mut self) {
        self.dispatched = 0;
        self.commands = 0;
        self.error = None;
        self.settling = false;
    }

    /// What counts for a limit of bytes.
    pub(super) fn moved_bytes(&self) -> u64 {
        match self.operation {
            Operation::Read | Operation::Write => self.length,
            _ => 0,
        }
    }

    pub(super) fn modifies(&self) -> bool {
        !matches!(self.operation, Operation::Read | Operation::Flush)
    }

    /// What the log has to keep of it while the server may lose it. Discarded ranges may hold anything.
    pub(super) fn logged_bytes(&self) -> Option<usize> {
        match self.operation {
            Operation::Write => usize::try_from(self.length).ok(),
            Operation::WriteZeroes { .. } => Some(0),
            _ => None,
        }
    }

    /// Refuses what the export cannot do; `Ok(true)` when nothing is left to do.
    pub(super) fn check(&self, export: &Export, size: u64, read_only: bool) -> Result<bool, IoError> {
        if self.operation == Operation::Flush {
            return Ok(!export.flush || read_only);
        }
        if read_only && self.modifies() {
            return Err(self.failure(libc::EROFS));
        }
        let block = u64::from(export.min_block_bytes);
        let inside = self.offset.checked_add(self.length).is_some_and(|end| end <= size);
        if !inside || !self.offset.is_multiple_of(block) || !self.length.is_multiple_of(block) {
            return Err(self.failure(libc::EINVAL));
        }
        match self.operation {
            // A hint: nothing is lost by not taking it.
            Operation::Discard if !export.trim => Ok(true),
            Operation::WriteZeroes { .. } if !export.write_zeroes => Err(self.failure(libc::EOPNOTSUPP)),
            _ => Ok(self.length == 0),
        }
    }

    pub(super) fn is_dispatched(&self) -> bool {
        self.dispatched >= self.length && (self.operation != Operation::Flush || self.commands > 0)
    }

    /// The next command of the task in this slot.
    pub(super) fn next_command(&mut self, slot: usize, export: &Export) -> Command {
        let maximum = match self.operation {
            Operation::Discard => MAX_TRIM_BYTES,
            _ => u64::from(export.max_payload_bytes),
        };
        let at = self.dispatched;
        let length = (self.length - at).min(maximum);
        self.dispatched += length;
        self.commands += 1;
        let fua = if self.through && export.fua { wire::CMD_FLAG_FUA } else { 0 };
        let mut payload = Payload::None;
        let mut into = Vec::new();
        let (command, flags) = match self.operation {
            Operation::Read => {
                into = section(&self.iovecs, at, length);
                (wire::CMD_READ, 0)
            }
            Operation::Write => {
                payload = Payload::Memory(section(&self.iovecs, at, length));
                (wire::CMD_WRITE, fua)
            }
            Operation::Flush => (wire::CMD_FLUSH, 0),
            Operation::Discard => (wire::CMD_TRIM, 0),
            Operation::WriteZeroes { may_unmap: true } => (wire::CMD_WRITE_ZEROES, fua),
            Operation::WriteZeroes { may_unmap: false } => (wire::CMD_WRITE_ZEROES, fua | wire::CMD_FLAG_NO_HOLE),
        };
        Command {
            purpose: Purpose::Part { task: slot },
            command,
            flags,
            offset: self.offset + at,
            // At most `maximum`, which fits.
            length: length as u32,
            payload,
            into,
        }
    }

    /// Copies what was written, for the log.
    pub(super) fn copy_data(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::with_capacity(self.length as usize);
        for iovec in &self.iovecs {
            bytes.reserve(iovec.iov_len);
            // SAFETY: the submitter keeps the memory readable until the completion was drained. It may change meanwhile:
            // so may what was sent, and the guest gets one or the other.
            unsafe {
                let start = bytes.len();
                std::ptr::copy_nonoverlapping(
                    iovec.iov_base.cast::<u8>(),
                    bytes.as_mut_ptr().wrapping_add(start),
                    iovec.iov_len,
                );
                bytes.set_len(start + iovec.iov_len);
            }
        }
        bytes
    }

    /// The request's failure with this errno.
    pub(super) fn failure(&self, errno: i32) -> IoError {
        let source = io::Error::from_raw_os_error(errno);
        IoError { operation: self.operation, offset: self.offset, length: self.length, source }
    }
}

/// A command without data.
pub(super) fn flush(purpose: Purpose) -> Command {
    Command {
        purpose,
        command: wire::CMD_FLUSH,
        flags: 0,
        offset: 0,
        length: 0,
        payload: Payload::None,
        into: Vec::new(),
    }
}

impl From<ProtocolError> for crate::BlockError {
    fn from(error: ProtocolError) -> Self {
        Self::Nbd(error.into())
    }
}
