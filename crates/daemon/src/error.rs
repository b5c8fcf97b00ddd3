//! Why the daemon ends.

use std::io;
use std::path::PathBuf;

use hearth_agent::AgentError;
use hearth_control::ControlError;
use thiserror::Error;

/// What ends `hearthd`, in words for the operator.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    ConfigFile {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The configuration file is not of the right form.
    #[error("configuration file {}: {reason}", path.display())]
    ConfigSyntax {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// A setting makes no sense.
    #[error("setting {name}: {reason}")]
    Setting {
        /// Its name, as in the configuration file.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Agents make network devices, cgroups and jails.
    #[error("the agent must run as root")]
    NotRoot,
    /// Threads or signal handlers cannot be made.
    #[error("cannot start: {0}")]
    Runtime(io::Error),
    /// The control plane failed.
    #[error("control plane: {0}")]
    Control(#[from] ControlError),
    /// The store cannot be copied or restored.
    #[error("store: {0}")]
    Store(#[from] hearth_store::Error),
    /// A restore would replace a store.
    #[error("there is a store already: {}", .0.display())]
    StoreExists(PathBuf),
    /// A folder cannot be made.
    #[error("cannot make {}: {source}", path.display())]
    Folder {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The agent failed.
    #[error("agent: {0}")]
    Agent(#[from] AgentError),
    /// A part ended without being asked to.
    #[error("the {0} ended unexpectedly")]
    Ended(&'static str),
    /// Parts did not end in time after a signal.
    #[error("not everything ended within {0} s after the signal")]
    Stuck(u64),
}

impl DaemonError {
    /// 2 for what the operator wrote wrong, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::ConfigFile { .. } | Self::ConfigSyntax { .. } | Self::Setting { .. } => 2,
            Self::Control(ControlError::Setting { .. } | ControlError::Catalogue { .. }) => 2,
            _ => 1,
        }
    }

    /// What to do about it, where that is known.
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::NotRoot => Some("start it with sudo, or run only the control plane: hearthd control".to_owned()),
            Self::Control(ControlError::Listen { address, source }) => match source.kind() {
                io::ErrorKind::AddrInUse => Some(format!(
                    "another program (another hearthd?) listens on {address}: stop it (`ss -ltnp` shows which it is) or choose \
                     another address with --listen"
                )),
                io::ErrorKind::AddrNotAvailable => {
                    Some(format!("{} is no address of this machine: choose another with --listen", address.ip()))
                }
                io::ErrorKind::PermissionDenied => Some("ports below 1024 need root".to_owned()),
                _ => None,
            },
            Self::StoreExists(_) => {
                Some("--force puts the backup in its place and keeps the present store under another name".to_owned())
            }
            Self::Store(hearth_store::Error::InUse { .. }) => {
                Some("stop the control plane first: systemctl stop hearthd".to_owned())
            }
            Self::Control(error) if mentions_lock(&error.to_string()) => Some(in_use()),
            Self::Agent(error) if mentions_lock(&error.to_string()) => Some(in_use()),
            Self::Control(ControlError::Io { source, .. }) | Self::Agent(AgentError::File { source, .. }) => {
                match source.kind() {
                    io::ErrorKind::PermissionDenied => {
                        Some("run as root, or choose a folder of yours with --state-dir and --run-dir".to_owned())
                    }
                    io::ErrorKind::StorageFull => Some("free some disk space".to_owned()),
                    io::ErrorKind::ReadOnlyFilesystem => Some("choose a writable folder with --state-dir".to_owned()),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

fn mentions_lock(text: &str) -> bool {
    text.contains("lock") || text.contains("in use")
}

fn in_use() -> String {
    "another hearthd uses this state folder: stop it first, or choose another folder with --state-dir".to_owned()
}
