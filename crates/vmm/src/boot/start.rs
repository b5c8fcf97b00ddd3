//! The first vCPU's state at the kernel's entry point.

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_xcrs};
use kvm_ioctls::VcpuFd;

use crate::kvm::{KvmError, call};
use crate::mem::layout::{BOOT_GDT, BOOT_PAGE_TABLES, PAGE_SIZE, PVH_START_INFO, ZERO_PAGE};
use crate::mem::{Memory, MemoryError};

/// How and where the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, start information in EBX.
    Pvh {
        /// Physical address.
        entry: u32,
    },
    /// 64-bit mode with identity-mapped pages, zero page in RSI.
    Linux64 {
        /// Physical address.
        entry: u64,
    },
}

/// Architectural bits (Intel SDM volume 3A sections 2.2.1, 2.5, 3.4.5).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
/// Page table bits: present, writable, and a 2 MiB page in a page directory.
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_HUGE: u64 = 1 << 7;

/// MSR numbers (Intel SDM volume 4).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// "Fast string operations".
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, default type write-back: firmware would have set this, and Linux refuses PAT without it.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

/// GDT selectors as Linux's boot protocol wants them.
const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TSS: u16 = 0x20;

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    let code = kind == 0xb && selector == SELECTOR_CODE;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!(long && code)),
        s: 1,
        l: u8::from(long && code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// A descriptor table entry for the segment (Intel SDM volume 3A section 3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g != 0 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_) | (u64::from(s.s) << 4) | (u64::from(s.dpl) << 5) | (u64::from(s.present) << 7);
    let flags = u64::from(s.avl) | (u64::from(s.l) << 1) | (u64::from(s.db) << 2) | (u64::from(s.g) << 3);
    (limit & 0xffff)
        | ((s.base & 0xff_ffff) << 16)
        | (access << 40)
        | (((limit >> 16) & 0xf) << 48)
        | (flags << 52)
        | (((s.base >> 24) & 0xff) << 56)
}

/// MSRs that every vCPU starts with.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK), entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING)];
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Missing("room for the MSR table"))?;
    let done = vcpu.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
    // The last one does not exist on some CPUs, and there it is not needed.
    if done == 0 { Err(KvmError::Missing("the MTRR default type register")) } else { Ok(()) }
}

/// Enables every extended state component the CPU has, as firmware may.
///
/// KVM computes the size in CPUID leaf 0xd from XCR0 as it knows it. Where the host's virtualization does not report the
/// guest's own XSETBV (QEMU's emulated SVM), Linux would find a size that does not fit its features, and KVM would undo the
/// guest's setting at every entry.
pub fn set_extended_state(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    let leaf = cpuid.as_slice().iter().find(|e| e.function == 0xd && e.index == 0);
    let Some(components) = leaf.map(|e| u64::from(e.eax) | (u64::from(e.edx) << 32)).filter(|c| c & 1 != 0) else {
        return Ok(());
    };
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    if let Some(first) = xcrs.xcrs.first_mut() {
        first.value = components;
    }
    vcpu.set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))
}

/// Writes descriptor and page tables for `entry`.
pub fn write_tables(memory: &Memory, entry: Entry) -> Result<(), MemoryError> {
    let long = matches!(entry, Entry::Linux64 { .. });
    let tss = tss();
    let gdt = [
        0,
        0,
        descriptor(&segment(SELECTOR_CODE, 0xb, long)),
        descriptor(&segment(SELECTOR_DATA, 3, long)),
        descriptor(&tss),
    ];
    let bytes: Vec<u8> = gdt.iter().flat_map(|d| d.to_le_bytes()).collect();
    memory.write(BOOT_GDT, &bytes)?;
    if long {
        memory.write(BOOT_PAGE_TABLES, &identity_page_tables())?;
    }
    Ok(())
}

/// Identity map of the first 4 GiB in 2 MiB pages.
fn identity_page_tables() -> Vec<u8> {
    let mut entries = vec![0u64; 6 * 512];
    let table = |n: u64| (BOOT_PAGE_TABLES + n * PAGE_SIZE) | PAGE_PRESENT_WRITABLE;
    for (i, entry) in entries.iter_mut().enumerate() {
        let i = i as u64;
        *entry = match i {
            0 => table(1),
            512..516 => table(2 + (i - 512)),
            1024.. => ((i - 1024) << 21) | PAGE_PRESENT_WRITABLE | PAGE_HUGE,
            _ => 0,
        };
    }
    entries.iter().flat_map(|e| e.to_le_bytes()).collect()
}

fn tss() -> kvm_segment {
    let mut tss = segment(SELECTOR_TSS, 0xb, false);
    (tss.s, tss.g, tss.db, tss.limit) = (0, 0, 0, 0x67);
    tss
}

/// Sets the first vCPU to the kernel's entry point.
pub fn set_registers(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut sregs: kvm_sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let long = matches!(entry, Entry::Linux64 { .. });
    sregs.cs = segment(SELECTOR_CODE, 0xb, long);
    let data = segment(SELECTOR_DATA, 3, long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss();
    (sregs.gdt.base, sregs.gdt.limit) = (BOOT_GDT, 5 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Pvh { entry } => {
            (sregs.cr0, sregs.cr4) = (CR0_PE | CR0_ET, 0);
            (regs.rip, regs.rbx) = (u64::from(entry), PVH_START_INFO);
        }
        Entry::Linux64 { entry } => {
            (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE | CR0_ET | CR0_PG, BOOT_PAGE_TABLES, CR4_PAE);
            sregs.efer |= EFER_LME | EFER_LMA;
            (regs.rip, regs.rsi) = (entry, ZERO_PAGE);
        }
    }
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    // What `fninit` leaves behind, and the reset value of MXCSR.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(call("KVM_SET_FPU"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_match_the_well_known_flat_ones() {
        assert_eq!(descriptor(&segment(SELECTOR_CODE, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(SELECTOR_CODE, 0xb, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(SELECTOR_DATA, 3, true)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&tss()), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn page_tables_map_each_address_to_itself() {
        let bytes = identity_page_tables();
        let entry = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().unwrap());
        assert_eq!(entry(0), (BOOT_PAGE_TABLES + PAGE_SIZE) | 3);
        assert_eq!(entry(515), (BOOT_PAGE_TABLES + 5 * PAGE_SIZE) | 3);
        assert_eq!(entry(1024 + 2047), (2047 << 21) | 0x83);
        assert_eq!(bytes.len(), 6 * 4096);
    }
}
