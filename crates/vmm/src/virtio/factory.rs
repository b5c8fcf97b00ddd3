//! Makes devices for PCI slots: at start for the spec's, later for hot-plugged disks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hearth_block::{Engine, RawFile, Volume};

use super::VirtioError;
use super::backend::Backend;
use super::block::{self, BlockBackend};
use super::device_set::{Disk, Platform};
use super::io_device::{DeviceId, IoDevice};
use super::io_thread::{CommandSender, eventfd};
use super::shared::DeviceShared;
use super::transport::{BAR_BYTES, Profile, VirtioPci};
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
    pub(crate) volume: Arc<dyn Volume>,
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

    /// A device for the lowest free slot.
    pub(crate) fn make(
        &self,
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
        let id: DeviceId = self.next_device.fetch_add(1, Ordering::Relaxed);
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

    /// A disk over `disk`'s backing.
    pub(crate) fn make_disk(&self, disk: Disk) -> Result<MadeDisk, VirtioError> {
        let Disk { serial, file, read_only, queues } = disk;
        let volume = RawFile::new(file, read_only, Engine::Auto)
            .map_err(|source| VirtioError::Volume { serial: serial.clone(), source })?;
        self.make_volume(&serial, Arc::new(volume), queues)
    }

    /// A disk over any volume.
    pub(crate) fn make_volume(
        &self,
        serial: &str,
        volume: Arc<dyn Volume>,
        queues: u16,
    ) -> Result<MadeDisk, VirtioError> {
        if serial.is_empty() || serial.len() > SERIAL_BYTES || !serial.is_ascii() {
            return Err(VirtioError::BadSerial(serial.to_owned()));
        }
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(VirtioError::BadQueueCount { serial: serial.to_owned(), queues });
        }
        let profile = block::profile(volume.as_ref(), queues);
        let config = block::config_space(volume.as_ref(), queues);
        let memory = &self.platform.memory;
        let mut backend = BlockBackend::new(Arc::clone(&volume), serial, usize::from(queues), memory);
        backend.open().map_err(|source| VirtioError::Volume { serial: serial.to_owned(), source })?;
        let made = self.make(format!("disk {serial}"), &profile, config, |_| Box::new(backend))?;
        Ok(MadeDisk { made, serial: serial.to_owned(), volume })
    }
}
