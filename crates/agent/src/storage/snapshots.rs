//! Snapshots of volumes of this host, and volumes that leave it.
//!
//! The point in time of all snapshots of a set is fixed at once: by the VMM that has the volumes (which then copies each frozen
//! chunk to a stage before the guest changes it), or by keeping a volume open that nobody has open. After that the upload takes its
//! time; when somebody else needs the volume meanwhile, what is left is copied aside first (see [`super::frozen`]). Snapshots of
//! one volume are uploaded one after the other, because each builds on the one before. Decision: what an agent that ends was
//! uploading is in error; its chunks count as changed again.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt;
use hearth_proto::v1::{self, ObservedSnapshot, SnapshotReport};
use hearth_snapshot::{
    CHUNK_BYTES, ChunkStore, Epoch, IndexedSource, Manifest, ManifestSpec, SnapshotKey, SnapshotUpload, SourceError,
    StorageError, Uploaded,
};
use hearth_types::{InstanceId, VolumeId};
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::frozen::{Frozen, freeze_live};
use super::volumes::{HostVolumes, Lineage, Placed, VolumeError};
use crate::launch::DiskControl;
use crate::reports::Reports;
use crate::state::Layout;

/// Least time between two reports of progress.
pub(super) const TELL_EVERY: Duration = Duration::from_millis(500);
/// How long a volume that is being opened or closed is waited for, less than the control plane waits for the point in time.
const FREEZE_PATIENCE: Duration = Duration::from_secs(15);
const FREEZE_PAUSE: Duration = Duration::from_millis(200);

/// A VMM that runs.
#[derive(Clone)]
pub struct Running {
    /// Its disks.
    pub disks: Arc<dyn DiskControl>,
    /// Serial number and size in bytes of a root disk that was made from a bundle.
    pub bundle_root: Option<(String, u64)>,
}

/// Works on snapshots, bundles and departures, one task for each set, each bundle and each volume.
pub struct Snapshots {
    pub(super) layout: Layout,
    pub(super) volumes: Arc<HostVolumes>,
    pub(super) reports: Arc<Reports>,
    pub(super) running: Mutex<HashMap<InstanceId, Running>>,
    sets: Mutex<HashMap<String, JoinHandle<()>>>,
    /// Disks that are fixed, with what is uploaded of them.
    fixed: Mutex<Vec<Weak<Frozen>>>,
    /// One set at a time fixes a volume.
    fixing: Turns,
    /// One set at a time uploads what is fixed of a volume.
    uploading: Turns,
    pub(super) leaving: Mutex<HashMap<String, (u64, JoinHandle<()>)>>,
    pub(super) bundles: Mutex<HashMap<String, JoinHandle<()>>>,
}

/// Locks by the ids of volumes.
#[derive(Default)]
struct Turns(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// Waits until nobody else has one of these volumes.
    async fn take(&self, volumes: &BTreeSet<String>) -> Vec<OwnedMutexGuard<()>> {
        let mut taken = Vec::new();
        // In order of their ids, so that nobody waits for somebody who waits for him.
        for volume in volumes {
            let lock = {
                let mut locks = self.0.lock();
                locks.retain(|_, lock| Arc::strong_count(lock) > 1);
                locks.entry(volume.clone()).or_default().clone()
            };
            taken.push(lock.lock_owned().await);
        }
        taken
    }
}

