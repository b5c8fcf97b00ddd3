//! The io_uring executor: one ring per queue, with the volume's files registered. The ring's own descriptor is the queue's
//! completion descriptor: wake-ups by other threads and by time are polls in the same ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::clock::Clock;
use super::core::Core;
use super::files::Descriptors;
use super::op::FileId;
use super::shared::{Shared, Signal};
use crate::raw::signal;
use crate::task::Call;
use crate::{BlockError, Completion, Request, VolumeQueue};

/// Registered after the volume's files.
const WAKE_FILE: Fixed = Fixed(5);
const TIMER_FILE: Fixed = Fixed(6);
const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
/// `IORING_REGISTER_FILES_UPDATE`, linux/io_uring.h.
const REGISTER_FILES_UPDATE: u8 = 6;
/// Kernel worker threads per ring, of either kind.
const WORKERS_MAX: u32 = 8;
/// Refused submissions in a row (kernel out of memory) before the queue gives up.
const MAX_SUBMIT_RETRIES: usize = 1000;

/// An eventfd that other threads ring, with a flag so that a queue that is awake need not wait for its poll.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) fd: EventFd,
    rung: AtomicBool,
}

impl Event {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Self { fd, rung: AtomicBool::new(false) }))
    }

    /// Whether it was rung since the last call.
    pub(super) fn take(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::Acquire)
    }
}

impl Signal for Event {
    fn signal(&self) {
        if !self.rung.swap(true, Ordering::Release) {
            signal(&self.fd);
        }
    }
}

/// A timer for [`Core::next_wakeup`].
#[derive(Debug)]
pub(super) struct Alarm {
    pub(super) timer: TimerFd,
    armed: Option<u64>,
}

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self { timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?, armed: None })
    }

    /// Rings at `at` (ns of `CLOCK_MONOTONIC`), or not at all.
    pub(super) fn set(&mut self, at: Option<u64>) -> io::Result<()> {
        if at == self.armed {
            return Ok(());
        }
        match at {
            // Zero would disarm it.
            Some(at) => self.timer.set(
                Expiration::OneShot(TimeSpec::from_duration(Duration::from_nanos(at.max(1)))),
                TimerSetTimeFlags::TFD_TIMER_ABSTIME,
            )?,
            None => self.timer.unset()?,
        }
        self.armed = at;
        Ok(())
    }

    /// It rang.
    pub(super) fn rang(&mut self) {
        self.armed = None;
    }
}

pub(crate) struct RingQueue {
    ring: IoUring,
    core: Core,
    descriptors: Arc<Descriptors>,
    event: Arc<Event>,
    alarm: Alarm,
    stage: u64,
    /// Entries whose completions have not been seen, polls included.
    outstanding: usize,
    outstanding_max: usize,
    enabled: bool,
}

impl RingQueue {
    pub(crate) fn open(
        shared: Arc<Shared>,
        descriptors: Arc<Descriptors>,
        capacity: usize,
    ) -> Result<Self, BlockError> {
        let event = Event::new().map_err(BlockError::RingSetup)?;
        let alarm = Alarm::new().map_err(BlockError::RingSetup)?;
        let fd = |file| descriptors.raw(file);
        let files = [
            fd(FileId::Data),
            fd(FileId::Map),
            fd(FileId::Base),
            -1,
            -1,
            event.fd.as_raw_fd(),
            alarm.timer.as_fd().as_raw_fd(),
        ];
        // Room for the two polls and the volume's own work beside the guest's requests.
        let ring = build(capacity as u32 + 16, &files).map_err(BlockError::RingSetup)?;
        let outstanding_max = ring.params().cq_entries() as usize;
        let signal = Arc::clone(&event) as Arc<dyn Signal>;
        let core = Core::new(shared, capacity, Some(signal), Clock::Monotonic);
        let (stage, outstanding) = (0, 0);
        Ok(Self { ring, core, descriptors, event, alarm, stage, outstanding, outstanding_max, enabled: false })
    }

