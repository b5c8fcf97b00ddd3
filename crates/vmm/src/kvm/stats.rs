//! The kernel's own counters of a vCPU (Linux Documentation/virt/kvm/api.rst 4.133 `KVM_GET_STATS_FD`): every exit, also those
//! that never reach this process.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

use super::exits::add;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

const HEADER_SIZE: usize = 24;
const DESCRIPTOR_SIZE: usize = 16;
/// Sanity limits; kernels have about 50 counters with names of 48 bytes.
const MAX_DESCRIPTORS: usize = 1024;
const MAX_NAME: usize = 256;
/// Type nibble of a descriptor's flags: only cumulative counters are of interest.
const TYPE_MASK: u32 = 0xf;
const TYPE_CUMULATIVE: u32 = 0;

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Counter {
    name: String,
    offset: u64,
}

/// The counters of one vCPU; `None` inside on kernels before 5.14.
#[derive(Debug)]
pub struct KernelCounters(Option<(File, Vec<Counter>)>);

impl KernelCounters {
    /// Opens the counters of `vcpu`.
    pub fn open(vcpu: &VcpuFd) -> Self {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Self(None);
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        let file = unsafe { File::from_raw_fd(fd) };
        let counters = descriptors(&file);
        Self(counters.map(|counters| (file, counters)))
    }

    /// Adds the counters that are not zero to `sums`, with the prefix `kvm_`.
    pub fn add_to(&self, sums: &mut Vec<(String, u64)>) {
        let Some((file, counters)) = &self.0 else { return };
        for counter in counters {
            let mut value = [0u8; 8];
            if file.read_exact_at(&mut value, counter.offset).is_ok() && value != [0; 8] {
                add(sums, &counter.name, u64::from_le_bytes(value));
            }
        }
    }
}

fn descriptors(file: &File) -> Option<Vec<Counter>> {
    let mut header = [0u8; HEADER_SIZE];
    file.read_exact_at(&mut header, 0).ok()?;
    let (_, name_size, count) = (word(&header, 0)?, word(&header, 4)? as usize, word(&header, 8)? as usize);
    if name_size > MAX_NAME || count > MAX_DESCRIPTORS {
        return None;
    }
    let mut bytes = vec![0u8; count * (DESCRIPTOR_SIZE + name_size)];
    file.read_exact_at(&mut bytes, u64::from(word(&header, 16)?)).ok()?;
    let data = u64::from(word(&header, 20)?);
    Some(bytes.chunks_exact(DESCRIPTOR_SIZE + name_size).filter_map(|d| counter(d, data)).collect())
}

/// A cumulative counter of one value, out of a descriptor.
fn counter(descriptor: &[u8], data: u64) -> Option<Counter> {
    let values = u16::from_le_bytes(descriptor.get(6..8)?.try_into().ok()?);
    if word(descriptor, 0)? & TYPE_MASK != TYPE_CUMULATIVE || values != 1 {
        return None;
    }
    let name = descriptor.get(DESCRIPTOR_SIZE..)?.split(|b| *b == 0).next()?;
    Some(Counter {
        name: format!("kvm_{}", std::str::from_utf8(name).ok()?),
        offset: data + u64::from(word(descriptor, 8)?),
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn counters_are_read_by_name_and_histograms_left_out() {
        let mut bytes: Vec<u8> = [0u32, 8, 2, 24, 24, 72].iter().flat_map(|w| w.to_le_bytes()).collect();
        for (kind, size, offset, name) in [(0u32, 1u16, 8u32, b"exits\0\0\0"), (3, 4, 16, b"histo\0\0\0")] {
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&0u16.to_le_bytes());
            bytes.extend_from_slice(&size.to_le_bytes());
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&0u32.to_le_bytes());
            bytes.extend_from_slice(name);
        }
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&77u64.to_le_bytes());
        let file = file(&bytes);
        let counters = descriptors(&file).unwrap();
        assert_eq!(counters, [Counter { name: "kvm_exits".into(), offset: 80 }]);
        let mut sums = vec![("kvm_exits".to_owned(), 3)];
        KernelCounters(Some((file, counters))).add_to(&mut sums);
        assert_eq!(sums, [("kvm_exits".to_owned(), 80)]);
    }

    proptest! {
        #[test]
        fn garbage_yields_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = descriptors(&file(&bytes));
        }
    }
}
