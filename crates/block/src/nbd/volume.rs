//! The volume and its queues, as front-ends see them.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::NbdError;
use super::handshake::Export;
use super::link::Link;
use super::session::{Session, Wakes};
use super::task::Task;
use super::{Connector, NbdEvents, NbdOptions};
use crate::{BlockError, Completion, Limits, Operation, RateLimits, Request, Volume, VolumeQueue};

/// Largest discard or zeroing offered; longer than one command, it is sent as several.
const MAX_RANGE_BYTES: u64 = 1 << 30;

type Shared = Arc<Mutex<Session>>;

fn lock(session: &Shared) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A volume served over NBD. See the [module](super).
pub struct NbdVolume {
    session: Shared,
    export: Export,
    read_only: bool,
}

impl fmt::Debug for NbdVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdVolume").field("export", &self.export).field("read_only", &self.read_only).finish()
    }
}

impl NbdVolume {
    /// Connects and negotiates; blocks until that is done, at most [`NbdOptions::handshake_timeout`].
    ///
    /// # Errors
    /// No connection, or the server has no such export or one that cannot be used.
    pub fn open(
        connector: Box<dyn Connector>,
        events: Arc<dyn NbdEvents>,
        options: NbdOptions,
    ) -> Result<Self, NbdError> {
        let socket = connector.connect().map_err(NbdError::Connect)?;
        let mut link = Link::new(socket, &options.export, None)?;
        let export = negotiate(&mut link, options.handshake_timeout)?;
        let session = Session::new(connector, events, options, link, export)?;
        let read_only = session.read_only();
        Ok(Self { session: Arc::new(Mutex::new(session)), export, read_only })
    }

    /// What the server offered when the volume was opened.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Tells that the [`Connector`] has a connection which it did not have when it was last asked. Does not block.
    pub fn connection_came(&self) {
        lock(&self.session).connection_came();
    }

    /// New rate limits, from now on. Flushes are not limited, discards and zeroing count as operations without bytes.
    pub fn set_rate_limits(&self, limits: RateLimits) {
        lock(&self.session).set_rate_limits(limits);
    }

    fn queue(&self, capacity: usize, own_link: bool) -> Result<NbdQueue, NbdError> {
        let mut session = lock(&self.session);
        let (id, wakes) = session.open_queue(own_link)?;
        let close_timeout = session.options().close_timeout;
        drop(session);
        let session = Arc::clone(&self.session);
        Ok(NbdQueue { session, id, wakes, batch: Vec::new(), in_flight: 0, capacity, close_timeout })
    }
}

