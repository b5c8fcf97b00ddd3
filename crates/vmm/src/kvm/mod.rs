//! The hypervisor: one virtual machine, its vCPUs, and the interrupt paths into it.

pub mod coalesced;
pub mod cpuid;
pub mod exits;
pub mod irq;
pub mod stats;
pub mod vcpu;
pub mod vm;

use std::io;

/// A KVM call that failed, and on whose behalf.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// An ioctl.
    #[error("{call} failed: {source}")]
    Call {
        /// Which call, and on what.
        call: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The host's KVM lacks something the machine cannot do without.
    #[error("this host's KVM lacks {0}; a Linux kernel of 5.10 or newer with hardware virtualization is needed")]
    Missing(&'static str),
    /// The file descriptor handed in is not /dev/kvm.
    #[error("the kvm file descriptor does not speak KVM API version 12: {0}")]
    NotKvm(String),
    /// More or fewer vCPUs than supported.
    #[error("{0} vCPUs are not supported: at least 1 and at most {max}", max = vm::MAX_VCPUS)]
    VcpuCount(u8),
    /// A vCPU thread could not be started.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Thread {
        /// Which vCPU.
        index: u8,
        /// The host's answer.
        source: io::Error,
    },
    /// A vCPU did not stop in time.
    #[error("a vCPU did not stop within {0} ms")]
    Stuck(u64),
}

/// Attaches the name of the call to a kvm-ioctls error.
pub(crate) fn call(name: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    let call = name.into();
    move |e| KvmError::Call { call, source: io::Error::from_raw_os_error(e.errno()) }
}
