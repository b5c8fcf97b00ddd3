//! Images as single objects: StoreImage writes one with all disks and attributes, RestoreImage makes an image of it again, here or in
//! another cloud whose store holds it.
//! Sources: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateStoreImageTask.html>,
//! `API_DescribeStoreImageTasks`, `API_CreateRestoreImageTask`.

use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_snapshot::{
    ArchiveDisk, Committed, Epoch, ManifestSpec, OpenedArchive, RestoreDisk, SnapshotKey, StorageError, open_archive,
    write_archive,
};
use hearth_store::Txn;
use hearth_types::SnapshotState;
use object_store::path::Path;
use object_store::{Error, ObjectStoreExt};
use rec::TaskState;
use rec::task::Kind;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::idempotency::ClientToken;
use super::register::{available, new_image};
use super::store_image_tasks::view;
use super::{Api, bundle, image, import, snapshot, task};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode};
use crate::keys;
use crate::mappings;
use crate::quotas::{self, Wanted};
use crate::storage;
use crate::tables::{SCHEMA_VERSION, Tables};

pub(crate) const STORE_PREFIX: &str = "storeimage";
const RESTORE_PREFIX: &str = "restoreimage";
/// Folder of all archives in the object store.
const FOLDER: &str = "archive";
const SUFFIX: &str = ".bin";

/// What an archive tells of its image.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Attributes {
    name: String,
    description: String,
    architecture: String,
    root_device_name: String,
    cmdline: String,
    extra_cmdline: String,
    block_device_mappings: Vec<Mapping>,
}

/// A block device mapping; the disk of the archive with the same name is its content.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Mapping {
    device_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    virtual_name: String,
    volume_size_bytes: u64,
    volume_type: String,
    iops: Option<u32>,
    throughput_mibps: Option<u32>,
    delete_on_termination: Option<bool>,
}

impl Mapping {
    fn new(mapping: &v1::BlockDeviceMapping) -> Self {
        let ebs = mapping.ebs.clone().unwrap_or_default();
        Self {
            device_name: mapping.device_name.clone(),
            virtual_name: mapping.virtual_name.clone(),
            volume_size_bytes: ebs.volume_size_bytes,
            volume_type: ebs.volume_type,
            iops: ebs.iops,
            throughput_mibps: ebs.throughput_mibps,
            delete_on_termination: ebs.delete_on_termination,
        }
    }

    fn with_snapshot(&self, snapshot_id: String) -> v1::BlockDeviceMapping {
        let ebs = v1::EbsBlockDevice {
            snapshot_id,
            volume_size_bytes: self.volume_size_bytes,
            volume_type: self.volume_type.clone(),
            iops: self.iops,
            throughput_mibps: self.throughput_mibps,
            delete_on_termination: self.delete_on_termination,
            encrypted: None,
        };
        v1::BlockDeviceMapping {
            device_name: self.device_name.clone(),
            virtual_name: self.virtual_name.clone(),
            ebs: self.virtual_name.is_empty().then_some(ebs),
            no_device: false,
        }
    }
}

pub(crate) fn job(task: &rec::Task) -> Option<&rec::StoreImageJob> {
    match &task.kind {
        Some(Kind::StoreImage(job)) => Some(job),
        _ => None,
    }
}

pub(crate) fn restore_job(task: &rec::Task) -> Option<&rec::RestoreImageJob> {
    match &task.kind {
        Some(Kind::RestoreImage(job)) => Some(job),
        _ => None,
    }
}

/// Key of the account's archive that is called so.
fn key_of(account: &str, asked: &str) -> ApiResult<String> {
    let own = format!("{FOLDER}/{account}/");
    let key = if asked.starts_with(&own) { asked.to_owned() } else { format!("{own}{asked}") };
    let named = key.strip_suffix(SUFFIX).and_then(|rest| rest.rsplit_once('/'));
    let Some((prefix, name)) = named.filter(|(_, name)| image::check_id(name).is_ok()) else {
        return Err(ApiError::invalid("object_key", format!("'{asked:.200}' must end in IMAGE{SUFFIX}")));
    };
    let prefix = prefix.strip_prefix(own.trim_end_matches('/')).unwrap_or_default();
    Ok(format!("{}/{name}{SUFFIX}", bundle::folder(FOLDER, account, prefix)?))
}

/// Whether an image or a snapshot is being restored, and goes on after a restart.
pub(crate) fn is_being_restored(tables: &Tables, id: &str) -> bool {
    let mut jobs = task::open(tables).filter_map(|task| restore_job(task));
    jobs.any(|job| job.image_id == id || job.snapshot_ids.iter().any(|snapshot| snapshot == id))
}

