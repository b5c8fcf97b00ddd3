//! What CPUID tells the guest: the host's CPU as far as KVM can show it, with this guest's topology and timers.
//!
//! Leaf numbers and fields: Intel SDM volume 2A "CPUID", AMD APM volume 3 appendix E, Linux
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::KvmError;

/// Leaf 1 ECX: x2APIC, TSC-deadline timer, running under a hypervisor.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001 ECX: AMD's way to say the same.
const CMP_LEGACY: u32 = 1 << 1;

/// Position of a vCPU in the guest: one package, one core per vCPU, one thread per core.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Number of this vCPU, which is its APIC id.
    pub index: u8,
    /// Number of vCPUs.
    pub count: u8,
}

impl Topology {
    /// Bits of the APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }
}

/// The CPUID table of one vCPU, made from what KVM supports on this host.
pub fn for_vcpu(supported: &CpuId, topology: Topology, tsc_deadline: bool) -> Result<CpuId, KvmError> {
    let count = u32::from(topology.count);
    let id = u32::from(topology.index);
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026)).copied().collect();
    for e in &mut entries {
        match e.function {
            // Topology leaf 0xb is always offered, and leaf 0x1f never.
            0 => e.eax = e.eax.clamp(0xb, u32::MAX),
            1 => {
                e.ebx = (e.ebx & 0xffff) | (count << 16) | (id << 24);
                e.ecx |= HYPERVISOR | X2APIC;
                set(&mut e.ecx, TSC_DEADLINE, tsc_deadline);
                set(&mut e.edx, HTT, count > 1);
            }
            // Intel deterministic cache parameters: levels 1 and 2 belong to a core, others to the package.
            4 if e.eax & 0x1f != 0 => {
                let sharing = if (e.eax >> 5) & 7 <= 2 { 0 } else { count - 1 };
                e.eax = (e.eax & 0x3fff) | (sharing << 14) | ((count - 1).min(63) << 26);
            }
            0x8000_0001 => set(&mut e.ecx, CMP_LEGACY, count > 1 && is_amd(supported)),
            // Number of cores, and bits of the APIC id that number them.
            0x8000_0008 if is_amd(supported) => e.ecx = (e.ecx & !0xf0ff) | (count - 1) | (topology.core_bits() << 12),
            0x8000_001d if e.eax & 0x1f != 0 => {
                let sharing = if (e.eax >> 5) & 7 <= 2 { 0 } else { count - 1 };
                e.eax = (e.eax & !(0xfff << 14)) | (sharing << 14);
            }
            // Extended APIC id; core id with one thread per core; node 0 of one.
            0x8000_001e => (e.eax, e.ebx, e.ecx) = (id, id, 0),
            _ => {}
        }
    }
    for (level, eax, ebx, kind) in [(0, 0, 1, 1), (1, topology.core_bits(), count, 2), (2, 0, 0, 0)] {
        entries.push(kvm_cpuid_entry2 {
            function: 0xb,
            index: level,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: level | (kind << 8),
            edx: id,
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::Missing("room for the CPUID table"))
}

/// Physical address bits of the host as shown to the guest (leaf 0x80000008), 36 when it does not say.
pub fn physical_address_bits(supported: &CpuId) -> u8 {
    supported.as_slice().iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax as u8)
}

fn is_amd(supported: &CpuId) -> bool {
    // "AuthenticAMD" or "HygonGenuine": EBX of leaf 0.
    supported.as_slice().iter().any(|e| e.function == 0 && matches!(&e.ebx.to_le_bytes(), b"Auth" | b"Hygo"))
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on {
        *register |= bits;
    } else {
        *register &= !bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(vendor: &[u8; 4]) -> CpuId {
        let leaf = |function, eax, ebx| kvm_cpuid_entry2 { function, eax, ebx, ..Default::default() };
        CpuId::from_entries(&[
            leaf(0, 0xd, u32::from_le_bytes(*vendor)),
            leaf(1, 0x830f10, 0x1234_5678),
            leaf(4, 0x163, 0),
            leaf(0xb, 9, 9),
            leaf(0x1f, 9, 9),
            leaf(0x8000_0001, 0, 0),
            leaf(0x8000_0008, 0x3028, 0),
            leaf(0x8000_001e, 77, 77),
        ])
        .unwrap()
    }

    proptest! {
        #[test]
        fn apic_ids_agree_in_every_leaf(count in 1u8..=32, pick in 0u8..32, amd: bool) {
            let topology = Topology { index: pick % count, count };
            let host = host(if amd { b"Auth" } else { b"Genu" });
            let cpuid = for_vcpu(&host, topology, true).unwrap();
            let leaf = |function, index| *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap();
            let id = u32::from(topology.index);
            prop_assert_eq!(leaf(1, 0).ebx >> 24, id);
            prop_assert_eq!(leaf(0xb, 0).edx, id);
            prop_assert_eq!(leaf(0xb, 1).edx, id);
            prop_assert_eq!(leaf(0xb, 1).ebx, u32::from(count));
            prop_assert!(u32::from(count) <= 1 << leaf(0xb, 1).eax);
            prop_assert_eq!(leaf(0x8000_001e, 0).eax, id);
            prop_assert_eq!(leaf(1, 0).edx & HTT != 0, count > 1);
            prop_assert!(leaf(1, 0).ecx & (HYPERVISOR | TSC_DEADLINE) == (HYPERVISOR | TSC_DEADLINE));
            prop_assert!(!cpuid.as_slice().iter().any(|e| e.function == 0x1f));
            if amd {
                prop_assert_eq!(leaf(0x8000_0008, 0).ecx & 0xff, u32::from(count) - 1);
            }
            prop_assert_eq!(physical_address_bits(&cpuid), 40);
        }
    }
}
