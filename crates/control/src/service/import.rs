//! Importing images: upload to a spool file, conversion to a snapshot, registration.
//!
//! The records of image and snapshot stand in state `pending` from the first message on, so name and client token are taken. An
//! upload that breaks off takes everything back, as does a crash (at the next start); a file that is no usable image ends in
//! state `failed` with the reason. The snapshot is whole in the object store before the records say so.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_snapshot::{Epoch, Format, ImageError, ImportRequest, Imported, Limits, SnapshotKey, StorageError};
use hearth_store::Txn;
use hearth_types::volume::GIB;
use hearth_types::{ImageId, StateReason};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::idempotency::ClientToken;
use super::{image, snapshot};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode, id_value};
use crate::keys;
use crate::storage;
use crate::tables::SCHEMA_VERSION;

pub(crate) type ImportStream = Pin<Box<dyn Stream<Item = Result<v1::ImportImageResponse, Status>> + Send>>;

const CALL: &str = "ImportImage";
/// Longest pause between two messages of an upload.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between two progress messages.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(300);
/// Bytes after which an upload's progress is told.
const UPLOAD_PROGRESS_BYTES: u64 = 16 << 20;
const MAX_DESCRIPTION_CHARS: usize = 1000;
const MAX_CMDLINE_CHARS: usize = 1500;

/// File of an unfinished upload.
fn spool_path(core: &Core, id: &str) -> PathBuf {
    core.config.spool_dir().join(format!("{id}.upload"))
}

/// Reads the header, reserves the image's name and lets the rest go on by itself.
pub(crate) async fn start(
    core: Arc<Core>,
    account: String,
    mut messages: Streaming<v1::ImportImageRequest>,
) -> ApiResult<ImportStream> {
    use v1::import_image_request::Message;
    let first = next(&mut messages).await?.and_then(|message| message.message);
    let Some(Message::Header(header)) = first else {
        return Err(ApiError::invalid("header", "the first message must be the header"));
    };
    let format = check_header(&core, &header)?;
    let params = v1::ImportImageHeader { client_token: String::new(), ..header.clone() };
    let token = ClientToken::new(&account, CALL, &header.client_token, &params);
    let replayed = replay(&core.tables(), token.as_ref(), &account)?;
    if let Some(image) = replayed {
        return Ok(Box::pin(tokio_stream::once(Ok(image))));
    }
    let Ok(permit) = core.imports.clone().try_acquire_owned() else {
        let limit = core.config.max_concurrent_imports;
        return Err(ApiError::exhausted(
            "RequestLimitExceeded",
            format!("{limit} imports are going on; try again later"),
        ));
    };
    let spec = rec::ImageSpec {
        schema_version: SCHEMA_VERSION,
        image_id: ImageId::generate()?.to_string(),
        account_id: account.clone(),
        name: header.name.clone(),
        description: header.description,
        boot: header.boot,
        tags: header.tags,
        created_ms: clock::now_ms(),
        client_token: header.client_token,
        ..Default::default()
    };
    let worker_core = core.clone();
    let begun = super::detached(&worker_core, async move { reserve(&core, spec, token.as_ref()).await });
    let (spec, snapshot) = match begun.await? {
        Reserved::New(spec, snapshot) => (*spec, *snapshot),
        Reserved::Replayed(image) => return Ok(Box::pin(tokio_stream::once(Ok(*image)))),
    };
    let (answers, stream) = mpsc::channel(16);
    let tasks = worker_core.tasks.clone();
    let job =
        Job { core: worker_core, spec, snapshot, file_bytes: header.file_bytes, format, answers, _permit: permit };
    tasks.spawn(job.run(messages));
    Ok(Box::pin(ReceiverStream::new(stream)))
}

async fn next(messages: &mut Streaming<v1::ImportImageRequest>) -> ApiResult<Option<v1::ImportImageRequest>> {
    match tokio::time::timeout(UPLOAD_TIMEOUT, messages.message()).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(status)) => Err(ApiError::new(
            tonic::Code::Aborted,
            "UploadAborted",
            format!("the upload broke off: {}", status.message()),
        )),
        Err(_) => Err(ApiError::new(tonic::Code::Aborted, "UploadAborted", "the upload paused for too long")),
    }
}

fn check_header(core: &Core, header: &v1::ImportImageHeader) -> ApiResult<Option<Format>> {
    check::name("name", &header.name)?;
    check::text("description", &header.description, MAX_DESCRIPTION_CHARS)?;
    check::tags(&header.tags)?;
    check::client_token(&header.client_token)?;
    check_boot(header.boot.as_ref())?;
    let most = core.config.max_image_bytes;
    if header.file_bytes == 0 || header.file_bytes > most {
        return Err(ApiError::invalid("file_bytes", format!("is {}, must be 1..={most}", header.file_bytes)));
    }
    match header.format.as_str() {
        "" => Ok(None),
        format => format.parse().map(Some).map_err(|error| ApiError::invalid("format", format!("{error}"))),
    }
}