fn unreadable(error: &StorageError) -> ApiError {
    match error {
        StorageError::Objects { .. } => ApiError::unavailable(error.to_string()),
        error => ApiError::new(Code::InvalidArgument, "InvalidImageObject", error.to_string()),
    }
}

impl Api {
    pub(crate) async fn do_store_image(
        &self,
        account: String,
        mut request: v1::CreateStoreImageTaskRequest,
    ) -> ApiResult<v1::StoreImageTask> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let account = account.as_str();
        let token = ClientToken::new(account, "CreateStoreImageTask", &token_text, &request);
        image::check_id(&request.image_id)?;
        let folder = bundle::folder(FOLDER, account, &request.prefix)?;
        let object_key = format!("{folder}/{}{SUFFIX}", request.image_id);
        let taken = |what: &str| ApiError::duplicate("InvalidObjectKey.Duplicate", format!("{what} at {object_key}"));
        for _ in 0..super::MAX_ATTEMPTS {
            let replayed = token.as_ref().map(|token| token.replay(&self.core.tables())).transpose()?.flatten();
            if let Some(id) = replayed.and_then(|ids| ids.into_iter().next()) {
                let tables = self.core.tables();
                let known = tables.tasks.get(&id).and_then(|task| Some(view(&self.core, task, job(task)?)));
                return known.ok_or_else(|| ApiError::not_found("InvalidTaskID.NotFound", "task", &[&id]));
            }
            match self.core.storage.objects.head(&Path::from(object_key.as_str())).await {
                Err(Error::NotFound { .. }) => {}
                Ok(_) => return Err(taken("there is an object")),
                Err(error) => return Err(ApiError::unavailable(format!("object store: {error}"))),
            }
            let (task, txn) = {
                let tables = self.core.tables();
                if task::open(&tables).filter_map(|task| job(task)).any(|job| job.object_key == object_key) {
                    return Err(taken("an image is being stored"));
                }
                let (new, txn) = of_image(&tables, account, &request.image_id, &object_key)?;
                let task = task::new(account, STORE_PREFIX, &token_text, Kind::StoreImage(new))?;
                let txn = txn.put(keys::task(account, &task.task_id), encode(&task));
                let ids = std::slice::from_ref(&task.task_id);
                (task.clone(), token.as_ref().map_or(txn.clone(), |token| token.record(txn, ids)))
            };
            if self.core.commit(txn).await? == Commit::Done {
                return Ok(view(&self.core, &task, &job(&task).cloned().unwrap_or_default()));
            }
        }
        Err(ApiError::unavailable("too many changes at the same time; try again"))
    }

    pub(crate) async fn do_delete_stored(&self, account: &str, asked: &str) -> ApiResult<()> {
        let key = key_of(account, asked)?;
        let used = task::open(&self.core.tables()).any(|task| {
            restore_job(task).is_some_and(|job| job.object_key == key)
                || job(task).is_some_and(|job| job.object_key == key)
        });
        if used {
            let message = format!("a task works on {key}; try again when it has ended");
            return Err(ApiError::wrong_state("IncorrectState", message).with("object_key", key));
        }
        let objects = &*self.core.storage.objects;
        let path = Path::from(key.as_str());
        let gone = async {
            objects.head(&path).await?;
            objects.delete(&path).await
        };
        gone.await.map_err(|error| match error {
            Error::NotFound { .. } => ApiError::not_found("NoSuchKey", "object", &[&key]),
            error => ApiError::unavailable(format!("object store: {error}")),
        })
    }

    pub(crate) async fn do_restore_image(
        &self,
        account: String,
        mut request: v1::CreateRestoreImageTaskRequest,
    ) -> ApiResult<v1::Image> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let account = account.as_str();
        let token = ClientToken::new(account, "CreateRestoreImageTask", &token_text, &request);
        let object_key = key_of(account, &request.object_key)?;
        let opened = open_archive(self.core.storage.objects.clone(), &object_key).await;
        let archive = opened.map_err(|error| unreadable(&error))?;
        let told = read_attributes(&archive)?;
        let name = if request.name.is_empty() { told.name.as_str() } else { request.name.as_str() };
        check::tags_of("snapshot_tags", &request.snapshot_tags)?;
        let mut spec = new_image(account, name, &told.description, &request.tags, &token_text)?;
        spec.snapshot_tags.clone_from(&request.snapshot_tags);
        self.register(account, token.as_ref(), |tables| {
            let wanted = Wanted::snapshots(archive.header().disks.len());
            let guard = quotas::check(&self.core.config, tables, account, &wanted)?;
            let (spec, task, txn) = plan(tables, account, (&spec, &told), &archive, &object_key)?;
            let txn = guard.apply(txn);
            let status = rec::ImageStatus {
                schema_version: SCHEMA_VERSION,
                state: v1::ImageState::Pending.into(),
                ..Default::default()
            };
            Ok((spec, status, txn.put(keys::task(account, &task.task_id), encode(&task))))
        })
        .await
    }
}

