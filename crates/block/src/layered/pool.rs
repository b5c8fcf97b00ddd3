//! The fallback executor where io_uring is forbidden: a few threads make the calls, blocking.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::clock::Clock;
use super::core::Core;
use super::files::Descriptors;
use super::ring::{Alarm, Event};
use super::shared::{Shared, Signal};
use crate::raw::execute;
use crate::task::Call;
use crate::{BlockError, Completion, Request, VolumeQueue};

/// Enough that one slow fdatasync does not stop reads; more threads gain little on one file.
const THREADS: usize = 4;

/// A call on its way to a thread.
struct Job {
    index: usize,
    fd: RawFd,
    call: Call<'static>,
}

// SAFETY: the call's iovecs live in a transfer of the queue that made the job, which keeps them until the result is in; the
// memory behind them is the submitter's promise (`VolumeQueue::submit`).
unsafe impl Send for Job {}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    finished: Vec<(usize, Result<u64, i32>)>,
    closing: bool,
}

struct Pool {
    jobs: Mutex<Jobs>,
    work: Condvar,
    ended: Condvar,
    event: Arc<Event>,
}

impl Pool {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct PoolQueue {
    core: Core,
    descriptors: Arc<Descriptors>,
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
    alarm: Alarm,
    /// Over the event and the alarm.
    epoll: Epoll,
    batch: Vec<Job>,
    finished: Vec<(usize, Result<u64, i32>)>,
}

impl PoolQueue {
    pub(crate) fn open(
        shared: Arc<Shared>,
        descriptors: Arc<Descriptors>,
        capacity: usize,
    ) -> Result<Self, BlockError> {
        let event = Event::new().map_err(BlockError::PoolSetup)?;
        let alarm = Alarm::new().map_err(BlockError::PoolSetup)?;
        let failed = |errno: nix::Error| BlockError::PoolSetup(errno.into());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        epoll.add(&event.fd, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(failed)?;
        epoll.add(&alarm.timer, EpollEvent::new(EpollFlags::EPOLLIN, 1)).map_err(failed)?;
        let signal = Arc::clone(&event) as Arc<dyn Signal>;
        let (work, ended) = (Condvar::new(), Condvar::new());
        let pool = Arc::new(Pool { jobs: Mutex::default(), work, ended, event });
        let mut threads = Vec::new();
        // Threads start with the queue: later the process may be confined and not allowed to make any.
        for number in 0..THREADS {
            let pool = Arc::clone(&pool);
            let thread = std::thread::Builder::new()
                .name(format!("volume-{number}"))
                .stack_size(64 * 1024)
                .spawn(move || work_on(&pool))
                .map_err(BlockError::PoolSetup)?;
            threads.push(thread);
        }
        let core = Core::new(shared, capacity, Some(signal), Clock::Monotonic);
        let (batch, finished) = (Vec::new(), Vec::new());
        Ok(Self { core, descriptors, pool, threads, alarm, epoll, batch, finished })
    }

    fn issue(&mut self) -> Result<(), BlockError> {
        while let Some(index) = self.core.next_call() {
            let Some((file, call)) = self.core.call(index) else {
                self.core.finish(index, Err(libc::EINVAL));
                continue;
            };
            let fd = self.descriptors.raw(file);
            // SAFETY: only the lifetime changes. The transfer that holds the iovecs is neither changed nor freed before
            // `finish`, and dropping the queue waits for the threads.
            let call = unsafe { std::mem::transmute::<Call<'_>, Call<'static>>(call) };
            self.batch.push(Job { index, fd, call });
        }
        if !self.batch.is_empty() {
            self.pool.jobs().waiting.extend(self.batch.drain(..));
            self.pool.work.notify_all();
        }
        self.alarm.set(self.core.next_wakeup()).map_err(BlockError::PoolSetup)
    }

    fn reap(&mut self) {
        std::mem::swap(&mut self.finished, &mut self.pool.jobs().finished);
        for (index, result) in self.finished.drain(..) {
            self.core.finish(index, result);
        }
    }
}

impl VolumeQueue for PoolQueue {
    unsafe fn submit(&mut self, request: Request<'_>) -> Result<(), BlockError> {
        // SAFETY: the caller's promise.
        unsafe { self.core.submit(&request) }
    }

    fn kick(&mut self) -> Result<(), BlockError> {
        self.issue()
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn drain(&mut self, sink: &mut dyn FnMut(Completion)) -> Result<(), BlockError> {
        // Both read EAGAIN when there is nothing to reset. What is rung after this makes the event readable again.
        let _ = self.pool.event.fd.read();
        let _ = self.pool.event.take();
        let mut count = [0u8; 8];
        if nix::unistd::read(&self.alarm.timer, &mut count).is_ok() {
            self.alarm.rang();
        }
        self.core.turn();
        self.reap();
        self.issue()?;
        while let Some(completion) = self.core.pop_done() {
            sink(completion);
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.core.in_flight()
    }

    fn active(&self) -> usize {
        self.core.active()
    }

    fn capacity(&self) -> usize {
        self.core.capacity()
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        self.core.begin_close();
        loop {
            let _ = self.issue();
            if self.core.outstanding() == 0 {
                break;
            }
            let mut jobs = self.pool.jobs();
            while jobs.finished.is_empty() {
                jobs = self.pool.ended.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
            drop(jobs);
            self.reap();
        }
        self.pool.jobs().closing = true;
        self.pool.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panicked worker has nothing in flight any more.
            let _ = thread.join();
        }
        self.core.close();
    }
}

fn work_on(pool: &Pool) {
    loop {
        let mut jobs = pool.jobs();
        let job = loop {
            if let Some(job) = jobs.waiting.pop_front() {
                break job;
            }
            if jobs.closing {
                return;
            }
            jobs = pool.work.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        };
        drop(jobs);
        let result = execute(job.call, job.fd);
        pool.jobs().finished.push((job.index, result));
        pool.ended.notify_all();
        pool.event.signal();
    }
}
