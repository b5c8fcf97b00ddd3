//! Type 0 configuration space (PCI Local Bus Specification 3.0, chapter 6): identity, BARs, capabilities, write masks.

/// Conventional configuration space. Our functions have no PCI Express capability, so there is nothing above.
pub const CONFIG_BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: memory decoding, bus master, parity response, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0002 | 0x0004 | 0x0040 | 0x0100 | 0x0400;
const COMMAND_MEMORY: u16 = 0x0002;
const COMMAND_BUS_MASTER: u16 = 0x0004;
const STATUS_CAPABILITIES: u16 = 0x0010;
/// 64-bit memory BAR, prefetchable (so that Linux places it in the 64-bit window).
const BAR_FLAGS: u32 = 0x4 | 0x8;

/// What identifies a function to drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, sub-class, programming interface as `0x00BBSSPP`.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// One 64-bit memory BAR.
#[derive(Clone, Copy, Debug)]
struct Bar {
    /// Index of its low register, 0..=4.
    index: u8,
    /// Power of two, in bytes.
    size: u64,
    /// Where the function answers now.
    decoded: Option<u64>,
}

/// The registers of one function.
///
/// Decoding follows the registers with one exception: while either half of a BAR holds all ones, the value a driver
/// writes to learn the size, the function goes on answering at its last address. A driver that sizes or moves a 64-bit BAR
/// in two writes without turning decoding off therefore never makes the function vanish in between.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bar: Option<Bar>,
    last_capability: usize,
    next_free: usize,
}

impl ConfigSpace {
    /// Registers after reset: nothing decoded, no BAR, no capability.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bar: None,
            last_capability: 0,
            next_free: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &((identity.class << 8) | u32::from(identity.revision)).to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and interrupt line are plain scratch registers.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Adds the function's one 64-bit memory BAR at registers `index` and `index + 1` with a power-of-two `size` (at least
    /// 4 KiB, at most 2 GiB) and its initial address.
    pub fn set_bar(&mut self, index: u8, size: u64, address: u64) {
        let size = size.next_power_of_two().clamp(4096, 1 << 31);
        let index = index.min(4);
        let register = BAR0 + usize::from(index) * 4;
        let low_mask = !(size as u32 - 1);
        let address = address & !(size - 1);
        self.put(register, &((address as u32) | BAR_FLAGS).to_le_bytes());
        self.put(register + 4, &((address >> 32) as u32).to_le_bytes());
        self.allow(register, &low_mask.to_le_bytes());
        self.allow(register + 4, &[0xff; 4]);
        self.bar = Some(Bar { index, size, decoded: None });
    }

    /// Appends a capability; `body` follows the id and next-pointer bytes, `writable` masks it bit by bit (missing = read
    /// only). Returns its offset, `None` when configuration space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let offset = self.next_free;
        let end = offset + 2 + body.len();
        if end > CONFIG_BYTES {
            return None;
        }
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        let link = if self.last_capability == 0 { CAPABILITIES_POINTER } else { self.last_capability + 1 };
        self.put(link, &[offset as u8]);
        let status = self.u16_at(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        self.last_capability = offset;
        self.next_free = end.next_multiple_of(4);
        Some(offset)
    }

    /// Reads any width at any offset; beyond the end reads zeros.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        super::copy_padded(data, self.bytes.get(offset..).unwrap_or_default());
    }

    /// Writes any width at any offset through the masks. True when the address the BAR answers at changed.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        for (index, value) in data.iter().enumerate() {
            let at = offset.saturating_add(index);
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
        self.update_decoding()
    }

    /// Sets read-only bytes (capability fields the device itself changes).
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            if let Some(byte) = self.bytes.get_mut(offset.saturating_add(index)) {
                *byte = *value;
            }
        }
    }

    /// A little-endian 16-bit register.
    pub fn u16_at(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A little-endian 32-bit register.
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The function may access memory.
    pub fn bus_master(&self) -> bool {
        self.u16_at(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// Where the BAR answers: its index, address and size; `None` while memory decoding is off.
    pub fn decoded_bar(&self) -> Option<(u8, u64, u64)> {
        let bar = self.bar?;
        Some((bar.index, bar.decoded?, bar.size))
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (index, value) in mask.iter().enumerate() {
            if let Some(byte) = self.writable.get_mut(offset.saturating_add(index)) {
                *byte = *value;
            }
        }
    }

    fn update_decoding(&mut self) -> bool {
        let Some(bar) = self.bar else { return false };
        let register = BAR0 + usize::from(bar.index) * 4;
        let low_mask = !(bar.size as u32 - 1);
        let low = self.u32_at(register) & low_mask;
        let high = self.u32_at(register + 4);
        let decoded = if self.u16_at(COMMAND) & COMMAND_MEMORY == 0 {
            None
        } else if low == low_mask || high == u32::MAX {
            bar.decoded
        } else {
            Some((u64::from(high) << 32) | u64::from(low))
        };
        let changed = decoded != bar.decoded;
        self.bar = Some(Bar { decoded, ..bar });
        changed
    }
}
