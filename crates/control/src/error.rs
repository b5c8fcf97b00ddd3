//! Why a control plane cannot start or go on.

use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

/// Fatal to a control plane. Errors of single calls go to their callers.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A file or folder cannot be used.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The port cannot be taken.
    #[error("listen on {address}: {source}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// The store failed.
    #[error("store: {0}")]
    Store(#[from] hearth_store::Error),
    /// The object store cannot be opened.
    #[error(transparent)]
    ObjectStore(#[from] hearth_snapshot::StorageError),
    /// A certificate or key is unusable.
    #[error("certificates: {0}")]
    Pki(String),
    /// A record in the store cannot be read.
    #[error("record {key}: {reason}")]
    Record {
        /// Its key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// The instance type file is wrong.
    #[error("{}: {source}", path.display())]
    Catalogue {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: hearth_types::CatalogueError,
    },
    /// The built-in catalogue is wrong.
    #[error("built-in catalogue: {0}")]
    BuiltInCatalogue(#[from] hearth_types::CatalogueError),
    /// The system gives no random numbers.
    #[error("random numbers: {0}")]
    Random(#[from] getrandom::Error),
    /// The gRPC server failed.
    #[error("gRPC server: {0}")]
    Server(#[from] tonic::transport::Error),
    /// A setting is out of range.
    #[error("setting {name}: {reason}")]
    Setting {
        /// Which one.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A part of the control plane ended that never should.
    #[error("{0} stopped unexpectedly")]
    Stopped(&'static str),
}

impl ControlError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
