//! A queue without a thread or a ring: makes its calls where it stands. For cold paths and volumes without a VMM.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::core::Core;
use super::files::Descriptors;
use super::freeze::FreezeState;
use super::shared::{Mail, Shared, Signal};
use crate::raw::execute;
use crate::{BlockError, IoError, Operation, Request};

/// How long another queue may take to end a flush that this one waits for.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Signal for Bell {
    fn signal(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

pub(crate) struct Inline {
    core: Core,
    descriptors: Arc<Descriptors>,
    bell: Arc<Bell>,
}

impl Inline {
    pub(crate) fn new(shared: Arc<Shared>, descriptors: Arc<Descriptors>) -> Self {
        let bell = Arc::new(Bell::default());
        let signal = Arc::clone(&bell) as Arc<dyn Signal>;
        Self { core: Core::new(shared, 1, Some(signal), Clock::Monotonic), descriptors, bell }
    }

    /// Puts mail into this queue's own box.
    pub(crate) fn mail(&mut self, mail: Mail) {
        self.core.post_to_self(mail);
    }

    /// Works until `done`, and then until nothing is in the kernel.
    ///
    /// # Errors
    /// A chunk of the base is missing, or another queue did not end its flush in time.
    pub(crate) fn run(&mut self, done: impl Fn(&mut Core) -> bool) -> Result<(), BlockError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.core.turn();
            while let Some(index) = self.core.next_call() {
                let result = match self.core.call(index) {
                    Some((file, call)) => execute(call, self.descriptors.raw(file)),
                    None => Err(libc::EINVAL),
                };
                self.core.finish(index, result);
            }
            if done(&mut self.core) {
                return Ok(());
            }
            if let Some(chunk) = self.core.missing_chunk() {
                return Err(BlockError::ChunkMissing { chunk });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BlockError::Sync(io::Error::from_raw_os_error(libc::ETIMEDOUT)));
            }
            let mut rung = self.bell.rung.lock().unwrap_or_else(PoisonError::into_inner);
            if !*rung {
                let nap = left.min(Duration::from_millis(100));
                rung = self.bell.changed.wait_timeout(rung, nap).unwrap_or_else(PoisonError::into_inner).0;
            }
            *rung = false;
        }
    }

    pub(crate) fn flush(&mut self) -> Result<(), BlockError> {
        let request = Request { operation: Operation::Flush, offset: 0, length: 0, buffers: &[], token: 0 };
        self.request(&request).map_err(|error| match error {
            BlockError::Io(IoError { source, .. }) => BlockError::Sync(source),
            other => other,
        })
    }

    /// Reads from the volume.
    pub(crate) fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), BlockError> {
        let buffers = [libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() }];
        self.request(&Request { operation: Operation::Read, offset, length: 0, buffers: &buffers, token: 0 })
    }

    fn request(&mut self, request: &Request<'_>) -> Result<(), BlockError> {
        // SAFETY: the buffers outlive `run`, which returns only when no call is being made; see also `drop`.
        unsafe { self.core.submit(request)? };
        self.run(Core::has_done)?;
        match self.core.pop_done() {
            Some(completion) => Ok(completion.result?),
            None => Err(BlockError::Closed),
        }
    }
}

impl Drop for Inline {
    fn drop(&mut self) {
        self.core.begin_close();
        while let Some(index) = self.core.next_call() {
            let result = match self.core.call(index) {
                Some((file, call)) => execute(call, self.descriptors.raw(file)),
                None => Err(libc::EINVAL),
            };
            self.core.finish(index, result);
        }
        self.core.close();
    }
}

impl Core {
    pub(super) fn freeze_state(&mut self) -> FreezeState {
        self.shared.coord().freeze.state
    }

    /// Nothing remains to be done about a chunk that was to be staged.
    pub(super) fn is_copied(&mut self, chunk: u64) -> bool {
        let coord = self.shared.coord();
        !coord.freeze.copies.contains(&chunk) && (self.demands.is_empty() || !coord.freeze.needs_copy(chunk))
    }

    /// A chunk that one of this queue's requests waits for.
    fn missing_chunk(&mut self) -> Option<u64> {
        if self.parked == 0 {
            return None;
        }
        self.shared.coord().fetches.keys().next().copied()
    }
}
