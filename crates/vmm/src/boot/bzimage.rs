//! bzImage by the 64-bit entry: Linux Documentation/arch/x86/boot.rst, from an untrusted file.

use super::params::ZeroPage;
use super::{BootError, Entry, Images, Placement, Range, field, length, load_initrd, place, read_exact};
use crate::mem::Memory;
use crate::mem::layout::{COMMAND_LINE, HIGH_RAM};

/// Where the setup header starts, in the file and in the zero page.
pub const SETUP_HEADER: usize = 0x1f1;
/// Bytes read from the start of the file: the whole boot sector and as much of the header as can be.
const HEAD: usize = 0x300;

const MAGIC: &[u8; 4] = b"HdrS";
/// Protocol 2.12 introduced `xloadflags`.
const MIN_PROTOCOL: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1 << 0;
const LOADED_HIGH: u8 = 1 << 0;
/// The 64-bit entry point relative to the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

fn bad(reason: impl Into<String>) -> BootError {
    BootError::Image { format: "bzImage", reason: reason.into() }
}

/// Puts a bzImage, its initrd and the zero page into memory.
pub fn load(memory: &Memory, images: &Images<'_>, rsdp: u64) -> Result<Entry, BootError> {
    let file = images.kernel;
    let file_length = length(file, "kernel")?;
    if file_length < HEAD as u64 {
        return Err(BootError::UnknownFormat);
    }
    let mut head = [0u8; HEAD];
    read_exact(file, "kernel", &mut head, 0)?;
    if field::<4>(&head, 0x202).as_ref() != Some(MAGIC) {
        return Err(BootError::UnknownFormat);
    }
    let byte = |at: usize| head.get(at).copied().unwrap_or(0);
    let half = |at: usize| field(&head, at).map_or(0, u16::from_le_bytes);
    let word = |at: usize| field(&head, at).map_or(0, u32::from_le_bytes);
    if half(0x206) < MIN_PROTOCOL || half(0x236) & XLF_KERNEL_64 == 0 || byte(0x211) & LOADED_HIGH == 0 {
        return Err(bad("it has no 64-bit entry point (boot protocol 2.12 or newer is needed)"));
    }
    let sectors = match byte(SETUP_HEADER) {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * SECTOR;
    let Some(size) = file_length.checked_sub(offset).filter(|s| *s > ENTRY_64) else {
        return Err(bad("it ends before its protected-mode part"));
    };
    let start = field(&head, 0x258).map_or(0, u64::from_le_bytes);
    let needed = u64::from(word(0x260)).max(size);
    if start < HIGH_RAM {
        return Err(bad(format!("it wants to be loaded at {start:#x}, below 1 MiB")));
    }
    if start.checked_add(needed).is_none_or(|end| end > memory.layout().low) {
        return Err(BootError::TooBig { what: "kernel", size: needed });
    }
    if images.cmdline.len() as u64 > u64::from(word(0x238)) {
        return Err(bad(format!("it takes a command line of at most {} bytes", word(0x238))));
    }
    // A compressed image is read once and overwritten by what it decompresses to: mapping it would gain nothing.
    place(memory, Placement::Copy, file, "kernel", offset, Range { start, size })?;
    let initrd = load_initrd(memory, images, Range { start, size: needed }, u64::from(word(0x22c)).saturating_add(1))?;

    let mut zero_page = ZeroPage::new();
    let header_end = 0x202 + usize::from(byte(0x201));
    zero_page.set_header(head.get(SETUP_HEADER..header_end).unwrap_or_default());
    zero_page.set_boot(COMMAND_LINE as u32, initrd, rsdp);
    zero_page.write(memory)?;
    Ok(Entry::Linux64 { entry: start + ENTRY_64 })
}
