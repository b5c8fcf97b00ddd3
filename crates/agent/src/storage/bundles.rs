//! Bundles: root disks of instance-store-backed instances, made from a bundle at the launch and packed into new ones while the
//! guest runs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth_block::map::{self, MapSpec};
use hearth_block::{BLOCK_BYTES, VolumeFiles};
use hearth_proto::v1::{self, BundleReport, ObservedBundle};
use hearth_snapshot::{BundleSpec, ObjectStore, StorageError, load_bundle, restore_bundle, write_bundle};
use hearth_types::InstanceId;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::{Duration, Instant};

use super::frozen::{Frozen, freeze_live};
use super::snapshots::Snapshots;
use crate::state::sync_dir;

/// Least time between two reports of progress.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Why a root disk cannot be made from a bundle.
#[derive(Debug, Error)]
pub enum BundleRootError {
    /// The object store, or what is in it.
    #[error("bundle {location}: {source}")]
    Storage {
        /// Its manifest.
        location: String,
        /// What is wrong.
        source: Box<StorageError>,
    },
    /// The bundle is not what the image was registered with.
    #[error("bundle {location} holds a disk of {found} bytes; the image was registered with {wanted}")]
    Size {
        /// Its manifest.
        location: String,
        /// Bytes of the disk in it.
        found: u64,
        /// Bytes that the image's record tells.
        wanted: u64,
    },
    /// The host.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl BundleRootError {
    /// Whether trying again later may help without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Storage { source, .. } => source.is_transient(),
            Self::Size { .. } => false,
            Self::Io { .. } => true,
        }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BundleRootError {
    let path = path.to_owned();
    move |source| BundleRootError::Io { action, path, source }
}

/// Makes the root disk in `folder`, unless it is there: all parts are fetched in parallel, checked, and written. `progress` is
/// told bytes done and in all. May be given up; then the next call begins anew.
pub async fn make_root(
    objects: &dyn ObjectStore,
    wanted: &v1::BundleRoot,
    folder: &Path,
    progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
) -> Result<(), BundleRootError> {
    if folder.exists() {
        return Ok(());
    }
    let location = &wanted.manifest_location;
    let failed = |source| BundleRootError::Storage { location: location.clone(), source: Box::new(source) };
    let (manifest, _) = load_bundle(objects, location, Some(&wanted.manifest_sha256)).await.map_err(failed)?;
    if manifest.disk_bytes != wanted.size_bytes {
        let (location, found, wanted) = (location.clone(), manifest.disk_bytes, wanted.size_bytes);
        return Err(BundleRootError::Size { location, found, wanted });
    }
    let new = folder.with_extension("new");
    match std::fs::remove_dir_all(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("deleting", &new)(error)),
        _ => std::fs::create_dir(&new).map_err(io_error("creating", &new))?,
    }
    let create = |name: &str| -> Result<File, BundleRootError> {
        let path = new.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(io_error("creating", &path))
    };
    let (data, map_file) = (Arc::new(create("data")?), create("map")?);
    restore_bundle(objects, location, &manifest, data.clone(), progress).await.map_err(failed)?;
    let (folder, size, id) = (folder.to_owned(), manifest.disk_bytes, wanted.serial.clone());
    let finish = move || {
        let size_bytes = size.next_multiple_of(BLOCK_BYTES);
        data.set_len(size_bytes).and_then(|()| data.sync_all()).map_err(io_error("syncing the data in", &new))?;
        // All of it counts as changed: a bundle of this disk has everything in it.
        let spec = MapSpec { volume_id: id, size_bytes, base: None, generation: 0, filled: true };
        let failed = |error: hearth_block::MapError| io_error("making the map in", &new)(io::Error::other(error));
        map::create(&map_file, spec).map_err(failed)?;
        sync_dir(&new).map_err(io_error("syncing", &new))?;
        std::fs::rename(&new, &folder).map_err(io_error("renaming", &new))?;
        let parent = folder.parent().unwrap_or(Path::new("/"));
        sync_dir(parent).map_err(io_error("syncing", parent))
    };
    match tokio::task::spawn_blocking(finish).await {
        Ok(finished) => finished,
        Err(error) => Err(io_error("making", Path::new(location))(io::Error::other(error))),
    }
}