    /// The ring starts disabled: the thread that enables it becomes its single issuer.
    fn enable(&mut self) -> Result<(), BlockError> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings().map_err(BlockError::RingSetup)?;
            self.enabled = true;
            self.poll(WAKE_FILE, WAKE)?;
            self.poll(TIMER_FILE, TIMER)?;
        }
        Ok(())
    }

    fn poll(&mut self, file: Fixed, data: u64) -> Result<(), BlockError> {
        self.push(&opcode::PollAdd::new(file, libc::POLLIN as u32).build().user_data(data))
    }

    fn push(&mut self, entry: &Entry) -> Result<(), BlockError> {
        // SAFETY: what the entry points to lives in a transfer, which is neither changed nor freed before its completion is
        // seen, or is the submitter's promise (`VolumeQueue::submit`).
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.submit_pending()?;
        }
        self.outstanding += 1;
        Ok(())
    }

    /// Moves ready calls to the submission queue, as far as their completions have room.
    fn issue(&mut self) -> Result<(), BlockError> {
        while self.outstanding + 2 < self.outstanding_max {
            let Some(index) = self.core.next_call() else { break };
            let entry = match self.core.call(index) {
                Some((file, call)) => (file, entry_for(file, call).user_data(index as u64)),
                None => {
                    self.core.finish(index, Err(libc::EINVAL));
                    continue;
                }
            };
            if matches!(entry.0, FileId::Stage | FileId::Staged) {
                self.register_stage()?;
            }
            self.push(&entry.1)?;
        }
        self.submit_pending()?;
        self.alarm.set(self.core.next_wakeup()).map_err(BlockError::RingSetup)
    }

    fn register_stage(&mut self) -> Result<(), BlockError> {
        let (number, stage) = self.descriptors.stage();
        if number != self.stage
            && let Some(stage) = stage
        {
            let files = [stage.file.as_raw_fd(), stage.staged.as_raw_fd()];
            let first = FileId::Stage as u32;
            self.ring.submitter().register_files_update(first, &files).map_err(BlockError::RingSetup)?;
            self.stage = number;
        }
        Ok(())
    }

    fn submit_pending(&mut self) -> Result<(), BlockError> {
        let mut retries = 0;
        loop {
            let pending = self.ring.submission().len();
            if pending == 0 {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) => {
                    let again = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
                    retries += 1;
                    if !again || retries > MAX_SUBMIT_RETRIES {
                        return Err(BlockError::Submit { pending, source: error });
                    }
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Digests what the kernel has finished.
    fn reap(&mut self) -> Result<(), BlockError> {
        loop {
            let Some(entry) = self.ring.completion().next() else { return Ok(()) };
            self.outstanding = self.outstanding.saturating_sub(1);
            match entry.user_data() {
                WAKE => {
                    // The count first: a ring after this makes it readable again.
                    let _ = self.event.fd.read();
                    let _ = self.event.take();
                    self.poll(WAKE_FILE, WAKE)?;
                    self.core.turn();
                }
                TIMER => {
                    self.alarm.rang();
                    // Its expiration count must be read, or it stays readable.
                    let mut count = [0u8; 8];
                    let _ = nix::unistd::read(&self.alarm.timer, &mut count);
                    self.poll(TIMER_FILE, TIMER)?;
                    self.core.turn();
                }
                index => {
                    let result = u64::try_from(entry.result()).map_err(|_| entry.result().saturating_neg());
                    self.core.finish(index as usize, result);
                }
            }
        }
    }
}

impl VolumeQueue for RingQueue {
    unsafe fn submit(&mut self, request: Request<'_>) -> Result<(), BlockError> {
        // SAFETY: the caller's promise.
        unsafe { self.core.submit(&request) }
    }

    fn kick(&mut self) -> Result<(), BlockError> {
        self.enable()?;
        self.issue()
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns this descriptor and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    fn drain(&mut self, sink: &mut dyn FnMut(Completion)) -> Result<(), BlockError> {
        self.enable()?;
        if self.event.take() {
            self.core.turn();
        }
        self.reap()?;
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

impl Drop for RingQueue {
    fn drop(&mut self) {
        // Buffers may be unmapped once the queue is gone, so wait for the kernel to be done with them. What was never sent
        // ends with the core.
        self.core.begin_close();
        while self.enabled {
            if self.issue().is_err() || self.core.outstanding() == 0 {
                break;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                }
                Err(_) => break,
            }
            if self.reap().is_err() {
                break;
            }
        }
        self.core.close();
    }
}

fn entry_for(file: FileId, call: Call<'_>) -> Entry {
    let file = Fixed(file as u32);
    match call {
        Call::Readv { iovecs: [one], offset } => {
            opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32).offset(offset).build()
        }
        Call::Writev { iovecs: [one], offset } => {
            opcode::Write::new(file, one.iov_base.cast::<u8>(), one.iov_len as u32).offset(offset).build()
        }
        Call::Readv { iovecs, offset } => {
            opcode::Readv::new(file, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
        }
        Call::Writev { iovecs, offset } => {
            opcode::Writev::new(file, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
        }
        Call::Fdatasync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        Call::Fallocate { mode, offset, length } => {
            opcode::Fallocate::new(file, length).offset(offset).mode(mode).build()
        }
    }
}

/// A disabled, restricted ring around these files. `SINGLE_ISSUER` and `COOP_TASKRUN` came with Linux 6.0 and 5.19; older
/// kernels get a ring without them.
fn build(entries: u32, files: &[i32]) -> io::Result<IoUring> {
    let fast = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_clamp()
        .build(entries);
    let ring = match fast {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().dontfork().setup_r_disabled().setup_clamp().build(entries)?
        }
        other => other?,
    };
    let submitter = ring.submitter();
    submitter.register_files(files)?;
    // Buffered reads of the base and syncs go through kernel worker threads; unbounded, one busy disk could take a host's
    // worth of them. Linux before 5.15 cannot bound them.
    let _ = submitter.register_iowq_max_workers(&mut [WORKERS_MAX; 2]);
    let mut restrictions = [
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        Restriction::register_op(REGISTER_FILES_UPDATE),
    ];
    submitter.register_restrictions(&mut restrictions)?;
    Ok(ring)
}
