//! From the whole upload to the image: work of the control plane alone, begun anew after every interruption. Chunks that are in the
//! object store already are found there, and a manifest that is there is whole.

use std::sync::Arc;
use std::time::Duration;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_snapshot::{
    CHUNK_BYTES, Epoch, Format, ImageError, ImportRequest, Limits, PrefixDigest, SnapshotKey, StorageError,
};
use hearth_store::Txn;
use hearth_types::StateReason;
use hearth_types::volume::GIB;

use super::{Pending, pending, spool};
use crate::api_error::ApiResult;
use crate::clock;
use crate::core::{Core, encode};
use crate::keys;
use crate::service::{image, snapshot, volume};
use crate::storage;
use crate::tables::{SCHEMA_VERSION, Tables};

/// Pause after a conversion that was not the file's fault, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The upload is whole: opens the snapshot in the epoch of this moment. From here the client is not needed any more.
pub(super) async fn hand_over(core: &Core, id: &str, digest: PrefixDigest) -> ApiResult<()> {
    core.update(|tables| {
        let Some(found) = pending(tables, id) else { return Err(super::gone(id)) };
        if found.is_whole() {
            return Ok((None, ()));
        }
        let account = &found.spec.account_id;
        let order = snapshot::order(account, format!("Imported for {id}"), Vec::new(), String::new())?;
        let no_volume = rec::VolumeSpec { volume_id: snapshot::NO_VOLUME.to_owned(), ..Default::default() };
        let opened = snapshot::new_record(tables, &order, &no_volume)?;
        let mut spec = (*found.spec.value).clone();
        let root = v1::EbsBlockDevice { snapshot_id: opened.snapshot_id.clone(), ..Default::default() };
        spec.block_device_mappings = vec![v1::BlockDeviceMapping {
            device_name: image::root_device_name(&spec),
            ebs: Some(root),
            ..Default::default()
        }];
        let status = rec::ImageStatus {
            uploaded_bytes: found.job.file_bytes,
            uploaded_digest: digest.as_bytes().to_vec(),
            upload_active_ms: clock::now_ms(),
            ..(*found.status.value).clone()
        };
        let txn = found
            .guard(storage::guard_epoch(Txn::new(), tables))
            .put(keys::snapshot_spec(account, &opened.snapshot_id), encode(&opened))
            .put(keys::image_spec(account, id), encode(&spec))
            .put(keys::image_status(account, id), encode(&status));
        Ok((Some(txn), ()))
    })
    .await
}

/// Works on all imports whose upload is whole.
pub(crate) fn advance(core: &Arc<Core>) {
    let whole: Vec<String> = {
        let tables = core.tables();
        let found = tables.images.keys().filter(|id| pending(&tables, id).is_some_and(|found| found.is_whole()));
        found.cloned().collect()
    };
    whole.iter().for_each(|id| begin(core, id));
}

/// Works on one, unless that is done already.
pub(super) fn begin(core: &Arc<Core>, id: &str) {
    let Some(called_off) = core.jobs.take(id) else { return };
    let (worker, id) = (core.clone(), id.to_owned());
    core.tasks.spawn(async move {
        tokio::select! {
            () = run(&worker, &id) => {}
            () = called_off.cancelled() => {}
            // Begun anew after the next start.
            () = worker.stop.cancelled() => {}
        }
        worker.live.set_progress(&id, None);
        worker.jobs.done(&id);
    });
}

/// A disk that is in the object store.
struct Made {
    root: String,
    disk_bytes: u64,
    full_bytes: u64,
    added_bytes: u64,
}

/// Why there is no image.
enum Failure {
    /// The file is no good.
    BadImage(String),
    /// There is no file any more.
    Lost(String),
    /// Something that may be better later.
    Hindered(String),
}

