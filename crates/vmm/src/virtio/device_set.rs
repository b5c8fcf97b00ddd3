//! All PCI devices of one microVM, built from its spec.
//!
//! How the machine uses it: [`DeviceSet::build`] once, hook [`DeviceSet::port_device`] and [`DeviceSet::mmio_devices`] into
//! the port and MMIO buses, [`DeviceSet::start`] the I/O thread, then keep the [`IoThread`] handle for pause, resume,
//! statistics and the end.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

#[cfg(test)]
use hearth_block::Volume;
use vm_memory::GuestMemoryMmap;

use super::VirtioError;
use super::backend::Backend;
use super::balloon::{self, BalloonBackend};
use super::factory::{Factory, Made, MadeDisk};
use super::hotplug::{Arrival, DepartureEvents, Hotplug};
use super::io_device::IoDevice;
use super::io_handle::IoThread;
use super::io_thread::IoLoop;
use super::net::{self, Link, NetBackend, Tap};
use super::rng::{self, RngBackend};
use super::shared::DeviceShared;
use super::transport::Profile;
use super::volume::Backing;
#[cfg(test)]
use super::volume::OpenVolume;
use crate::bus::BusDevice;
use crate::control::protocol::{DiskStats, NicStats};
use crate::events::EventSink;
use crate::interrupt::{IoEventRegistry, IrqLine, MsiSender};
use crate::pci::PciLayout;

/// The I/O thread's stack: no recursion, no large buffers.
const STACK_BYTES: usize = 256 * 1024;

/// One disk: what the guest sees and what is behind it.
pub struct Disk {
    /// Up to 20 ASCII bytes, answered to VIRTIO_BLK_T_GET_ID.
    pub serial: String,
    /// Where its bytes are.
    pub backing: Backing,
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

/// Everything on the PCI bus besides the host bridge, in slot order: disks, NICs, entropy source, balloon.
#[derive(Default)]
pub struct DeviceList {
    /// Slots 1.. in this order.
    pub disks: Vec<Disk>,
    /// Slots after the disks.
    pub nics: Vec<Nic>,
    /// `/dev/urandom` or the like for virtio-rng; in the slot after the NICs.
    pub rng: Option<File>,
    /// Offer virtio-balloon for free page reporting; in the slot after the entropy source.
    pub balloon: bool,
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
    /// Tells the guest that the PCI hot-plug registers changed.
    pub hotplug_line: Arc<dyn IrqLine>,
    /// Where disks on their way out are reported.
    pub events: Arc<dyn EventSink>,
}

/// The built devices, before and after their I/O thread starts.
pub struct DeviceSet {
    factory: Factory,
    hotplug: Arc<Hotplug>,
    fixed: u32,
    io_loop: Option<IoLoop>,
    on_failure: Option<Box<dyn FnOnce(String) + Send>>,
}

impl DeviceSet {
    /// Builds bus and devices; nothing runs yet and no guest memory is touched.
    pub fn build(devices: DeviceList, platform: Platform) -> Result<Self, VirtioError> {
        let mut builder = Builder::new(platform)?;
        for disk in devices.disks {
            builder.add_disk(disk)?;
        }
        for (index, nic) in devices.nics.into_iter().enumerate() {
            let link = Tap::new(nic.tap).map_err(|(what, source)| VirtioError::Tap { index, what, source })?;
            builder.add_nic(index, nic.mac, nic.mtu, Box::new(link))?;
        }
        if let Some(source) = devices.rng {
            builder.add_rng(source)?;
        }
        if devices.balloon {
            builder.add_balloon()?;
        }
        builder.finish()
    }

    /// Slots, bit by bit, in which functions may come and go.
    pub fn hotplug_slots(&self) -> u32 {
        !self.fixed
    }

    /// The hot-plug registers: see [`acpi::hotplug`](crate::acpi::hotplug).
    pub fn hotplug_device(&self) -> Arc<dyn BusDevice> {
        Arc::clone(&self.hotplug) as _
    }

    /// Configuration access by ports: register for `0xCF8..=0xCFF`.
    pub fn port_device(&self) -> Arc<dyn BusDevice> {
        self.factory.bus.port_device()
    }

    /// ECAM and both BAR windows, as guest physical ranges to register on the MMIO bus.
    pub fn mmio_devices(&self) -> Vec<(Range<u64>, Arc<dyn BusDevice>)> {
        self.factory.bus.mmio_devices()
    }

    /// The loop itself, for tests that turn it by hand.
    #[cfg(test)]
    pub(crate) fn take_io_loop(&mut self) -> IoLoop {
        self.io_loop.take().unwrap()
    }

