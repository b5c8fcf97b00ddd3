//! The PVH boot protocol: Xen docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h.

use super::{BootError, Entry, Images, Range, elf, field, load_initrd, place};
use crate::mem::Memory;
use crate::mem::layout::{self, HIGH_RAM, MMIO_HOLE};

/// `XEN_ELFNOTE_PHYS32_ENTRY` and its owner.
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";

const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;

/// Puts an ELF kernel, its initrd and the PVH start information into memory.
pub fn load(memory: &Memory, images: &Images<'_>, rsdp: u64) -> Result<Entry, BootError> {
    let image = elf::parse(images.kernel)?;
    let entry = image
        .notes
        .iter()
        .find_map(|notes| elf::find_note(notes, NOTE_OWNER, NOTE_PHYS32_ENTRY))
        .and_then(|descriptor| field::<4>(descriptor, 0))
        .map(u32::from_le_bytes)
        .ok_or_else(|| bad("it has no PVH entry point (a kernel built with CONFIG_PVH has one)".into()))?;
    let (Some(first), Some(last)) = (image.segments.first(), image.segments.last()) else {
        return Err(bad("it has nothing to load".into()));
    };
    let kernel = Range { start: first.address, size: last.address + last.memory_size - first.address };
    if kernel.start < HIGH_RAM {
        return Err(bad(format!("it wants to be loaded at {:#x}, below 1 MiB", kernel.start)));
    }
    if kernel.end() > memory.layout().low {
        return Err(BootError::TooBig { what: "kernel", size: kernel.end() });
    }
    if !image.segments.iter().any(|s| (s.address..s.address + s.memory_size).contains(&u64::from(entry))) {
        return Err(bad(format!("its PVH entry point {entry:#x} is outside its segments")));
    }
    for segment in &image.segments {
        let target = Range { start: segment.address, size: segment.file_size };
        place(memory, images.placement, images.kernel, "kernel", segment.offset, target)?;
    }
    let initrd = load_initrd(memory, images, kernel, MMIO_HOLE)?;
    write_start_info(memory, initrd, rsdp)?;
    Ok(Entry::Pvh { entry })
}

fn bad(reason: String) -> BootError {
    BootError::Image { format: "ELF", reason }
}

fn write_start_info(memory: &Memory, initrd: Option<Range>, rsdp: u64) -> Result<(), BootError> {
    let map = layout::memory_map(memory.layout());
    let mut info = Vec::with_capacity(56);
    for word in [START_INFO_MAGIC, START_INFO_VERSION, 0, u32::from(initrd.is_some())] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    let modules = if initrd.is_some() { layout::PVH_MODULES } else { 0 };
    for address in [modules, layout::COMMAND_LINE, rsdp, layout::PVH_MEMORY_MAP] {
        info.extend_from_slice(&address.to_le_bytes());
    }
    for word in [map.len() as u32, 0] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    memory.write(layout::PVH_START_INFO, &info)?;
    if let Some(initrd) = initrd {
        let module: Vec<u8> = [initrd.start, initrd.size, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        memory.write(layout::PVH_MODULES, &module)?;
    }
    let entries: Vec<u8> =
        map.iter().flat_map(|e| [e.start, e.size, u64::from(e.kind as u32)]).flat_map(u64::to_le_bytes).collect();
    memory.write(layout::PVH_MEMORY_MAP, &entries)?;
    Ok(())
}
