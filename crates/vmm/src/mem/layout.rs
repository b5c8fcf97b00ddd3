//! The guest physical address map. One place decides every address; ACPI tables, loaders and buses read it from here.
//!
//! ```text
//! 0x0000_0000            RAM (real-mode area; boot structures below 0xa0000)
//! 0x000a_0000            hole: legacy video, option ROMs (nothing answers)
//! 0x000e_0000            ACPI tables, then SMBIOS at 0xf0000 (RAM, reported as reserved)
//! 0x0010_0000            RAM, up to 3 GiB
//! 0xc000_0000            32-bit MMIO window of PCI segment 0
//! 0xe800_0000            PCI configuration space (ECAM), bus 0
//! 0xfe00_0000            platform registers: generic event device, PCI hot-plug
//! 0xfec0_0000            I/O APIC
//! 0xfee0_0000            local APICs, message-signalled interrupts
//! 0x1_0000_0000          RAM above the hole
//! after RAM, 1 GiB aligned  64-bit MMIO window of PCI segment 0
//! ```

/// Bytes per MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes per GiB.
pub const GIB: u64 = 1 << 30;
/// Page size of the x86 MMU's smallest page.
pub const PAGE_SIZE: u64 = 4096;
/// Size of a huge page; guest RAM is aligned to it on the host.
pub const HUGE_PAGE_SIZE: u64 = 2 * MIB;

/// Smallest guest memory.
pub const MIN_MEMORY: u64 = 128 * MIB;
/// Largest guest memory: what a 40-bit physical address space (the least any supported CPU has) holds beside the MMIO windows.
pub const MAX_MEMORY: u64 = 960 * GIB;

/// Where the boot GDT lies.
pub const BOOT_GDT: u64 = 0x500;
/// PVH `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list (the initrd).
pub const PVH_MODULES: u64 = 0x6100;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6200;
/// Linux boot parameters ("zero page") of a bzImage.
pub const ZERO_PAGE: u64 = 0x7000;
/// `setup_data` list of a bzImage (random seed).
pub const SETUP_DATA: u64 = 0x8000;
/// Identity page tables for the 64-bit entry: one PML4, one PDPT, four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x20000;
/// Longest command line in bytes, without its NUL.
pub const COMMAND_LINE_MAX: usize = 2047;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0xa0000;
/// ACPI tables; the RSDP comes first, where kernels scan for it.
pub const ACPI_TABLES: u64 = 0xe0000;
/// End of the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0xf0000;
/// SMBIOS 3 entry point and tables.
pub const SMBIOS: u64 = 0xf0000;
/// End of the room for SMBIOS.
pub const SMBIOS_END: u64 = RESET_VECTOR;
/// Where a PC's CPU starts after reset, as seen in real mode (F000:FFF0).
pub const RESET_VECTOR: u64 = 0xffff0;
/// First byte a kernel or initrd may occupy.
pub const HIGH_RAM: u64 = 0x100000;

/// First byte of the hole below 4 GiB.
pub const MMIO_HOLE: u64 = 3 * GIB;
/// First byte after the hole.
pub const MMIO_HOLE_END: u64 = 4 * GIB;
/// 32-bit window for PCI BARs.
pub const PCI_MMIO32: u64 = MMIO_HOLE;
/// Size of that window.
pub const PCI_MMIO32_SIZE: u64 = PCI_ECAM - PCI_MMIO32;
/// Memory-mapped PCI configuration space of segment 0.
pub const PCI_ECAM: u64 = 0xe800_0000;
/// One bus: 32 devices, 8 functions, 4 KiB each.
pub const PCI_ECAM_SIZE: u64 = MIB;
/// Size of the 64-bit window for PCI BARs.
pub const PCI_MMIO64_SIZE: u64 = 16 * GIB;
/// Registers of the generic event device.
pub const GED: u64 = 0xfe00_0000;
/// Size of the generic event device's register page.
pub const GED_SIZE: u64 = 0x1000;
/// PCI hot-plug registers.
pub const PCI_HOTPLUG: u64 = 0xfe00_1000;
/// Size of their page.
pub const PCI_HOTPLUG_SIZE: u64 = 0x1000;
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Size of the I/O APIC's register window.
pub const IOAPIC_SIZE: u64 = 0x20;
/// Local APIC.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page for KVM's real-mode identity map on CPUs that need it.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's real-mode TSS on CPUs that need it.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// I/O port numbers.
pub mod port {
    /// PCI configuration mechanism 1: address and data.
    pub const PCI_CONFIG: u16 = 0xcf8;
    /// Length of the PCI configuration port range.
    pub const PCI_CONFIG_LEN: u16 = 8;
    /// COM1.
    pub const COM1: u16 = 0x3f8;
    /// Length of COM1's port range.
    pub const COM1_LEN: u16 = 8;
    /// pvpanic (QEMU's paravirtual panic device).
    pub const PVPANIC: u16 = 0x505;
    /// ACPI sleep control, sleep status, reset (one byte each) and a reserved byte.
    pub const ACPI_POWER: u16 = 0x600;
    /// Length of the ACPI power port range.
    pub const ACPI_POWER_LEN: u16 = 4;
}

