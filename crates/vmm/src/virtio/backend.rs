//! The I/O thread's half of a device.

use std::os::fd::RawFd;

use super::DeviceStats;
use super::queue::{QueueError, VirtQueue};

/// Why a device stopped serving its driver until the next reset.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Volume(#[from] hearth_block::BlockError),
    #[error("cannot watch the device's descriptor: {0}")]
    Watch(std::io::Error),
    #[error("cannot set the tap's offloads: {0}")]
    Offloads(std::io::Error),
}

/// Why `run` was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// The driver notified this queue, or it was just started.
    Queue(usize),
    /// The descriptor of `Backend::event_fd` became ready.
    Fd,
    /// The descriptor of `Backend::wake_fd` became ready.
    Outside,
}

/// What serves the queues: owned by the I/O thread alone.
pub(crate) trait Backend: Send {
    /// The driver accepted `features` and is about to start queues. Called again after each reset.
    fn activate(&mut self, features: u64) -> Result<(), Broken>;

    /// A descriptor to watch (edge-triggered, in and out) from activation on.
    fn event_fd(&self) -> Option<RawFd>;

    /// True for a device that works also without a driver: its descriptors are watched and it runs from the start.
    fn always_on(&self) -> bool {
        false
    }

    /// A second descriptor to watch (edge-triggered, never read) from the start.
    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    /// Requests in flight wait for something outside this process, perhaps for ever.
    fn is_stuck(&self) -> bool {
        false
    }

    /// A queue starts moving.
    fn start_queue(&mut self, queue: VirtQueue);

    /// The queue's rings must not be touched again. Requests in flight finish silently.
    fn stop_queue(&mut self, index: usize);

    /// Requests of this queue that the host still works on (and whose buffers it may write).
    fn in_flight(&self, index: usize) -> usize;

    /// Notes why the device is to run next.
    fn wake(&mut self, wake: Wake);

    /// Does what there is to do, within a budget so that other devices get their turn. True: there is more, run again
    /// soon. With `accept` false only finishes what is in flight.
    fn run(&mut self, accept: bool) -> Result<bool, Broken>;

    /// The thread is about to sleep: has the driver notify again. True: there is more, run again instead. Only called with queues that
    /// may move; devices whose `run` ends with that have nothing to do.
    fn rest(&mut self) -> Result<bool, Broken> {
        Ok(false)
    }

    /// Whether the driver has added something since the last `run`, whose notification [`rest`](Self::rest) has not asked for yet.
    fn has_chains(&self) -> bool {
        false
    }

    /// What is behind the device is to be given back: requests in flight finish, new ones are refused, and writes become
    /// durable. [`take_released`](Self::take_released) tells when that is done; until then `run` goes on being called.
    fn retire(&mut self) {}

    /// True while the device has host resources that [`retire`](Self::retire) gives back.
    fn holds_host(&self) -> bool {
        false
    }

    /// Once, when everything has been given back: whether all writes were made durable.
    fn take_released(&mut self) -> Option<bool> {
        None
    }

    /// The volume has this many bytes now.
    fn resized(&mut self, _bytes: u64) {}

    /// Adds the device's counters to the set's, in construction order.
    fn collect(&self, stats: &mut DeviceStats);
}