/// Opens a root disk that was made.
pub fn open_root(folder: &Path) -> Result<VolumeFiles, BundleRootError> {
    let open = |name: &str| {
        let path = folder.join(name);
        OpenOptions::new().read(true).write(true).open(&path).map_err(io_error("opening", &path))
    };
    Ok(VolumeFiles { data: open("data")?, map: open("map")?, base: None, key: None })
}

impl Snapshots {
    /// Takes over one bundle, unless it is known.
    pub fn bundle(self: &Arc<Self>, wanted: v1::DesiredBundle) {
        let mut bundles = self.bundles.lock();
        bundles.retain(|_, task| !task.is_finished());
        if bundles.contains_key(&wanted.bundle_id) {
            return;
        }
        // The control plane asks again for what was reported: the report was lost.
        let ended = |report: &BundleReport| report.state() != ObservedBundle::Storing;
        if let Some(report) = self.reports.bundle(&wanted.bundle_id).filter(ended) {
            return self.reports.publish_bundle(report);
        }
        let (id, this) = (wanted.bundle_id.clone(), self.clone());
        bundles.insert(id, tokio::spawn(async move { this.make_bundle(wanted).await }));
    }

    /// Only these bundles are wanted any more.
    pub fn keep_bundles(&self, wanted: impl Fn(&str) -> bool) {
        self.bundles.lock().retain(|id, task| {
            let keep = wanted(id);
            if !keep {
                task.abort();
            }
            keep
        });
        self.reports.forget_bundles(wanted);
    }

    async fn make_bundle(&self, wanted: v1::DesiredBundle) {
        let report = BundleReport { bundle_id: wanted.bundle_id.clone(), ..BundleReport::default() };
        let report = match self.try_bundle(&wanted).await {
            Ok((manifest_sha256, bytes)) => BundleReport {
                state: ObservedBundle::Complete.into(),
                manifest_sha256,
                done_bytes: bytes,
                total_bytes: bytes,
                ..report
            },
            Err(error) => {
                tracing::warn!(bundle = wanted.bundle_id, error, "the bundle cannot be made");
                BundleReport { state: ObservedBundle::Failed.into(), error, ..report }
            }
        };
        self.reports.publish_bundle(report);
    }

    /// Answers the manifest's hash and the bytes of the disk.
    async fn try_bundle(&self, wanted: &v1::DesiredBundle) -> Result<(String, u64), String> {
        let instance: InstanceId = wanted.instance_id.parse().map_err(|error| format!("{error}"))?;
        let running = self.running.lock().get(&instance).cloned();
        let running = running.ok_or_else(|| format!("instance {instance} does not run here"))?;
        let (serial, size) = running.bundle_root.ok_or_else(|| format!("the root disk of {instance} is a volume"))?;
        let frozen = Frozen::of_disk(&self.layout, &wanted.bundle_id, serial, size).await?;
        freeze_live(std::slice::from_ref(&frozen), running.disks).await?;
        let attributes = serde_json::from_str(&wanted.attributes_json);
        let spec = BundleSpec {
            prefix: wanted.prefix.clone(),
            name: wanted.name.clone(),
            disk_bytes: size,
            attributes: attributes.map_err(|error| format!("its attributes: {error}"))?,
        };
        let (reports, id) = (self.reports.clone(), wanted.bundle_id.clone());
        let last = Mutex::new(None::<Instant>);
        let progress = Arc::new(move |done_bytes: u64, total_bytes: u64| {
            let mut last = last.lock();
            if last.is_some_and(|last| last.elapsed() < TELL_EVERY) {
                return;
            }
            *last = Some(Instant::now());
            let state = ObservedBundle::Storing.into();
            let bundle_id = id.clone();
            reports.publish_bundle(BundleReport {
                bundle_id,
                state,
                done_bytes,
                total_bytes,
                ..BundleReport::default()
            });
        });
        let objects = self.volumes.bases().objects();
        let bundled = write_bundle(objects.as_ref(), spec, &frozen.source(), progress).await;
        frozen.thaw(true).await;
        bundled.map(|bundled| (bundled.manifest_sha256, size)).map_err(|error| error.to_string())
    }
}
