//! Importing images: upload to a spool file, conversion to a snapshot, registration.
//!
//! The image's record stands in state `pending` from the first message on, so name and client token are taken. Clients bring the
//! upload forward one after the other ([`upload`]); how much is durably in the spool file stands in the image's status. When it is
//! whole, one transaction opens the snapshot, and from there the control plane goes on alone, after crashes too ([`convert`]). Clients
//! only look on. An upload that breaks off waits for its client for [`crate::ControlConfig::upload_ttl`] if it is resumable, and is
//! taken back at once otherwise; a file that is no usable image ends in state `failed` with the reason. The snapshot is whole in the
//! object store before the records say so.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_snapshot::{Format, PrefixDigest};
use hearth_store::Txn;
use hearth_types::ImageId;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::idempotency::ClientToken;
use super::image;
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode, id_value};
use crate::keys;
use crate::quotas::{self, Wanted};
use crate::tables::{SCHEMA_VERSION, Tables, Versioned};

pub(crate) mod convert;
pub(crate) mod seats;
pub(crate) mod spool;
mod upload;

pub(crate) type ImportStream = Pin<Box<dyn Stream<Item = Result<v1::ImportImageResponse, Status>> + Send>>;

const CALL: &str = "ImportImage";
/// Longest pause between two messages of an upload.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest pause between two looks at an import that its client waits for.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);
const MAX_DESCRIPTION_CHARS: usize = 1000;
const MAX_CMDLINE_CHARS: usize = 1500;

/// An import that has not ended.
pub(crate) struct Pending {
    pub spec: Versioned<rec::ImageSpec>,
    pub status: Versioned<rec::ImageStatus>,
    pub job: rec::ImportJob,
}

/// The import of this image, if it has not ended.
pub(crate) fn pending(tables: &Tables, image: &str) -> Option<Pending> {
    let entry = tables.images.get(image)?;
    let spec = entry.spec.clone().filter(|spec| !spec.deregistered)?;
    let status = entry.status.clone().filter(|status| status.state() == v1::ImageState::Pending)?;
    let job = spec.import.clone()?;
    Some(Pending { spec, status, job })
}

impl Pending {
    /// Whether the upload has come to its end.
    pub fn is_whole(&self) -> bool {
        self.snapshot_id().is_some()
    }

    /// The snapshot, which is opened when the upload is whole.
    pub fn snapshot_id(&self) -> Option<&str> {
        image::root_snapshot(&self.spec)
    }

    /// What the transaction is made from must not have changed.
    fn guard(&self, txn: Txn) -> Txn {
        let (account, id) = (&self.spec.account_id, &self.spec.image_id);
        txn.compare_mod_revision(keys::image_spec(account, id), self.spec.revision)
            .compare_mod_revision(keys::image_status(account, id), self.status.revision)
    }
}

/// Whether a snapshot is what an import works on, and goes on after a restart.
pub(crate) fn is_being_imported(tables: &Tables, snapshot: &str) -> bool {
    tables.images.keys().any(|id| pending(tables, id).is_some_and(|found| found.snapshot_id() == Some(snapshot)))
}

/// Whether nobody has brought the import forward for too long.
fn is_overdue(core: &Core, found: &Pending) -> bool {
    let ttl = core.config.upload_ttl;
    // Nobody could come while there was no control plane.
    clock::now_ms() >= found.status.upload_active_ms.saturating_add(clock::as_ms(ttl)) && core.live.uptime() >= ttl
}

/// Whether an upload's client has stayed away for too long.
pub(crate) fn is_abandoned(core: &Core, found: &Pending) -> bool {
    !found.is_whole() && is_overdue(core, found) && !core.uploads.is_taken(&found.spec.image_id)
}

/// How far a pending import is, and when it is given up unless its client comes back.
pub(crate) fn seen(core: &Core, found: &Pending) -> (v1::Progress, String) {
    let id = &found.spec.image_id;
    let progress = core.live.progress(id).unwrap_or_else(|| v1::Progress {
        done_bytes: found.status.uploaded_bytes,
        total_bytes: found.job.file_bytes,
        step: if found.is_whole() { "uploaded" } else { "upload interrupted" }.to_owned(),
    });
    let waits = !found.is_whole() && !core.uploads.is_taken(id);
    let expires = found.status.upload_active_ms.saturating_add(clock::as_ms(core.config.upload_ttl));
    (progress, if waits { clock::rfc3339(expires) } else { String::new() })
}

