//! All bases of a host: opened once each, kept for later launches, removed when nobody uses them and room is short.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hearth_block::XtsKey;
use hearth_block::map;
use hearth_proto::v1::BaseSnapshot;
use hearth_snapshot::{Manifest, ObjectStore, SnapshotKey};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::base::{Base, BaseError};
use super::keyring::{KeyError, Keyring};
use crate::state::Layout;

/// How often it is looked whether room is short.
const LOOK: Duration = Duration::from_secs(15);

/// All bases of a host.
pub struct Bases {
    layout: Layout,
    objects: Arc<dyn ObjectStore>,
    keyring: Arc<Keyring>,
    boot_id: String,
    fill_rate: u64,
    /// By root; empty while it is being opened.
    open: Mutex<HashMap<String, Arc<OnceCell<Arc<Base>>>>>,
}

/// What a look at the bases that nobody uses has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Bases that were removed.
    pub bases: u64,
    /// Bytes that these took.
    pub bytes: u64,
}

impl Bases {
    /// Bases below the layout's folder, which are filled in the background at `fill_rate` bytes per second; 0 = they are not.
    pub fn new(
        layout: Layout,
        objects: Arc<dyn ObjectStore>,
        keyring: Arc<Keyring>,
        boot_id: String,
        fill_rate: u64,
    ) -> Self {
        Self { layout, objects, keyring, boot_id, fill_rate, open: Mutex::default() }
    }

    /// Keys of snapshots and volumes.
    pub fn keyring(&self) -> &Arc<Keyring> {
        &self.keyring
    }

