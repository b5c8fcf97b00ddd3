//! Why an agent stops.

use std::path::{Path, PathBuf};

use thiserror::Error;

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
}

impl AgentError {
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}
