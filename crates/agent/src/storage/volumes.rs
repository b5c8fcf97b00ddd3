//! Volumes on this host: a folder each, made in one step, opened for VMMs, read offline, deleted.
//!
//! ```text
//! STATE/volumes/ID/data          the volume's own blocks
//! STATE/volumes/ID/map           which those are (docs/storage.md)
//! STATE/volumes/ID/lineage.json  the manifest that the map's DIRTY bits are relative to
//! STATE/volumes/.new-ID          being made
//! STATE/volumes/.gone-ID         being deleted
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth_block::map::{self, MapBase, MapSpec};
use hearth_block::{BLOCK_BYTES, BaseFiles, BlockError, CHUNK_BYTES, MapError, OfflineVolume, VolumeFiles, XtsKey};
use hearth_proto::v1;
use hearth_types::VolumeId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::base::{Base, BaseError, Reader};
use super::bases::Bases;
use super::keyring::KeyError;
use super::network::NetworkVolumes;
use crate::boot::ReadAt;
use crate::state::{Layout, read_if_exists, sync_dir, write_atomically};

/// Why a volume cannot be used.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// What the control plane says of it makes no sense.
    #[error("volume {id}: {reason}")]
    Spec {
        /// Which volume.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// What it starts with.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// Its key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its map.
    #[error("map of volume {id}: {source}")]
    Map {
        /// Which volume.
        id: String,
        /// What is wrong.
        source: MapError,
    },
    /// Its files are not where they were.
    #[error("volume {id}: the host has lost it: {} is missing; is a file system not mounted?", path.display())]
    Lost {
        /// Which volume.
        id: String,
        /// Its folder.
        path: PathBuf,
    },
    /// Opening or reading it.
    #[error("volume {id}: {source}")]
    Block {
        /// Which volume.
        id: String,
        /// What is wrong.
        source: BlockError,
    },
}

impl VolumeError {
    /// Whether trying again later may help without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Spec { .. } | Self::Map { .. } | Self::Lost { .. } => false,
            Self::Base(error) => error.is_transient(),
            Self::Key(error) => error.is_transient(),
            Self::Io { .. } => true,
            Self::Block { source, .. } => matches!(source, BlockError::InUse | BlockError::ChunkMissing { .. }),
        }
    }

    /// Somebody else has the volume open.
    pub fn is_in_use(&self) -> bool {
        matches!(self, Self::Block { source: BlockError::InUse, .. })
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { action, path, source }
}

/// The manifest that a volume's DIRTY bits are relative to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Its id.
    pub snapshot_id: String,
    /// Hash of its root, hex.
    pub root: String,
}

/// A volume that is on this host, closed.
#[derive(Clone)]
pub struct Placed {
    /// Its id.
    pub id: VolumeId,
    /// As the control plane wants it.
    pub wanted: v1::HostVolume,
    /// What it starts with.
    pub base: Option<Arc<Base>>,
    /// Key of its files, when they are not in clear.
    pub key: Option<XtsKey>,
    folder: PathBuf,
}

impl Placed {
    /// Opens its files anew; nobody has it locked by that.
    pub fn files(&self) -> Result<VolumeFiles, VolumeError> {
        let open = |name: &str| {
            let path = self.folder.join(name);
            OpenOptions::new().read(true).write(true).open(&path).map_err(io_error("opening", &path))
        };
        let base = match &self.base {
            None => None,
            Some(base) => {
                let (data, presence) = base.files().map_err(io_error("opening the base of", &self.folder))?;
                Some(BaseFiles { data, presence, key: base.key().cloned() })
            }
        };
        Ok(VolumeFiles { data: open("data")?, map: open("map")?, base, key: self.key.clone() })
    }

    /// Opens it for this process. Blocks.
    pub fn open_offline(&self) -> Result<OfflineVolume, VolumeError> {
        let failed = |source| VolumeError::Block { id: self.id.to_string(), source };
        let volume = OfflineVolume::open(self.files()?, self.wanted.attach_generation).map_err(failed)?;
        if volume.size_bytes() < self.wanted.size_bytes {
            volume.grow(self.wanted.size_bytes).map_err(failed)?;
        }
        Ok(volume)
    }

    /// The manifest that its DIRTY bits are relative to; `None` = none, all that was ever written is DIRTY. `parent` is the
    /// manifest that the control plane takes for it, if it knows one. Blocks.
    ///
    /// # Errors
    /// It cannot be read, or there must be one and is not: then DIRTY says too little.
    pub fn lineage(&self, parent: Option<&v1::BaseSnapshot>) -> Result<Option<Lineage>, VolumeError> {
        let path = self.folder.join("lineage.json");
        let Some(text) = read_if_exists(&path).map_err(io_error("reading", &path))? else {
            return match parent.or(self.wanted.base.as_ref()) {
                None => Ok(None),
                Some(_) => Err(io_error("reading", &path)(io::ErrorKind::NotFound.into())),
            };
        };
        let lineage = serde_json::from_slice(&text);
        lineage.map(Some).map_err(|error| io_error("reading", &path)(error.into()))
    }