    /// Where chunks and manifests come from.
    pub fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.objects
    }

    /// The base of a snapshot, opened once. It stays on the host for as long as the answer is held, and for as long as there is a
    /// volume here that was made from it.
    pub async fn get(&self, wanted: &BaseSnapshot) -> Result<Arc<Base>, BaseError> {
        // One whose manifest does not come keeps nobody waiting who wants another.
        let slot = self.open.lock().entry(wanted.root.clone()).or_default().clone();
        let base = slot.get_or_try_init(async || self.open_base(wanted).await.map(Arc::new)).await?;
        Ok(base.clone())
    }

    async fn open_base(&self, wanted: &BaseSnapshot) -> Result<Base, BaseError> {
        let spec = |reason: String| BaseError::Spec { id: wanted.snapshot_id.clone(), reason };
        let root = wanted.root.parse().map_err(|_| spec(format!("'{}' is no root hash", wanted.root)))?;
        let id = SnapshotKey::new(&wanted.snapshot_id).map_err(|error| spec(error.to_string()))?;
        let unknown = |source| BaseError::Key { id: wanted.snapshot_id.clone(), source };
        let store = self.keyring.chunk_store(&self.objects, wanted.key_domain.as_ref()).map_err(unknown)?;
        let key = match &wanted.key_domain {
            Some(domain) if domain.encrypt_on_hosts => {
                let key = XtsKey::new(store.domain().key_on_hosts(&wanted.root));
                Some(key.ok_or_else(|| unknown(KeyError::Malformed(format!("the base {}", wanted.root))))?)
            }
            _ => None,
        };
        let manifest = Manifest::load(&*self.objects, &id, Some(&root)).await;
        let failed = |source| BaseError::Storage { id: wanted.snapshot_id.clone(), source: Box::new(source) };
        let manifest = manifest.map_err(failed)?;
        let (folder, boot_id, fill_rate) = (self.layout.base(&wanted.root), self.boot_id.clone(), self.fill_rate);
        let open = move || {
            let base = Base::open(&folder, &boot_id, manifest, store, key, fill_rate)?;
            // When it was last used: what has not been for longest goes first.
            let _ = std::fs::File::open(&folder).and_then(|folder| folder.set_modified(SystemTime::now()));
            Ok(base)
        };
        let opened = tokio::task::spawn_blocking(open).await;
        opened.map_err(|error| spec(format!("internal error: {error}")))?
    }

    /// Keeps `reserve` of the state folder's file system free, now and then, as far as removing bases does it.
    pub async fn keep_room(self: Arc<Self>, reserve: u64) {
        if let Err(error) = self.finish_removals() {
            tracing::warn!(%error, "removing what is left of bases");
        }
        loop {
            let this = self.clone();
            let evicted = tokio::task::spawn_blocking(move || this.evict(|| this.free_bytes() < reserve)).await;
            match evicted {
                Ok(Ok(Evicted { bases: 0, .. })) => {}
                Ok(Ok(Evicted { bases, bytes })) => {
                    tracing::info!(bases, bytes, "room was short: removed what no volume here is made from");
                }
                Ok(Err(error)) => tracing::warn!(%error, "making room"),
                Err(error) => tracing::warn!(%error, "making room"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn free_bytes(&self) -> u64 {
        nix::sys::statvfs::statvfs(self.layout.state_root())
            .map_or(u64::MAX, |found| found.blocks_available().saturating_mul(found.fragment_size()))
    }

    /// Deletes what an earlier agent began to delete.
    fn finish_removals(&self) -> std::io::Result<()> {
        let folder = self.layout.bases();
        std::fs::create_dir_all(&folder)?;
        for entry in std::fs::read_dir(&folder)?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with('.')) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes bases that nobody uses, the longest unused ones first, while room is short. Blocks.
    ///
    /// # Errors
    /// When it cannot be told which bases are used: then nothing more is removed.
    pub fn evict(&self, is_short: impl Fn() -> bool) -> Result<Evicted, BaseError> {
        let mut evicted = Evicted::default();
        if !is_short() {
            return Ok(evicted);
        }
        let folder = self.layout.bases();
        let failed = |action: &'static str, path: &PathBuf| {
            let path = path.clone();
            move |source| BaseError::Io { action, path, source }
        };
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(failed("reading", &folder))?.flatten() {
            let (Some(root), Ok(about)) = (entry.file_name().to_str().map(str::to_owned), entry.metadata()) else {
                continue;
            };
            if !root.starts_with('.') {
                found.push((about.modified().unwrap_or(SystemTime::UNIX_EPOCH), root));
            }
        }
        found.sort();
        for (_, root) in found {
            if !is_short() {
                break;
            }
            let (path, gone) = (folder.join(&root), folder.join(format!(".gone-{root}")));
            {
                // Nobody gets it meanwhile; and who has got it and not made his volume yet holds it.
                let mut open = self.open.lock();
                if open.get(&root).is_some_and(is_held) || self.roots_in_use()?.contains(&root) {
                    continue;
                }
                open.remove(&root);
                std::fs::rename(&path, &gone).map_err(failed("renaming", &path))?;
            }
            evicted.bases += 1;
            evicted.bytes += allocated(&gone.join("data"));
            std::fs::remove_dir_all(&gone).map_err(failed("deleting", &gone))?;
        }
        Ok(evicted)
    }

    /// Roots that volumes here are made from, whether anybody has them open or not.
    fn roots_in_use(&self) -> Result<HashSet<String>, BaseError> {
        let folder = self.layout.volumes();
        let failed = |path: &PathBuf, source| BaseError::Io { action: "reading", path: path.clone(), source };
        let mut used = HashSet::new();
        for entry in std::fs::read_dir(&folder).map_err(|error| failed(&folder, error))? {
            let path = entry.map_err(|error| failed(&folder, error))?.path().join("map");
            match std::fs::File::open(&path) {
                // Half made or half deleted.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path, error)),
                Ok(file) => {
                    let header =
                        map::read_header(&file).map_err(|error| failed(&path, std::io::Error::other(error)))?;
                    used.extend(header.base_root.map(hex::encode));
                }
            }
        }
        Ok(used)
    }
}

/// Somebody has the base, or is waiting for it to be opened.
fn is_held(slot: &Arc<OnceCell<Arc<Base>>>) -> bool {
    match slot.get() {
        Some(base) => Arc::strong_count(base) > 1,
        None => Arc::strong_count(slot) > 1,
    }
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.metadata().map_or(0, |about| about.blocks() * 512)
}
