//! The io_uring engine: one ring per queue, restricted to the few operations on the one registered file.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};

use super::Shared;
use crate::task::{Call, Task, Verdict};
use crate::{BlockError, Completion, IoError, Request, VolumeQueue};

/// The volume's place in the ring's registered files.
const VOLUME_FILE: Fixed = Fixed(0);
/// Kernel worker threads per ring, of either kind.
const WORKERS_MAX: u32 = 8;
/// Refused submissions in a row (kernel out of memory) before the queue gives up.
const MAX_SUBMIT_RETRIES: usize = 1000;

pub(crate) struct RingQueue {
    ring: IoUring,
    shared: Arc<Shared>,
    /// Indexed by the ring's user data.
    slots: Vec<Task>,
    free: Vec<usize>,
    /// Requests that ended without reaching the kernel.
    ended: Vec<(u64, Result<(), IoError>)>,
    capacity: usize,
    in_flight: usize,
    enabled: bool,
}

impl RingQueue {
    pub(crate) fn open(shared: Arc<Shared>, capacity: usize) -> Result<Self, BlockError> {
        let ring = build(capacity as u32, shared.file.as_raw_fd()).map_err(BlockError::RingSetup)?;
        Ok(Self {
            ring,
            shared,
            slots: Vec::new(),
            free: Vec::new(),
            ended: Vec::new(),
            capacity,
            in_flight: 0,
            enabled: false,
        })
    }

    /// The ring starts disabled: the thread that enables it becomes its single issuer.
    fn enable(&mut self) -> Result<(), BlockError> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings().map_err(BlockError::RingSetup)?;
            self.enabled = true;
        }
        Ok(())
    }

    /// Puts slot `index`'s next call on the submission queue, or ends it.
    fn push(&mut self, index: usize) -> Result<(), BlockError> {
        let Some(task) = self.slots.get_mut(index) else { return Ok(()) };
        let token = task.token;
        let entry = self.shared.gate(task).map(|()| task.call().map(entry_for));
        let entry = match entry {
            Ok(Some(entry)) => entry.user_data(index as u64),
            nothing => {
                self.end(index, token, nothing.map(|_| ()));
                return Ok(());
            }
        };
        // SAFETY: the iovec array lives in the slot, which is neither changed nor dropped before its completion is seen; the
        // buffers behind it are the submitter's promise (`VolumeQueue::submit`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // Cannot fail: the ring has room for `capacity` entries and each slot has at most one.
        pushed.map_err(|_| BlockError::QueueFull { capacity: self.capacity })
    }

    /// Ends a request without the kernel; `drain` reports it.
    fn end(&mut self, index: usize, token: u64, result: Result<(), IoError>) {
        self.ended.push((token, result));
        self.free.push(index);
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
}

impl VolumeQueue for RingQueue {
    unsafe fn submit(&mut self, request: Request<'_>) -> Result<(), BlockError> {
        if self.in_flight >= self.capacity {
            return Err(BlockError::QueueFull { capacity: self.capacity });
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push(Task::idle());
                self.slots.len() - 1
            }
        };
        let size = self.shared.size();
        let Some(task) = self.slots.get_mut(index) else {
            return Err(BlockError::QueueFull { capacity: self.capacity });
        };
        self.in_flight += 1;
        if let Err(error) = task.start(&request, size) {
            self.end(index, request.token, Err(error));
            return Ok(());
        }
        self.push(index)
    }

    fn kick(&mut self) -> Result<(), BlockError> {
        self.enable()?;
        self.submit_pending()
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns this descriptor and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    fn drain(&mut self, sink: &mut dyn FnMut(Completion)) -> Result<(), BlockError> {
        loop {
            for (token, result) in std::mem::take(&mut self.ended) {
                self.in_flight = self.in_flight.saturating_sub(1);
                sink(Completion { token, result });
            }
            let Some(entry) = self.ring.completion().next() else { break };
            let index = entry.user_data() as usize;
            let result = u64::try_from(entry.result()).map_err(|_| entry.result().saturating_neg());
            let Some(task) = self.slots.get_mut(index) else { continue };
            if result.is_err() && task.is_sync() && result != Err(libc::EINTR) {
                self.shared.note_sync_failure();
            }
            match task.advance(result) {
                Verdict::Done(result) => {
                    let token = task.token;
                    self.free.push(index);
                    self.in_flight = self.in_flight.saturating_sub(1);
                    sink(Completion { token, result });
                }
                Verdict::Again => self.push(index)?,
            }
        }
        self.submit_pending()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

impl Drop for RingQueue {
    fn drop(&mut self) {
        // Buffers may be unmapped once the queue is gone, so wait for the kernel to be done with them.
        while self.enabled && self.in_flight > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                }
                Err(_) => return,
            }
            let mut done = 0;
            for entry in self.ring.completion() {
                let _ = entry.result();
                done += 1;
            }
            self.in_flight = self.in_flight.saturating_sub(done + std::mem::take(&mut self.ended).len());
        }
    }
}

fn entry_for(call: Call<'_>) -> Entry {
    match call {
        Call::Readv { iovecs, offset } => {
            opcode::Readv::new(VOLUME_FILE, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
        }
        Call::Writev { iovecs, offset } => {
            opcode::Writev::new(VOLUME_FILE, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
        }
        Call::Fdatasync => opcode::Fsync::new(VOLUME_FILE).flags(FsyncFlags::DATASYNC).build(),
        Call::Fallocate { mode, offset, length } => {
            opcode::Fallocate::new(VOLUME_FILE, length).offset(offset).mode(mode).build()
        }
    }
}

/// A disabled, restricted ring around one file. `SINGLE_ISSUER` and `COOP_TASKRUN` came with Linux 6.0 and 5.19; older
/// kernels get a ring without them.
fn build(entries: u32, file: i32) -> io::Result<IoUring> {
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
    submitter.register_files(&[file])?;
    // Buffered writes go through kernel worker threads; unbounded, one busy disk could take a host's worth of them.
    // Linux before 5.15 cannot bound them.
    let _ = submitter.register_iowq_max_workers(&mut [WORKERS_MAX; 2]);
    let mut restrictions = [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
    ];
    submitter.register_restrictions(&mut restrictions)?;
    Ok(ring)
}
