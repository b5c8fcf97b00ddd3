//! One microVM: KVM, memory, boot, ACPI, PCI and virtio devices, and the hearth-vmm program.

pub mod bus;
pub mod control;
pub mod interrupt;
pub mod pci;
pub mod virtio;
