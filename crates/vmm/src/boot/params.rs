//! `struct boot_params`, the "zero page": Linux Documentation/arch/x86/zero-page.rst and boot.rst.

use super::bzimage::SETUP_HEADER;
use super::{BootError, Range};
use crate::mem::Memory;
use crate::mem::layout::{self, SETUP_DATA, ZERO_PAGE};

const SIZE: usize = 4096;
/// Offsets in the zero page.
const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const E820_ENTRIES: usize = 0x1e8;
const TYPE_OF_LOADER: usize = 0x210;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const SETUP_DATA_PTR: usize = 0x250;
const E820_TABLE: usize = 0x2d0;

/// "Undefined boot loader".
const LOADER_UNDEFINED: u8 = 0xff;
/// `SETUP_RNG_SEED`.
const SETUP_RNG_SEED: u32 = 9;
const SEED_BYTES: usize = 32;

/// The zero page under construction.
pub struct ZeroPage(Vec<u8>);

impl ZeroPage {
    /// All zero.
    pub fn new() -> Self {
        Self(vec![0; SIZE])
    }

    /// Writes `bytes` at `offset`; what lies outside the page is dropped.
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }

    /// Takes the image's own setup header, which must end before the E820 table.
    pub fn set_header(&mut self, header: &[u8]) {
        self.put(SETUP_HEADER, header.get(..E820_TABLE - SETUP_HEADER).unwrap_or(header));
    }

    /// What a boot loader fills in.
    pub fn set_boot(&mut self, cmdline: u32, initrd: Option<Range>, rsdp: u64) {
        self.put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
        self.put(CMD_LINE_PTR, &cmdline.to_le_bytes());
        self.put(ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
        self.put(SETUP_DATA_PTR, &SETUP_DATA.to_le_bytes());
        let initrd = initrd.unwrap_or(Range { start: 0, size: 0 });
        self.put(RAMDISK_IMAGE, &(initrd.start as u32).to_le_bytes());
        self.put(EXT_RAMDISK_IMAGE, &((initrd.start >> 32) as u32).to_le_bytes());
        self.put(RAMDISK_SIZE, &(initrd.size as u32).to_le_bytes());
        self.put(EXT_RAMDISK_SIZE, &((initrd.size >> 32) as u32).to_le_bytes());
    }

    /// Adds the memory map and puts the page and a random seed into guest memory.
    pub fn write(mut self, memory: &Memory) -> Result<(), BootError> {
        let map = layout::memory_map(memory.layout());
        self.put(E820_ENTRIES, &[map.len() as u8]);
        for (i, entry) in map.iter().enumerate() {
            let at = E820_TABLE + i * 20;
            self.put(at, &entry.start.to_le_bytes());
            self.put(at + 8, &entry.size.to_le_bytes());
            self.put(at + 16, &(entry.kind as u32).to_le_bytes());
        }
        memory.write(ZERO_PAGE, &self.0)?;
        let mut seed = [0u8; SEED_BYTES];
        // SAFETY: the buffer is valid for its length, and the call keeps no pointer to it.
        let got = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), SEED_BYTES, 0) };
        if got != SEED_BYTES as isize {
            return Err(BootError::Read { what: "host's random numbers", source: std::io::Error::last_os_error() });
        }
        let mut node = Vec::with_capacity(16 + SEED_BYTES);
        node.extend_from_slice(&0u64.to_le_bytes());
        node.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
        node.extend_from_slice(&(SEED_BYTES as u32).to_le_bytes());
        node.extend_from_slice(&seed);
        memory.write(SETUP_DATA, &node)?;
        Ok(())
    }
}

impl Default for ZeroPage {
    fn default() -> Self {
        Self::new()
    }
}
