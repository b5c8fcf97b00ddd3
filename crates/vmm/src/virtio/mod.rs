//! Virtio devices (OASIS virtio 1.2) and their PCI transport.
//!
//! Two sides share each device. vCPU threads read and write registers ([`transport`]); the I/O thread ([`io_thread`]) owns
//! the queues and what is behind them ([`backend`]). Between them stand a command channel (activate, reset, queue reset) and
//! [`shared::DeviceShared`]: status, device configuration and interrupts. A reset is asynchronous, as the specification
//! allows: the status register reads non-zero until the I/O thread has nothing of the device in flight any more.

mod backend;
mod balloon;
mod block;
mod common_config;
mod device_set;
mod factory;
mod guest_buffers;
mod hotplug;
mod io_device;
mod io_handle;
mod io_thread;
mod nbd;
mod net;
mod patience;
mod queue;
mod rng;
mod shared;
mod transport;
mod volume;

#[cfg(test)]
mod tests;

pub use device_set::{DeviceList, DeviceSet, DeviceStats, Disk, Nic, Platform};
pub use hotplug::{DiskCondition, DiskEvent, DiskNews, DiskNotice};
pub use io_device::DeviceId;
pub use io_handle::IoThread;
pub use nbd::NbdBacking;
pub use volume::{Backing, LayeredBacking};

use std::io;

use hearth_block::BlockError;

use crate::pci::PciError;

/// Why a device could not be built or its I/O thread failed.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// A disk's serial is longer than the 20 bytes virtio-blk has, or not ASCII.
    #[error("disk serial {0:?} is not 1 to 20 ASCII bytes")]
    BadSerial(String),
    /// Queues outside 1..=16.
    #[error("disk {serial}: {queues} request queues asked for, 1 to 16 are possible")]
    BadQueueCount {
        /// Which disk.
        serial: String,
        /// What was asked for.
        queues: u16,
    },
    /// MTU outside what virtio-net and Ethernet allow.
    #[error("network interface {index}: MTU {mtu} is not within 68..=65521")]
    BadMtu {
        /// Position in the spec.
        index: usize,
        /// What was asked for.
        mtu: u16,
    },
    /// The volume behind a disk.
    #[error("disk {serial}: {source}")]
    Volume {
        /// Which disk.
        serial: String,
        /// Cause.
        source: BlockError,
    },
    /// A tap could not be configured.
    #[error("network interface {index}: cannot set up its tap ({what}): {source}")]
    Tap {
        /// Position in the spec.
        index: usize,
        /// Which step.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// A disk with this serial is there already, or not gone yet.
    #[error("a disk with serial {0} is attached already, or its detachment is not over yet")]
    SerialTaken(String),
    /// No such disk.
    #[error("no disk with serial {0} is attached")]
    NoSuchDisk(String),
    /// A disk whose backing has no engine for what is asked.
    #[error("disk {0} is not a layered volume: it has no snapshots here")]
    NotLayered(String),
    /// A disk whose backing has no limiter.
    #[error("disk {0} is a raw file: it has no rate limits")]
    NoLimits(String),
    /// A disk that has no connection.
    #[error("disk {0} is not served over NBD")]
    NotNbd(String),
    /// A disk can only grow.
    #[error("disk {serial} has {from} bytes and cannot become {to}: it can only grow, by whole sectors")]
    Shrink {
        /// Which disk.
        serial: String,
        /// Its size.
        from: u64,
        /// What was asked for.
        to: u64,
    },
    /// The guest could not be told of a change.
    #[error("cannot interrupt the guest: {0}")]
    Notify(io::Error),
    /// No room on the bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The 64-bit PCI window cannot hold all BARs.
    #[error("the 64-bit PCI window is too small for the BAR of slot {0}")]
    WindowTooSmall(usize),
    /// eventfd, epoll or thread creation failed.
    #[error("cannot set up the I/O thread ({what}): {source}")]
    Setup {
        /// Which step.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// `start` was called twice.
    #[error("the I/O thread was already started")]
    AlreadyStarted,
    /// A disk's last writes may be lost; which, has been logged.
    #[error("not every disk could be made durable")]
    NotDurable,
    /// The I/O thread is gone; the machine cannot go on.
    #[error("the I/O thread ended: {0}")]
    IoThreadGone(String),
}
