//! Hot-pluggable PCI slots in AML: what makes Linux's acpiphp (and any other ACPI system) offer them (ACPI 6.5 sections 6.1.11
//! `_SUN`, 6.3.3 `_EJx`).

use acpi_tables::aml::{
    And, Arg, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path, Scope, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::hotplug::REGISTERS_BYTES;
use crate::mem::layout;
use crate::pci::SLOTS;

/// Called by the generic event device when the registers changed.
pub(super) const HOTPLUG_METHOD: &str = "\\_SB_.PCI0.PCHP";

/// Notification values (ACPI 6.5 table 5.6): look at the device anew; let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The name of a slot's device: a letter and its number in hexadecimal.
fn slot_name(slot: usize) -> String {
    format!("S{slot:02X}_")
}

/// Registers, one device per slot in `slots`, and the method that notifies them. Nothing without slots but the method.
pub(super) fn aml(out: &mut dyn AmlSink, slots: u32) {
    let slots: Vec<usize> = (0..SLOTS).filter(|slot| slots & (1 << slot) != 0).collect();
    let devices: Vec<Slot> = slots.iter().map(|slot| Slot(*slot)).collect();
    let notices: Vec<Notice> = slots.iter().map(|slot| Notice(*slot)).collect();
    let region = OpRegion::new("HPRG".into(), OpRegionSpace::SystemMemory, &layout::PCI_HOTPLUG, &REGISTERS_BYTES);
    // In the order of their offsets.
    let fields = Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"HPIN", 32), FieldEntry::Named(*b"HPRM", 32), FieldEntry::Named(*b"HPEJ", 32)],
    );
    // Arg0 holds slots, Arg1 what to tell them.
    let notify =
        Method::new("PCNT".into(), 2, true, notices.iter().map(|notice| notice as &dyn Aml).collect::<Vec<_>>());
    let (inserted, removals) = (Path::new("HPIN"), Path::new("HPRM"));
    let tell_inserted = MethodCall::new("PCNT".into(), vec![&Local(0), &DEVICE_CHECK]);
    let tell_removals = MethodCall::new("PCNT".into(), vec![&Local(0), &EJECT_REQUEST]);
    let (take_inserted, take_removals) = (Store::new(&Local(0), &inserted), Store::new(&Local(0), &removals));
    let changed =
        Method::new("PCHP".into(), 0, true, vec![&take_inserted, &tell_inserted, &take_removals, &tell_removals]);
    let mut children: Vec<&dyn Aml> = vec![&region, &fields];
    children.extend(devices.iter().map(|device| device as &dyn Aml));
    children.extend([&notify as &dyn Aml, &changed]);
    Scope::new("\\_SB_.PCI0".into(), children).to_aml_bytes(out);
}

/// One slot's device.
struct Slot(usize);

impl Aml for Slot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (number, address, bit) = (self.0 as u8, (self.0 as u32) << 16, 1u32 << self.0);
        let eject = Path::new("HPEJ");
        Device::new(
            Path::new(&slot_name(self.0)),
            vec![
                &Name::new("_SUN".into(), &number),
                &Name::new("_ADR".into(), &address),
                &Method::new("_EJ0".into(), 1, true, vec![&Store::new(&eject, &bit)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// "If (Arg0 & slot) Notify (slot, Arg1)".
struct Notice(usize);

impl Aml for Notice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let bit = 1u32 << self.0;
        If::new(&And::new(&Local(0), &Arg(0), &bit), vec![&Notify::new(&Path::new(&slot_name(self.0)), &Arg(1))])
            .to_aml_bytes(sink);
    }
}
