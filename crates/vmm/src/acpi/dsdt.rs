//! The differentiated system description table: the devices that are not found by enumeration, in AML.
//! Device ids: ACPI 6.5 section 5.6.7 and the PNP id list; `_DSM` of the host bridge: PCI Firmware Specification 3.3 section 4.6.5.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name,
    Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Return, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::ged::{PCI_HOTPLUG, POWER_BUTTON};
use super::power::S5_SLEEP_TYPE;
use super::slots::{self, HOTPLUG_METHOD};
use crate::mem::layout::{self, gsi, port};

/// Machine-dependent facts in the DSDT.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Start of the 64-bit window for PCI BARs.
    pub pci_mmio64: u64,
    /// PCI slots, bit by bit, that functions may come to and go from while the guest runs.
    pub hotplug_slots: u32,
}

/// "Present, enabled, shown, working".
const STA_WORKING: u8 = 0xf;

/// The table's AML, without its header.
pub fn aml(platform: Platform) -> Vec<u8> {
    let mut out = Vec::new();
    com1(&mut out);
    motherboard(&mut out);
    pci_host_bridge(&mut out, platform);
    slots::aml(&mut out, platform.hotplug_slots);
    events(&mut out);
    panic_device(&mut out);
    Name::new("_S5_".into(), &Package::new(vec![&S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut out);
    out
}

fn com1(out: &mut dyn AmlSink) {
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_STA".into(), &STA_WORKING),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(port::COM1, port::COM1, 1, port::COM1_LEN as u8),
                    &Interrupt::new(true, true, false, false, gsi::COM1),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// Ranges no device may be given.
fn motherboard(out: &mut dyn AmlSink) {
    Device::new(
        "_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, layout::PCI_ECAM as u32, layout::PCI_ECAM_SIZE as u32),
                    &Memory32Fixed::new(true, layout::GED as u32, layout::GED_SIZE as u32),
                    &Memory32Fixed::new(true, layout::PCI_HOTPLUG as u32, layout::PCI_HOTPLUG_SIZE as u32),
                    &IO::new(port::ACPI_POWER, port::ACPI_POWER, 1, port::ACPI_POWER_LEN as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn pci_host_bridge(out: &mut dyn AmlSink, platform: Platform) {
    let mmio64_last = platform.pci_mmio64 + (layout::PCI_MMIO64_SIZE - 1);
    let mmio32_last = (layout::PCI_MMIO32 + layout::PCI_MMIO32_SIZE - 1) as u32;
    let host_bridge_dsm = Uuid::new("E5C937D0-3553-4D7A-9117-EA4D19C3434D");
    Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0u16),
                    &IO::new(port::PCI_CONFIG, port::PCI_CONFIG, 1, port::PCI_CONFIG_LEN as u8),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        layout::PCI_MMIO32 as u32,
                        mmio32_last,
                        None,
                    ),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        platform.pci_mmio64,
                        mmio64_last,
                        None,
                    ),
                ]),
            ),
            // Function 0: functions 0 and 5 are implemented. Function 5 = 0: the BARs as found must be kept.
            &Method::new(
                "_DSM".into(),
                4,
                false,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &host_bridge_dsm),
                        vec![
                            &If::new(
                                &Equal::new(&Arg(2), &ZERO),
                                vec![&Return::new(&BufferData::new(vec![0b10_0001]))],
                            ),
                            &If::new(&Equal::new(&Arg(2), &5u8), vec![&Return::new(&ZERO)]),
                        ],
                    ),
                    &Return::new(&BufferData::new(vec![0])),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// Power button, and the generic event device that presses it and tells of hot-plug.
fn events(out: &mut dyn AmlSink) {
    Device::new(
        "_SB_.PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &ZERO)],
    )
    .to_aml_bytes(out);
    Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, gsi::GED)]),
            ),
            &OpRegion::new("GEDR".into(), OpRegionSpace::SystemMemory, &layout::GED, &4u8),
            &Field::new(
                "GEDR".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 32)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &And::new(&Local(1), &Local(0), &POWER_BUTTON),
                    &If::new(
                        &Equal::new(&Local(1), &POWER_BUTTON),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                    ),
                    &And::new(&Local(1), &Local(0), &PCI_HOTPLUG),
                    &If::new(
                        &Equal::new(&Local(1), &PCI_HOTPLUG),
                        vec![&MethodCall::new(HOTPLUG_METHOD.into(), vec![])],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// Linux Documentation and QEMU docs/specs/pvpanic.rst name this id.
fn panic_device(out: &mut dyn AmlSink) {
    Device::new(
        "_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &STA_WORKING),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(port::PVPANIC, port::PVPANIC, 1, 1)])),
        ],
    )
    .to_aml_bytes(out);
}
