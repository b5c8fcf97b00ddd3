//! Volumes that a backend keeps (docs/storage.md): made, opened for VMMs, connected again, deleted.
//!
//! ```text
//! RUN/.network/ID/  of a volume that is open here: the size its guest sees; with RBD also the attachment's generation and the
//!                   storage daemon's socket, pid file and log
//! ```
//!
//! Nothing of them outlives the host's boot, and everything may be repeated: what is true of a volume stands at its backend.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hearth_driver::{Backend, DriverError};
use hearth_proto::v1;
use hearth_types::VolumeId;
use parking_lot::Mutex;
use thiserror::Error;

use crate::state::Layout;

/// Why a volume of a backend cannot be used.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The host has no backend of this name.
    #[error(
        "volume {volume}: this host has no volume backend '{backend}'; name it in the agent's configuration and restart it"
    )]
    NoBackend {
        /// Which volume.
        volume: String,
        /// The backend's name.
        backend: String,
    },
    /// The volume's id is none.
    #[error("volume {volume}: {reason}")]
    Volume {
        /// Which volume.
        volume: String,
        /// What is wrong.
        reason: String,
    },
    /// The backend says why.
    #[error("volume {volume} at backend '{backend}': {source}")]
    Driver {
        /// Which volume.
        volume: String,
        /// The backend's name.
        backend: String,
        /// Cause.
        source: DriverError,
    },
}

/// Whether a backend keeps this volume, and not this host's disk.
pub fn is_network(volume: &v1::HostVolume) -> bool {
    !volume.backend.is_empty()
}

/// File with the size that the volume's guest sees.
const SIZE: &str = "size";

/// What is done with a volume. One at a time for each volume: they begin with the lock of that volume.
type Locks = Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>;

/// The backends of this host.
pub struct NetworkVolumes {
    layout: Layout,
    backends: BTreeMap<String, Arc<Backend>>,
    locks: Locks,
}

/// Whether a connection is the attachment's first or a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// The VMM does not have the volume yet, or its server has to begin anew.
    First,
    /// The VMM has lost the connection.
    Again,
}

impl NetworkVolumes {
    /// For these backends; those of later duplicates of a name are ignored.
    pub fn new(layout: Layout, backends: Vec<Backend>) -> Self {
        let mut named = BTreeMap::new();
        for backend in backends {
            named.entry(backend.name().to_owned()).or_insert_with(|| Arc::new(backend));
        }
        Self { layout, backends: named, locks: Locks::default() }
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.backends.keys().cloned().collect()
    }

    /// Does something with a volume, when nothing else is done with it. It goes on to its end if the caller gives up.
    async fn work<T: Send + 'static>(
        &self,
        volume: &v1::HostVolume,
        work: impl FnOnce(&Backend, &hearth_driver::Name, &std::path::Path) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let no = |reason: String| NetworkError::Volume { volume: volume.volume_id.clone(), reason };
        let id: VolumeId = volume.volume_id.parse().map_err(|error| no(format!("{error}")))?;
        let name: hearth_driver::Name = id.as_str().parse().map_err(|error: DriverError| no(error.to_string()))?;
        let backend = self.backends.get(&volume.backend).cloned().ok_or_else(|| NetworkError::NoBackend {
            volume: volume.volume_id.clone(),
            backend: volume.backend.clone(),
        })?;
        let folder = self.layout.network_volume(&id);
        let guard = self.lock(&volume.volume_id).await;
        let done = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            work(&backend, &name, &folder)
        })
        .await;
        done.map_err(|error| no(format!("internal error: {error}")))?.map_err(|source| NetworkError::Driver {
            volume: volume.volume_id.clone(),
            backend: volume.backend.clone(),
            source,
        })
    }

    async fn lock(&self, id: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock();
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(id.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Makes a blank volume.
    pub async fn create(&self, volume: &v1::HostVolume) -> Result<(), NetworkError> {
        let bytes = volume.size_bytes;
        self.work(volume, move |backend, name, _| backend.create(name, bytes)).await
    }

    /// Deletes a volume.
    pub async fn delete(&self, volume: &v1::HostVolume) -> Result<(), NetworkError> {
        self.work(volume, |backend, name, folder| backend.delete(name, folder)).await
    }

    /// A connected socket for the VMM that has the volume, or is to have it, and the export that it must ask for.
    pub async fn connect(&self, volume: &v1::HostVolume, connect: Connect) -> Result<(OwnedFd, String), NetworkError> {
        let (bytes, generation) = (volume.size_bytes, volume.attach_generation);
        self.work(volume, move |backend, name, folder| {
            let export = backend.export(name)?;
            let socket = match connect {
                Connect::First => backend.open(name, bytes, generation, folder),
                Connect::Again => backend.reconnect(name, bytes, generation, folder),
            };
            Ok((socket?, export))
        })
        .await
    }

    /// Notes the size that the guest of a volume sees, for the next agent.
    pub fn note_size(&self, volume: &v1::HostVolume) {
        let Ok(id) = volume.volume_id.parse() else { return };
        let folder = self.layout.network_volume(&id);
        let write = || {
            std::fs::create_dir_all(&folder)?;
            std::fs::write(folder.join(SIZE), volume.size_bytes.to_string())
        };
        if let Err(error) = write() {
            tracing::warn!(volume = volume.volume_id, %error, "noting a volume's size");
        }
    }

    /// The size noted last; 0 = none, as far as anybody knows.
    pub fn noted_size(&self, volume: &v1::HostVolume) -> u64 {
        let Ok(id) = volume.volume_id.parse() else { return 0 };
        let text = std::fs::read_to_string(self.layout.network_volume(&id).join(SIZE));
        text.ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// Ends what serves a volume here: no VMM has it any more. Nothing happens to what a later attachment uses.
    pub async fn close(&self, volume: &v1::HostVolume) -> Result<(), NetworkError> {
        let no = |reason: String| NetworkError::Volume { volume: volume.volume_id.clone(), reason };
        let id: VolumeId = volume.volume_id.parse().map_err(|error| no(format!("{error}")))?;
        let (folder, generation) = (self.layout.network_volume(&id), volume.attach_generation);
        let guard = self.lock(&volume.volume_id).await;
        let closed = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            hearth_driver::close(&folder, generation)
        })
        .await;
        closed.map_err(|error| no(format!("internal error: {error}")))?.map_err(|error| no(error.to_string()))
    }

    /// What an earlier agent left behind of volumes that no instance has, for [`close`](Self::close).
    pub fn left_behind(&self, kept: &HashSet<String>) -> Vec<v1::HostVolume> {
        let entries = std::fs::read_dir(self.layout.network()).into_iter().flatten().flatten();
        let left = entries.filter_map(|entry| {
            let volume_id = entry.file_name().into_string().ok().filter(|name| !kept.contains(name))?;
            let attach_generation = hearth_driver::generation(&entry.path()).unwrap_or(0);
            Some(v1::HostVolume { volume_id, attach_generation, ..v1::HostVolume::default() })
        });
        left.collect()
    }
}