    /// [`Self::lineage`], off the runtime's own threads.
    pub async fn read_lineage(&self, parent: Option<&v1::BaseSnapshot>) -> Result<Option<Lineage>, VolumeError> {
        let (this, parent) = (self.clone(), parent.cloned());
        self.blocking(move || this.lineage(parent.as_ref())).await
    }

    /// [`Self::set_lineage`], off the runtime's own threads.
    pub async fn write_lineage(&self, lineage: Lineage) -> Result<(), VolumeError> {
        let this = self.clone();
        self.blocking(move || this.set_lineage(&lineage)).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        let failed = |error| io_error("working in", &self.folder)(io::Error::other(error));
        tokio::task::spawn_blocking(work).await.map_err(failed)?
    }

    /// Notes the manifest that DIRTY is relative to from now on, durably. Blocks.
    pub fn set_lineage(&self, lineage: &Lineage) -> Result<(), VolumeError> {
        let path = self.folder.join("lineage.json");
        let text = serde_json::to_vec(lineage).map_err(|error| io_error("writing", &path)(error.into()))?;
        write_atomically(&path, &text, 0o600).map_err(io_error("writing", &path))
    }
}

/// All volumes of a host.
pub struct HostVolumes {
    layout: Layout,
    bases: Arc<Bases>,
    network: Arc<NetworkVolumes>,
}

impl HostVolumes {
    /// Volumes below the layout's folder, after finishing what was being made or deleted.
    pub fn new(layout: Layout, bases: Arc<Bases>) -> Result<Self, VolumeError> {
        let folder = layout.volumes();
        std::fs::create_dir_all(&folder).map_err(io_error("creating", &folder))?;
        for entry in std::fs::read_dir(&folder).map_err(io_error("reading", &folder))?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with('.')) {
                std::fs::remove_dir_all(entry.path()).map_err(io_error("deleting", &entry.path()))?;
            }
        }
        let network = Arc::new(NetworkVolumes::new(layout.clone(), Vec::new()));
        Ok(Self { layout, bases, network })
    }

    /// The same with volumes that backends keep.
    pub fn with_network(self, network: NetworkVolumes) -> Self {
        Self { network: Arc::new(network), ..self }
    }

    /// Those.
    pub fn network(&self) -> &Arc<NetworkVolumes> {
        &self.network
    }

    /// Bases of the host.
    pub fn bases(&self) -> &Arc<Bases> {
        &self.bases
    }

    /// Whether anything of a volume is here.
    pub fn is_here(&self, id: &VolumeId) -> bool {
        self.layout.volume(id).exists()
    }

    /// Whether something has a volume open that is here. Blocks.
    pub fn is_in_use(&self, id: &VolumeId) -> Result<bool, VolumeError> {
        let path = self.layout.volume(id).join("map");
        let map = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            map => map.map_err(io_error("opening", &path))?,
        };
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let asked = nix::fcntl::fcntl(&map, nix::fcntl::FcntlArg::F_OFD_GETLK(&mut lock));
        asked.map_err(|errno| io_error("looking for a lock of", &path)(errno.into()))?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    }

    /// The volume as it is wanted, which is here already.
    ///
    /// # Errors
    /// [`VolumeError::Lost`] when it is not.
    pub async fn find(&self, wanted: &v1::HostVolume) -> Result<Placed, VolumeError> {
        let id: VolumeId = wanted
            .volume_id
            .parse()
            .map_err(|error| VolumeError::Spec { id: wanted.volume_id.clone(), reason: format!("{error}") })?;
        if !self.is_here(&id) {
            return Err(VolumeError::Lost { path: self.layout.volume(&id), id: wanted.volume_id.clone() });
        }
        self.place(wanted).await
    }

    /// The volume as it is wanted, made if it is not here yet.
    pub async fn place(&self, wanted: &v1::HostVolume) -> Result<Placed, VolumeError> {
        let spec = |reason: String| VolumeError::Spec { id: wanted.volume_id.clone(), reason };
        let id: VolumeId = wanted.volume_id.parse().map_err(|error| spec(format!("{error}")))?;
        if wanted.size_bytes == 0 || !wanted.size_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(spec(format!("{} bytes; it must be a multiple of {BLOCK_BYTES}", wanted.size_bytes)));
        }
        let key = self.bases.keyring().volume(wanted)?;
        let base = match &wanted.base {
            Some(base) => Some(self.bases.get(base).await?),
            None => None,
        };
        let folder = self.layout.volume(&id);
        let placed = Placed { id, wanted: wanted.clone(), base, key, folder };
        if !placed.folder.exists() {
            let (making, volumes) = (placed.clone(), self.layout.volumes());
            let made = tokio::task::spawn_blocking(move || make(&making, &volumes)).await;
            made.map_err(|error| spec(format!("internal error: {error}")))??;
        }
        Ok(placed)
    }

    /// Deletes a volume, if it is here. Blocks.
    pub fn delete(&self, id: &VolumeId) -> Result<(), VolumeError> {
        // First of all: what is left of an encrypted volume is noise then.
        self.bases.keyring().forget_volume(id.as_str());
        let (folder, gone) = (self.layout.volume(id), self.layout.volumes().join(format!(".gone-{id}")));
        // Renamed first: half a volume must not be taken for a whole one.
        match std::fs::rename(&folder, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed.map_err(io_error("renaming", &folder))?,
        }
        match std::fs::remove_dir_all(&gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            deleted => deleted.map_err(io_error("deleting", &gone))?,
        }
        sync_dir(&self.layout.volumes()).map_err(io_error("syncing", &self.layout.volumes()))
    }
}

