//! Disks that come and go while the guest runs.
//!
//! A disk leaves in one of two ways. Asked nicely, the guest lets go of the function when it can and writes EJECT; the
//! function leaves the bus at once, and the I/O thread finishes, flushes and gives back the volume. By force, the volume is
//! given back first: what is in flight finishes, a last flush follows, and every later request fails; the dead function
//! keeps its slot until the guest lets go of it. (Taken off the bus under a driver's feet it would read as all ones, and
//! Linux's virtio driver then waits for the end of its reset for ever.)

use std::sync::{Arc, Mutex};

use hearth_block::{SECTOR_BYTES, Volume};

use super::VirtioError;
use super::factory::{Made, MadeDisk};
use super::io_device::{DeviceId, IoDevice};
use super::io_thread::{Command, CommandSender, DepartureSink};
use super::shared::{DeviceShared, lock};
use super::transport::VirtioPci;
use crate::acpi::hotplug::HotplugRegisters;
use crate::bus::BusDevice;
use crate::events::{EventSink, MachineEvent};
use crate::interrupt::IrqLine;
use crate::pci::{PciBus, SLOTS};

/// A step of a disk's departure, from the I/O thread to the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskEvent {
    /// The I/O thread no longer uses the volume.
    Released {
        /// The device.
        device: DeviceId,
        /// The last flush succeeded.
        durable: bool,
    },
    /// Nothing is left of the device.
    Gone {
        /// The device.
        device: DeviceId,
    },
}

/// A disk whose volume is free again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detached {
    /// Which.
    pub serial: String,
    /// The last flush succeeded.
    pub durable: bool,
}

/// Reports departures as machine events.
pub(crate) struct DepartureEvents(pub(crate) Arc<dyn EventSink>);

impl DepartureSink for DepartureEvents {
    fn released(&self, device: DeviceId, durable: bool) {
        self.0.raise(MachineEvent::Disk(DiskEvent::Released { device, durable }));
    }

    fn gone(&self, device: DeviceId) {
        self.0.raise(MachineEvent::Disk(DiskEvent::Gone { device }));
    }
}

/// One disk on the bus, or just off it.
struct Entry {
    device: DeviceId,
    slot: usize,
    serial: String,
    /// `None` once it was given back.
    volume: Option<Arc<dyn Volume>>,
    shared: Arc<DeviceShared>,
    /// Off the bus.
    ejected: bool,
}

/// A disk to be shown to the guest.
pub(crate) struct Arrival {
    device: DeviceId,
    slot: usize,
    function: Arc<VirtioPci>,
    shared: Arc<DeviceShared>,
    serial: String,
    volume: Arc<dyn Volume>,
}

impl Arrival {
    /// Splits a made disk into this and the I/O thread's half.
    pub(crate) fn of(disk: MadeDisk) -> (Self, IoDevice) {
        let MadeDisk { made: Made { slot, function, device }, serial, volume } = disk;
        let shared = Arc::clone(&device.shared);
        (Self { device: device.id, slot, function, shared, serial, volume }, device)
    }
}

#[derive(Default)]
struct State {
    registers: HotplugRegisters,
    entries: Vec<Entry>,
}

impl State {
    fn find(&mut self, serial: &str) -> Result<&mut Entry, VirtioError> {
        self.entries
            .iter_mut()
            .find(|entry| entry.volume.is_some() && entry.serial == serial)
            .ok_or_else(|| VirtioError::NoSuchDisk(serial.to_owned()))
    }
}

/// The hot-plug registers and the disks behind them. The control thread attaches and detaches; a vCPU ejects.
pub(crate) struct Hotplug {
    bus: Arc<PciBus>,
    commands: CommandSender,
    /// Tells the guest that the registers changed.
    line: Arc<dyn IrqLine>,
    state: Mutex<State>,
}

impl Hotplug {
    pub(crate) fn new(bus: Arc<PciBus>, commands: CommandSender, line: Arc<dyn IrqLine>) -> Self {
        Self { bus, commands, line, state: Mutex::default() }
    }