/// Kernel command lines have an end.
pub(crate) fn check_boot(boot: Option<&v1::BootOverride>) -> ApiResult<()> {
    let Some(boot) = boot else { return Ok(()) };
    check::text("boot.extra_cmdline", &boot.extra_cmdline, MAX_CMDLINE_CHARS)?;
    check::text("boot.cmdline", &boot.cmdline, MAX_CMDLINE_CHARS)
}

/// The answer of an earlier call with this token.
fn replay(
    tables: &crate::tables::Tables,
    token: Option<&ClientToken>,
    account: &str,
) -> ApiResult<Option<v1::ImportImageResponse>> {
    let Some(ids) = token.map(|token| token.replay(tables)).transpose()?.flatten() else { return Ok(None) };
    let id = ids.first().map_or("", String::as_str);
    let (spec, status) = image::find(tables, account, id)?;
    Ok(Some(v1::ImportImageResponse { progress: None, image: Some(image::view(spec, status)) }))
}

/// How taking the name ended.
enum Reserved {
    New(Box<rec::ImageSpec>, Box<rec::SnapshotSpec>),
    /// Another call with the same token was faster.
    Replayed(Box<v1::ImportImageResponse>),
}

/// Takes name and token and opens the upload of the snapshot.
async fn reserve(core: &Core, mut spec: rec::ImageSpec, token: Option<&ClientToken>) -> ApiResult<Reserved> {
    for _ in 0..super::MAX_ATTEMPTS {
        let (account, id) = (spec.account_id.clone(), spec.image_id.clone());
        let name_key = keys::image_name(&account, &spec.name);
        let (snapshot, txn) = {
            let tables = core.tables();
            if let Some(image) = replay(&tables, token, &account)? {
                return Ok(Reserved::Replayed(Box::new(image)));
            }
            if taken(&tables, &account, &spec.name) {
                let message = format!("there is an image named '{}' already", spec.name);
                return Err(ApiError::duplicate("InvalidAMIName.Duplicate", message).with("name", &spec.name));
            }
            let order = snapshot::order(&account, format!("Imported for {id}"), Vec::new(), String::new())?;
            let volume = rec::VolumeSpec { volume_id: snapshot::NO_VOLUME.to_owned(), ..Default::default() };
            let snapshot = snapshot::new_record(&tables, &order, &volume)?;
            (snapshot, storage::guard_epoch(Txn::new(), &tables))
        };
        let root = v1::EbsBlockDevice { snapshot_id: snapshot.snapshot_id.clone(), ..Default::default() };
        spec.block_device_mappings = vec![v1::BlockDeviceMapping {
            device_name: image::root_device_name(&spec),
            ebs: Some(root),
            ..Default::default()
        }];
        let status = rec::ImageStatus {
            schema_version: SCHEMA_VERSION,
            state: v1::ImageState::Pending.into(),
            ..Default::default()
        };
        let mut txn = txn
            .compare_absent(&name_key)
            .put(&name_key, id_value(&id))
            .put(keys::snapshot_spec(&account, &snapshot.snapshot_id), encode(&snapshot))
            .put(keys::image_spec(&account, &id), encode(&spec))
            .put(keys::image_status(&account, &id), encode(&status));
        if let Some(token) = token {
            txn = token.record(txn, std::slice::from_ref(&id));
        }
        if core.commit(txn).await? == Commit::Done {
            return Ok(Reserved::New(Box::new(spec), Box::new(snapshot)));
        }
    }
    Err(ApiError::unavailable("too many changes at the same time; try again"))
}

/// Whether the account has an image of this name.
pub(crate) fn taken(tables: &crate::tables::Tables, account: &str, name: &str) -> bool {
    tables.images.values().any(|entry| {
        let named = |spec: &rec::ImageSpec| spec.account_id == account && spec.name == name && !spec.deregistered;
        let failed = entry.status.as_ref().is_some_and(|status| status.state() == v1::ImageState::Failed);
        !failed && entry.spec.as_deref().is_some_and(named)
    })
}

/// Why an import ended without an image.
enum Failure {
    /// The file is no good; the record says so.
    BadImage(String),
    /// Not the file's fault: as if the call had never been.
    TakeBack(ApiError),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::TakeBack(error)
    }
}

struct Job {
    core: Arc<Core>,
    spec: rec::ImageSpec,
    snapshot: rec::SnapshotSpec,
    file_bytes: u64,
    format: Option<Format>,
    answers: mpsc::Sender<Result<v1::ImportImageResponse, Status>>,
    _permit: OwnedSemaphorePermit,
}

