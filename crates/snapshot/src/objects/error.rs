//! What can go wrong between this program and an object store.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::error::ImageError;

/// What is wrong with an object's content. Every kind means: this copy cannot be used, and nothing of it was.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Damage {
    /// It does not start as such an object does.
    #[error("it does not start with the signature of {0}")]
    Signature(&'static str),
    /// Written by a later version of this program, or nonsense.
    #[error("format version {0} is not known")]
    Version(u32),
    /// Unknown compression.
    #[error("codec {0} is not known")]
    Codec(u8),
    /// Flags that this version does not know.
    #[error("flags {0:#06x} are not known")]
    Flags(u32),
    /// Its size is not what it says itself.
    #[error("it has {found} bytes instead of {expected}")]
    Size {
        /// What it should be.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// CRC-32C over the object.
    #[error("its checksum is {found:08x} instead of {expected:08x}")]
    Checksum {
        /// What it says.
        expected: u32,
        /// What it is.
        found: u32,
    },
    /// The AEAD tag is wrong: another key domain's, or changed by somebody who knows how to make checksums.
    #[error("it does not decrypt with the key of its key domain")]
    Decryption,
    /// zstd refuses it, or it unpacks to another size.
    #[error("it does not unpack to {0} bytes")]
    Decompression(u64),
    /// All checks pass, but it is the content of another name.
    #[error("its content is not what its name says: {0}")]
    Content(String),
    /// A field has an impossible value.
    #[error("{0}")]
    Field(String),
}

/// Why work on an object store failed.
#[derive(Debug, Error)]
pub enum StorageError {
    /// The store's address or options make no sense.
    #[error("'{url}' cannot be used as an object store: {reason}")]
    Address {
        /// The address.
        url: String,
        /// Why.
        reason: String,
    },
    /// A name that cannot be a part of an object's path.
    #[error("'{name}' is not a {what}: it must be 1 to 64 of a-z, 0-9 and '-'")]
    Name {
        /// What was named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The store refused or did not answer, after all retries.
    #[error("cannot {action} object {path}: {source}")]
    Objects {
        /// What was being done, e.g. "read".
        action: &'static str,
        /// The object.
        path: String,
        /// The store's answer.
        source: object_store::Error,
    },
    /// An object that something refers to is not there.
    #[error("object {path} is missing from the object store")]
    Missing {
        /// The object.
        path: String,
    },
    /// An object is there but cannot be used.
    #[error("object {path} is damaged: {damage}")]
    Damaged {
        /// The object.
        path: String,
        /// How.
        damage: Damage,
    },
    /// Another root was published under the same id: two writers, of which the other was first.
    #[error("snapshot {id} was already published with other content")]
    RootExists {
        /// The snapshot.
        id: String,
    },
    /// A chunk or a manifest of one key domain was given to another.
    #[error("key domain {found} given where {expected} is needed")]
    KeyDomain {
        /// The domain of the store or parent.
        expected: String,
        /// The other one.
        found: String,
    },
    /// The caller broke a rule of this crate.
    #[error("{0}")]
    Usage(String),
    /// The source of a snapshot's chunks could not be read.
    #[error("cannot read the volume: {source}")]
    Source {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The control plane's records could not be read or changed.
    #[error("the ledger of snapshots: {0}")]
    Ledger(Box<dyn std::error::Error + Send + Sync>),
    /// The disk image given or asked for.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A system call on a local file failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, e.g. "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Somebody asked for an end before it was done.
    #[error("cancelled")]
    Cancelled,
    /// A task of this program died.
    #[error("a worker died: {0}")]
    Worker(String),
}

impl StorageError {
    /// A call on one object or listing failed.
    pub(crate) fn objects(
        action: &'static str,
        path: &object_store::path::Path,
    ) -> impl FnOnce(object_store::Error) -> Self {
        let path = path.to_string();
        move |source| Self::Objects { action, path, source }
    }

    /// Reading an object failed; that it is not there has its own kind.
    pub(crate) fn reading(path: &object_store::path::Path) -> impl FnOnce(object_store::Error) -> Self {
        let path = path.to_string();
        move |source| match source {
            object_store::Error::NotFound { .. } => Self::Missing { path },
            source => Self::Objects { action: "read", path, source },
        }
    }

    pub(crate) fn damaged(path: &object_store::path::Path) -> impl FnOnce(Damage) -> Self {
        let path = path.to_string();
        move |damage| Self::Damaged { path, damage }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Whether the same call may succeed later without anybody mending anything: the store was not reachable, throttled
    /// or out of order. False for damage, wrong use and wrong addresses.
    pub fn is_transient(&self) -> bool {
        use object_store::Error as E;
        match self {
            Self::Objects { source, .. } => matches!(source, E::Generic { .. } | E::JoinError { .. }),
            Self::Io { .. } | Self::Ledger(_) => true,
            _ => false,
        }
    }
}

impl From<tokio::task::JoinError> for StorageError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::Worker(error.to_string())
    }
}
