//! Makes devices for PCI slots: at start for the spec's, later for hot-plugged disks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::VirtioError;
use super::backend::Backend;
use super::block::{self, BlockBackend};
use super::device_set::{Disk, Platform};
use super::io_device::{DeviceId, IoDevice};
use super::io_thread::{CommandSender, eventfd};
use super::shared::DeviceShared;
use super::transport::{BAR_BYTES, Profile, VirtioPci};
use super::volume::OpenVolume;
use crate::pci::PciBus;

/// virtio-blk's serial field.
const SERIAL_BYTES: usize = 20;
/// Request queues per disk: with the configuration vector they fit the MSI-X table.
const QUEUES_MAX: u16 = 16;

/// Both halves of a device, and where it goes. Visible to nobody yet.
pub(crate) struct Made {
    pub(crate) slot: usize,
    pub(crate) function: Arc<VirtioPci>,
    pub(crate) device: IoDevice,
}

/// A made disk, with what the machine keeps of it.
pub(crate) struct MadeDisk {
    pub(crate) made: Made,
    pub(crate) serial: String,
    pub(crate) volume: OpenVolume,
}

pub(crate) struct Factory {
    pub(crate) platform: Platform,
    pub(crate) bus: Arc<PciBus>,
    pub(crate) commands: CommandSender,
    next_device: AtomicU32,
}

impl Factory {
    pub(crate) fn new(platform: Platform) -> Result<Self, VirtioError> {
        let bus = Arc::new(PciBus::new(platform.layout.clone()));
        Ok(Self { bus, commands: CommandSender::new()?, next_device: AtomicU32::new(0), platform })
    }

    /// A number for a new device.
    pub(crate) fn next_id(&self) -> DeviceId {
        self.next_device.fetch_add(1, Ordering::Relaxed)
    }

    /// A device for the lowest free slot.
    pub(crate) fn make(
        &self,
        id: DeviceId,
        name: String,
        profile: &Profile,
        config: Vec<u8>,
        backend: impl FnOnce(Arc<DeviceShared>) -> Box<dyn Backend>,
    ) -> Result<Made, VirtioError> {
        let slot = self.bus.free_slot()?;
        let window = &self.platform.layout.mmio64;
        let address = window.start + slot as u64 * BAR_BYTES;
        if address + BAR_BYTES > window.end {
            return Err(VirtioError::WindowTooSmall(slot));
        }
        let queues = profile.queue_sizes.len();
        let shared = Arc::new(DeviceShared::new(queues, config, Arc::clone(&self.platform.msi)));
        let doorbells = (0..queues).map(|_| eventfd().map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let function = VirtioPci::new(
            profile,
            id,
            address,
            Arc::clone(&shared),
            &doorbells,
            self.commands.clone(),
            Arc::clone(&self.platform.ioevents),
        );
        let backend = backend(Arc::clone(&shared));
        Ok(Made { slot, function: Arc::new(function), device: IoDevice::new(id, name, shared, doorbells, backend) })
    }

    /// A disk over `disk`'s backing. Blocks while that is opened.
    pub(crate) fn make_disk(&self, disk: Disk) -> Result<MadeDisk, VirtioError> {
        let Disk { serial, backing, read_only, queues } = disk;
        // Before the volume is opened, which may already change it.
        check(&serial, queues)?;
        self.bus.free_slot()?;
        let id = self.next_id();
        let volume = OpenVolume::open(backing, read_only, id, &self.platform.events)
            .map_err(|source| VirtioError::Volume { serial: serial.clone(), source })?;
        self.make_volume(id, &serial, volume, queues)
    }

    /// A disk over an open volume.
    pub(crate) fn make_volume(
        &self,
        id: DeviceId,
        serial: &str,
        volume: OpenVolume,
        queues: u16,
    ) -> Result<MadeDisk, VirtioError> {
        check(serial, queues)?;
        let profile = block::profile(volume.volume.as_ref(), queues);
        let config = block::config_space(volume.volume.as_ref(), queues);
        let mut backend = BlockBackend::new(volume.clone(), serial, usize::from(queues), &self.platform.memory);
        backend.open().map_err(|source| VirtioError::Volume { serial: serial.to_owned(), source })?;
        let made = self.make(id, format!("disk {serial}"), &profile, config, |_| Box::new(backend))?;
        Ok(MadeDisk { made, serial: serial.to_owned(), volume })
    }
}

fn check(serial: &str, queues: u16) -> Result<(), VirtioError> {
    if serial.is_empty() || serial.len() > SERIAL_BYTES || !serial.is_ascii() {
        return Err(VirtioError::BadSerial(serial.to_owned()));
    }
    if !(1..=QUEUES_MAX).contains(&queues) {
        return Err(VirtioError::BadQueueCount { serial: serial.to_owned(), queues });
    }
    Ok(())
}