impl Job {
    async fn run(self, messages: Streaming<v1::ImportImageRequest>) {
        let spool = spool_path(&self.core, &self.spec.image_id);
        let outcome = self.import(messages, &spool).await;
        if let Err(error) = tokio::fs::remove_file(&spool).await {
            tracing::debug!(path = %spool.display(), %error, "no spool file to remove");
        }
        let answer = match outcome {
            Ok(converted) => self.finish(Ok(converted)).await,
            Err(Failure::BadImage(why)) => self.finish(Err(why)).await,
            Err(Failure::TakeBack(error)) => {
                tracing::warn!(image = self.spec.image_id, %error, "import taken back");
                if let Err(error) = take_back(&self.core, &self.spec).await {
                    tracing::error!(image = self.spec.image_id, %error, "an import could not be taken back; the next start does it");
                }
                Err(error.into())
            }
        };
        // The caller may be gone; the image is there all the same.
        let _ = self.answers.send(answer).await;
    }

    async fn import(&self, messages: Streaming<v1::ImportImageRequest>, spool: &Path) -> Result<Imported, Failure> {
        tokio::select! {
            uploaded = self.upload(messages, spool) => uploaded?,
            () = self.core.stop.cancelled() => return Err(ApiError::unavailable("the control plane is stopping").into()),
        }
        self.convert(spool).await
    }

    async fn upload(&self, mut messages: Streaming<v1::ImportImageRequest>, spool: &Path) -> Result<(), Failure> {
        use v1::import_image_request::Message;
        let failed = |error: std::io::Error| {
            let message = format!("write the upload to {}: {error}", spool.display());
            match error.kind() {
                std::io::ErrorKind::StorageFull => ApiError::exhausted("InsufficientStorage", message),
                _ => ApiError::internal(message),
            }
        };
        let mut file = File::create(spool).await.map_err(failed)?;
        let (mut written, mut told) = (0u64, 0u64);
        while written < self.file_bytes {
            let message = next(&mut messages).await?.and_then(|message| message.message);
            let count = match &message {
                Some(Message::Chunk(chunk)) => chunk.len() as u64,
                Some(Message::Zeros(zeros)) => *zeros,
                Some(Message::Header(_)) => return Err(ApiError::invalid("header", "came twice").into()),
                None => {
                    let why = format!("the upload ended after {written} of {} bytes", self.file_bytes);
                    return Err(ApiError::new(tonic::Code::Aborted, "UploadAborted", why).into());
                }
            };
            let after = written.checked_add(count).filter(|after| *after <= self.file_bytes).ok_or_else(|| {
                ApiError::invalid("chunk", format!("more than the {} bytes that the header announced", self.file_bytes))
            })?;
            match message {
                Some(Message::Chunk(chunk)) => file.write_all(&chunk).await.map_err(failed)?,
                _ => {
                    use tokio::io::AsyncSeekExt;
                    file.flush().await.map_err(failed)?;
                    file.set_len(after).await.map_err(failed)?;
                    file.seek(std::io::SeekFrom::Start(after)).await.map_err(failed)?;
                }
            }
            written = after;
            if written - told >= UPLOAD_PROGRESS_BYTES {
                told = written;
                self.tell("uploading", written, self.file_bytes);
            }
        }
        file.flush().await.map_err(failed)?;
        Ok(())
    }

    async fn convert(&self, spool: &Path) -> Result<Imported, Failure> {
        let done = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let counter = done.clone();
        let store = self.core.storage.chunks(&self.snapshot.key_domain)?;
        let request = ImportRequest {
            path: spool.to_owned(),
            format: self.format,
            limits: Limits { max_virtual_bytes: self.core.config.max_image_bytes },
            id: SnapshotKey::new(&self.snapshot.snapshot_id).map_err(|error| ApiError::internal(error.to_string()))?,
            epoch: Epoch(self.snapshot.epoch),
        };
        let work = hearth_snapshot::import(
            &store,
            request,
            Arc::new(move |progress| {
                counter.0.store(progress.bytes_done, Ordering::Relaxed);
                counter.1.store(progress.bytes_total, Ordering::Relaxed);
            }),
        );
        tokio::pin!(work);
        loop {
            tokio::select! {
                result = &mut work => return result.map_err(|error| classify(&error)),
                () = tokio::time::sleep(PROGRESS_INTERVAL) => {
                    self.tell("converting", done.0.load(Ordering::Relaxed), done.1.load(Ordering::Relaxed));
                }
            }
        }
    }

