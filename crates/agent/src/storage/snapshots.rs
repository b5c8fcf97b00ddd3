//! Snapshots of volumes of this host, and volumes that leave it.
//!
//! The point in time of all snapshots of a set is fixed at once: by the VMM that has the volumes (which then copies each frozen
//! chunk to a stage before the guest changes it), or by copying the changed chunks of a volume that nobody has open. After that
//! the upload takes its time. Decision: what an agent that ends was uploading is in error; its chunks count as changed again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use hearth_block::{BlockError, OfflineVolume};
use hearth_proto::v1::{self, ObservedSnapshot, SnapshotReport, VolumeOutcome, VolumeReport};
use hearth_snapshot::{
    CHUNK_BYTES, ChunkStore, Epoch, IndexedSource, Manifest, ManifestSpec, SnapshotKey, SnapshotUpload, SourceError,
    StorageError, Uploaded,
};
use hearth_types::{InstanceId, VolumeId};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::frozen::{Frozen, freeze_live};
use super::network::is_network;
use super::volumes::{HostVolumes, Lineage, Placed};
use crate::launch::DiskControl;
use crate::reports::Reports;
use crate::state::Layout;

/// Pause between two tries to let a volume go.
const PAUSE: Duration = Duration::from_secs(2);
/// Least time between two reports of progress.
const TELL_EVERY: Duration = Duration::from_millis(500);

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
    leaving: Mutex<HashMap<String, (u64, JoinHandle<()>)>>,
    pub(super) bundles: Mutex<HashMap<String, JoinHandle<()>>>,
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
        let (running, sets, leaving, bundles) = Default::default();
        Ok(Self { layout, volumes, reports, running, sets, leaving, bundles })
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

    async fn run(self: Arc<Self>, set: v1::DesiredSnapshotSet) {
        let frozen = match self.freeze(&set).await {
            Ok(frozen) => frozen,
            Err(error) => {
                tracing::warn!(set = set.set_id, error, "the point in time of a snapshot cannot be fixed");
                return set.snapshots.iter().for_each(|wanted| self.report(wanted, ObservedSnapshot::Failed, &error));
            }
        };
        set.snapshots.iter().for_each(|wanted| self.report(wanted, ObservedSnapshot::Frozen, ""));
        let uploads = frozen.iter().map(|frozen| self.upload(frozen));
        let results = futures::future::join_all(uploads).await;
        // All or none.
        let failure = results.iter().find_map(|result| result.as_ref().err().cloned());
        for (frozen, result) in frozen.iter().zip(results) {
            let error = match (&failure, result) {
                (None, Ok(uploaded)) => match self.finish(frozen, &uploaded).await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                (failure, _) => failure.clone().unwrap_or_default(),
            };
            tracing::warn!(snapshot = frozen.wanted.snapshot_id, error, "the snapshot failed");
            frozen.disk.thaw(true).await;
            self.report(&frozen.wanted, ObservedSnapshot::Failed, &error);
        }
    }

    /// Fixes the point in time of all volumes of a set.
    async fn freeze(&self, set: &v1::DesiredSnapshotSet) -> Result<Vec<Making>, String> {
        let mut frozen = Vec::new();
        for wanted in &set.snapshots {
            let volume = wanted.volume.as_ref().ok_or("the snapshot names no volume")?;
            let placed = self.volumes.place(volume).await.map_err(|error| error.to_string())?;
            let (serial, size) = (placed.id.serial(), volume.size_bytes);
            let disk = Frozen::prepare(&self.layout, &wanted.snapshot_id, serial, size, placed.key.clone())?;
            frozen.push(Making { wanted: wanted.clone(), placed, disk });
        }
        let live = match set.instance_id.parse::<InstanceId>() {
            Ok(instance) => self.running.lock().get(&instance).cloned(),
            Err(_) => None,
        };
        match live {
            Some(running) => {
                let mut disks: Vec<&mut Frozen> = frozen.iter_mut().map(|one| &mut one.disk).collect();
                freeze_live(&mut disks, running.disks).await?;
            }
            None => {
                for one in &mut frozen {
                    copy_offline(one).await?;
                }
            }
        }
        Ok(frozen)
    }

    /// Uploads what was frozen.
    async fn upload(&self, frozen: &Making) -> Result<Uploaded, String> {
        let wanted = &frozen.wanted;
        let objects = self.volumes.bases().objects();
        let store = self.chunk_store(wanted.key_domain.as_ref())?;
        let parent = match frozen.placed.lineage() {
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
        let last = Mutex::new(None::<tokio::time::Instant>);
        let progress = Arc::new(move |progress: hearth_snapshot::UploadProgress| {
            let mut last = last.lock();
            if last.is_some_and(|last| last.elapsed() < TELL_EVERY) {
                return;
            }
            *last = Some(tokio::time::Instant::now());
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

    fn chunk_store(&self, domain: Option<&v1::KeyDomain>) -> Result<ChunkStore, String> {
        let bases = self.volumes.bases();
        bases.keyring().chunk_store(bases.objects(), domain).map_err(|error| error.to_string())
    }

    /// All chunks of a frozen disk: those that have not changed since `before` as that has them. Nothing can be taken over from a
    /// manifest of another key domain, which `before` is when its volume is encrypted and what it was made from is not.
    fn in_full(&self, frozen: &Making, before: Arc<Manifest>) -> Result<IndexedSource, String> {
        let bases = self.volumes.bases();
        let domain = bases.keyring().domain(before.domain().as_str()).map_err(|error| error.to_string())?;
        let store = ChunkStore::new(bases.objects().clone(), domain);
        let changed = frozen.disk.chunks().clone();
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

    async fn finish(&self, frozen: &Making, uploaded: &Uploaded) -> Result<(), String> {
        let root = uploaded.manifest.root_hash.to_string();
        let lineage = Lineage { snapshot_id: frozen.wanted.snapshot_id.clone(), root: root.clone() };
        let placed = frozen.placed.clone();
        let noted = tokio::task::spawn_blocking(move || placed.set_lineage(&lineage)).await;
        noted.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        frozen.disk.thaw(false).await;
        let chunk = CHUNK_BYTES as u64;
        let chunks = uploaded.chunks;
        self.reports.publish_snapshot(SnapshotReport {
            snapshot_id: frozen.wanted.snapshot_id.clone(),
            state: ObservedSnapshot::Completed.into(),
            done_chunks: chunks.chunks_done,
            total_chunks: chunks.chunks_total,
            root,
            incremental_bytes: (chunks.chunks_written + chunks.chunks_found) * chunk,
            full_bytes: uploaded.manifest.present_chunks * chunk,
            error: String::new(),
        });
        Ok(())
    }

    /// Takes over that a volume is to leave, unless it is known.
    pub fn leave(self: &Arc<Self>, desired: v1::DesiredVolume) {
        let Some(volume) = desired.volume.clone() else { return };
        let mut leaving = self.leaving.lock();
        leaving.retain(|_, (_, task)| !task.is_finished());
        if let Some((generation, task)) = leaving.get(&volume.volume_id) {
            if *generation >= desired.generation {
                return;
            }
            task.abort();
        }
        let this = self.clone();
        let (id, generation) = (volume.volume_id.clone(), desired.generation);
        leaving.insert(id, (generation, tokio::spawn(async move { this.depart(&volume, &desired).await })));
    }

    /// At its backend, whichever host it is.
    async fn make_or_delete(&self, volume: &v1::HostVolume, wish: v1::VolumeWish) -> Result<VolumeOutcome, String> {
        let network = self.volumes.network();
        let (done, outcome) = match wish {
            v1::VolumeWish::Created => (network.create(volume).await, VolumeOutcome::Created),
            v1::VolumeWish::Deleted => (network.delete(volume).await, VolumeOutcome::Gone),
            other => return Err(format!("volume {}: {other:?} is nothing for a backend", volume.volume_id)),
        };
        done.map(|()| outcome).map_err(|error| error.to_string())
    }

    async fn depart(&self, volume: &v1::HostVolume, desired: &v1::DesiredVolume) {
        let report = |outcome: VolumeOutcome, root: String, error: String| VolumeReport {
            volume_id: volume.volume_id.clone(),
            observed_generation: desired.generation,
            outcome: outcome.into(),
            root,
            error,
        };
        let at_backend = |outcome, error| self.reports.publish_volume(report(outcome, String::new(), error));
        while is_network(volume) {
            match self.make_or_delete(volume, desired.wish()).await {
                Ok(outcome) => return at_backend(outcome, String::new()),
                Err(error) => {
                    tracing::warn!(volume = volume.volume_id, error, "a volume's backend");
                    at_backend(VolumeOutcome::Failed, error);
                    sleep(PAUSE).await;
                }
            }
        }
        loop {
            match self.try_depart(volume, desired).await {
                Ok(Some(root)) => {
                    return self.reports.publish_volume(report(VolumeOutcome::Released, root, String::new()));
                }
                Ok(None) => {
                    let nothing = String::new();
                    return self.reports.publish_volume(report(VolumeOutcome::Gone, nothing.clone(), nothing));
                }
                Err(error) => {
                    tracing::warn!(volume = volume.volume_id, error, "the volume cannot leave yet");
                    self.reports.publish_volume(report(VolumeOutcome::Failed, String::new(), error));
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Answers the root of what was uploaded. `None` = nothing was to be, or nothing is here: be it that it left before an earlier
    /// agent could tell, or that it never came. The control plane knows which.
    async fn try_depart(&self, volume: &v1::HostVolume, desired: &v1::DesiredVolume) -> Result<Option<String>, String> {
        let id: VolumeId = volume.volume_id.parse().map_err(|error| format!("{error}"))?;
        if !self.volumes.is_here(&id) {
            return Ok(None);
        }
        let mut root = None;
        if desired.wish() == v1::VolumeWish::Released {
            let placed = self.volumes.place(volume).await.map_err(|error| error.to_string())?;
            root = Some(self.upload_offline(&placed, desired).await?);
        } else {
            let placed = self.volumes.place(volume).await;
            // Nobody may have it open.
            if let Ok(placed) = placed {
                let free = tokio::task::spawn_blocking(move || placed.open_offline().map(drop)).await;
                let free = free.map_err(|error| error.to_string())?;
                if let Err(error) = free
                    && error.is_transient()
                {
                    return Err(error.to_string());
                }
            }
        }
        let volumes = self.volumes.clone();
        let deleted = tokio::task::spawn_blocking(move || volumes.delete(&id)).await;
        deleted.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        Ok(root)
    }

    async fn upload_offline(&self, placed: &Placed, desired: &v1::DesiredVolume) -> Result<String, String> {
        let objects = self.volumes.bases().objects();
        let store = self.chunk_store(desired.key_domain.as_ref())?;
        let lineage = placed.lineage();
        let parent = match &lineage {
            Some(lineage) => load_parent(objects.as_ref(), lineage).await?,
            None => None,
        };
        // Of another key domain, when the volume is encrypted and what it was made from is not.
        let parent = parent.filter(|parent| parent.domain() == store.domain().id());
        // Without what the DIRTY bits are relative to they say too little.
        let in_full = lineage.is_some() && parent.is_none();
        let opened = placed.clone();
        let volume = tokio::task::spawn_blocking(move || opened.open_offline()).await;
        let volume = Arc::new(volume.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?);
        let spec = ManifestSpec {
            id: SnapshotKey::new(&desired.manifest_id).map_err(|error| error.to_string())?,
            size_bytes: volume.size_bytes(),
            epoch: Epoch(desired.epoch),
        };
        let chunks: Vec<u64> = match in_full {
            true => (0..volume.size_bytes().div_ceil(CHUNK_BYTES as u64)).collect(),
            false => volume.dirty_chunks().iter().collect(),
        };
        let (reader, base) = (volume.clone(), placed.base.clone());
        let read = move |chunk: u64| {
            let (volume, base) = (reader.clone(), base.clone());
            async move { read_offline(&volume, base.as_deref(), chunk).await.map_err(SourceError::from) }.boxed()
        };
        let source = IndexedSource::new(chunks, Box::new(read));
        let uploaded =
            SnapshotUpload::new(store, spec, parent).run(&source).await.map_err(|error| error.to_string())?;
        Ok(uploaded.manifest.root_hash.to_string())
    }
}

/// The manifest, unless the store does not have it (any more).
async fn load_parent(
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

/// Reads a chunk of a volume that this process has open; `None` = zeros.
async fn read_offline(
    volume: &Arc<OfflineVolume>,
    base: Option<&super::Base>,
    chunk: u64,
) -> Result<Option<Bytes>, String> {
    loop {
        let reader = volume.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut content = vec![0; CHUNK_BYTES];
            reader.read_chunk(chunk, &mut content).map(|()| content)
        });
        match read.await.map_err(|error| error.to_string())? {
            Ok(content) if content.iter().all(|byte| *byte == 0) => return Ok(None),
            Ok(content) => return Ok(Some(content.into())),
            Err(BlockError::ChunkMissing { .. }) if base.is_some() => {
                if let Some(base) = base {
                    base.ensure(chunk).await;
                }
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// A snapshot of a volume whose point in time is fixed.
struct Making {
    wanted: v1::DesiredSnapshot,
    placed: Placed,
    disk: Frozen,
}

/// Copies what has changed since the last snapshot of a volume that nobody has open.
async fn copy_offline(one: &mut Making) -> Result<(), String> {
    let opened = one.placed.clone();
    let volume = tokio::task::spawn_blocking(move || opened.open_offline()).await;
    let volume = Arc::new(volume.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?);
    let chunks = volume.dirty_chunks();
    for chunk in chunks.iter() {
        if let Some(content) = read_offline(&volume, one.placed.base.as_deref(), chunk).await? {
            one.disk.put(chunk, content).await?;
        }
    }
    one.disk.fixed_offline(chunks);
    Ok(())
}