fn of_image(tables: &Tables, account: &str, id: &str, object_key: &str) -> ApiResult<(rec::StoreImageJob, Txn)> {
    let (spec, status) = image::find(tables, account, id)?;
    if status.is_none_or(|status| status.state() != v1::ImageState::Available) {
        let message = format!("image {id} is not available");
        return Err(ApiError::wrong_state("InvalidAMIID.Unavailable", message).with("image_id", id));
    }
    if !spec.image_location.is_empty() {
        return Err(ApiError::invalid("image_id", "has an instance-store root device; its bundle is stored already"));
    }
    let boot = spec.boot.clone().unwrap_or_default();
    let attributes = Attributes {
        name: spec.name.clone(),
        description: spec.description.clone(),
        architecture: "x86_64".to_owned(),
        root_device_name: image::root_device_name(spec),
        cmdline: boot.cmdline,
        extra_cmdline: boot.extra_cmdline,
        block_device_mappings: spec.block_device_mappings.iter().map(Mapping::new).collect(),
    };
    let attributes_json = serde_json::to_string(&attributes).map_err(|error| ApiError::internal(error.to_string()))?;
    let mut txn = Txn::new();
    let mut disks = Vec::new();
    for mapping in &spec.block_device_mappings {
        let Some(ebs) = mapping.ebs.as_ref().filter(|ebs| !ebs.snapshot_id.is_empty()) else { continue };
        let source = snapshot::find_completed(tables, account, &ebs.snapshot_id)?;
        if storage::is_encrypted(&source.base()) {
            let message = format!("snapshot {} is encrypted; an image object would have it in clear", ebs.snapshot_id);
            return Err(ApiError::wrong_state("UnsupportedOperation", message).with("snapshot_id", &ebs.snapshot_id));
        }
        txn = source.pin(txn);
        disks.push(rec::StoredDisk { device_name: mapping.device_name.clone(), source: Some(source.base()) });
    }
    let job = rec::StoreImageJob { image_id: id.to_owned(), object_key: object_key.to_owned(), attributes_json, disks };
    Ok((job, txn))
}

fn read_attributes(archive: &OpenedArchive) -> ApiResult<Attributes> {
    let refuse = |why: String| ApiError::new(Code::InvalidArgument, "InvalidImageObject", why);
    let value = serde_json::Value::Object(archive.header().attributes.clone());
    let told: Attributes = serde_json::from_value(value).map_err(|error| refuse(error.to_string()))?;
    let boot = v1::BootOverride { extra_cmdline: told.extra_cmdline.clone(), cmdline: told.cmdline.clone() };
    import::check_boot(Some(&boot)).map_err(|error| refuse(error.to_string()))?;
    let disks = &archive.header().disks;
    let mappings: Vec<v1::BlockDeviceMapping> =
        told.block_device_mappings.iter().map(|mapping| mapping.with_snapshot(String::new())).collect();
    mappings::check(&mappings).map_err(|error| refuse(error.to_string()))?;
    let root = mappings.iter().any(|mapping| mapping.device_name == told.root_device_name && mapping.ebs.is_some());
    if !root || !disks.iter().any(|disk| disk.name == told.root_device_name) {
        return Err(refuse(format!("it has no root disk '{}'", told.root_device_name)));
    }
    for disk in disks {
        let uses = mappings.iter().filter(|mapping| mapping.device_name == disk.name && mapping.ebs.is_some()).count();
        if uses != 1 || disks.iter().filter(|other| other.name == disk.name).count() != 1 {
            return Err(refuse(format!("disk '{}' is not the content of one device", disk.name)));
        }
    }
    for mapping in told.block_device_mappings.iter().filter(|mapping| mapping.virtual_name.is_empty()) {
        let disk = disks.iter().find(|disk| disk.name == mapping.device_name);
        let least = disk.map_or(0, |disk| disk.size_bytes);
        super::volume::Shape::new(
            &mapping.volume_type,
            mapping.volume_size_bytes,
            least,
            mapping.iops,
            mapping.throughput_mibps,
        )
        .map_err(|error| refuse(error.to_string()))?;
    }
    Ok(told)
}

