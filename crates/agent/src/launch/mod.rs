//! Starting, finding again and ending VMM processes.

mod cgroup;
mod conversation;
mod disks;
mod jail;
mod kvm;
mod process;
mod spawn;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use hearth_types::InstanceId;
use thiserror::Error;

pub use cgroup::{CgroupError, Cgroups, Limits};
pub use disks::{Backing, Disk, DiskControl, DiskEvents, DiskLimits, FreezeDisk, LayeredBacking, NbdBacking};
pub use kvm::{KvmLauncher, disk_queues};

/// How a VMM process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmEnd {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's CPU gave up (triple fault).
    GuestCrashed,
    /// The agent's `Kill` was obeyed.
    Killed,
    /// The VMM says that the host failed it, or that it has a fault of its own; its exit code.
    Failed(i32),
    /// It vanished without an exit code: killed from outside (SIGKILL, out of memory).
    Died,
}

/// One NIC to give to a VMM.
#[derive(Debug)]
pub struct Nic {
    /// Station address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u16,
    /// A tap that vanishes when it is closed.
    pub tap: OwnedFd,
}

/// Kernel, initrd and command line, opened.
#[derive(Debug)]
pub struct BootFiles {
    /// vmlinux or bzImage.
    pub kernel: File,
    /// Sealed memory.
    pub initrd: Option<File>,
    /// Command line.
    pub cmdline: String,
}

/// Everything a VMM is started with.
#[derive(Debug)]
pub struct LaunchSpec {
    /// Whose VMM.
    pub instance_id: InstanceId,
    /// Shown in SMBIOS.
    pub instance_type: String,
    /// Which uid of the range.
    pub slot: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Limits of its cgroup.
    pub limits: Limits,
    /// What to boot.
    pub boot: BootFiles,
    /// First the root disk.
    pub disks: Vec<Disk>,
    /// In guest order.
    pub nics: Vec<Nic>,
    /// Console ring, formatted.
    pub console_ring: File,
}

/// Why a VMM did not start or cannot be reached.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// A step on the host.
    #[error("{action}: {source}")]
    Host {
        /// What was tried.
        action: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Another VMM of the same instance still lives.
    #[error("another VMM of {0} still runs")]
    AlreadyRunning(InstanceId),
    /// A step of the child between clone and exec.
    #[error("starting hearth-vmm in its jail: {step}: {source}")]
    Jail {
        /// Which step.
        step: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The VMM answered with an error or not at all.
    #[error("hearth-vmm: {0}")]
    Vmm(String),
}

impl LaunchError {
    pub(crate) fn host(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { action: action.into(), source }
    }
}

/// What was found of an instance's VMM after a restart of the agent.
pub enum Found {
    /// It runs the guest.
    Running(Box<dyn Vmm>),
    /// None; how the last one ended, as far as it left word.
    Ended(Option<VmmEnd>),
}

/// A running VMM.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Waits for its end. May be given up and called again.
    async fn wait(&mut self) -> VmmEnd;
    /// Presses the guest's power button.
    async fn power_button(&self) -> Result<(), LaunchError>;
    /// Ends it, whatever the guest does; disks are flushed if it still listens. [`Vmm::wait`] tells when it is gone.
    async fn kill(&self);
    /// Its disks, for whoever works on them while somebody else waits for its end.
    fn disks(&self) -> Arc<dyn DiskControl>;
    /// What it tells of its disks. Once.
    fn take_events(&mut self) -> Option<DiskEvents>;
}

/// Makes VMMs. The only implementation outside of tests is [`KvmLauncher`].
#[async_trait]
pub trait VmmLauncher: Send + Sync {
    /// Starts a VMM and lets its guest run.
    async fn launch(&self, spec: LaunchSpec) -> Result<Box<dyn Vmm>, LaunchError>;
    /// Looks for an instance's VMM. One that does not run its guest yet (the agent ended in between) is killed. One that does
    /// not answer is taken for running if it `was_running` when last heard of, and killed otherwise.
    async fn find(&self, instance: &InstanceId, was_running: bool) -> Result<Found, LaunchError>;
    /// Kills what may be left of an instance's VMM and removes its cgroup and sockets. Done again it does nothing.
    async fn clean_up(&self, instance: &InstanceId) -> Result<(), LaunchError>;
}

/// A launcher that many instances share.
pub type SharedLauncher = Arc<dyn VmmLauncher>;
