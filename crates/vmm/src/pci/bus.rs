//! Bus 0 with 32 slots: configuration access by ports and ECAM, and the windows in which BARs answer.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{CONFIG_BYTES, HostBridge};
use crate::bus::BusDevice;

/// Device slots on the bus.
pub const SLOTS: usize = 32;

/// Guest physical ranges of the PCI windows. Must match the host bridge's `_CRS` and the MCFG table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciLayout {
    /// ECAM of bus 0: 1 MiB (32 slots x 8 functions x 4 KiB).
    pub ecam: Range<u64>,
    /// Window for 32-bit addresses (a guest may move BARs there).
    pub mmio32: Range<u64>,
    /// Window for 64-bit BARs; built devices' BARs lie at its start, by slot number.
    pub mmio64: Range<u64>,
}

impl PciLayout {
    /// BARs answer only inside the windows; a BAR programmed elsewhere (over RAM, say) answers nowhere.
    fn window_holds(&self, address: u64, size: u64) -> bool {
        let Some(end) = address.checked_add(size) else { return false };
        [&self.mmio32, &self.mmio64].iter().any(|window| window.start <= address && end <= window.end)
    }
}

/// Where a function's BAR wants to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodedBar {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// One single-function device with at most one BAR. Called from vCPU threads, several at once.
pub trait PciDevice: Send + Sync {
    /// Reads configuration space; beyond the device's registers zeros.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space. True when [`decoded_bar`](Self::decoded_bar) may have changed.
    fn write_config(&self, offset: usize, data: &[u8]) -> bool;
    /// Where the BAR wants to answer; `None` while decoding is off.
    fn decoded_bar(&self) -> Option<DecodedBar>;
    /// The bus tells where the BAR really answers from now on; ioeventfds follow.
    fn bar_moved(&self, address: Option<u64>);
    /// A read inside the BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]);
    /// A write inside the BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);
}

/// Why a slot could not be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// No such slot.
    #[error("PCI slot {0} does not exist (0..=31)")]
    NoSuchSlot(usize),
    /// Occupied.
    #[error("PCI slot {0} is occupied")]
    SlotOccupied(usize),
    /// All 32 are taken.
    #[error("all 32 PCI slots are occupied: too many disks and network interfaces")]
    BusFull,
}

#[derive(Clone)]
struct Mapping {
    slot: usize,
    range: Range<u64>,
    device: Arc<dyn PciDevice>,
}

type Slots = [Option<Arc<dyn PciDevice>>; SLOTS];

/// The bus. Cheap to share; all methods take `&self`.
pub struct PciBus {
    layout: PciLayout,
    slots: RwLock<Slots>,
    mappings: RwLock<Vec<Mapping>>,
    /// CONFIG_ADDRESS of configuration mechanism #1.
    config_address: AtomicU32,
}

impl PciBus {
    /// A bus with only its host bridge in slot 0.
    pub fn new(layout: PciLayout) -> Self {
        let mut slots = Slots::default();
        if let Some(first) = slots.first_mut() {
            *first = Some(Arc::new(HostBridge::new()));
        }
        Self { layout, slots: RwLock::new(slots), mappings: RwLock::new(Vec::new()), config_address: AtomicU32::new(0) }
    }

    /// The windows.
    pub fn layout(&self) -> &PciLayout {
        &self.layout
    }

    /// The lowest empty slot.
    pub fn free_slot(&self) -> Result<usize, PciError> {
        self.slots().iter().position(Option::is_none).ok_or(PciError::BusFull)
    }

    /// Makes a device visible. Do it last: a guest may look at any slot at any time.
    pub fn publish(&self, slot: usize, device: Arc<dyn PciDevice>) -> Result<(), PciError> {
        {
            let mut slots = self.slots_mut();
            match slots.get_mut(slot) {
                None => return Err(PciError::NoSuchSlot(slot)),
                Some(Some(_)) => return Err(PciError::SlotOccupied(slot)),
                Some(empty) => *empty = Some(Arc::clone(&device)),
            }
        }
        self.remap(slot, &device);
        Ok(())
    }

    /// Takes a device off the bus and hands it back; its BAR answers no more.
    pub fn unpublish(&self, slot: usize) -> Option<Arc<dyn PciDevice>> {
        let device = self.slots_mut().get_mut(slot)?.take()?;
        let mut mappings = self.mappings_mut();
        mappings.retain(|mapping| mapping.slot != slot);
        device.bar_moved(None);
        Some(device)
    }

    /// Occupied slots, bit by bit.
    pub fn occupied(&self) -> u32 {
        let slots = self.slots();
        slots.iter().enumerate().fold(0, |bits, (index, slot)| bits | (u32::from(slot.is_some()) << index))
    }