impl Snapshots {
    /// For volumes of `volumes`; what an earlier agent left of its work is removed.
    pub fn new(layout: Layout, volumes: Arc<HostVolumes>, reports: Arc<Reports>) -> std::io::Result<Self> {
        for folder in [layout.stages(), layout.staged()] {
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => std::fs::create_dir_all(&folder)?,
            }
        }
        let (running, sets, fixed, fixing, uploading, leaving, bundles) = Default::default();
        Ok(Self { layout, volumes, reports, running, sets, fixed, fixing, uploading, leaving, bundles })
    }

    /// An instance's VMM runs.
    pub fn running(&self, instance: &InstanceId, running: Running) {
        self.running.lock().insert(instance.clone(), running);
    }

    /// It does not any more.
    pub fn ended(&self, instance: &InstanceId) {
        self.running.lock().remove(instance);
    }

    /// Takes over one set, unless it is known.
    pub fn make(self: &Arc<Self>, set: v1::DesiredSnapshotSet) {
        let mut sets = self.sets.lock();
        sets.retain(|_, task| !task.is_finished());
        if sets.contains_key(&set.set_id) || self.is_done(&set) {
            return;
        }
        let (id, this) = (set.set_id.clone(), self.clone());
        sets.insert(id, tokio::spawn(async move { this.run(set).await }));
    }

    /// The control plane asks again for what was reported: the report is on its way.
    fn is_done(&self, set: &v1::DesiredSnapshotSet) -> bool {
        set.snapshots.iter().all(|wanted| {
            self.reports
                .snapshot(&wanted.snapshot_id)
                .is_some_and(|report| matches!(report.state(), ObservedSnapshot::Completed | ObservedSnapshot::Failed))
        })
    }

    /// Only these sets are wanted any more.
    pub fn keep(&self, wanted: impl Fn(&str) -> bool) {
        self.sets.lock().retain(|id, task| {
            let keep = wanted(id);
            if !keep {
                task.abort();
            }
            keep
        });
    }

    /// Nobody wants this set any more.
    pub fn cancel(&self, set_id: &str) {
        if let Some(task) = self.sets.lock().remove(set_id) {
            task.abort();
        }
    }

    fn report(&self, wanted: &v1::DesiredSnapshot, state: ObservedSnapshot, error: &str) {
        self.reports.publish_snapshot(SnapshotReport {
            snapshot_id: wanted.snapshot_id.clone(),
            state: state.into(),
            error: error.to_owned(),
            ..SnapshotReport::default()
        });
    }

    /// Snapshots that are not complete and have something of this volume.
    pub(super) fn of_volume(&self, id: &VolumeId) -> Vec<Arc<Frozen>> {
        let mut fixed = self.fixed.lock();
        fixed.retain(|one| one.strong_count() > 0);
        let found = fixed.iter().filter_map(Weak::upgrade);
        found.filter(|one| one.placed().is_some_and(|placed| placed.id == *id)).collect()
    }

    /// Sets a volume free that snapshots are uploaded of: a VMM is to have it. Must come before each opening of a volume for a VMM,
    /// whose guest would change what no stage has.
    pub async fn settle(&self, id: &VolumeId) {
        for frozen in self.of_volume(id) {
            tracing::info!(volume = %id, "copying aside what a snapshot still needs");
            frozen.settle().await;
        }
    }

    /// [`Self::settle`] for those who cannot wait: whether it is done, or goes on by itself.
    pub fn is_settled(&self, id: &VolumeId) -> bool {
        let mut settled = true;
        for frozen in self.of_volume(id).into_iter().filter(|frozen| frozen.holds_the_volume()) {
            settled = false;
            if frozen.is_asked_to_settle() {
                tracing::info!(volume = %id, "copying aside what a snapshot still needs");
                tokio::spawn(async move { frozen.settle().await });
            }
        }
        settled
    }

    async fn run(self: Arc<Self>, set: v1::DesiredSnapshotSet) {
        let volumes: BTreeSet<String> =
            set.snapshots.iter().flat_map(|wanted| &wanted.volume).map(|volume| volume.volume_id.clone()).collect();
        let frozen = {
            let _turn = self.fixing.take(&volumes).await;
            self.freeze(&set).await
        };
        let frozen = match frozen {
            Ok(frozen) => frozen,
            Err(error) => {
                tracing::warn!(set = set.set_id, error, "the point in time of a snapshot cannot be fixed");
                return set.snapshots.iter().for_each(|wanted| self.report(wanted, ObservedSnapshot::Failed, &error));
            }
        };
        set.snapshots.iter().for_each(|wanted| self.report(wanted, ObservedSnapshot::Frozen, ""));
        let _turn = self.uploading.take(&volumes).await;
        let uploads = futures::future::join_all(frozen.iter().map(|frozen| self.upload(frozen))).await;
        // All or none.
        let uploaded: Result<Vec<Uploaded>, String> = uploads.into_iter().collect();
        let finished = match uploaded {
            Ok(uploaded) => self.finish(&frozen, &uploaded).await,
            Err(error) => Err(error),
        };
        if let Err(error) = finished {
            for frozen in &frozen {
                tracing::warn!(snapshot = frozen.wanted.snapshot_id, error, "the snapshot failed");
                frozen.disk.thaw(true).await;
                self.report(&frozen.wanted, ObservedSnapshot::Failed, &error);
            }
        }
    }

    /// Fixes the point in time of all volumes of a set.
    async fn freeze(&self, set: &v1::DesiredSnapshotSet) -> Result<Vec<Making>, String> {
        let began = Instant::now();
        loop {
            match self.try_freeze(set).await {
                Ok(frozen) => {
                    self.fixed.lock().extend(frozen.iter().map(|one| Arc::downgrade(&one.disk)));
                    return Ok(frozen);
                }
                Err(Unfixed::Now(error)) if began.elapsed() >= FREEZE_PATIENCE => return Err(error),
                Err(Unfixed::Now(_)) => sleep(FREEZE_PAUSE).await,
                Err(Unfixed::Ever(error)) => return Err(error),
            }
        }
    }

    async fn try_freeze(&self, set: &v1::DesiredSnapshotSet) -> Result<Vec<Making>, Unfixed> {
        let mut frozen = Vec::new();
        for wanted in &set.snapshots {
            let volume = wanted.volume.as_ref().ok_or_else(|| Unfixed::Ever("the snapshot names no volume".into()))?;
            let placed = match self.volumes.find(volume).await {
                // Nothing of it has been needed yet: it is what it was made from.
                Err(VolumeError::Lost { .. }) if !volume.opened => self.volumes.place(volume).await,
                // Its first start is under way, or it is lost indeed.
                Err(error @ VolumeError::Lost { .. }) => return Err(Unfixed::Now(error.to_string())),
                found => found,
            };
            let placed = placed.map_err(|error| Unfixed::Ever(error.to_string()))?;
            self.settle(&placed.id).await;
            let disk = Frozen::of_volume(&self.layout, &wanted.snapshot_id, placed.clone()).await?;
            frozen.push(Making { wanted: wanted.clone(), placed, disk });
        }
        let live = match set.instance_id.parse::<InstanceId>() {
            Ok(instance) => self.running.lock().get(&instance).cloned(),
            Err(_) => None,
        };
        let Some(running) = live else {
            for one in &frozen {
                if !one.disk.fix_here().await? {
                    let error = format!("volume {} is in use by a VMM that is just starting or ending", one.placed.id);
                    return Err(Unfixed::Now(error));
                }
            }
            return Ok(frozen);
        };
        let disks: Vec<Arc<Frozen>> = frozen.iter().map(|one| one.disk.clone()).collect();
        freeze_live(&disks, running.disks).await?;
        Ok(frozen)
    }

    /// Uploads what was frozen.
    async fn upload(&self, frozen: &Making) -> Result<Uploaded, String> {
        let wanted = &frozen.wanted;
        let objects = self.volumes.bases().objects();
        let store = self.chunk_store(wanted.key_domain.as_ref())?;
        let lineage = frozen.placed.read_lineage(wanted.parent.as_ref()).await.map_err(|error| {
            format!("{error}; attach the volume to an instance on another host to store it in full")
        })?;
        let parent = match lineage {
            // What is frozen is relative to it, so that there is no snapshot without.
            Some(lineage) => match load_parent(objects.as_ref(), &lineage).await? {
                Some(parent) => Some(parent),
                None => {
                    return Err(format!(
                        "snapshot {} is missing; attach the volume to an instance on another host to store it in full",
                        lineage.snapshot_id
                    ));
                }
            },
            None => None,
        };
        let spec = ManifestSpec {
            id: SnapshotKey::new(&wanted.snapshot_id).map_err(|error| error.to_string())?,
            size_bytes: frozen.placed.wanted.size_bytes,
            epoch: Epoch(wanted.epoch),
        };
        let (reports, id) = (self.reports.clone(), wanted.snapshot_id.clone());
        let last = Mutex::new(None::<Instant>);
        let progress = Arc::new(move |progress: hearth_snapshot::UploadProgress| {
            let mut last = last.lock();
            if last.is_some_and(|last| last.elapsed() < TELL_EVERY) {
                return;
            }
            *last = Some(Instant::now());
            reports.publish_snapshot(SnapshotReport {
                snapshot_id: id.clone(),
                state: ObservedSnapshot::Frozen.into(),
                done_chunks: progress.chunks_done,
                total_chunks: progress.chunks_total,
                ..SnapshotReport::default()
            });
        });
        let (parent, other) = match parent {
            Some(parent) if parent.domain() != store.domain().id() => (None, Some(parent)),
            parent => (parent, None),
        };
        let upload = SnapshotUpload::new(store, spec, parent).with_progress(progress);
        let source = match other {
            None => frozen.disk.source(),
            Some(before) => self.in_full(frozen, before)?,
        };
        // Not tried again here: chunks that the source has handed out are not handed out again.
        upload.run(&source).await.map_err(|error| error.to_string())
    }

    pub(super) fn chunk_store(&self, domain: Option<&v1::KeyDomain>) -> Result<ChunkStore, String> {
        let bases = self.volumes.bases();
        bases.keyring().chunk_store(bases.objects(), domain).map_err(|error| error.to_string())
    }

    /// All chunks of a frozen disk: those that have not changed since `before` as that has them. Nothing can be taken over from a
    /// manifest of another key domain, which `before` is when its volume is encrypted and what it was made from is not.
    fn in_full(&self, frozen: &Making, before: Arc<Manifest>) -> Result<IndexedSource, String> {
        let bases = self.volumes.bases();
        let domain = bases.keyring().domain(before.domain().as_str()).map_err(|error| error.to_string())?;
        let store = ChunkStore::new(bases.objects().clone(), domain);
        let changed = frozen.disk.chunks();
        let last = frozen.placed.wanted.size_bytes.div_ceil(CHUNK_BYTES as u64);
        let unchanged: Vec<u64> = before.chunks().filter(|chunk| *chunk < last && !changed.contains(*chunk)).collect();
        Ok(frozen.disk.source().then(
            unchanged,
            Box::new(move |chunk| {
                let (before, store) = (before.clone(), store.clone());
                async move { before.read_chunk(&store, chunk).await.map_err(SourceError::from) }.boxed()
            }),
        ))
    }

    /// Notes what the next snapshots build on, then reports.
    async fn finish(&self, set: &[Making], uploaded: &[Uploaded]) -> Result<(), String> {
        let mut noted: Vec<(&Placed, Option<Lineage>)> = Vec::new();
        for (frozen, uploaded) in set.iter().zip(uploaded) {
            let placed = &frozen.placed;
            let before = placed.read_lineage(None).await.unwrap_or_default();
            let root = uploaded.manifest.root_hash.to_string();
            let lineage = Lineage { snapshot_id: frozen.wanted.snapshot_id.clone(), root };
            if let Err(error) = placed.write_lineage(lineage).await {
                // All or none: the others build on what they built on before.
                for (placed, before) in noted {
                    if let Some(before) = before
                        && let Err(error) = placed.write_lineage(before).await
                    {
                        tracing::error!(volume = %placed.id, %error, "the volume's next snapshot builds on a failed one");
                    }
                }
                return Err(error.to_string());
            }
            noted.push((placed, before));
        }
        for frozen in set {
            frozen.disk.thaw(false).await;
        }
        let chunk = CHUNK_BYTES as u64;
        for (frozen, uploaded) in set.iter().zip(uploaded) {
            let chunks = uploaded.chunks;
            self.reports.publish_snapshot(SnapshotReport {
                snapshot_id: frozen.wanted.snapshot_id.clone(),
                state: ObservedSnapshot::Completed.into(),
                done_chunks: chunks.chunks_done,
                total_chunks: chunks.chunks_total,
                root: uploaded.manifest.root_hash.to_string(),
                incremental_bytes: (chunks.chunks_written + chunks.chunks_found) * chunk,
                full_bytes: uploaded.manifest.present_chunks * chunk,
                error: String::new(),
            });
        }
        Ok(())
    }
}

