//! Virtio devices (OASIS virtio 1.2) and their PCI transport.

mod device_set;

pub use device_set::{DeviceList, DeviceSet, DeviceStats, Disk, IoThread, Nic, Platform};

/// Why a device could not be built or its I/O thread failed.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The I/O thread is gone; the machine cannot go on.
    #[error("the I/O thread ended: {0}")]
    IoThreadGone(String),
}
