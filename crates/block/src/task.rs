//! One request on its way through the kernel: which system call comes next, and what its result means. Pure; both
//! engines use it.

use std::io;

use crate::{IoError, Operation, Request};

/// Most iovecs one call may carry (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;
/// Interrupted or would-block results in a row before a request fails.
const MAX_RETRIES: u8 = 100;

#[repr(align(4096))]
struct ZeroPage([u8; 4096]);
static ZERO_PAGE: ZeroPage = ZeroPage([0; 4096]);

/// The system call to make next. Pointers inside the iovecs are the submitter's promise (see `VolumeQueue::submit`).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call<'a> {
    Readv { iovecs: &'a [libc::iovec], offset: u64 },
    Writev { iovecs: &'a [libc::iovec], offset: u64 },
    Fdatasync,
    Fallocate { mode: i32, offset: u64, length: u64 },
}

/// What a result means for the request.
#[derive(Debug)]
pub(crate) enum Verdict {
    Done(Result<(), IoError>),
    Again,
}

/// How the remaining part is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Transfer,
    Sync,
    ZeroRange,
    PunchHole,
    /// Plain writes of zeros, for file systems without either.
    WriteZeros,
}

#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) token: u64,
    operation: Operation,
    step: Step,
    offset: u64,
    remaining: u64,
    iovecs: Vec<libc::iovec>,
    first: usize,
    retries: u8,
}

// SAFETY: the iovecs' pointers refer to memory that the submitter keeps valid on all threads until completion
// (`VolumeQueue::submit`), or to ZERO_PAGE.
unsafe impl Send for Task {}

impl Task {
    /// An idle slot; `start` gives it work. Slots are reused so that their iovec arrays are allocated once.
    pub(crate) fn idle() -> Self {
        Self {
            token: 0,
            operation: Operation::Flush,
            step: Step::Sync,
            offset: 0,
            remaining: 0,
            iovecs: Vec::new(),
            first: 0,
            retries: 0,
        }
    }

    /// Takes a request. An error is the request's immediate outcome (outside the volume of `size` bytes).
    pub(crate) fn start(&mut self, request: &Request<'_>, size: u64) -> Result<(), IoError> {
        self.token = request.token;
        self.operation = request.operation;
        self.offset = request.offset;
        self.first = 0;
        self.retries = 0;
        self.iovecs.clear();
        self.remaining = 0;
        self.step = match request.operation {
            Operation::Flush => {
                self.offset = 0;
                Step::Sync
            }
            Operation::Read | Operation::Write => {
                self.iovecs.extend_from_slice(request.buffers);
                for iovec in request.buffers {
                    let total = self.remaining.checked_add(iovec.iov_len as u64);
                    self.remaining = total.ok_or_else(|| self.error(libc::EINVAL))?;
                }
                Step::Transfer
            }
            Operation::Discard => {
                self.remaining = request.length;
                Step::PunchHole
            }
            Operation::WriteZeroes { may_unmap } => {
                self.remaining = request.length;
                if may_unmap { Step::PunchHole } else { Step::ZeroRange }
            }
        };
        match self.offset.checked_add(self.remaining) {
            Some(end) if end <= size => Ok(()),
            _ => Err(self.error(libc::EINVAL)),
        }
    }

    /// Changes the volume's content.
    pub(crate) fn modifies(&self) -> bool {
        matches!(self.operation, Operation::Write | Operation::Discard | Operation::WriteZeroes { .. })
    }

    pub(crate) fn is_sync(&self) -> bool {
        self.step == Step::Sync
    }

    /// The next call, `None` when nothing is left to do (zero-length request).
    pub(crate) fn call(&mut self) -> Option<Call<'_>> {
        if self.step == Step::Sync {
            return Some(Call::Fdatasync);
        }
        if self.remaining == 0 {
            return None;
        }
        Some(match self.step {
            Step::Sync => Call::Fdatasync,
            Step::Transfer => {
                let rest = self.iovecs.get(self.first..).unwrap_or_default();
                let iovecs = rest.get(..MAX_IOVECS).unwrap_or(rest);
                match self.operation {
                    Operation::Read => Call::Readv { iovecs, offset: self.offset },
                    _ => Call::Writev { iovecs, offset: self.offset },
                }
            }
            Step::WriteZeros => {
                self.fill_zero_iovecs();
                Call::Writev { iovecs: &self.iovecs, offset: self.offset }
            }
            Step::ZeroRange => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                Call::Fallocate { mode, offset: self.offset, length: self.remaining }
            }
            Step::PunchHole => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                Call::Fallocate { mode, offset: self.offset, length: self.remaining }
            }
        })
    }

    /// Digests a call's result: bytes moved (0 for sync and fallocate) or an errno.
    pub(crate) fn advance(&mut self, result: Result<u64, i32>) -> Verdict {
        match result {
            Err(libc::EINTR | libc::EAGAIN) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                Verdict::Again
            }
            Err(errno) => match self.fallback(errno) {
                Some(verdict) => verdict,
                None => Verdict::Done(Err(self.error(errno))),
            },
            Ok(bytes) => {
                self.retries = 0;
                match self.step {
                    Step::Sync | Step::ZeroRange | Step::PunchHole => Verdict::Done(Ok(())),
                    Step::Transfer | Step::WriteZeros => self.moved(bytes),
                }
            }
        }
    }

    fn moved(&mut self, bytes: u64) -> Verdict {
        if bytes == 0 {
            // End of file inside the volume: somebody truncated the backing file.
            return Verdict::Done(Err(self.error(libc::EIO)));
        }
        self.remaining = self.remaining.saturating_sub(bytes);
        self.offset = self.offset.saturating_add(bytes);
        if self.remaining == 0 {
            return Verdict::Done(Ok(()));
        }
        if self.step == Step::Transfer {
            self.skip(bytes);
        }
        Verdict::Again
    }

    /// Drops `bytes` from the front of the iovecs.
    fn skip(&mut self, mut bytes: u64) {
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            let length = iovec.iov_len as u64;
            if bytes < length {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(bytes as usize).cast();
                iovec.iov_len = (length - bytes) as usize;
                return;
            }
            bytes -= length;
            self.first += 1;
        }
    }

    /// Another way to the same end when the file system lacks one, else `None`.
    fn fallback(&mut self, errno: i32) -> Option<Verdict> {
        if !matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL) {
            return None;
        }
        match (self.operation, self.step) {
            // A hint: nothing is lost by not taking it.
            (Operation::Discard, Step::PunchHole) => Some(Verdict::Done(Ok(()))),
            (Operation::WriteZeroes { .. }, Step::PunchHole) => {
                self.step = Step::ZeroRange;
                Some(Verdict::Again)
            }
            (Operation::WriteZeroes { .. }, Step::ZeroRange) => {
                self.step = Step::WriteZeros;
                Some(Verdict::Again)
            }
            _ => None,
        }
    }

    fn fill_zero_iovecs(&mut self) {
        let page = ZERO_PAGE.0.len() as u64;
        self.iovecs.clear();
        let mut left = self.remaining;
        while left > 0 && self.iovecs.len() < MAX_IOVECS {
            let length = left.min(page);
            self.iovecs
                .push(libc::iovec { iov_base: (&raw const ZERO_PAGE).cast_mut().cast(), iov_len: length as usize });
            left -= length;
        }
    }

    /// The request's failure with this errno.
    pub(crate) fn error(&self, errno: i32) -> IoError {
        let source = io::Error::from_raw_os_error(errno);
        IoError { operation: self.operation, offset: self.offset, length: self.remaining, source }
    }
}
