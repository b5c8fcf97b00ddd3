//! Guest memory: where it lies in the guest ([`layout`]) and on the host.
//!
//! RAM is anonymous, private and not reserved, aligned so that the kernel can back it with huge pages. Files (kernel,
//! initrd) can be mapped over parts of it, copy-on-write, so that their clean pages are shared by all guests.

pub mod layout;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use layout::{GIB, HUGE_PAGE_SIZE, MAX_MEMORY, MIB, MIN_MEMORY, MMIO_HOLE_END, PAGE_SIZE, RamLayout};

/// The guest's memory as every device sees it.
pub type GuestRam = GuestMemoryMmap<()>;

/// Why guest memory could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size asked for is not supported.
    #[error("guest memory of {0} MiB is not supported: at least {min} MiB and at most {max} MiB", min = MIN_MEMORY / MIB, max = MAX_MEMORY / MIB)]
    Size(u64),
    /// The host refused the mapping.
    #[error("cannot map {size} bytes of guest memory at {address:#x}: {source}")]
    Map {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        size: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// An access outside RAM.
    #[error("{size} bytes at guest address {address:#x} do not lie in RAM")]
    OutOfRange {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// A file could not be read into memory.
    #[error("cannot read {size} bytes at offset {offset:#x} of {what}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Offset in the file.
        offset: u64,
        /// Bytes.
        size: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// vm-memory refused the regions.
    #[error("cannot assemble guest memory: {0}")]
    Regions(String),
}

/// Guest RAM together with its layout.
#[derive(Clone, Debug)]
pub struct Memory {
    ram: GuestRam,
    layout: RamLayout,
}

impl Memory {
    /// Maps `memory_mib` MiB of RAM. Nothing is populated yet.
    ///
    /// The mappings stay for the life of the process: a VMM process has one machine, and devices may still hold pointers.
    pub fn new(memory_mib: u64) -> Result<Self, MemoryError> {
        let bytes = memory_mib
            .checked_mul(MIB)
            .filter(|b| (MIN_MEMORY..=MAX_MEMORY).contains(b))
            .ok_or(MemoryError::Size(memory_mib))?;
        let layout = RamLayout::new(bytes);
        let mut regions = vec![map_ram(0, layout.low)?];
        if layout.high > 0 {
            regions.push(map_ram(MMIO_HOLE_END, layout.high)?);
        }
        let ram = GuestRam::from_regions(regions).map_err(|e| MemoryError::Regions(e.to_string()))?;
        Ok(Self { ram, layout })
    }

    /// The memory as devices use it.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How it lies around the hole.
    pub fn layout(&self) -> RamLayout {
        self.layout
    }

    /// Start and length of each region in this process's address space.
    pub fn host_ranges(&self) -> Vec<(u64, u64)> {
        use vm_memory::GuestMemoryRegion;
        self.ram.iter().map(|region| (region.as_ptr() as u64, region.len())).collect()
    }

    /// Host address of `size` bytes of RAM at `address`.
    pub fn host_address(&self, address: u64, size: u64) -> Result<*mut u8, MemoryError> {
        let out_of_range = MemoryError::OutOfRange { address, size };
        let Ok(length) = usize::try_from(size) else { return Err(out_of_range) };
        self.ram
            .get_slice(GuestAddress(address), length)
            .map(|slice| slice.ptr_guard_mut().as_ptr())
            .map_err(|_| out_of_range)
    }

    /// Copies `data` to `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        use vm_memory::Bytes;
        self.ram
            .write_slice(data, GuestAddress(address))
            .map_err(|_| MemoryError::OutOfRange { address, size: data.len() as u64 })
    }

    /// Reads `size` bytes at `offset` of `file` to `address`.
    pub fn read_file(
        &self,
        file: &File,
        what: &'static str,
        offset: u64,
        address: u64,
        size: u64,
    ) -> Result<(), MemoryError> {
        let host = self.host_address(address, size)?;
        if size == 0 {
            return Ok(());
        }
        // SAFETY: `host_address` has checked that `size` bytes from `host` are RAM of this process, which is never
        // unmapped; no vCPU or device runs while an image is loaded, so nothing else touches them.
        let buffer = unsafe { std::slice::from_raw_parts_mut(host, size as usize) };
        file.read_exact_at(buffer, offset).map_err(|source| MemoryError::Read { what, offset, size, source })
    }

    /// Maps `size` bytes at `offset` of `file` copy-on-write over RAM at `address`. All three must be multiples of the page
    /// size, except that `size` may end in the file's last page (the rest of that page reads as zeros).
    pub fn map_file(&self, file: &File, offset: u64, address: u64, size: u64) -> Result<(), MemoryError> {
        let mapped = layout::align_up(size, PAGE_SIZE);
        let fail = |source| MemoryError::Map { address, size, source };
        if !offset.is_multiple_of(PAGE_SIZE) || !address.is_multiple_of(PAGE_SIZE) {
            return Err(fail(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let host = self.host_address(address, mapped)?;
        let Ok(file_offset) = libc::off_t::try_from(offset) else {
            return Err(fail(io::Error::from_raw_os_error(libc::EOVERFLOW)));
        };
        // SAFETY: the range is page aligned RAM owned by this process (checked above), so MAP_FIXED replaces only guest
        // memory; protection stays read-write and the mapping private.
        let result = unsafe {
            libc::mmap(
                host.cast(),
                mapped as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                file_offset,
            )
        };
        if result == libc::MAP_FAILED { Err(fail(io::Error::last_os_error())) } else { Ok(()) }
    }
}

/// Maps one region of RAM, aligned to huge pages on the host.
fn map_ram(address: u64, size: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    let fail = |source| MemoryError::Map { address, size, source };
    let too_big = || fail(io::Error::from_raw_os_error(libc::ENOMEM));
    let length = usize::try_from(size).map_err(|_| too_big())?;
    let align = if size >= GIB { GIB } else { HUGE_PAGE_SIZE } as usize;
    let reserved = length.checked_add(align).ok_or_else(too_big)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(fail(io::Error::last_os_error()));
    }
    let start = (base as usize).next_multiple_of(align);
    // SAFETY: `start..start + length` lies inside the reservation just made (it is `align` bytes longer), which nobody
    // else knows of; the two trimmed ends are not used afterwards.
    unsafe {
        let head = start - base as usize;
        if head > 0 {
            libc::munmap(base, head);
        }
        let tail = reserved - head - length;
        if tail > 0 {
            libc::munmap((start + length) as *mut libc::c_void, tail);
        }
        if libc::mprotect(start as *mut libc::c_void, length, libc::PROT_READ | libc::PROT_WRITE) != 0 {
            return Err(fail(io::Error::last_os_error()));
        }
        // Advice only: a host without transparent huge pages answers EINVAL and 4 KiB pages serve.
        libc::madvise(start as *mut libc::c_void, length, libc::MADV_HUGEPAGE);
        // A core dump of the VMM must not carry the guest's secrets.
        libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTDUMP);
    }
    // SAFETY: the range was mapped above with this protection and these flags and is never unmapped.
    let region = unsafe { MmapRegion::build_raw(start as *mut u8, length, libc::PROT_READ | libc::PROT_WRITE, flags) }
        .map_err(|e| MemoryError::Regions(e.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(address)).ok_or_else(too_big)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        assert!(matches!(Memory::new(127), Err(MemoryError::Size(127))));
        assert!(matches!(Memory::new(u64::MAX), Err(MemoryError::Size(_))));
    }

    #[test]
    fn ram_lies_on_both_sides_of_the_hole() {
        let memory = Memory::new(4096).unwrap();
        assert_eq!(memory.ram().num_regions(), 2);
        memory.write(MMIO_HOLE_END, b"high").unwrap();
        assert!(memory.write(layout::MMIO_HOLE, b"hole").is_err());
        assert!(memory.host_address(layout::MMIO_HOLE - 1, 2).is_err());
        assert_eq!(memory.host_address(0, 1).unwrap() as u64 % HUGE_PAGE_SIZE, 0);
    }

    #[test]
    fn a_mapped_file_is_private_and_zero_padded() {
        let memory = Memory::new(128).unwrap();
        memory.write(0x201000, &[0xff; 64]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7u8; 4096 + 10]).unwrap();
        memory.map_file(&file, 0, 0x200000, 4096 + 10).unwrap();
        let byte = |at| -> u8 { memory.ram().read_obj(GuestAddress(at)).unwrap() };
        assert_eq!((byte(0x200000), byte(0x201009), byte(0x20100a)), (7, 7, 0));
        memory.write(0x200000, &[9]).unwrap();
        let mut back = [0u8; 1];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, [7]);
        assert!(memory.map_file(&file, 1, 0x200000, 10).is_err());
        assert!(memory.map_file(&file, 0, 0xffff_ffff_ffff_f000, 4097).is_err());
    }
}
