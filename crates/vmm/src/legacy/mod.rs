//! The little that is left of a PC: COM1, the I/O APIC, and the panic port.

pub mod ioapic;
pub mod pvpanic;
pub mod serial;