/// Reads the header, finds or reserves the image, and lets the rest go on by itself.
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
    check_header(&core, &header)?;
    let params = v1::ImportImageHeader { client_token: String::new(), ..header.clone() };
    let token = ClientToken::new(&account, CALL, &header.client_token, &params);
    let known = known(&core, token.as_ref(), &account)?;
    let (begun, permit) = match known {
        Some(begun) => (begun, None),
        None => {
            let permit = permit_for(&core)?;
            let spec = new_spec(&account, header)?;
            let worker = core.clone();
            let reserved = async move { reserve(&worker, spec, token.as_ref()).await };
            (super::detached(&core, reserved).await?, Some(permit))
        }
    };
    let image_id = match begun {
        Begun::Ended(image) => {
            let answer = v1::ImportImageResponse { image: Some(*image), ..Default::default() };
            return Ok(Box::pin(tokio_stream::once(Ok(answer))));
        }
        Begun::Open(image_id) => image_id,
    };
    let (answers, stream) = mpsc::channel(16);
    let caller = Caller { core: core.clone(), account, image_id, answers };
    core.tasks.spawn(async move {
        let answer = caller.serve(messages, permit).await;
        // The caller may be gone; the import goes on all the same, or waits.
        let _ = caller.answers.send(answer.map_err(Status::from)).await;
    });
    Ok(Box::pin(ReceiverStream::new(stream)))
}

fn new_spec(account: &str, header: v1::ImportImageHeader) -> ApiResult<rec::ImageSpec> {
    let v1::ImportImageHeader { file_bytes, format, resumable, .. } = header;
    Ok(rec::ImageSpec {
        schema_version: SCHEMA_VERSION,
        image_id: ImageId::generate()?.to_string(),
        account_id: account.to_owned(),
        name: header.name,
        description: header.description,
        boot: header.boot,
        tags: header.tags,
        created_ms: clock::now_ms(),
        client_token: header.client_token,
        import: Some(rec::ImportJob { file_bytes, format, resumable }),
        ..Default::default()
    })
}

/// The right to be one of the imports that are worked on now.
fn permit_for(core: &Core) -> ApiResult<OwnedSemaphorePermit> {
    let limit = core.config.max_concurrent_imports;
    core.imports.clone().try_acquire_owned().map_err(|_| {
        ApiError::exhausted("RequestLimitExceeded", format!("{limit} imports are going on; try again later"))
    })
}

async fn next(messages: &mut Streaming<v1::ImportImageRequest>) -> ApiResult<Option<v1::ImportImageRequest>> {
    match tokio::time::timeout(UPLOAD_TIMEOUT, messages.message()).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(status)) => Err(upload::broken_off(format!("the upload broke off: {}", status.message()))),
        Err(_) => Err(upload::broken_off("the upload paused for too long")),
    }
}

fn check_header(core: &Core, header: &v1::ImportImageHeader) -> ApiResult<()> {
    check::name("name", &header.name)?;
    check::text("description", &header.description, MAX_DESCRIPTION_CHARS)?;
    check::tags(&header.tags)?;
    check::client_token(&header.client_token)?;
    check_boot(header.boot.as_ref())?;
    if !header.format.is_empty() {
        let format = header.format.parse::<Format>();
        format.map_err(|error| ApiError::invalid("format", error.to_string()))?;
    }
    if header.resumable && header.client_token.is_empty() {
        return Err(ApiError::invalid("client_token", "must be given, to find a resumable upload again"));
    }
    let most = core.config.max_image_bytes;
    match header.file_bytes {
        bytes if bytes == 0 || bytes > most => {
            Err(ApiError::invalid("file_bytes", format!("is {bytes}, must be 1..={most}")))
        }
        _ => Ok(()),
    }
}

