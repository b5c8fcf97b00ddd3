//! One microVM: KVM, memory, boot, ACPI, PCI and virtio devices, and the hearth-vmm program.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod console;
pub mod console_ring;
pub mod control;
pub mod developer;
pub mod events;
pub mod interrupt;
pub mod kvm;
pub mod legacy;
pub mod machine;
pub mod mem;
pub mod memory_use;
pub mod pci;
pub mod probe;
pub mod sandbox;
pub mod virtio;
