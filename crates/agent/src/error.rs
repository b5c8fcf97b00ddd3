//! Why an agent stops.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::launch::{CgroupError, LaunchError};
use crate::link::LinkError;

/// What ends [`crate::run`] or keeps it from starting. What goes wrong with one instance is reported for that instance and
/// is never one of these.
#[derive(Debug, Error)]
pub enum AgentError {
    /// A file or folder of the agent's own.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was tried, e.g. "creating".
        action: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Jails, taps and cgroups need root.
    #[error("the agent must run as root: it makes jails, network devices and cgroups")]
    NotRoot,
    /// One state folder, one agent.
    #[error("another agent uses the state folder {}", .0.display())]
    InUse(PathBuf),
    /// Joining, or the identity.
    #[error("joining the cluster: {0}")]
    Link(#[from] LinkError),
    /// Control groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// /dev/kvm, the VMM program.
    #[error("this host cannot run instances: {0} (`hearth doctor` tells more)")]
    Launch(#[from] LaunchError),
    /// Volumes.
    #[error(transparent)]
    Volumes(#[from] crate::storage::VolumeError),
    /// What the operator says of a volume backend.
    #[error(transparent)]
    Backend(hearth_driver::DriverError),
    /// The host's network.
    #[error("network: {0}")]
    Network(#[from] hearth_net::NetError),
    /// A thread of the agent's own broke.
    #[error("internal error: {0}")]
    Internal(String),
}

impl AgentError {
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}