    /// An error when a disk of this name is there.
    pub(crate) fn check_serial(&self, serial: &str) -> Result<(), VirtioError> {
        match lock(&self.state).find(serial) {
            Ok(_) => Err(VirtioError::SerialTaken(serial.to_owned())),
            Err(_) => Ok(()),
        }
    }

    /// Puts a disk's function on the bus; its other half must be with the I/O thread already. Returns its slot, of which
    /// [`announce`](Self::announce) tells a guest that may have looked there before.
    pub(crate) fn publish(&self, disk: Arrival) -> Result<usize, VirtioError> {
        let Arrival { device, slot, function, shared, serial, volume } = disk;
        let mut state = lock(&self.state);
        self.bus.publish(slot, function)?;
        state.entries.push(Entry { device, slot, serial, volume: Some(volume), shared, ejected: false });
        Ok(slot)
    }

    /// Tells the guest of a new function.
    pub(crate) fn announce(&self, slot: usize) -> Result<(), VirtioError> {
        lock(&self.state).registers.inserted(slot);
        self.notify()
    }

    /// Interrupts the guest so that it reads the registers.
    fn notify(&self) -> Result<(), VirtioError> {
        self.line.trigger().map_err(VirtioError::Notify)
    }

    /// Asks the guest to let go of a disk; told by [`DiskEvent`]s when it has. Asking again notifies again.
    pub(crate) fn ask_removal(&self, serial: &str) -> Result<(), VirtioError> {
        let mut state = lock(&self.state);
        let entry = state.find(serial)?;
        if entry.ejected {
            return Ok(());
        }
        let slot = entry.slot;
        state.registers.ask_removal(slot);
        drop(state);
        self.notify()
    }

    /// Takes the volume of a disk away from the guest, whatever that does, and asks it to let go of the rest.
    pub(crate) fn force_removal(&self, serial: &str) -> Result<(), VirtioError> {
        let device = lock(&self.state).find(serial)?.device;
        self.commands.send(Command::Retire { device });
        self.ask_removal(serial)
    }

    /// The volume of a disk, to be looked at or grown.
    pub(crate) fn volume(&self, serial: &str) -> Result<(DeviceId, Arc<dyn Volume>), VirtioError> {
        let mut state = lock(&self.state);
        let entry = state.find(serial)?;
        let missing = || VirtioError::NoSuchDisk(serial.to_owned());
        Ok((entry.device, entry.volume.clone().ok_or_else(missing)?))
    }

    /// Shows the guest a new capacity. The I/O thread must know of it already.
    pub(crate) fn show_capacity(&self, serial: &str, bytes: u64) -> Result<(), VirtioError> {
        let shared = Arc::clone(&lock(&self.state).find(serial)?.shared);
        shared.update_config(|config| {
            if let Some(capacity) = config.get_mut(..8) {
                capacity.copy_from_slice(&(bytes / SECTOR_BYTES).to_le_bytes());
            }
        });
        Ok(())
    }

    /// Notes what the I/O thread told; a disk whose volume is free now.
    pub(crate) fn note(&self, event: DiskEvent) -> Option<Detached> {
        let mut state = lock(&self.state);
        match event {
            DiskEvent::Released { device, durable } => {
                let entry = state.entries.iter_mut().find(|entry| entry.device == device)?;
                // The last reference: this closes the file.
                entry.volume.take()?;
                Some(Detached { serial: entry.serial.clone(), durable })
            }
            DiskEvent::Gone { device } => {
                state.entries.retain(|entry| entry.device != device);
                None
            }
        }
    }

    fn eject(&self, slots: u32, state: &mut State) {
        for slot in (0..SLOTS).filter(|slot| slots & (1 << slot) != 0) {
            if let Some(entry) = state.entries.iter_mut().find(|entry| entry.slot == slot && !entry.ejected) {
                entry.ejected = true;
                self.bus.unpublish(slot);
                self.commands.send(Command::Remove { device: entry.device });
            }
        }
    }
}

impl BusDevice for Hotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.state).registers.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        let ejected = state.registers.write(offset, data);
        self.eject(ejected, &mut state);
    }
}