/// Kernel command lines have an end.
pub(crate) fn check_boot(boot: Option<&v1::BootOverride>) -> ApiResult<()> {
    let Some(boot) = boot else { return Ok(()) };
    check::text("boot.extra_cmdline", &boot.extra_cmdline, MAX_CMDLINE_CHARS)?;
    check::text("boot.cmdline", &boot.cmdline, MAX_CMDLINE_CHARS)
}

/// Refuses a name that an image of the account has.
pub(crate) fn check_name_is_free(tables: &Tables, account: &str, name: &str) -> ApiResult<()> {
    let holder = tables.images.iter().find(|(_, entry)| {
        let named = |spec: &rec::ImageSpec| spec.account_id == account && spec.name == name && !spec.deregistered;
        let failed = entry.status.as_ref().is_some_and(|status| status.state() == v1::ImageState::Failed);
        !failed && entry.spec.as_deref().is_some_and(named)
    });
    let Some((id, _)) = holder else { return Ok(()) };
    let message = match pending(tables, id) {
        Some(_) => format!(
            "an unfinished import, {id}, has the name '{name}'; go on with the same file and parameters, or deregister it"
        ),
        None => format!("there is an image named '{name}' already"),
    };
    Err(ApiError::duplicate("InvalidAMIName.Duplicate", message).with("name", name).with("image_id", id))
}

/// What stands behind a call.
enum Begun {
    /// An import that has not ended.
    Open(String),
    /// The answer of one that has, or that is not to be continued.
    Ended(Box<v1::Image>),
}

/// What an earlier call with this token has begun.
fn known(core: &Core, token: Option<&ClientToken>, account: &str) -> ApiResult<Option<Begun>> {
    let tables = core.tables();
    let Some(ids) = token.map(|token| token.replay(&tables)).transpose()?.flatten() else { return Ok(None) };
    let id = ids.first().map_or("", String::as_str);
    let (spec, status) = image::find(&tables, account, id)?;
    Ok(Some(match pending(&tables, id).filter(|found| found.job.resumable) {
        Some(_) => Begun::Open(id.to_owned()),
        None => Begun::Ended(Box::new(image::view(spec, status))),
    }))
}

/// Takes name and token.
async fn reserve(core: &Core, spec: rec::ImageSpec, token: Option<&ClientToken>) -> ApiResult<Begun> {
    let (account, id) = (&spec.account_id, &spec.image_id);
    let name_key = keys::image_name(account, &spec.name);
    let status = rec::ImageStatus {
        schema_version: SCHEMA_VERSION,
        state: v1::ImageState::Pending.into(),
        upload_active_ms: clock::now_ms(),
        ..Default::default()
    };
    let mut txn = Txn::new()
        .compare_absent(&name_key)
        .put(&name_key, id_value(id))
        .put(keys::image_spec(account, id), encode(&spec))
        .put(keys::image_status(account, id), encode(&status));
    if let Some(token) = token {
        txn = token.record(txn, std::slice::from_ref(id));
    }
    for _ in 0..super::MAX_ATTEMPTS {
        if let Some(known) = known(core, token, account)? {
            return Ok(known);
        }
        let txn = {
            let tables = core.tables();
            check_name_is_free(&tables, account, &spec.name)?;
            let wanted = Wanted { images: 1, snapshots: 1, ..Wanted::default() };
            quotas::check(&core.config, &tables, account, &wanted)?.apply(txn.clone())
        };
        if core.commit(txn).await? == Commit::Done {
            return Ok(Begun::Open(id.clone()));
        }
    }
    Err(ApiError::unavailable("too many changes at the same time; try again"))
}

/// Notes how much of an upload is durable.
async fn note_position(core: &Core, id: &str, offset: u64, digest: PrefixDigest) -> ApiResult<()> {
    core.update(|tables| {
        let Some(found) = pending(tables, id) else { return Err(gone(id)) };
        let status = rec::ImageStatus {
            uploaded_bytes: offset,
            uploaded_digest: digest.as_bytes().to_vec(),
            upload_active_ms: clock::now_ms(),
            ..(*found.status.value).clone()
        };
        let key = keys::image_status(&found.spec.account_id, id);
        Ok((Some(found.guard(Txn::new()).put(key, encode(&status))), ()))
    })
    .await
}

