//! Register writes that need no answer, batched by the kernel (Linux Documentation/virt/kvm/api.rst 4.116
//! `KVM_REGISTER_COALESCED_MMIO`): the guest goes on at once, and this process takes the writes before it handles the next
//! exit. Fit only for registers whose write has no effect of its own, such as an index that selects what a data register
//! means.

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};

use super::{KvmError, call};
use crate::bus::Buses;
use crate::mem::layout::{IOAPIC, PAGE_SIZE, port};

/// Entries in the page the kernel shares.
const ENTRIES: u32 =
    ((PAGE_SIZE as usize - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring of waiting writes; one per machine.
pub struct CoalescedWrites {
    /// Held from taking an entry until it has been applied, so that whoever finds the ring empty finds nothing still under way.
    ring: Mutex<Ring>,
}

struct Ring(NonNull<kvm_coalesced_mmio_ring>);

// SAFETY: the page is mapped for the life of the process and accessed only under the mutex (by this process) and with
// atomics (what the kernel writes too).
unsafe impl Send for Ring {}

impl CoalescedWrites {
    /// Batches writes to the index registers of PCI configuration access and of the I/O APIC. The ring is mapped through any
    /// one `vcpu` of `vm`.
    pub fn new(vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, KvmError> {
        // SAFETY: maps a page the kernel keeps for this purpose, at an address of its choice.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE_SIZE as i64,
            )
        };
        let ring = NonNull::new(page).filter(|p| p.as_ptr() != libc::MAP_FAILED).ok_or_else(|| KvmError::Call {
            call: "mmap of the coalesced write ring".into(),
            source: io::Error::last_os_error(),
        })?;
        for (address, size) in
            [(IoEventAddress::Pio(u64::from(port::PCI_CONFIG)), 4), (IoEventAddress::Mmio(IOAPIC), 4)]
        {
            vm.register_coalesced_mmio(address, size).map_err(call("KVM_REGISTER_COALESCED_MMIO"))?;
        }
        Ok(Self { ring: Mutex::new(Ring(ring.cast())) })
    }

    /// Applies all waiting writes in the order the guest made them.
    pub fn apply(&self, buses: &Buses) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).0.as_ptr();
        // SAFETY: the page is mapped; the kernel updates `last` concurrently and reads `first`, hence the atomics.
        let (first, last) =
            unsafe { (AtomicU32::from_ptr(&raw mut (*ring).first), AtomicU32::from_ptr(&raw mut (*ring).last)) };
        loop {
            let at = first.load(Ordering::Relaxed) % ENTRIES;
            if at == last.load(Ordering::Acquire) % ENTRIES {
                return;
            }
            // SAFETY: `at` is below the number of entries in the page, and the kernel has finished this one (acquire above).
            let entry: kvm_coalesced_mmio =
                unsafe { (&raw const (*ring).coalesced_mmio).cast::<kvm_coalesced_mmio>().add(at as usize).read() };
            let data = entry.data.get(..entry.len as usize).unwrap_or_default();
            // SAFETY: both members of this union are the same plain number.
            if unsafe { entry.__bindgen_anon_1.pio } != 0 {
                buses.ports.write(entry.phys_addr, data);
            } else {
                buses.mmio.write(entry.phys_addr, data);
            }
            first.store((at + 1) % ENTRIES, Ordering::Release);
        }
    }
}