    /// Calls `told` from the I/O thread if that ends without having been told to: the machine cannot go on. Before `start`.
    pub fn on_failure(&mut self, told: impl FnOnce(String) + Send + 'static) {
        self.on_failure = Some(Box::new(told));
    }

    /// Spawns the I/O thread. `on_start` runs first in that thread (seccomp filter, thread name in logs); its error ends
    /// the thread. Devices answer register accesses before, but queues move only after.
    pub fn start(
        mut self,
        on_start: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<IoThread, VirtioError> {
        let io_loop = self.io_loop.take().ok_or(VirtioError::AlreadyStarted)?;
        let on_failure = self.on_failure.take();
        let thread = std::thread::Builder::new()
            .name("io".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let result = on_start()
                    .map_err(|source| VirtioError::Setup { what: "thread start hook", source })
                    .and_then(|()| io_loop.run());
                if let (Err(error), Some(told)) = (&result, on_failure) {
                    told(error.to_string());
                }
                result
            })
            .map_err(|source| VirtioError::Setup { what: "thread", source })?;
        Ok(IoThread::new(self.factory, self.hotplug, thread))
    }
}

/// Puts devices on the bus one after the other.
pub(crate) struct Builder {
    factory: Factory,
    hotplug: Arc<Hotplug>,
    devices: Vec<IoDevice>,
    /// Slots of functions that stay as long as the machine.
    fixed: u32,
}

impl Builder {
    pub(crate) fn new(platform: Platform) -> Result<Self, VirtioError> {
        let factory = Factory::new(platform)?;
        let line = Arc::clone(&factory.platform.hotplug_line);
        let hotplug = Arc::new(Hotplug::new(Arc::clone(&factory.bus), factory.commands.clone(), line));
        // Slot 0 is the host bridge's.
        Ok(Self { factory, hotplug, devices: Vec::new(), fixed: 1 })
    }

    pub(crate) fn add_disk(&mut self, disk: Disk) -> Result<(), VirtioError> {
        self.hotplug.check_serial(&disk.serial)?;
        let disk = self.factory.make_disk(disk)?;
        self.add_made_disk(disk)
    }

    #[cfg(test)]
    pub(crate) fn add_volume(&mut self, serial: &str, volume: Arc<dyn Volume>, queues: u16) -> Result<(), VirtioError> {
        let disk = self.factory.make_volume(self.factory.next_id(), serial, OpenVolume::plain(volume), queues)?;
        self.add_made_disk(disk)
    }

    fn add_made_disk(&mut self, disk: MadeDisk) -> Result<(), VirtioError> {
        let (arrival, device) = Arrival::of(disk);
        self.devices.push(device);
        self.hotplug.publish(arrival).map(|_| ())
    }

    pub(crate) fn add_nic(
        &mut self,
        index: usize,
        mac: [u8; 6],
        mtu: u16,
        link: Box<dyn Link>,
    ) -> Result<(), VirtioError> {
        if !(68..=65521).contains(&mtu) {
            return Err(VirtioError::BadMtu { index, mtu });
        }
        let memory = Arc::clone(&self.factory.platform.memory);
        self.add(format!("network interface {index}"), &net::profile(), net::config_space(mac, mtu), |shared| {
            Box::new(NetBackend::new(link, shared, mtu, &memory))
        })
    }

    pub(crate) fn add_rng(&mut self, source: File) -> Result<(), VirtioError> {
        let memory = Arc::clone(&self.factory.platform.memory);
        self.add("entropy source".into(), &rng::profile(), Vec::new(), |_| Box::new(RngBackend::new(source, &memory)))
    }

    pub(crate) fn add_balloon(&mut self) -> Result<(), VirtioError> {
        let backend = BalloonBackend::new(&self.factory.platform.memory);
        self.add("balloon".into(), &balloon::profile(), balloon::config_space(), |_| Box::new(backend))
    }

    fn add(
        &mut self,
        name: String,
        profile: &Profile,
        config: Vec<u8>,
        backend: impl FnOnce(Arc<DeviceShared>) -> Box<dyn Backend>,
    ) -> Result<(), VirtioError> {
        let Made { slot, function, device } =
            self.factory.make(self.factory.next_id(), name, profile, config, backend)?;
        self.devices.push(device);
        self.fixed |= 1 << slot;
        Ok(self.factory.bus.publish(slot, function)?)
    }

    pub(crate) fn finish(self) -> Result<DeviceSet, VirtioError> {
        let Self { factory, hotplug, devices, fixed } = self;
        let departures = Box::new(DepartureEvents(Arc::clone(&factory.platform.events)));
        let memory = Arc::clone(&factory.platform.memory);
        let io_loop = IoLoop::new(factory.commands.clone(), memory, devices, departures)?;
        Ok(DeviceSet { factory, hotplug, fixed, io_loop: Some(io_loop), on_failure: None })
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
