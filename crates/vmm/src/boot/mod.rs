//! From kernel image, initrd and command line to a machine that is ready to run its first instruction.

pub mod bzimage;
pub mod elf;
pub mod params;
pub mod pvh;
pub mod smbios;
pub mod start;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::mem::layout::{COMMAND_LINE, COMMAND_LINE_MAX, HIGH_RAM, MIB, PAGE_SIZE, align_down, align_up};
use crate::mem::{Memory, MemoryError};

pub use start::Entry;

/// Why a guest cannot be booted from what was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither format was recognised.
    #[error("the kernel image is neither an ELF file nor a bzImage")]
    UnknownFormat,
    /// The image contradicts itself or lacks something.
    #[error("the {format} kernel image is not usable: {reason}")]
    Image {
        /// `ELF` or `bzImage`.
        format: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Something does not fit into the guest's memory below the MMIO hole.
    #[error("the {what} ({size} bytes) does not fit into the guest's memory")]
    TooBig {
        /// Kernel or initrd.
        what: &'static str,
        /// Bytes needed.
        size: u64,
    },
    /// The command line is too long or has a NUL.
    #[error("the kernel command line must have at most {COMMAND_LINE_MAX} bytes and no NUL")]
    CommandLine,
    /// A file could not be read.
    #[error("cannot read the {what}: {source}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// Memory refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// How images get into guest memory.
///
/// Copying is what machines do: a stock kernel patches nearly every page of itself at boot (alternatives, static calls,
/// ftrace), and mapped pages cost the guest two faults each, of 4 KiB. Measured with Debian's 6.1 kernel on an emulated host:
/// 39 faults in all when copied into huge pages, 12,000 and 0.6 s more until init when mapped, against 10 MiB and 70 ms saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Pages of the file are mapped copy-on-write, so that guests share the clean ones.
    Map,
    /// Bytes are copied into huge pages.
    Copy,
}

/// What to boot.
#[derive(Debug)]
pub struct Images<'a> {
    /// ELF vmlinux with a PVH note, or bzImage.
    pub kernel: &'a File,
    /// Initial RAM disk.
    pub initrd: Option<&'a File>,
    /// Kernel command line without NUL.
    pub cmdline: &'a str,
    /// How they are placed.
    pub placement: Placement,
}

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

impl Range {
    /// First address behind the range.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

/// Puts everything into `memory` and says how the first vCPU starts. `rsdp` is the address of the ACPI root pointer.
pub fn load(memory: &Memory, images: &Images<'_>, rsdp: u64) -> Result<Entry, BootError> {
    if images.cmdline.len() > COMMAND_LINE_MAX || images.cmdline.contains('\0') {
        return Err(BootError::CommandLine);
    }
    memory.write(COMMAND_LINE, images.cmdline.as_bytes())?;
    memory.write(COMMAND_LINE + images.cmdline.len() as u64, &[0])?;
    let mut magic = [0u8; 4];
    read_exact(images.kernel, "kernel", &mut magic, 0)?;
    if magic == elf::MAGIC { pvh::load(memory, images, rsdp) } else { bzimage::load(memory, images, rsdp) }
}

/// Length of a file or block device.
fn length(mut file: &File, what: &'static str) -> Result<u64, BootError> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::End(0)).map_err(|source| BootError::Read { what, source })
}

fn read_exact(file: &File, what: &'static str, buffer: &mut [u8], offset: u64) -> Result<(), BootError> {
    file.read_exact_at(buffer, offset).map_err(|source| BootError::Read { what, source })
}

/// Puts the initrd as high as `limit` (exclusive) and RAM allow, above the kernel.
fn load_initrd(memory: &Memory, images: &Images<'_>, kernel: Range, limit: u64) -> Result<Option<Range>, BootError> {
    const WHAT: &str = "initrd";
    let Some(file) = images.initrd else { return Ok(None) };
    let size = length(file, WHAT)?;
    if size == 0 {
        return Ok(None);
    }
    let too_big = BootError::TooBig { what: WHAT, size };
    let top = memory.layout().low.min(limit);
    let Some(start) = top.checked_sub(align_up(size, PAGE_SIZE)) else { return Err(too_big) };
    let start = align_down(start, PAGE_SIZE);
    if start < kernel.end() || start < HIGH_RAM {
        return Err(too_big);
    }
    place(memory, images.placement, file, WHAT, 0, Range { start, size })?;
    Ok(Some(Range { start, size }))
}

/// Most bytes between two points of the copy at which nothing else happens; keeps single reads short.
const COPY_STEP: u64 = 64 * MIB;

/// Brings `target.size` bytes at `offset` of `file` to `target.start`. The range must lie in RAM.
fn place(
    memory: &Memory,
    placement: Placement,
    file: &File,
    what: &'static str,
    offset: u64,
    target: Range,
) -> Result<(), BootError> {
    let congruent = offset % PAGE_SIZE == target.start % PAGE_SIZE;
    if placement == Placement::Copy || !congruent {
        return copy(memory, file, what, offset, target);
    }
    // Whole pages are mapped; the first and last part may share their page with something else.
    let first = align_up(target.start, PAGE_SIZE).min(target.end());
    let last = align_down(target.end(), PAGE_SIZE).max(first);
    let at = |address: u64| offset + (address - target.start);
    copy(memory, file, what, offset, Range { start: target.start, size: first - target.start })?;
    if last > first {
        memory.map_file(file, at(first), first, last - first)?;
    }
    copy(memory, file, what, at(last), Range { start: last, size: target.end() - last })
}

fn copy(memory: &Memory, file: &File, what: &'static str, offset: u64, target: Range) -> Result<(), BootError> {
    let mut done = 0;
    while done < target.size {
        let step = (target.size - done).min(COPY_STEP);
        memory.read_file(file, what, offset + done, target.start + done, step)?;
        done += step;
    }
    Ok(())
}

/// Little-endian fields of untrusted headers.
fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests;
