//! Interrupt and notification paths between devices and the virtual machine.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::{IoEventRegistry, MsiSender};

/// Sends message-signalled interrupts with `KVM_SIGNAL_MSI` and binds eventfds with `KVM_IOEVENTFD`.
#[derive(Clone)]
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
}

impl KvmInterrupts {
    /// For the devices of `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

fn io_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

impl MsiSender for KvmInterrupts {
    /// A guest that masked its APIC or named no CPU gets nothing and the sender no error: KVM reports that as a count of
    /// zero, which devices need not know.
    fn send(&self, address: u64, data: u32) -> io::Result<()> {
        let msi =
            kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..Default::default() };
        self.vm.signal_msi(msi).map(|_| ()).map_err(io_error)
    }
}

impl IoEventRegistry for KvmInterrupts {
    fn register(&self, guest_address: u64, event: &EventFd) -> io::Result<()> {
        self.vm.register_ioevent(event, &IoEventAddress::Mmio(guest_address), NoDatamatch).map_err(io_error)
    }

    fn unregister(&self, guest_address: u64, event: &EventFd) -> io::Result<()> {
        self.vm.unregister_ioevent(event, &IoEventAddress::Mmio(guest_address), NoDatamatch).map_err(io_error)
    }
}
