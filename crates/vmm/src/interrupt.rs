//! What a device needs of the interrupt fabric and of KVM's fast notification path, as traits, so that devices are
//! tested without KVM.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Delivers message-signalled interrupts (KVM: `KVM_SIGNAL_MSI`).
pub trait MsiSender: Send + Sync {
    /// Sends one MSI message: `address` and `data` as the guest programmed them into the MSI-X table.
    fn send(&self, address: u64, data: u32) -> io::Result<()>;
}

/// Edge-triggered line on the I/O APIC (COM1, GED).
pub trait IrqLine: Send + Sync {
    /// Pulses the line once.
    fn trigger(&self) -> io::Result<()>;
}

/// Turns guest writes to an address into eventfd signals without an exit to user space (KVM: `KVM_IOEVENTFD`).
pub trait IoEventRegistry: Send + Sync {
    /// Any write of any width to `guest_address` signals `event`.
    fn register(&self, guest_address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes `register` with the same pair.
    fn unregister(&self, guest_address: u64, event: &EventFd) -> io::Result<()>;
}
