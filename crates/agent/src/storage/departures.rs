//! Volumes that leave this host or are deleted, and those that a backend makes or deletes.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use hearth_proto::v1::{self, VolumeOutcome, VolumeReport};
use hearth_snapshot::{
    CHUNK_BYTES, Epoch, IndexedSource, ManifestSpec, SnapshotKey, SnapshotUpload, SourceError, UploadProgress,
};
use hearth_types::VolumeId;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::frozen::read_offline;
use super::network::is_network;
use super::snapshots::{Snapshots, TELL_EVERY, load_parent};
use super::volumes::Placed;

/// Pause between two tries to let a volume go.
const PAUSE: Duration = Duration::from_secs(2);

impl Snapshots {
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
            outcome: outcome.into(),
            root,
            error,
            ..departure(desired)
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
        // What a snapshot needs of it is here and nowhere else.
        if !self.of_volume(&id).is_empty() {
            return Err("a snapshot of it is being uploaded".to_owned());
        }
        let mut root = None;
        if desired.wish() == v1::VolumeWish::Released {
            let placed = self.volumes.find(volume).await.map_err(|error| error.to_string())?;
            root = Some(self.upload_offline(&placed, desired).await?);
        } else {
            let (volumes, looked_at) = (self.volumes.clone(), id.clone());
            let in_use = tokio::task::spawn_blocking(move || volumes.is_in_use(&looked_at)).await;
            if in_use.map_err(|error| error.to_string())?.map_err(|error| error.to_string())? {
                return Err(format!("{id} is still in use"));
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
        let lineage = placed.read_lineage(desired.parent.as_ref()).await;
        let parent = match &lineage {
            Ok(Some(lineage)) => load_parent(objects.as_ref(), lineage).await?,
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(volume = %placed.id, %error, "the volume is stored in full");
                None
            }
        };
        // Of another key domain, when the volume is encrypted and what it was made from is not.
        let parent = parent.filter(|parent| parent.domain() == store.domain().id());
        // Without what the DIRTY bits are relative to they say too little.
        let in_full = !matches!(lineage, Ok(None)) && parent.is_none();
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
        let (reports, report, last) = (self.reports.clone(), departure(desired), Mutex::new(None::<Instant>));
        let progress = Arc::new(move |progress: UploadProgress| {
            let mut last = last.lock();
            if last.is_some_and(|last| last.elapsed() < TELL_EVERY) {
                return;
            }
            *last = Some(Instant::now());
            let (done_chunks, total_chunks) = (progress.chunks_done, progress.chunks_total);
            reports.publish_volume(VolumeReport { done_chunks, total_chunks, ..report.clone() });
        });
        let upload = SnapshotUpload::new(store, spec, parent).with_progress(progress);
        let uploaded = upload.run(&source).await.map_err(|error| error.to_string())?;
        Ok(uploaded.manifest.root_hash.to_string())
    }
}

/// A report of work on what is wanted.
fn departure(desired: &v1::DesiredVolume) -> VolumeReport {
    VolumeReport {
        volume_id: desired.volume.as_ref().map(|volume| volume.volume_id.clone()).unwrap_or_default(),
        observed_generation: desired.generation,
        outcome: VolumeOutcome::Working.into(),
        ..VolumeReport::default()
    }
}