/// Records of the image and its snapshots, all pending, and of the task.
fn plan(
    tables: &Tables,
    account: &str,
    (spec, told): (&rec::ImageSpec, &Attributes),
    archive: &OpenedArchive,
    object_key: &str,
) -> ApiResult<(rec::ImageSpec, rec::Task, Txn)> {
    let mut txn = storage::guard_epoch(Txn::new(), tables);
    let mut snapshots = Vec::new();
    for disk in &archive.header().disks {
        let description = format!("Restored for {} from {object_key}", spec.image_id);
        let order = snapshot::order(
            account,
            description.chars().take(255).collect(),
            spec.snapshot_tags.clone(),
            String::new(),
        )?;
        let volume = rec::VolumeSpec {
            volume_id: snapshot::NO_VOLUME.to_owned(),
            volume: Some(v1::HostVolume { size_bytes: disk.size_bytes, ..Default::default() }),
            ..Default::default()
        };
        let record = snapshot::new_record(tables, &order, &volume)?;
        txn = txn.put(keys::snapshot_spec(account, &record.snapshot_id), encode(&record));
        snapshots.push((disk.name.as_str(), record.snapshot_id));
    }
    let boot = v1::BootOverride { extra_cmdline: told.extra_cmdline.clone(), cmdline: told.cmdline.clone() };
    let of_device = |device: &str| snapshots.iter().find(|(name, _)| *name == device).map(|(_, id)| id.clone());
    let mapped = told.block_device_mappings.iter();
    let spec = rec::ImageSpec {
        root_device_name: told.root_device_name.clone(),
        boot: Some(boot).filter(|boot| *boot != v1::BootOverride::default()),
        block_device_mappings: mapped
            .map(|mapping| mapping.with_snapshot(of_device(&mapping.device_name).unwrap_or_default()))
            .collect(),
        ..spec.clone()
    };
    let job = rec::RestoreImageJob {
        image_id: spec.image_id.clone(),
        object_key: object_key.to_owned(),
        snapshot_ids: snapshots.into_iter().map(|(_, id)| id).collect(),
    };
    let task = task::new(account, RESTORE_PREFIX, "", Kind::RestoreImage(job))?;
    Ok((spec, task, txn))
}

/// Stores an image; begun anew after a restart.
pub(crate) async fn store(core: &Arc<Core>, id: &str, job: &rec::StoreImageJob, called_off: &CancellationToken) {
    let written = tokio::select! {
        written = write(core, id, job) => written,
        () = called_off.cancelled() => return,
        () = core.stop.cancelled() => return,
    };
    let noted = match written {
        Ok(()) => task::change(core, id, |task| task.set_state(TaskState::Complete)).await,
        Err(error) => task::fail(core, id, task::failure(error.to_string())).await,
    };
    core.live.set_percent(id, None);
    match noted {
        Ok(_) => {
            tracing::info!(task = id, image = job.image_id, key = job.object_key, "the storing of an image has ended")
        }
        Err(error) => tracing::warn!(task = id, %error, "the end of a task could not be noted; it is done again"),
    }
}

async fn write(core: &Arc<Core>, id: &str, job: &rec::StoreImageJob) -> ApiResult<()> {
    task::begin(core, id).await?;
    let mut disks = Vec::new();
    for disk in &job.disks {
        let Some(base) = &disk.source else { continue };
        let domain = storage::name_of_domain(base);
        let manifest = Arc::new(storage::load_manifest(core, base).await?);
        disks.push(ArchiveDisk { name: disk.device_name.clone(), store: core.storage.chunks(domain)?, manifest });
    }
    let attributes = serde_json::from_str(&job.attributes_json).unwrap_or_default();
    let objects = &*core.storage.objects;
    let written = write_archive(objects, &job.object_key, attributes, &disks, progress(core, id, &[])).await;
    written.map(|_| ()).map_err(|error| ApiError::internal(error.to_string()))
}

/// Keeps how far a task is, for whoever looks at it or at the snapshots that it makes.
fn progress(core: &Arc<Core>, id: &str, snapshots: &[String]) -> hearth_snapshot::OnArchiveProgress {
    let (core, id, snapshots) = (core.clone(), id.to_owned(), snapshots.to_vec());
    Arc::new(move |done, total| {
        let percent = done.min(total).saturating_mul(100).checked_div(total).unwrap_or(0);
        let percent = u32::try_from(percent).ok();
        core.live.set_percent(&id, percent);
        for snapshot in &snapshots {
            if core.live.set_percent(snapshot, percent) {
                core.announce_snapshot(snapshot);
            }
        }
    })
}