/// The manifest, unless the store does not have it (any more).
pub(super) async fn load_parent(
    objects: &dyn hearth_snapshot::ObjectStore,
    lineage: &Lineage,
) -> Result<Option<Arc<Manifest>>, String> {
    let key = SnapshotKey::new(&lineage.snapshot_id).map_err(|error| error.to_string())?;
    let root = lineage.root.parse().map_err(|_| format!("'{}' is no root hash", lineage.root))?;
    match Manifest::load(objects, &key, Some(&root)).await {
        Ok(manifest) => Ok(Some(Arc::new(manifest))),
        Err(StorageError::Missing { path }) => {
            tracing::warn!(
                snapshot = lineage.snapshot_id,
                path,
                "the volume's last snapshot is not in the store any more"
            );
            Ok(None)
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Why a point in time is not fixed.
enum Unfixed {
    /// A VMM begins or ends; it is known soon.
    Now(String),
    Ever(String),
}

impl From<String> for Unfixed {
    fn from(error: String) -> Self {
        Self::Ever(error)
    }
}

/// A snapshot of a volume whose point in time is fixed.
struct Making {
    wanted: v1::DesiredSnapshot,
    placed: Placed,
    disk: Arc<Frozen>,
}

#[cfg(test)]
#[path = "snapshots_test.rs"]
mod tests;
