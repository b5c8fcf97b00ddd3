//! The virtual machine: capabilities, memory slots, split interrupt controller.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::{KvmError, call};
use crate::mem::Memory;
use crate::mem::layout::{IOAPIC_PINS, KVM_IDENTITY_MAP, KVM_TSS};

/// Most vCPUs of one guest.
pub const MAX_VCPUS: u8 = 32;

/// What the machine cannot do without, with the name an operator would look for.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::CoalescedPio, "KVM_CAP_COALESCED_PIO"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// A KVM virtual machine with a split interrupt controller: local APICs in the kernel, the I/O APIC in this process.
pub struct Vm {
    fd: Arc<VmFd>,
    cpuid: CpuId,
    tsc_deadline: bool,
}

impl Vm {
    /// Makes a virtual machine from an open `/dev/kvm`.
    pub fn new(kvm: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and passed on whole; whether it really is /dev/kvm is asked next.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::NotKvm(format!("it answers {version}")));
        }
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Missing(name));
            }
        }
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        // Only CPUs that cannot run real mode natively use these pages; elsewhere the calls cost nothing.
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(KVM_TSS as usize).map_err(call("KVM_SET_TSS_ADDR"))?;
        let split =
            kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [IOAPIC_PINS as u64, 0, 0, 0], ..Default::default() };
        fd.enable_cap(&split).map_err(call("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { fd: Arc::new(fd), cpuid, tsc_deadline })
    }

    /// The descriptor, for devices that send interrupts and register eventfds.
    pub fn fd(&self) -> Arc<VmFd> {
        Arc::clone(&self.fd)
    }

    /// What KVM can show a guest on this host.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// KVM emulates the APIC timer's TSC-deadline mode.
    pub fn has_tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }

    /// Gives every region of `memory` its slot.
    pub fn set_memory(&self, memory: &Memory) -> Result<(), KvmError> {
        for (slot, region) in memory.ram().iter().enumerate() {
            let slot_region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped read-write for the life of the process, and regions do not overlap.
            unsafe { self.fd.set_user_memory_region(slot_region) }
                .map_err(call(format!("KVM_SET_USER_MEMORY_REGION(slot {slot})")))?;
        }
        Ok(())
    }

    /// Makes vCPU number `index`, which is also its APIC id.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(u64::from(index)).map_err(call(format!("KVM_CREATE_VCPU({index})")))
    }
}