/// I/O APIC input pins (= global system interrupts).
pub mod gsi {
    /// COM1, as on every PC.
    pub const COM1: u32 = 4;
    /// Generic event device.
    pub const GED: u32 = 5;
}

/// Pins of the I/O APIC. A PC's has 24, of which the guest reads and masks each one by one at boot, several exits a pin; ours
/// has no more than are in use, in a power of two.
pub const IOAPIC_PINS: usize = 8;

/// Rounds up to a multiple of `align`, a power of two; saturates at the top of the address space.
pub const fn align_up(value: u64, align: u64) -> u64 {
    match value.checked_add(align - 1) {
        Some(sum) => sum & !(align - 1),
        None => !(align - 1),
    }
}

/// Rounds down to a multiple of `align`, a power of two.
pub const fn align_down(value: u64, align: u64) -> u64 {
    value & !(align - 1)
}

/// How much RAM lies on each side of the hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    /// Bytes from address 0.
    pub low: u64,
    /// Bytes from 4 GiB on; 0 when all RAM fits below the hole.
    pub high: u64,
}

impl RamLayout {
    /// Splits `memory` bytes around the hole below 4 GiB.
    pub const fn new(memory: u64) -> Self {
        if memory <= MMIO_HOLE {
            Self { low: memory, high: 0 }
        } else {
            Self { low: MMIO_HOLE, high: memory - MMIO_HOLE }
        }
    }

    /// First address after all RAM and the hole.
    pub const fn end(&self) -> u64 {
        if self.high == 0 { self.low } else { MMIO_HOLE_END + self.high }
    }

    /// Start of the 64-bit PCI window.
    pub const fn pci_mmio64(&self) -> u64 {
        let end = self.end();
        align_up(if end < MMIO_HOLE_END { MMIO_HOLE_END } else { end }, GIB)
    }
}

/// Kind of a memory map entry; values are those of the PC BIOS E820 call and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// One entry of the memory map shown to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What lies there.
    pub kind: MemoryKind,
}

/// The memory map for a guest with this RAM, sorted and without overlaps.
pub fn memory_map(ram: RamLayout) -> Vec<MemoryMapEntry> {
    let mut map = vec![
        MemoryMapEntry { start: 0, size: LOW_RAM_END, kind: MemoryKind::Ram },
        MemoryMapEntry { start: ACPI_TABLES, size: HIGH_RAM - ACPI_TABLES, kind: MemoryKind::Reserved },
        MemoryMapEntry { start: HIGH_RAM, size: ram.low - HIGH_RAM, kind: MemoryKind::Ram },
        MemoryMapEntry { start: PCI_ECAM, size: PCI_ECAM_SIZE, kind: MemoryKind::Reserved },
    ];
    if ram.high > 0 {
        map.push(MemoryMapEntry { start: MMIO_HOLE_END, size: ram.high, kind: MemoryKind::Ram });
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ram_adds_up_and_avoids_every_window(mib in 128u64..(MAX_MEMORY / MIB)) {
            let memory = mib * MIB;
            let ram = RamLayout::new(memory);
            prop_assert_eq!(ram.low + ram.high, memory);
            prop_assert!(ram.low <= MMIO_HOLE);
            prop_assert!(ram.pci_mmio64() >= ram.end());
            prop_assert!(ram.pci_mmio64() >= MMIO_HOLE_END);
            prop_assert_eq!(ram.pci_mmio64() % GIB, 0);
            prop_assert!(ram.pci_mmio64() + PCI_MMIO64_SIZE <= 1 << 40);
            let map = memory_map(ram);
            for pair in map.windows(2) {
                prop_assert!(pair[0].start + pair[0].size <= pair[1].start);
            }
        }
    }

    #[test]
    fn platform_windows_do_not_overlap() {
        let windows = [
            (PCI_MMIO32, PCI_MMIO32_SIZE),
            (PCI_ECAM, PCI_ECAM_SIZE),
            (GED, GED_SIZE),
            (PCI_HOTPLUG, PCI_HOTPLUG_SIZE),
            (IOAPIC, IOAPIC_SIZE),
            (LOCAL_APIC, MIB),
            (KVM_IDENTITY_MAP, PAGE_SIZE),
            (KVM_TSS, 3 * PAGE_SIZE),
        ];
        for pair in windows.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{:x?}", pair);
        }
        const { assert!(KVM_TSS + 3 * PAGE_SIZE <= MMIO_HOLE_END) };
    }

    #[test]
    fn align_up_saturates() {
        assert_eq!(align_up(u64::MAX, PAGE_SIZE) % PAGE_SIZE, 0);
        assert_eq!(align_up(1, PAGE_SIZE), PAGE_SIZE);
        assert_eq!(align_up(PAGE_SIZE, PAGE_SIZE), PAGE_SIZE);
    }
}
