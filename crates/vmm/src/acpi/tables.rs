//! The tables around the DSDT, laid out one after the other in the BIOS area (ACPI 6.5 chapter 5).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::dsdt::{self, Platform};
use super::power;
use crate::mem::layout::{self, port};
use crate::mem::{Memory, MemoryError};

const OEM_ID: [u8; 6] = *b"HEARTH";
const OEM_TABLE_ID: [u8; 8] = *b"HEARTHVM";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5 table 5.10): no VGA, no ASPM, no CMOS clock; no 8042 and no ISA devices by bits left clear.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_ASPM: u16 = 1 << 4;
const BOOT_ARCH_NO_CMOS: u16 = 1 << 5;

/// All tables as one block to be placed at [`layout::ACPI_TABLES`]; the RSDP comes first.
pub fn build(vcpus: u8, platform: Platform) -> Vec<u8> {
    let mut block = Block::after_rsdp();
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&dsdt::aml(platform));
    let dsdt = block.add(&table);
    let fadt = block.add(&fadt(dsdt));
    let madt = block.add(&madt(vcpus));
    let mcfg = block.add(&mcfg());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in [fadt, madt, mcfg] {
        xsdt.add_entry(entry);
    }
    let xsdt = block.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    rsdp.resize(RSDP_ROOM, 0);
    rsdp.extend_from_slice(&block.bytes);
    rsdp
}

/// Writes the tables into guest memory, with `hotplug_slots` as in [`Platform`], and returns the address of the RSDP.
pub fn write(memory: &Memory, vcpus: u8, hotplug_slots: u32) -> Result<u64, MemoryError> {
    let tables = build(vcpus, Platform { pci_mmio64: memory.layout().pci_mmio64(), hotplug_slots });
    if tables.len() as u64 > layout::ACPI_TABLES_END - layout::ACPI_TABLES {
        return Err(MemoryError::OutOfRange { address: layout::ACPI_TABLES, size: tables.len() as u64 });
    }
    memory.write(layout::ACPI_TABLES, &tables)?;
    Ok(layout::ACPI_TABLES)
}

/// Bytes kept for the RSDP (36) at the start.
const RSDP_ROOM: usize = 64;

/// Tables behind the RSDP, each 16-byte aligned.
struct Block {
    bytes: Vec<u8>,
}

impl Block {
    fn after_rsdp() -> Self {
        Self { bytes: Vec::new() }
    }

    /// Appends a table and returns its guest address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = layout::ACPI_TABLES + (RSDP_ROOM + self.bytes.len()) as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let register =
        |offset| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port::ACPI_POWER + offset));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // These two say that there are no *fixed* buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_ASPM | BOOT_ARCH_NO_CMOS).into();
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(layout::LOCAL_APIC as u32));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        for vcpus in [1, 32] {
            let bytes = build(vcpus, Platform { pci_mmio64: 4 * layout::GIB, hotplug_slots: u32::MAX });
            assert!(bytes.len() as u64 <= layout::ACPI_TABLES_END - layout::ACPI_TABLES);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let table = |address: u64| {
                let at = (address - layout::ACPI_TABLES) as usize;
                let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
                let table = &bytes[at..at + length];
                assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
                table
            };
            let address = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
            let xsdt = table(address(&bytes[24..32]));
            let found: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(address(entry))).collect();
            let names: Vec<_> = found.iter().map(|t| &t[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
            assert_eq!(&table(address(&found[0][140..148]))[..4], b"DSDT");
            let local_apics = found[1][44..].chunks(8).filter(|c| c[0] == 0).count();
            assert!(local_apics >= usize::from(vcpus));
        }
    }
}