async fn run(core: &Arc<Core>, id: &str) {
    let mut pause = FIRST_PAUSE;
    loop {
        let found = pending(&core.tables(), id);
        let Some(found) = found else { return };
        let outcome = match core.imports.acquire().await {
            Ok(_permit) => convert(core, &found).await,
            Err(_) => return,
        };
        let outcome = match outcome {
            Err(Failure::Hindered(why)) if super::is_overdue(core, &found) => {
                Err(Failure::Lost(format!("it could not be converted in time: {why}")))
            }
            outcome => outcome,
        };
        let why = match outcome {
            Err(Failure::Hindered(why)) => why,
            outcome => match finish(core, id, outcome).await {
                Ok(()) => return spool::remove(core, id).await,
                Err(error) => error.to_string(),
            },
        };
        tracing::warn!(image = id, why, "an import could not be completed; it is tried again");
        let step = format!("waiting to convert ({why})");
        core.live.set_progress(id, Some(v1::Progress { step, ..Default::default() }));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn convert(core: &Arc<Core>, found: &Pending) -> Result<Made, Failure> {
    let hindered = |error: String| Failure::Hindered(error);
    let snapshot = {
        let tables = core.tables();
        let entry = found.snapshot_id().and_then(|id| tables.snapshots.get(id));
        entry.and_then(|entry| entry.spec.as_deref().cloned())
    };
    let Some(snapshot) = snapshot else { return Err(Failure::Lost("its snapshot is gone".to_owned())) };
    let before = storage::published(core, &snapshot.snapshot_id).await;
    if let Some(made) = before.map_err(|error| hindered(error.to_string()))? {
        let storage::Published { root, full_bytes, disk_bytes } = made;
        return Ok(Made { root, disk_bytes, full_bytes, added_bytes: full_bytes });
    }
    let store = core.storage.chunks(&snapshot.key_domain).map_err(|error| hindered(error.to_string()))?;
    let format = match found.job.format.as_str() {
        "" => None,
        format => Some(format.parse::<Format>().map_err(|error| Failure::BadImage(error.to_string()))?),
    };
    let request = ImportRequest {
        path: spool::path(core, &found.spec.image_id),
        format,
        limits: Limits { max_virtual_bytes: core.config.max_image_bytes },
        id: SnapshotKey::new(&snapshot.snapshot_id).map_err(|error| hindered(error.to_string()))?,
        epoch: Epoch(snapshot.epoch),
    };
    let (told, id) = (core.clone(), found.spec.image_id.clone());
    let imported = hearth_snapshot::import(
        &store,
        request,
        Arc::new(move |progress| {
            let (done_bytes, total_bytes) = (progress.bytes_done, progress.bytes_total);
            told.live.set_progress(&id, Some(v1::Progress { done_bytes, total_bytes, step: "converting".to_owned() }));
        }),
    );
    let imported = imported.await.map_err(|error| classify(&error))?;
    Ok(Made {
        root: imported.manifest.root_hash.to_string(),
        disk_bytes: imported.virtual_bytes,
        full_bytes: imported.manifest.present_chunks * CHUNK_BYTES as u64,
        added_bytes: imported.chunks.chunks_written * CHUNK_BYTES as u64,
    })
}

/// Tells a file that is no good from a server that cannot work.
fn classify(error: &StorageError) -> Failure {
    match error {
        StorageError::Image(ImageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Failure::Lost("the uploaded file is gone from the control plane's spool folder".to_owned())
        }
        StorageError::Image(image) if !matches!(image, ImageError::Io { .. }) => Failure::BadImage(image.to_string()),
        error => Failure::Hindered(error.to_string()),
    }
}

/// Writes how it ended, once.
async fn finish(core: &Arc<Core>, id: &str, outcome: Result<Made, Failure>) -> ApiResult<()> {
    let is_first = core
        .update(|tables| {
            // Tags may have changed meanwhile.
            let Some(found) = pending(tables, id) else { return Ok((None, false)) };
            let txn = match &outcome {
                Ok(made) => completed(tables, &found, made),
                Err(failure) => failed(&found, failure),
            };
            Ok((Some(found.guard(txn)), true))
        })
        .await?;
    match &outcome {
        _ if !is_first => {}
        Ok(made) => tracing::info!(image = id, bytes = made.disk_bytes, "image available"),
        Err(Failure::BadImage(why) | Failure::Lost(why) | Failure::Hindered(why)) => {
            tracing::warn!(image = id, why, "import failed")
        }
    }
    Ok(())
}

fn completed(tables: &Tables, found: &Pending, made: &Made) -> Txn {
    let (account, id) = (&found.spec.account_id, &found.spec.image_id);
    let mut spec = (*found.spec.value).clone();
    for ebs in spec.block_device_mappings.iter_mut().filter_map(|mapping| mapping.ebs.as_mut()) {
        ebs.volume_size_bytes = made.disk_bytes.next_multiple_of(GIB);
        ebs.volume_type = volume::DEFAULT_TYPE.name().to_owned();
        ebs.delete_on_termination = Some(true);
    }
    let status = rec::ImageStatus {
        schema_version: SCHEMA_VERSION,
        state: v1::ImageState::Available.into(),
        size_bytes: made.disk_bytes,
        ..Default::default()
    };
    let txn = Txn::new()
        .put(keys::image_spec(account, id), encode(&spec))
        .put(keys::image_status(account, id), encode(&status));
    let known = found.snapshot_id().and_then(|snapshot| tables.snapshots.get(snapshot)?.spec.as_ref());
    let Some(known) = known else { return txn };
    let snapshot = rec::SnapshotSpec { volume_bytes: made.disk_bytes, ..(*known.value).clone() };
    let completed = rec::SnapshotStatus {
        schema_version: SCHEMA_VERSION,
        state: v1::SnapshotState::Completed.into(),
        frozen: true,
        root: made.root.clone(),
        incremental_bytes: made.added_bytes,
        full_bytes: made.full_bytes,
        completed_ms: clock::now_ms(),
        ..Default::default()
    };
    let key = keys::snapshot_spec(account, &snapshot.snapshot_id);
    txn.compare_mod_revision(&key, known.revision)
        .put(&key, encode(&snapshot))
        .put(keys::snapshot_status(account, &snapshot.snapshot_id), encode(&completed))
}

fn failed(found: &Pending, failure: &Failure) -> Txn {
    let (account, id) = (&found.spec.account_id, &found.spec.image_id);
    let (code, why, is_answer) = match failure {
        Failure::BadImage(why) => (StateReason::INVALID_IMAGE, why, true),
        Failure::Lost(why) | Failure::Hindered(why) => (StateReason::INTERNAL_ERROR, why, false),
    };
    let status = rec::ImageStatus {
        schema_version: SCHEMA_VERSION,
        state: v1::ImageState::Failed.into(),
        reason: Some(v1::StateReason { code: code.to_owned(), message: why.clone() }),
        ..Default::default()
    };
    let mut txn = Txn::new()
        .put(keys::image_status(account, id), encode(&status))
        .delete(keys::image_name(account, &found.spec.name));
    if let Some(snapshot) = found.snapshot_id() {
        txn = txn.delete(keys::snapshot_spec(account, snapshot));
    }
    // The same file would be no better; what was not its fault may be tried again.
    if is_answer { txn } else { super::forget_token(txn, &found.spec) }
}
