//! Importing images: upload to a spool file, conversion to a raw disk, registration.
//!
//! The image's records stand in state `pending` from the first message on, so its name and client token are taken. An upload that
//! breaks off takes everything back, as does a crash (at the next start); a file that is no usable image ends in state
//! `failed` with the reason. The raw disk appears whole under its final name before the record says `available`.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_snapshot::{Converted, Format, ImageError, Limits};
use hearth_store::Txn;
use hearth_types::{ImageId, StateReason};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::idempotency::ClientToken;
use super::image;
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode, id_value};
use crate::keys;
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

/// File of an image's raw disk.
pub(crate) fn image_path(core: &Core, id: &str) -> PathBuf {
    core.config.image_dir().join(format!("{id}.raw"))
}

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
    if let Some(image) = replay(&core, &account, token.as_ref())? {
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
        deregistered: false,
        client_token: header.client_token,
    };
    let worker_core = core.clone();
    let begun =
        super::detached(
            &worker_core,
            async move { reserve(&core, &spec, token.as_ref()).await.map(|image| (spec, image)) },
        );
    let (spec, replayed) = begun.await?;
    if let Some(image) = replayed {
        return Ok(Box::pin(tokio_stream::once(Ok(image))));
    }
    let (answers, stream) = mpsc::channel(16);
    let tasks = worker_core.tasks.clone();
    let job = Job { core: worker_core, spec, file_bytes: header.file_bytes, format, answers, _permit: permit };
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
    if let Some(boot) = &header.boot {
        check::text("boot.extra_cmdline", &boot.extra_cmdline, MAX_CMDLINE_CHARS)?;
        check::text("boot.cmdline", &boot.cmdline, MAX_CMDLINE_CHARS)?;
    }
    let most = core.config.max_image_bytes;
    if header.file_bytes == 0 || header.file_bytes > most {
        return Err(ApiError::invalid("file_bytes", format!("is {}, must be 1..={most}", header.file_bytes)));
    }
    match header.format.as_str() {
        "" => Ok(None),
        format => format.parse().map(Some).map_err(|error| ApiError::invalid("format", format!("{error}"))),
    }
}

/// The answer of an earlier call with this token.
fn replay(core: &Core, account: &str, token: Option<&ClientToken>) -> ApiResult<Option<v1::ImportImageResponse>> {
    let tables = core.tables();
    let Some(ids) = token.map(|token| token.replay(&tables)).transpose()?.flatten() else { return Ok(None) };
    let id = ids.first().map_or("", String::as_str);
    let (spec, status) = image::find(&tables, account, id)?;
    Ok(Some(v1::ImportImageResponse { progress: None, image: Some(image::view(spec, status)) }))
}

/// Takes the name and the token; `Some` when another call with the same token was faster.
async fn reserve(
    core: &Core,
    spec: &rec::ImageSpec,
    token: Option<&ClientToken>,
) -> ApiResult<Option<v1::ImportImageResponse>> {
    let (account, id) = (&spec.account_id, &spec.image_id);
    let name_key = keys::image_name(account, &spec.name);
    let status = rec::ImageStatus {
        schema_version: SCHEMA_VERSION,
        state: v1::ImageState::Pending.into(),
        ..Default::default()
    };
    let mut txn = Txn::new()
        .compare_absent(&name_key)
        .put(&name_key, id_value(id))
        .put(keys::image_spec(account, id), encode(spec))
        .put(keys::image_status(account, id), encode(&status));
    if let Some(token) = token {
        txn = token.record(txn, std::slice::from_ref(id));
    }
    match core.commit(txn).await? {
        Commit::Done => Ok(None),
        Commit::Conflict(_) => match replay(core, account, token)? {
            Some(image) => Ok(Some(image)),
            None => {
                let message = format!("there is an image named '{}' already", spec.name);
                Err(ApiError::duplicate("InvalidAMIName.Duplicate", message).with("name", &spec.name))
            }
        },
    }
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

    async fn import(&self, messages: Streaming<v1::ImportImageRequest>, spool: &Path) -> Result<Converted, Failure> {
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

    async fn convert(&self, spool: &Path) -> Result<Converted, Failure> {
        let done = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let (counter, input) = (done.clone(), spool.to_owned());
        let output = image_path(&self.core, &self.spec.image_id);
        let format = self.format;
        let limits = Limits { max_virtual_bytes: self.core.config.max_image_bytes };
        let mut work = tokio::task::spawn_blocking(move || {
            hearth_snapshot::convert_with_limits(&input, format, &output, limits, &|bytes, all| {
                counter.0.store(bytes, Ordering::Relaxed);
                counter.1.store(all, Ordering::Relaxed);
            })
        });
        loop {
            tokio::select! {
                result = &mut work => {
                    return match result {
                        Ok(Ok(converted)) => Ok(converted),
                        Ok(Err(error)) => Err(classify(&error)),
                        Err(error) => Err(ApiError::internal(format!("conversion ended unexpectedly: {error}")).into()),
                    };
                }
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
    async fn finish(&self, outcome: Result<Converted, String>) -> Result<v1::ImportImageResponse, Status> {
        let spec = &self.spec;
        let (account, id) = (&spec.account_id, &spec.image_id);
        let mut status = rec::ImageStatus { schema_version: SCHEMA_VERSION, ..Default::default() };
        let mut txn = Txn::new();
        match &outcome {
            Ok(converted) => {
                status.set_state(v1::ImageState::Available);
                status.size_bytes = converted.virtual_bytes;
                status.sha256.clone_from(&converted.sha256);
            }
            Err(why) => {
                status.set_state(v1::ImageState::Failed);
                let code = StateReason::INVALID_IMAGE.to_owned();
                status.reason = Some(v1::StateReason { code, message: why.clone() });
                txn = txn.delete(keys::image_name(account, &spec.name));
            }
        }
        let key = keys::image_status(account, id);
        let txn = txn.compare_exists(keys::image_spec(account, id)).put(&key, encode(&status));
        self.core.commit(txn).await?;
        match outcome {
            Ok(_) => tracing::info!(image = id, name = spec.name, bytes = status.size_bytes, "image available"),
            Err(why) => tracing::warn!(image = id, name = spec.name, why, "import failed"),
        }
        // Tags may have changed meanwhile.
        let tables = self.core.tables();
        let (spec, status) = image::find(&tables, account, id)?;
        Ok(v1::ImportImageResponse { progress: None, image: Some(image::view(spec, status)) })
    }
}

/// Tells a file that is no good from a server that cannot work.
fn classify(error: &ImageError) -> Failure {
    match error {
        ImageError::Io { .. } => Failure::TakeBack(ApiError::internal(format!("conversion: {error}"))),
        error => Failure::BadImage(error.to_string()),
    }
}

/// Makes it as if the import had never been asked for.
pub(crate) async fn take_back(core: &Core, spec: &rec::ImageSpec) -> ApiResult<()> {
    let (account, id) = (&spec.account_id, &spec.image_id);
    let mut txn = Txn::new()
        .delete(keys::image_name(account, &spec.name))
        .delete(keys::image_spec(account, id))
        .delete(keys::image_status(account, id));
    if !spec.client_token.is_empty() {
        txn = txn.delete(keys::client_token(account, CALL, &spec.client_token));
    }
    core.commit(txn).await.map(|_| ())
}
