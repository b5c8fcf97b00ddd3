//! Disks that come and go while the guest runs.
//!
//! A disk leaves in one of two ways. Asked nicely, the guest lets go of the function when it can and writes EJECT; the
//! function leaves the bus at once, and the I/O thread finishes, flushes and gives back the volume. By force, the volume is
//! given back first: what is in flight finishes, a last flush follows, and every later request fails; the dead function
//! keeps its slot until the guest lets go of it. (Taken off the bus under a driver's feet it would read as all ones, and
//! Linux's virtio driver then waits for the end of its reset for ever.)

use std::io::Write;
use std::sync::{Arc, Mutex};

use hearth_block::{Cause, SECTOR_BYTES};

use super::VirtioError;
use super::factory::{Made, MadeDisk};
use super::io_device::{DeviceId, IoDevice};
use super::io_thread::{Command, CommandSender, DepartureSink};
use super::shared::{DeviceShared, lock};
use super::transport::VirtioPci;
use super::volume::{Layered, OpenVolume};
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
    /// Requests wait for a chunk of the base.
    Fetch {
        /// The device.
        device: DeviceId,
        /// The chunk.
        chunk: u64,
    },
    /// Requests wait or fail.
    Impaired {
        /// The device.
        device: DeviceId,
        /// Why.
        cause: Cause,
    },
    /// Nothing waits any more.
    Recovered {
        /// The device.
        device: DeviceId,
    },
    /// A chunk is complete in the stage of a freeze.
    Staged {
        /// The device.
        device: DeviceId,
        /// The chunk.
        chunk: u64,
    },
    /// Requests wait for a new connection to the volume's server.
    ConnectionWanted {
        /// The device.
        device: DeviceId,
    },
}

impl DiskEvent {
    fn device(self) -> DeviceId {
        match self {
            Self::Released { device, .. }
            | Self::Gone { device }
            | Self::Fetch { device, .. }
            | Self::Impaired { device, .. }
            | Self::Recovered { device }
            | Self::Staged { device, .. }
            | Self::ConnectionWanted { device } => device,
        }
    }
}

/// What the agent is to be told of the disk named `serial`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskNotice {
    /// Which.
    pub serial: String,
    /// What.
    pub news: DiskNews,
}

/// See [`DiskNotice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskNews {
    /// Its volume is free again.
    Detached {
        /// All its writes were made durable.
        durable: bool,
    },
    /// It needs this chunk.
    Fetch(u64),
    /// Requests wait or fail.
    Impaired(Cause),
    /// Nothing waits any more.
    Recovered,
    /// This chunk is in the stage.
    Staged(u64),
    /// It needs a connection.
    ConnectionWanted,
}

/// What an agent that was away has to know of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskCondition {
    /// Which.
    pub serial: String,
    /// Chunks it waits for.
    pub chunks: Vec<u64>,
    /// It waits for a connection.
    pub connect: bool,
    /// Why requests wait or fail, if they do.
    pub impaired: Option<Cause>,
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
    volume: Option<OpenVolume>,
    impaired: Option<Cause>,
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
    volume: OpenVolume,
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
        state.entries.push(Entry {
            device,
            slot,
            serial,
            volume: Some(volume),
            impaired: None,
            shared,
            ejected: false,
        });
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
    pub(crate) fn volume(&self, serial: &str) -> Result<(DeviceId, OpenVolume), VirtioError> {
        let mut state = lock(&self.state);
        let entry = state.find(serial)?;
        let missing = || VirtioError::NoSuchDisk(serial.to_owned());
        Ok((entry.device, entry.volume.clone().ok_or_else(missing)?))
    }

    /// The layered engine of a disk.
    pub(crate) fn layered(&self, serial: &str) -> Result<Layered, VirtioError> {
        self.volume(serial)?.1.layered().cloned().ok_or_else(|| VirtioError::NotLayered(serial.to_owned()))
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

    /// Notes what happened to a disk; what the agent is to be told of it. Closing a volume blocks.
    pub(crate) fn note(&self, event: DiskEvent) -> Option<DiskNotice> {
        let mut state = lock(&self.state);
        let device = event.device();
        if let DiskEvent::Gone { .. } = event {
            state.entries.retain(|entry| entry.device != device);
            return None;
        }
        let entry = state.entries.iter_mut().find(|entry| entry.device == device && entry.volume.is_some())?;
        let serial = entry.serial.clone();
        let news = match event {
            DiskEvent::Fetch { chunk, .. } => DiskNews::Fetch(chunk),
            DiskEvent::Staged { chunk, .. } => DiskNews::Staged(chunk),
            DiskEvent::ConnectionWanted { .. } => DiskNews::ConnectionWanted,
            DiskEvent::Impaired { cause, .. } => {
                entry.impaired = Some(cause);
                DiskNews::Impaired(cause)
            }
            DiskEvent::Recovered { .. } => {
                entry.impaired = None;
                DiskNews::Recovered
            }
            DiskEvent::Released { durable, .. } => {
                let volume = entry.volume.take()?;
                drop(state);
                // The last reference: its files are closed then.
                let closed = close(&serial, volume);
                return Some(DiskNotice { serial, news: DiskNews::Detached { durable: durable && closed } });
            }
            DiskEvent::Gone { .. } => return None,
        };
        Some(DiskNotice { serial, news })
    }

    /// What an agent that comes back has to know.
    pub(crate) fn conditions(&self) -> Vec<DiskCondition> {
        let state = lock(&self.state);
        let condition = |entry: &Entry| {
            let (chunks, connect) = entry.volume.as_ref()?.wants()?;
            Some(DiskCondition { serial: entry.serial.clone(), chunks, connect, impaired: entry.impaired })
        };
        state.entries.iter().filter_map(condition).collect()
    }

    /// Closes every volume, once the I/O thread is over. False when writes may not be durable.
    pub(crate) fn close_all(&self) -> bool {
        let entries = std::mem::take(&mut lock(&self.state).entries);
        let mut durable = true;
        for entry in entries {
            durable &= entry.volume.is_none_or(|volume| close(&entry.serial, volume));
        }
        durable
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

fn close(serial: &str, volume: OpenVolume) -> bool {
    let closed = volume.volume.close();
    if let Err(error) = &closed {
        let _ = writeln!(std::io::stderr(), "disk {serial}: {error}");
    }
    closed.is_ok()
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