/// Blocks until the link is ready.
fn negotiate(link: &mut Link, timeout: Duration) -> Result<Export, NbdError> {
    let until = Instant::now() + timeout;
    loop {
        if let Some(export) = link.receive()? {
            return Ok(export);
        }
        link.transmit()?;
        if until <= Instant::now() {
            return Err(NbdError::Silent("negotiation"));
        }
        let flags = if link.blocked { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        wait(link.socket().as_fd(), flags, until).map_err(NbdError::Socket)?;
    }
}

/// Waits for an event, a moment, or a signal.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    // Rounded up, not to spin in the last millisecond.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd, flags)], timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl Volume for NbdVolume {
    fn size_bytes(&self) -> u64 {
        lock(&self.session).size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        let block = self.export.min_block_bytes;
        let physical = block.max(4096);
        let preferred = self.export.preferred_block_bytes.min(1 << 20);
        Limits {
            logical_block_bytes: block,
            physical_block_bytes: physical,
            optimal_io_bytes: if preferred > physical { preferred } else { 0 },
            max_discard_bytes: if self.export.trim { MAX_RANGE_BYTES } else { 0 },
            discard_granularity_bytes: physical,
            max_write_zeroes_bytes: if self.export.write_zeroes { MAX_RANGE_BYTES } else { 0 },
        }
    }

    fn open_queue(&self, capacity: usize) -> Result<Box<dyn VolumeQueue>, BlockError> {
        Ok(Box::new(self.queue(capacity.clamp(1, 4096), true)?))
    }

    /// NBD cannot resize. When the last negotiation did not find the export that long, this asks the server on a new connection
    /// and goes on over that one: servers may know an export's length per connection.
    fn grow(&self, bytes: u64) -> Result<(), BlockError> {
        let from = self.size_bytes();
        let refuse = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            Err(BlockError::Grow { from, to: bytes, source })
        };
        if bytes < from || !bytes.is_multiple_of(u64::from(self.export.min_block_bytes)) {
            return refuse(libc::EINVAL);
        }
        let (socket, options) = {
            let mut session = lock(&self.session);
            if session.grow(bytes) {
                return Ok(());
            }
            (session.connect()?, session.options().clone())
        };
        let mut link = Link::new(socket, &options.export, None)?;
        let export = negotiate(&mut link, options.handshake_timeout)?;
        if export.size_bytes < bytes {
            link.disconnect();
            return refuse(libc::ENOSPC);
        }
        let mut session = lock(&self.session);
        session.adopt(link, &export)?;
        session.grow(bytes);
        Ok(())
    }

    fn sync(&self) -> Result<(), BlockError> {
        let mut queue = self.queue(1, false)?;
        let until = Instant::now() + queue.close_timeout;
        let request = Request { operation: Operation::Flush, offset: 0, length: 0, buffers: &[], token: 0 };
        // SAFETY: no buffers.
        unsafe { queue.submit(request)? };
        queue.kick()?;
        loop {
            let mut outcome = None;
            queue.drain(&mut |completion| outcome = Some(completion.result))?;
            match outcome {
                Some(result) => return result.map_err(|error| BlockError::Sync(error.source)),
                None if until <= Instant::now() => {
                    queue.close_timeout = Duration::ZERO;
                    return Err(BlockError::Sync(io::Error::from_raw_os_error(libc::ETIMEDOUT)));
                }
                None => wait(queue.wakes.fd(), PollFlags::POLLIN, until).map_err(BlockError::Sync)?,
            }
        }
    }

    /// Does not wait while the connection is lost, since who closes a volume does not bring it a new one: that fails unless
    /// everything has been flushed.
    fn close(&self) -> Result<(), BlockError> {
        let (impaired, flushed) = {
            let session = lock(&self.session);
            (session.is_impaired(), session.is_flushed())
        };
        match (impaired, flushed) {
            (true, true) => Ok(()),
            (true, false) => Err(BlockError::Sync(io::ErrorKind::NotConnected.into())),
            (false, _) => self.sync(),
        }
    }
}

/// One I/O thread's way to an [`NbdVolume`].
pub struct NbdQueue {
    session: Shared,
    id: usize,
    wakes: Arc<Wakes>,
    /// Taken since the last kick.
    batch: Vec<Task>,
    in_flight: usize,
    capacity: usize,
    close_timeout: Duration,
}

impl VolumeQueue for NbdQueue {
    unsafe fn submit(&mut self, request: Request<'_>) -> Result<(), BlockError> {
        if self.in_flight >= self.capacity {
            return Err(BlockError::QueueFull { capacity: self.capacity });
        }
        self.in_flight += 1;
        self.batch.push(Task::new(&request, self.id));
        Ok(())
    }

    fn kick(&mut self) -> Result<(), BlockError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let mut session = lock(&self.session);
        for task in self.batch.drain(..) {
            session.submit(task);
        }
        session.kick(self.id);
        Ok(())
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.wakes.fd()
    }

    fn drain(&mut self, sink: &mut dyn FnMut(Completion)) -> Result<(), BlockError> {
        let completions = lock(&self.session).drain(self.id);
        self.in_flight = self.in_flight.saturating_sub(completions.len());
        completions.into_iter().for_each(sink);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

impl Drop for NbdQueue {
    /// Waits for everything in flight, but not for ever: what the server does not answer in time is called off, which is
    /// safe because only this process touches the buffers.
    fn drop(&mut self) {
        let until = Instant::now() + self.close_timeout;
        // Neither fails: errors of the connection lead to a new one.
        let _ = self.kick();
        let _ = self.drain(&mut drop);
        while self.in_flight > 0 && Instant::now() < until && !lock(&self.session).is_impaired() {
            self.wakes.wait(until.saturating_duration_since(Instant::now()));
            let _ = self.drain(&mut drop);
        }
        lock(&self.session).close_queue(self.id);
    }
}
