//! All state of one NBD volume: its connections, its queues' requests, the log, and where a reconnection stands. One lock guards
//! it, so that the thread of any queue can take every step.

mod connections;
mod queues;
mod requests;
mod steps;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use super::error::NbdError;
use super::handshake::Export;
use super::link::Link;
use super::log::Log;
use super::task::Task;
use super::{Connector, NbdEvents, NbdOptions};
use crate::limit::Limiter;
use crate::{Completion, RateLimits};

/// Where the volume stands with its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// No connection until then.
    Down(Instant),
    /// The first connection negotiates, at most until then.
    Opening(Instant),
    /// So many writes of the log are not yet repeated.
    Repeating(usize),
    /// They are, and become durable.
    Flushing,
}

/// The file descriptors that one queue's thread waits for.
#[derive(Debug)]
pub(super) struct Wakes {
    epoll: Epoll,
    done: EventFd,
}

impl Wakes {
    fn new(timer: &TimerFd) -> Result<Self, NbdError> {
        let make = || -> nix::Result<Self> {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            let done = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
            epoll.add(&done, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            epoll.add(timer, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            Ok(Self { epoll, done })
        };
        make().map_err(|errno| NbdError::Events(errno.into()))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Waits for an event, or a signal. (`epoll_wait`, which threads may call that may not `poll`.)
    pub(super) fn wait(&self, patience: Duration) {
        // Rounded up, not to spin in the last millisecond.
        let timeout = EpollTimeout::try_from(patience + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX);
        // Interrupted: the caller looks again.
        let _ = self.epoll.wait(&mut [EpollEvent::empty()], timeout);
    }
}

#[derive(Debug)]
struct Queue {
    wakes: Arc<Wakes>,
    /// Waits for every link's events.
    all_links: bool,
    completions: Vec<Completion>,
    /// Its thread was woken and has not looked since.
    signalled: bool,
}

impl Queue {
    /// Wakes its thread.
    fn signal(&mut self) {
        if !std::mem::replace(&mut self.signalled, true) {
            // The counter cannot overflow: it is read before the next is written.
            let _ = self.wakes.done.write(1);
        }
    }

    /// Its thread looks.
    fn look(&mut self) {
        if std::mem::take(&mut self.signalled) {
            let _ = self.wakes.done.read();
        }
    }
}

pub(super) struct Session {
    connector: Box<dyn Connector>,
    events: Arc<dyn NbdEvents>,
    options: NbdOptions,
    export: Export,
    size: u64,
    /// What the newest negotiation found, at least `size`.
    offered: u64,
    phase: Phase,
    links: Vec<Link>,
    queues: Vec<Option<Queue>>,
    tasks: Vec<Option<Task>>,
    free_tasks: Vec<usize>,
    /// Slots of tasks that have commands to send, in order.
    waiting: VecDeque<usize>,
    next_number: u64,
    log: Log,
    /// A flush to make room in the log is in flight, or not allowed before.
    retiring: bool,
    retire_after: Option<Instant>,
    /// Connections in a row that brought nothing.
    failures: u32,
    /// `lost` was reported.
    impaired: bool,
    /// Someone else has to bring the next connection.
    starved: bool,
    limiter: Limiter,
    /// Requests wait for their rate until then.
    throttled_until: Option<Instant>,
    /// The queue that takes its completions at once.
    draining: Option<usize>,
    /// Start of the limiter's time.
    born: Instant,
    timer: TimerFd,
    armed: Option<Instant>,
}

impl Session {
    /// Takes the first, negotiated connection.
    pub(super) fn new(
        connector: Box<dyn Connector>,
        events: Arc<dyn NbdEvents>,
        options: NbdOptions,
        link: Link,
        export: Export,
    ) -> Result<Self, NbdError> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
            .map_err(|errno| NbdError::Events(errno.into()))?;
        let log = Log::new(if export.flush { options.log_bytes } else { 0 });
        Ok(Self {
            connector,
            events,
            options,
            export,
            size: export.size_bytes,
            offered: export.size_bytes,
            phase: Phase::Running,
            links: vec![link],
            queues: Vec::new(),
            tasks: Vec::new(),
            free_tasks: Vec::new(),
            waiting: VecDeque::new(),
            next_number: 0,
            log,
            retiring: false,
            retire_after: None,
            failures: 0,
            impaired: false,
            starved: false,
            limiter: Limiter::default(),
            throttled_until: None,
            draining: None,
            born: Instant::now(),
            timer,
            armed: None,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn read_only(&self) -> bool {
        self.export.read_only || self.options.read_only
    }

    pub(super) fn connect(&self) -> Result<OwnedFd, NbdError> {
        self.connector.connect().map_err(NbdError::Connect)
    }

    pub(super) fn options(&self) -> &NbdOptions {
        &self.options
    }

    /// Requests wait for a connection.
    pub(super) fn is_impaired(&self) -> bool {
        self.impaired
    }

    /// Nothing that was written still needs a flush.
    pub(super) fn is_flushed(&self) -> bool {
        self.log.is_empty()
    }

    /// Takes a larger size that the server is known to offer; `false` when it is not known to offer it.
    pub(super) fn grow(&mut self, size: u64) -> bool {
        let known = size <= self.offered;
        if known {
            self.size = self.size.max(size);
        }
        known
    }

    pub(super) fn set_rate_limits(&mut self, limits: RateLimits) {
        self.limiter.set(limits);
        // Their threads send what may go now.
        self.queues.iter_mut().flatten().for_each(Queue::signal);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for link in &mut self.links {
            link.disconnect();
        }
    }
}

fn interest(link: &Link) -> EpollFlags {
    if link.blocked { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN }
}