    fn tell(&self, step: &str, done_bytes: u64, total_bytes: u64) {
        let progress = v1::Progress { done_bytes, total_bytes, step: step.to_owned() };
        // A caller that is slow to read misses some.
        let _ = self.answers.try_send(Ok(v1::ImportImageResponse { progress: Some(progress), image: None }));
    }

    /// Writes how it ended.
    async fn finish(&self, outcome: Result<Imported, String>) -> Result<v1::ImportImageResponse, Status> {
        let spec = &self.spec;
        let (account, id) = (&spec.account_id, &spec.image_id);
        let spec_key = keys::image_spec(account, id);
        let snapshot_key = keys::snapshot_spec(account, &self.snapshot.snapshot_id);
        let mut status = rec::ImageStatus { schema_version: SCHEMA_VERSION, ..Default::default() };
        match &outcome {
            Ok(imported) => {
                status.set_state(v1::ImageState::Available);
                status.size_bytes = imported.virtual_bytes;
            }
            Err(why) => {
                status.set_state(v1::ImageState::Failed);
                let code = StateReason::INVALID_IMAGE.to_owned();
                status.reason = Some(v1::StateReason { code, message: why.clone() });
            }
        }
        self.core
            .update(|tables| {
                // Tags may have changed meanwhile.
                let Some(known) = tables.images.get(id).and_then(|entry| entry.spec.as_ref()) else {
                    return Err(ApiError::unavailable("the image was taken back"));
                };
                let mut txn = Txn::new()
                    .compare_mod_revision(&spec_key, known.revision)
                    .put(keys::image_status(account, id), encode(&status));
                let Ok(imported) = &outcome else {
                    return Ok((Some(txn.delete(keys::image_name(account, &spec.name)).delete(&snapshot_key)), ()));
                };
                let mut image = (*known.value).clone();
                for ebs in image.block_device_mappings.iter_mut().filter_map(|mapping| mapping.ebs.as_mut()) {
                    ebs.volume_size_bytes = imported.virtual_bytes.next_multiple_of(GIB);
                    ebs.volume_type = super::volume::DEFAULT_TYPE.name().to_owned();
                    ebs.delete_on_termination = Some(true);
                }
                let snapshot = rec::SnapshotSpec { volume_bytes: imported.virtual_bytes, ..self.snapshot.clone() };
                let content = imported.manifest.present_chunks * hearth_snapshot::CHUNK_BYTES as u64;
                let completed = rec::SnapshotStatus {
                    schema_version: SCHEMA_VERSION,
                    state: v1::SnapshotState::Completed.into(),
                    frozen: true,
                    root: imported.manifest.root_hash.to_string(),
                    incremental_bytes: imported.chunks.chunks_written * hearth_snapshot::CHUNK_BYTES as u64,
                    full_bytes: content,
                    completed_ms: clock::now_ms(),
                    ..Default::default()
                };
                txn = txn
                    .put(&spec_key, encode(&image))
                    .put(&snapshot_key, encode(&snapshot))
                    .put(keys::snapshot_status(account, &snapshot.snapshot_id), encode(&completed));
                Ok((Some(txn), ()))
            })
            .await?;
        match outcome {
            Ok(_) => tracing::info!(image = id, name = spec.name, bytes = status.size_bytes, "image available"),
            Err(why) => tracing::warn!(image = id, name = spec.name, why, "import failed"),
        }
        let tables = self.core.tables();
        let (spec, status) = image::find(&tables, account, id)?;
        Ok(v1::ImportImageResponse { progress: None, image: Some(image::view(spec, status)) })
    }
}

/// Tells a file that is no good from a server that cannot work.
fn classify(error: &StorageError) -> Failure {
    match error {
        StorageError::Image(image) if !matches!(image, ImageError::Io { .. }) => Failure::BadImage(image.to_string()),
        error => Failure::TakeBack(ApiError::internal(format!("conversion: {error}"))),
    }
}

/// Makes it as if the import had never been asked for.
pub(crate) async fn take_back(core: &Core, spec: &rec::ImageSpec) -> ApiResult<()> {
    let (account, id) = (&spec.account_id, &spec.image_id);
    let mut txn = Txn::new()
        .delete(keys::image_name(account, &spec.name))
        .delete(keys::image_spec(account, id))
        .delete(keys::image_status(account, id));
    for ebs in spec.block_device_mappings.iter().filter_map(|mapping| mapping.ebs.as_ref()) {
        txn = txn
            .delete(keys::snapshot_spec(account, &ebs.snapshot_id))
            .delete(keys::snapshot_status(account, &ebs.snapshot_id));
    }
    if !spec.client_token.is_empty() {
        txn = txn.delete(keys::client_token(account, CALL, &spec.client_token));
    }
    core.commit(txn).await.map(|_| ())
}