fn gone(id: &str) -> ApiError {
    let message = format!("the import of image {id} was given up: it was deregistered, or nobody went on with it");
    ApiError::new(Code::NotFound, "InvalidAMIID.NotFound", message).with("image_id", id)
}

/// A client of an import.
struct Caller {
    core: Arc<Core>,
    account: String,
    image_id: String,
    answers: mpsc::Sender<Result<v1::ImportImageResponse, Status>>,
}

impl Caller {
    /// Brings the upload forward and looks on until there is an image.
    async fn serve(
        &self,
        messages: Streaming<v1::ImportImageRequest>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> ApiResult<v1::ImportImageResponse> {
        let found = pending(&self.core.tables(), &self.image_id);
        match found {
            Some(found) if found.is_whole() => {
                let (offset, digest) = (found.status.uploaded_bytes, found.status.uploaded_digest.clone().into());
                let position = v1::UploadPosition { image_id: self.image_id.clone(), offset, digest };
                self.tell_position(position).await;
            }
            _ => upload::receive(self, messages, permit).await?,
        }
        let mut told = None;
        let mut changes = self.core.changes();
        loop {
            if let Some(image) = self.outcome()? {
                return Ok(v1::ImportImageResponse { image: Some(image), ..Default::default() });
            }
            let progress = self.core.live.progress(&self.image_id);
            if let Some(new) = progress.as_ref().filter(|_| progress != told) {
                self.tell(new);
            }
            told = progress;
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                _ = changes.recv() => {}
                () = self.answers.closed() => return Err(upload::broken_off("the client has gone")),
                () = self.core.stop.cancelled() => return Err(ApiError::unavailable("the control plane is stopping")),
            }
        }
    }

    /// The image, when the import has ended.
    fn outcome(&self) -> ApiResult<Option<v1::Image>> {
        let tables = self.core.tables();
        if pending(&tables, &self.image_id).is_some() {
            return Ok(None);
        }
        let (spec, status) = image::find(&tables, &self.account, &self.image_id).map_err(|_| self.gone())?;
        Ok(Some(image::view(spec, status)))
    }

    fn gone(&self) -> ApiError {
        gone(&self.image_id)
    }

    fn tell(&self, progress: &v1::Progress) {
        let answer = v1::ImportImageResponse { progress: Some(progress.clone()), ..Default::default() };
        // A caller that is slow to read misses some.
        let _ = self.answers.try_send(Ok(answer));
    }

    async fn tell_position(&self, position: v1::UploadPosition) {
        let answer = v1::ImportImageResponse { upload: Some(position), ..Default::default() };
        // Whether the caller is gone shows when it is listened to.
        let _ = self.answers.send(Ok(answer)).await;
    }
}

/// Forgets an import as if it had never been asked for.
pub(crate) fn take_back_txn(spec: &rec::ImageSpec) -> Txn {
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
    forget_token(txn, spec)
}

/// Another call with the same token begins anew.
pub(crate) fn forget_token(txn: Txn, spec: &rec::ImageSpec) -> Txn {
    match spec.client_token.as_str() {
        "" => txn,
        token => txn.delete(keys::client_token(&spec.account_id, CALL, token)),
    }
}

/// Takes back an import that has not ended; `false` when it has.
pub(crate) async fn take_back(core: &Core, id: &str) -> ApiResult<bool> {
    core.update(|tables| match pending(tables, id) {
        Some(found) => Ok((Some(found.guard(take_back_txn(&found.spec))), true)),
        None => Ok((None, false)),
    })
    .await
}

/// [`take_back`], and ends whatever is being done for it.
pub(crate) async fn give_up(core: &Core, id: &str) -> ApiResult<bool> {
    if !take_back(core, id).await? {
        return Ok(false);
    }
    core.jobs.cancel(id);
    // Whoever uploads hears that the import is gone, and rises.
    let _seat = core.uploads.take(id).await;
    spool::remove(core, id).await;
    Ok(true)
}
