//! The fallback engine where io_uring is forbidden: a few threads doing blocking calls.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Shared;
use crate::task::{Call, Task, Verdict};
use crate::{BlockError, Completion, IoError, Request, VolumeQueue};

/// Enough that one slow fdatasync does not stop reads; more threads gain little on one file.
const THREADS: usize = 4;

struct Jobs {
    waiting: VecDeque<Task>,
    finished: Vec<(Task, Result<(), IoError>)>,
    closing: bool,
}

struct Pool {
    shared: Arc<Shared>,
    jobs: Mutex<Jobs>,
    wake: Condvar,
    completed: EventFd,
}

impl Pool {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct PoolQueue {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
    /// Taken since the last kick.
    batch: Vec<Task>,
    spare: Vec<Task>,
    capacity: usize,
    in_flight: usize,
}

impl PoolQueue {
    pub(crate) fn open(shared: Arc<Shared>, capacity: usize) -> Result<Self, BlockError> {
        let completed = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| BlockError::PoolSetup(errno.into()))?;
        let jobs = Mutex::new(Jobs { waiting: VecDeque::new(), finished: Vec::new(), closing: false });
        let pool = Arc::new(Pool { shared, jobs, wake: Condvar::new(), completed });
        let mut queue =
            Self { pool, threads: Vec::new(), batch: Vec::new(), spare: Vec::new(), capacity, in_flight: 0 };
        queue.spawn()?;
        Ok(queue)
    }

    /// Threads start with the queue: later the process may be confined and not allowed to make any.
    fn spawn(&mut self) -> Result<(), BlockError> {
        while self.threads.len() < THREADS {
            let pool = Arc::clone(&self.pool);
            let thread = std::thread::Builder::new()
                .name(format!("volume-{}", self.threads.len()))
                .stack_size(64 * 1024)
                .spawn(move || work(&pool))
                .map_err(BlockError::PoolSetup)?;
            self.threads.push(thread);
        }
        Ok(())
    }
}

impl VolumeQueue for PoolQueue {
    unsafe fn submit(&mut self, request: Request<'_>) -> Result<(), BlockError> {
        if self.in_flight >= self.capacity {
            return Err(BlockError::QueueFull { capacity: self.capacity });
        }
        let mut task = self.spare.pop().unwrap_or_else(Task::idle);
        self.in_flight += 1;
        match task.start(&request, self.pool.shared.size()) {
            Ok(()) => self.batch.push(task),
            Err(error) => {
                self.pool.jobs().finished.push((task, Err(error)));
                signal(&self.pool.completed);
            }
        }
        Ok(())
    }

    fn kick(&mut self) -> Result<(), BlockError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.pool.jobs().waiting.extend(self.batch.drain(..));
        self.pool.wake.notify_all();
        Ok(())
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.pool.completed.as_fd()
    }

    fn drain(&mut self, sink: &mut dyn FnMut(Completion)) -> Result<(), BlockError> {
        // An empty eventfd reads EAGAIN; then there is nothing to reset.
        let _ = self.pool.completed.read();
        let finished = std::mem::take(&mut self.pool.jobs().finished);
        for (task, result) in finished {
            self.in_flight = self.in_flight.saturating_sub(1);
            let token = task.token;
            self.spare.push(task);
            sink(Completion { token, result });
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        self.pool.jobs().closing = true;
        self.pool.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A panicked worker has nothing in flight any more.
            let _ = thread.join();
        }
    }
}

fn work(pool: &Pool) {
    loop {
        let mut jobs = pool.jobs();
        let mut task = loop {
            if let Some(task) = jobs.waiting.pop_front() {
                break task;
            }
            if jobs.closing {
                return;
            }
            jobs = pool.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        };
        drop(jobs);
        let result = run(&mut task, &pool.shared);
        pool.jobs().finished.push((task, result));
        signal(&pool.completed);
    }
}

fn run(task: &mut Task, shared: &Shared) -> Result<(), IoError> {
    loop {
        shared.gate(task)?;
        let sync = task.is_sync();
        let Some(call) = task.call() else { return Ok(()) };
        let result = execute(call, shared.file.as_raw_fd());
        if sync && result.is_err() && result != Err(libc::EINTR) {
            shared.note_sync_failure();
        }
        match task.advance(result) {
            Verdict::Done(result) => return result,
            Verdict::Again => {}
        }
    }
}

/// Makes one call, blocking.
pub(crate) fn execute(call: Call<'_>, fd: i32) -> Result<u64, i32> {
    let result = match call {
        // SAFETY: the iovecs point to memory the submitter keeps mapped until completion (`VolumeQueue::submit`).
        Call::Readv { iovecs, offset } => unsafe {
            libc::preadv(fd, iovecs.as_ptr(), iovecs.len() as i32, offset as i64) as i64
        },
        // SAFETY: as above.
        Call::Writev { iovecs, offset } => unsafe {
            libc::pwritev(fd, iovecs.as_ptr(), iovecs.len() as i32, offset as i64) as i64
        },
        // SAFETY: no pointers.
        Call::Fdatasync => i64::from(unsafe { libc::fdatasync(fd) }),
        Call::Fallocate { mode, offset, length } => {
            // SAFETY: no pointers.
            i64::from(unsafe { libc::fallocate(fd, mode, offset as i64, length as i64) })
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// Makes an eventfd readable.
pub(crate) fn signal(event: &EventFd) {
    // The counter cannot overflow: every signal follows a finished task and `drain` resets it.
    let _ = event.write(1);
}
