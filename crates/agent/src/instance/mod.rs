//! One instance: from what is wanted to what is.
//!
//! Each instance has a task that compares the newest wish with what there is and takes the next step, again and again. Its record
//! on disk says how far it is; every step can be repeated, so that the agent may be killed anywhere.
//!
//! Decisions that EC2 leaves open:
//! - A triple fault of the guest is a reset, as on a real machine. Resets and crashes in quick succession are delayed, up to a
//!   minute, and never given up.
//! - A VMM that dies (SIGKILL, out of memory, a fault of its own) is started again at once, then with growing delays; after five
//!   times without five good minutes in between the instance is reported as failed.
//! - A power-off from inside is reported and not undone: the control plane applies the shutdown behaviour.

mod network;
mod restart;
mod spec;
mod start;
mod task;
mod volumes;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::boot::BootLoader;
use crate::capacity::{Admission, Calibration};
use crate::launch::SharedLauncher;
use crate::net::HostNet;
use crate::reports::Reports;
use crate::state::Layout;
use crate::storage::{Fills, HostVolumes, Snapshots};

pub use spec::{Attachment, Nic, Spec};
pub use task::{InstanceTask, Wishes, report_gone};

/// What all instances of a host share.
pub struct Host {
    /// Files.
    pub layout: Layout,
    /// VMMs.
    pub launcher: SharedLauncher,
    /// Network.
    pub network: Arc<dyn HostNet>,
    /// EBS volumes.
    pub volumes: Arc<HostVolumes>,
    /// Their snapshots.
    pub snapshots: Arc<Snapshots>,
    /// Snapshots that it is to have whole.
    pub fills: Fills,
    /// Kernels.
    pub boot: Arc<BootLoader>,
    /// What is taken.
    pub admission: Admission,
    /// How fast the host is.
    pub calibration: Calibration,
    /// What is told.
    pub reports: Arc<Reports>,
    /// Instances whose disks and VMMs may be made at the same time: more would only make each other, and the rest of the host,
    /// slower.
    pub starts: Arc<Semaphore>,
    /// How long a guest may take to shut down.
    pub stop_timeout: Duration,
    /// The same when it is terminated.
    pub terminate_timeout: Duration,
    /// MTU of instance NICs.
    pub mtu: u16,
    /// Where tests let the agent die.
    #[cfg(test)]
    pub(crate) crash: tests::CrashPoint,
}

impl Host {
    /// Between two steps with effects outside of this process. Tests stop here for good, as if the agent had been killed.
    #[cfg(not(test))]
    #[allow(clippy::unused_async)]
    pub(crate) async fn step(&self, _name: &'static str) {}

    #[cfg(test)]
    pub(crate) async fn step(&self, name: &'static str) {
        self.crash.pass(name).await;
    }
}

#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
pub(crate) use tests::CrashPoint;
