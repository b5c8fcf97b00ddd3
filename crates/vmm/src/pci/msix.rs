//! MSI-X table and pending bits (PCI Local Bus Specification 3.0, section 6.8.2).

/// Capability id of MSI-X.
pub const MSIX_CAPABILITY_ID: u8 = 0x11;
/// Bytes of one table entry.
pub const MSIX_ENTRY_BYTES: u64 = 16;
/// Most vectors a function of ours may have: its pending bits fit one 64-bit word.
pub const MAX_VECTORS: u16 = 64;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// One message-signalled interrupt, as the guest programmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where to write.
    pub address: u64,
    /// What to write.
    pub data: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

/// The vectors of one function. Every method that can release interrupts returns them for the caller to send.
#[derive(Clone, Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    pending: u64,
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// A table with 1..=[`MAX_VECTORS`] vectors, all masked, MSI-X disabled.
    pub fn new(vectors: u16) -> Self {
        let vectors = vectors.clamp(1, MAX_VECTORS);
        let entry = Entry { address: 0, data: 0, control: VECTOR_MASKED };
        Self { entries: vec![entry; usize::from(vectors)], pending: 0, enabled: false, masked: false }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// MSI-X is on: queue interrupts are messages, not INTx.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// The message control register's value.
    pub fn control(&self) -> u16 {
        let size = self.vectors().saturating_sub(1);
        size | if self.enabled { CONTROL_ENABLE } else { 0 } | if self.masked { CONTROL_FUNCTION_MASK } else { 0 }
    }

    /// Takes a write of the message control register.
    pub fn set_control(&mut self, value: u16) -> Vec<MsiMessage> {
        self.enabled = value & CONTROL_ENABLE != 0;
        self.masked = value & CONTROL_FUNCTION_MASK != 0;
        let vectors = 0..self.vectors();
        vectors.filter_map(|vector| self.release(vector)).collect()
    }

    /// The device wants vector `vector`: the message to send now, or `None` when it is masked (then it becomes pending),
    /// does not exist, or MSI-X is off.
    pub fn trigger(&mut self, vector: u16) -> Option<MsiMessage> {
        if !self.enabled || vector >= self.vectors() {
            return None;
        }
        self.pending |= 1 << vector;
        self.release(vector)
    }

    /// Reads the table at `offset`.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            let within = (at % MSIX_ENTRY_BYTES) as usize;
            *byte = match self.entries.get((at / MSIX_ENTRY_BYTES) as usize) {
                None => 0,
                Some(entry) => {
                    let mut bytes = [0; MSIX_ENTRY_BYTES as usize];
                    let (address, rest) = bytes.split_at_mut(8);
                    address.copy_from_slice(&entry.address.to_le_bytes());
                    let (data, control) = rest.split_at_mut(4);
                    data.copy_from_slice(&entry.data.to_le_bytes());
                    control.copy_from_slice(&entry.control.to_le_bytes());
                    bytes.get(within).copied().unwrap_or(0)
                }
            };
        }
    }

    /// Writes the table at `offset`. Only aligned 4- and 8-byte accesses are defined; others are ignored. Unmasking a
    /// pending vector releases it.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Option<MsiMessage> {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return None;
        }
        let vector = u16::try_from(offset / MSIX_ENTRY_BYTES).ok()?;
        let entry = self.entries.get_mut(usize::from(vector))?;
        for (index, chunk) in data.chunks_exact(4).enumerate() {
            let mut word = [0; 4];
            word.copy_from_slice(chunk);
            let word = u32::from_le_bytes(word);
            match offset % MSIX_ENTRY_BYTES + index as u64 * 4 {
                0 => entry.address = (entry.address & !0xffff_ffff) | u64::from(word),
                4 => entry.address = (entry.address & 0xffff_ffff) | (u64::from(word) << 32),
                8 => entry.data = word,
                _ => entry.control = word & VECTOR_MASKED,
            }
        }
        self.release(vector)
    }

    /// Reads the pending bits at `offset`.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.pending.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        super::copy_padded(data, bytes.get(start..).unwrap_or_default());
    }

    /// A vector's message when it is pending and nothing masks it.
    fn release(&mut self, vector: u16) -> Option<MsiMessage> {
        let entry = self.entries.get(usize::from(vector))?;
        let bit = 1 << vector;
        if self.pending & bit == 0 || !self.enabled || self.masked || entry.control & VECTOR_MASKED != 0 {
            return None;
        }
        self.pending &= !bit;
        Some(MsiMessage { address: entry.address, data: entry.data })
    }
}