/// Makes the folder of a new volume: whole under its name, or not at all.
fn make(placed: &Placed, volumes: &Path) -> Result<(), VolumeError> {
    let new = volumes.join(format!(".new-{}", placed.id));
    if new.exists() {
        std::fs::remove_dir_all(&new).map_err(io_error("deleting", &new))?;
    }
    std::fs::create_dir(&new).map_err(io_error("creating", &new))?;
    let create = |name: &str| -> Result<File, VolumeError> {
        let path = new.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(io_error("creating", &path))
    };
    let (data, map_file) = (create("data")?, create("map")?);
    data.set_len(placed.wanted.size_bytes).map_err(io_error("setting the size of the data in", &new))?;
    data.sync_all().map_err(io_error("syncing the data in", &new))?;
    let base = placed.base.as_ref();
    let spec = MapSpec {
        volume_id: placed.id.to_string(),
        size_bytes: placed.wanted.size_bytes,
        base: base.map(|base| MapBase { root: base.manifest.root_hash().0, extent: base.extent.clone() }),
        generation: 0,
        filled: false,
    };
    map::create(&map_file, spec).map_err(|source| VolumeError::Map { id: placed.id.to_string(), source })?;
    if let Some(base) = &placed.wanted.base {
        let lineage = Lineage { snapshot_id: base.snapshot_id.clone(), root: base.root.clone() };
        Placed { folder: new.clone(), ..placed.clone() }.set_lineage(&lineage)?;
    }
    sync_dir(&new).map_err(io_error("syncing", &new))?;
    std::fs::rename(&new, &placed.folder).map_err(io_error("renaming", &new))?;
    sync_dir(volumes).map_err(io_error("syncing", volumes))
}

/// Chunks of an offline volume that are kept in memory.
const KEPT_CHUNKS: usize = 32;

/// An offline volume as a disk that boot discovery reads; what is missing of the base is fetched.
pub struct VolumeDisk {
    volume: OfflineVolume,
    base: Option<Arc<Base>>,
    runtime: tokio::runtime::Handle,
    kept: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
    failure: Mutex<Option<io::Error>>,
}

impl VolumeDisk {
    /// Must be used outside of the runtime's own threads.
    pub fn new(volume: OfflineVolume, base: Option<Arc<Base>>, runtime: tokio::runtime::Handle) -> Self {
        Self { volume, base, runtime, kept: Mutex::default(), failure: Mutex::default() }
    }

    /// The first error of the host since the last call.
    pub fn take_failure(&self) -> Option<io::Error> {
        self.failure.lock().take()
    }

    fn chunk(&self, chunk: u64) -> io::Result<Arc<Vec<u8>>> {
        if let Some((_, content)) = self.kept.lock().iter().find(|(kept, _)| *kept == chunk) {
            return Ok(content.clone());
        }
        let mut content = vec![0; usize::try_from(CHUNK_BYTES).map_err(io::Error::other)?];
        loop {
            match self.volume.read_chunk(chunk, &mut content) {
                Ok(()) => break,
                Err(BlockError::ChunkMissing { .. }) if self.base.is_some() => {
                    if let Some(base) = &self.base {
                        self.runtime.block_on(base.ensure(chunk, Reader::Launch));
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        let content = Arc::new(content);
        let mut kept = self.kept.lock();
        if kept.len() >= KEPT_CHUNKS {
            kept.remove(0);
        }
        kept.push((chunk, content.clone()));
        Ok(content)
    }
}

impl ReadAt for VolumeDisk {
    fn size(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.size());
        if end.is_none() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let content = self.chunk(at / CHUNK_BYTES).inspect_err(|error| {
                self.failure.lock().get_or_insert(io::Error::new(error.kind(), error.to_string()));
            })?;
            let from = usize::try_from(at % CHUNK_BYTES).map_err(io::Error::other)?;
            let available = content.get(from..).unwrap_or_default();
            let length = available.len().min(rest.len());
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(available.get(..length).unwrap_or_default());
            at += length as u64;
            rest = later;
        }
        Ok(())
    }
}