/// Makes an image of an object; begun anew after a restart.
pub(crate) async fn restore(core: &Arc<Core>, task: &rec::Task, job: &rec::RestoreImageJob) {
    let id = task.task_id.as_str();
    let restored = tokio::select! {
        restored = read(core, id, job) => restored,
        () = core.stop.cancelled() => return,
    };
    let noted = finish(core, task, job, &restored).await;
    for id in std::iter::once(&task.task_id).chain(&job.snapshot_ids) {
        core.live.set_percent(id, None);
    }
    match (noted, restored) {
        (Err(error), _) => tracing::warn!(task = id, %error, "the end of a task could not be noted; it is done again"),
        (Ok(()), Ok(_)) => tracing::info!(image = job.image_id, key = job.object_key, "image restored"),
        (Ok(()), Err(error)) => tracing::warn!(image = job.image_id, key = job.object_key, %error, "the image failed"),
    }
}

async fn read(core: &Arc<Core>, id: &str, job: &rec::RestoreImageJob) -> ApiResult<Vec<Committed>> {
    let failed = |error: StorageError| ApiError::internal(error.to_string());
    task::begin(core, id).await?;
    let archive = open_archive(core.storage.objects.clone(), &job.object_key).await.map_err(failed)?;
    let mut targets = Vec::new();
    for id in &job.snapshot_ids {
        let spec = core.tables().snapshot(id).map(|(spec, _)| spec);
        let spec = spec.ok_or_else(|| ApiError::internal(format!("snapshot {id} was deleted")))?;
        targets.push(RestoreDisk {
            store: core.storage.chunks(&spec.key_domain)?,
            spec: ManifestSpec {
                id: SnapshotKey::new(id).map_err(failed)?,
                size_bytes: spec.volume_bytes,
                epoch: Epoch(spec.epoch),
            },
        });
    }
    archive.restore(&targets, progress(core, id, &job.snapshot_ids)).await.map_err(failed)
}

/// Writes how it ended: task, image and snapshots in one transaction.
async fn finish(
    core: &Core,
    task: &rec::Task,
    job: &rec::RestoreImageJob,
    restored: &ApiResult<Vec<Committed>>,
) -> ApiResult<()> {
    let account = &task.account_id;
    let reason = restored.as_ref().err().map(|error| task::failure(error.to_string()));
    let key = keys::task(account, &task.task_id);
    core.update(|tables| {
        let Some(known) = tables.tasks.get(&task.task_id).filter(|task| task::is_open(task)) else {
            return Ok((None, ()));
        };
        let state = if restored.is_ok() { TaskState::Complete } else { TaskState::Failed };
        let ended = rec::Task {
            state: state.into(),
            reason: reason.clone(),
            updated_ms: clock::now_ms(),
            ..(*known.value).clone()
        };
        let mut txn = Txn::new().compare_mod_revision(&key, known.revision).put(&key, encode(&ended));
        let committed = restored.iter().flatten().map(Some).chain(std::iter::repeat(None));
        for (id, committed) in job.snapshot_ids.iter().zip(committed) {
            let Some((spec, status)) = tables.snapshot(id) else { continue };
            if snapshot::state_of(status.as_deref()) != SnapshotState::Pending {
                continue;
            }
            let mut new = rec::SnapshotStatus {
                schema_version: SCHEMA_VERSION,
                state: v1::SnapshotState::Error.into(),
                reason: reason.clone(),
                ..Default::default()
            };
            if let Some(committed) = committed {
                new.set_state(v1::SnapshotState::Completed);
                new.frozen = true;
                new.root = committed.root_hash.to_string();
                new.full_bytes = committed.present_chunks * hearth_snapshot::CHUNK_BYTES as u64;
                new.completed_ms = clock::now_ms();
            }
            txn = txn
                .compare_mod_revision(keys::snapshot_spec(account, id), spec.revision)
                .put(keys::snapshot_status(account, id), encode(&new));
        }
        if let Some(entry) = tables.images.get(&job.image_id)
            && let Some(spec) = &entry.spec
        {
            let root = image::root_snapshot(spec).and_then(|id| tables.snapshot(id));
            let status = match &reason {
                None => available(root.map_or(0, |(spec, _)| spec.volume_bytes)),
                Some(_) => rec::ImageStatus {
                    schema_version: SCHEMA_VERSION,
                    state: v1::ImageState::Failed.into(),
                    reason: reason.clone(),
                    ..Default::default()
                },
            };
            txn = txn
                .compare_mod_revision(keys::image_spec(account, &job.image_id), spec.revision)
                .put(keys::image_status(account, &job.image_id), encode(&status));
            if reason.is_some() {
                txn = txn.delete(keys::image_name(account, &spec.name));
            }
        }
        Ok((Some(txn), ()))
    })
    .await
}