    /// Configuration access mechanism #1: a device for ports 0xCF8..=0xCFF.
    pub fn port_device(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(Arc::clone(self)))
    }

    /// ECAM and BAR windows with the guest physical ranges to register them at.
    pub fn mmio_devices(self: &Arc<Self>) -> Vec<(Range<u64>, Arc<dyn BusDevice>)> {
        let ecam: Arc<dyn BusDevice> = Arc::new(Ecam(Arc::clone(self)));
        let mut devices = vec![(self.layout.ecam.clone(), ecam)];
        for range in [&self.layout.mmio32, &self.layout.mmio64] {
            let window: Arc<dyn BusDevice> = Arc::new(Window { bus: Arc::clone(self), base: range.start });
            devices.push((range.clone(), window));
        }
        devices.retain(|(range, _)| !range.is_empty());
        devices
    }

    fn read_config(&self, target: ConfigTarget, data: &mut [u8]) {
        match self.device_at(target) {
            None => data.fill(0xff),
            Some(device) if target.register < CONFIG_BYTES => device.read_config(target.register, data),
            Some(_) => data.fill(0),
        }
    }

    fn write_config(&self, target: ConfigTarget, data: &[u8]) {
        if let Some(device) = self.device_at(target)
            && device.write_config(target.register, data)
        {
            self.remap(target.slot, &device);
        }
    }

    fn device_at(&self, target: ConfigTarget) -> Option<Arc<dyn PciDevice>> {
        if target.bus != 0 || target.function != 0 {
            return None;
        }
        self.slots().get(target.slot)?.clone()
    }

    /// Brings the window's map in line with the device's BAR. The mapping lock is held throughout, so that of two vCPUs
    /// moving one BAR the last one's value stands.
    fn remap(&self, slot: usize, device: &Arc<dyn PciDevice>) {
        let mut mappings = self.mappings_mut();
        // Unpublished meanwhile: nothing may come back.
        if !matches!(self.slots().get(slot), Some(Some(current)) if Arc::ptr_eq(current, device)) {
            return;
        }
        let wanted = device.decoded_bar().filter(|bar| self.layout.window_holds(bar.address, bar.size));
        mappings.retain(|mapping| mapping.slot != slot);
        device.bar_moved(wanted.map(|bar| bar.address));
        if let Some(bar) = wanted {
            let range = bar.address..bar.address + bar.size;
            mappings.push(Mapping { slot, range, device: Arc::clone(device) });
        }
    }

    fn mapping_at(&self, address: u64, length: usize) -> Option<Mapping> {
        let end = address.checked_add(length as u64)?;
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        mappings.iter().find(|mapping| mapping.range.start <= address && end <= mapping.range.end).cloned()
    }

    fn slots(&self) -> RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_mut(&self) -> RwLockWriteGuard<'_, Slots> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn mappings_mut(&self) -> RwLockWriteGuard<'_, Vec<Mapping>> {
        self.mappings.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One configuration register's coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ConfigTarget {
    bus: u32,
    slot: usize,
    function: u32,
    register: usize,
}

impl ConfigTarget {
    /// CONFIG_ADDRESS, `None` with its enable bit clear. Bits 24..=27 are register bits 8..=11 in the way AMD extended the
    /// mechanism; Linux uses them on AMD processors.
    fn from_address(value: u32) -> Option<Self> {
        (value >> 31 == 1).then_some(Self {
            bus: (value >> 16) & 0xff,
            slot: (value >> 11 & 0x1f) as usize,
            function: (value >> 8) & 7,
            register: ((value & 0xfc) | (value >> 16 & 0xf00)) as usize,
        })
    }

    fn from_ecam(offset: u64) -> Self {
        Self {
            bus: (offset >> 20) as u32,
            slot: (offset >> 15 & 0x1f) as usize,
            function: (offset >> 12 & 7) as u32,
            register: (offset & 0xfff) as usize,
        }
    }
}

/// Ports 0xCF8 (address) and 0xCFC..=0xCFF (data).
struct ConfigPorts(Arc<PciBus>);

const DATA_PORT: u64 = 4;

impl ConfigPorts {
    /// The register a data port access of `length` bytes means, and how many bytes stay inside its dword.
    fn target(&self, offset: u64, length: usize) -> Option<(ConfigTarget, usize)> {
        let within = usize::try_from(offset.checked_sub(DATA_PORT)?).ok()?;
        let mut target = ConfigTarget::from_address(self.0.config_address.load(Ordering::Relaxed))?;
        target.register += within;
        Some((target, length.min(4usize.saturating_sub(within))))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset < DATA_PORT {
            let bytes = self.0.config_address.load(Ordering::Relaxed).to_le_bytes();
            let rest = bytes.get(offset as usize..).unwrap_or_default();
            data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        } else if let Some((target, length)) = self.target(offset, data.len())
            && let Some(data) = data.get_mut(..length)
        {
            self.0.read_config(target, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset < DATA_PORT {
            // Only a whole dword at 0xCF8 reaches the latch; bytes there belong to other (absent) chipset registers.
            if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
                self.0.config_address.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
            }
        } else if let Some((target, length)) = self.target(offset, data.len())
            && let Some(data) = data.get(..length)
        {
            self.0.write_config(target, data);
        }
    }
}

/// The memory-mapped configuration space (PCI Express Base Specification, 7.2.2).
struct Ecam(Arc<PciBus>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(ConfigTarget::from_ecam(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_config(ConfigTarget::from_ecam(offset), data);
    }
}

/// A range in which BARs answer; where none does, reads give all ones as on real buses.
struct Window {
    bus: Arc<PciBus>,
    base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = self.base.saturating_add(offset);
        match self.bus.mapping_at(address, data.len()) {
            None => data.fill(0xff),
            Some(mapping) => mapping.device.read_bar(address - mapping.range.start, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let address = self.base.saturating_add(offset);
        if let Some(mapping) = self.bus.mapping_at(address, data.len()) {
            mapping.device.write_bar(address - mapping.range.start, data);
        }
    }
}
