//! EBS volumes: creating, finding, listing, deleting and modifying them. Attaching is in `attach`.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_Operations.html>

use std::borrow::Cow;
use std::pin::Pin;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::{InstanceState, VolumeId, VolumeState, VolumeType, VolumeTypeError, volume::GIB};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::idempotency::ClientToken;
use super::{Api, snapshot, watch};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::backends;
use crate::check;
use crate::clock;
use crate::core::{Commit, encode};
use crate::keys;
use crate::life;
use crate::listing::Listing;
use crate::modification;
use crate::quotas::{self, Wanted};
use crate::storage::{self, Storage};
use crate::tables::{SCHEMA_VERSION, Tables, Versioned};
use crate::volumes;

const FILTERS: [&str; 17] = [
    "volume-id",
    "snapshot-id",
    "size",
    "volume-type",
    "status",
    "availability-zone",
    "encrypted",
    "create-time",
    "host-id",
    "backend",
    "attachment.instance-id",
    "attachment.device",
    "attachment.status",
    "attachment.delete-on-termination",
    "tag-key",
    "tag-value",
    "tag:",
];
/// Type of volumes for which none was asked.
pub(crate) const DEFAULT_TYPE: VolumeType = VolumeType::Gp3;

pub(crate) fn not_found(ids: &[&str]) -> ApiError {
    ApiError::not_found("InvalidVolume.NotFound", "volume", ids)
}

pub(crate) fn check_id(id: &str) -> ApiResult<()> {
    match id.parse::<VolumeId>() {
        Ok(_) => Ok(()),
        Err(error) => Err(ApiError::malformed_id("InvalidVolumeID.Malformed", "volume_id", &error)),
    }
}

/// An account's volume.
pub(crate) fn find<'a>(tables: &'a Tables, account: &str, id: &str) -> ApiResult<&'a Versioned<rec::VolumeSpec>> {
    check_id(id)?;
    tables.volumes.get(id).filter(|spec| spec.account_id == account).ok_or_else(|| not_found(&[id]))
}

pub(crate) fn wrong_state(spec: &rec::VolumeSpec, action: &str) -> ApiError {
    let (id, state) = (&spec.volume_id, volumes::state_of(spec));
    let message = match state {
        VolumeState::InUse => {
            format!("volume {id} is attached to instance {}; it cannot be {action}", spec.instance_id)
        }
        VolumeState::Error => format!("volume {id} is in error ({}); it cannot be {action}", spec.error),
        _ => format!("volume {id} is {state}; it cannot be {action}"),
    };
    let code = if state == VolumeState::InUse { "VolumeInUse" } else { "IncorrectState" };
    ApiError::wrong_state(code, message).with("volume_id", id).with("state", state)
}

/// Type, size and speed that are asked for, as they will be.
pub(crate) struct Shape {
    pub kind: VolumeType,
    pub size_bytes: u64,
    pub iops: u32,
    pub throughput_mibps: u32,
}

impl Shape {
    /// Checks the wishes. `snapshot_bytes` is the least size, and the size when none is asked for.
    pub fn new(
        kind: &str,
        size_bytes: u64,
        snapshot_bytes: u64,
        iops: Option<u32>,
        throughput_mibps: Option<u32>,
    ) -> ApiResult<Self> {
        let kind = match kind {
            "" => DEFAULT_TYPE,
            kind => kind.parse().map_err(|error: VolumeTypeError| {
                ApiError::invalid("volume_type", error.to_string()).with_reason("UnknownVolumeType")
            })?,
        };
        if size_bytes == 0 && snapshot_bytes == 0 {
            return Err(ApiError::missing("size_bytes"));
        }
        if size_bytes != 0 && !size_bytes.is_multiple_of(GIB) && size_bytes != snapshot_bytes {
            return Err(ApiError::invalid("size_bytes", format!("is {size_bytes}, must be whole GiB")));
        }
        if size_bytes != 0 && size_bytes < snapshot_bytes {
            let message = format!("is {size_bytes}, the snapshot needs {snapshot_bytes}");
            return Err(ApiError::invalid("size_bytes", message));
        }
        let size_bytes = size_bytes.max(snapshot_bytes);
        let limits = kind
            .limits(size_bytes, iops, throughput_mibps)
            .map_err(|error| ApiError::invalid("volume_type", error.to_string()))?;
        Ok(Self { kind, size_bytes, iops: limits.iops, throughput_mibps: limits.throughput_mibps })
    }
}

/// A new volume's record, nowhere yet. It is encrypted if that is asked for or what it is made from is.
pub(crate) fn new_record(
    storage: &Storage,
    account: &str,
    shape: &Shape,
    base: Option<v1::BaseSnapshot>,
    encrypted: bool,
    now_ms: u64,
) -> ApiResult<rec::VolumeSpec> {
    let volume_id = VolumeId::generate()?.to_string();
    let encrypted = encrypted || base.as_ref().is_some_and(storage::is_encrypted);
    let data_key = if encrypted { storage.new_data_key(&volume_id)? } else { bytes::Bytes::new() };
    Ok(rec::VolumeSpec {
        schema_version: SCHEMA_VERSION,
        volume_id: volume_id.clone(),
        account_id: account.to_owned(),
        snapshot_id: base.as_ref().map(|base| base.snapshot_id.clone()).unwrap_or_default(),
        volume: Some(v1::HostVolume {
            volume_id,
            attach_generation: 0,
            size_bytes: shape.size_bytes,
            base,
            iops: shape.iops,
            throughput_mibps: shape.throughput_mibps,
            data_key,
            encrypted,
            ..Default::default()
        }),
        encrypted,
        volume_type: shape.kind.name().to_owned(),
        created_ms: now_ms,
        ..Default::default()
    })
}

fn filter_values<'a>(volume: &'a v1::Volume, name: &str) -> Vec<Cow<'a, str>> {
    let one = |text: &'a str| vec![Cow::Borrowed(text)];
    let of_attachments =
        |pick: &dyn Fn(&'a v1::VolumeAttachment) -> Cow<'a, str>| volume.attachments.iter().map(pick).collect();
    match name {
        "volume-id" => one(&volume.volume_id),
        "snapshot-id" => one(&volume.snapshot_id),
        "size" => vec![volume.size_bytes.div_ceil(GIB).to_string().into()],
        "volume-type" => one(&volume.volume_type),
        "status" => one(state_name(volume.state())),
        "availability-zone" => one(&volume.availability_zone),
        "encrypted" => vec![volume.encrypted.to_string().into()],
        "create-time" => one(&volume.create_time),
        "host-id" => one(&volume.host_id),
        "backend" => one(if volume.backend.is_empty() { "local" } else { &volume.backend }),
        "attachment.instance-id" => of_attachments(&|attachment| attachment.instance_id.as_str().into()),
        "attachment.device" => of_attachments(&|attachment| attachment.device.as_str().into()),
        "attachment.status" => of_attachments(&|attachment| attachment_name(attachment.state()).into()),
        "attachment.delete-on-termination" => {
            of_attachments(&|attachment| attachment.delete_on_termination.to_string().into())
        }
        other => check::tag_values(&volume.tags, other).unwrap_or_default(),
    }
}

fn state_name(state: v1::VolumeState) -> &'static str {
    match state {
        v1::VolumeState::Creating | v1::VolumeState::Unspecified => VolumeState::Creating.name(),
        v1::VolumeState::Available => VolumeState::Available.name(),
        v1::VolumeState::InUse => VolumeState::InUse.name(),
        v1::VolumeState::Deleting => VolumeState::Deleting.name(),
        v1::VolumeState::Deleted => VolumeState::Deleted.name(),
        v1::VolumeState::Error => VolumeState::Error.name(),
    }
}

fn attachment_name(state: v1::AttachmentState) -> &'static str {
    match state {
        v1::AttachmentState::Attaching | v1::AttachmentState::Unspecified => "attaching",
        v1::AttachmentState::Attached => "attached",
        v1::AttachmentState::Detaching => "detaching",
        v1::AttachmentState::Detached => "detached",
        v1::AttachmentState::Busy => "busy",
    }
}

impl Api {
    async fn do_create_volume(&self, account: &str, mut request: v1::CreateVolumeRequest) -> ApiResult<v1::Volume> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        check::tags(&request.tags)?;
        let token = ClientToken::new(account, "CreateVolume", &token_text, &request);
        for _ in 0..super::MAX_ATTEMPTS {
            let (spec, txn) = {
                let tables = self.core.tables();
                if let Some(ids) = token.as_ref().map(|token| token.replay(&tables)).transpose()?.flatten() {
                    let id = ids.first().map_or("", String::as_str);
                    return Ok(volumes::view(&self.core, &tables, find(&tables, account, id)?));
                }
                self.prepare_volume(&tables, account, &request, &token_text, token.as_ref())?
            };
            if request.dry_run {
                let message = "the request would have succeeded, but dry_run is set";
                return Err(ApiError::wrong_state("DryRunOperation", message));
            }
            if self.core.commit(txn).await? == Commit::Done {
                return Ok(volumes::view(&self.core, &self.core.tables(), &spec));
            }
        }
        Err(ApiError::unavailable("too many changes at the same time; try again"))
    }

    fn prepare_volume(
        &self,
        tables: &Tables,
        account: &str,
        request: &v1::CreateVolumeRequest,
        token_text: &str,
        token: Option<&ClientToken>,
    ) -> ApiResult<(rec::VolumeSpec, Txn)> {
        let mut txn = Txn::new();
        let mut base = None;
        if !request.snapshot_id.is_empty() {
            let source = snapshot::find_completed(tables, account, &request.snapshot_id)?;
            txn = source.guard(txn);
            base = Some(source.base());
        }
        let least = base.as_ref().map_or(0, |base| base.size_bytes);
        let shape =
            Shape::new(&request.volume_type, request.size_bytes, least, request.iops, request.throughput_mibps)?;
        txn = quotas::check(&self.core.config, tables, account, &Wanted::volume(shape.size_bytes))?.apply(txn);
        let mut spec = new_record(&self.core.storage, account, &shape, base, request.encrypted, clock::now_ms())?;
        spec.availability_zone = storage::zone(tables, &request.availability_zone)?;
        spec.tags.clone_from(&request.tags);
        spec.client_token = token_text.to_owned();
        let is_up = |host: &str| self.core.live.is_up(host);
        let (backend, host) = backends::choose(tables, &request.backend, &spec.availability_zone, &is_up)?;
        if !backend.is_empty() {
            if !request.snapshot_id.is_empty() || request.encrypted {
                let message =
                    format!("volumes of volume backend '{backend}' begin blank, and are not encrypted by hearth");
                return Err(ApiError::wrong_state("UnsupportedOperation", message));
            }
            spec.volume.get_or_insert_default().backend = backend;
            // That host makes it there.
            spec.creating = true;
            spec.host_id = host;
            spec.generation = 1;
        }
        txn = txn.put(keys::volume(account, &spec.volume_id), encode(&spec));
        if let Some(token) = token {
            txn = token.record(txn, std::slice::from_ref(&spec.volume_id));
        }
        Ok((spec, txn))
    }

    fn do_list_volumes(
        &self,
        account: &str,
        mut request: v1::ListVolumesRequest,
    ) -> ApiResult<v1::ListVolumesResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListVolumes", account, &request, page.as_ref())?
            .ids("volume_ids", &request.volume_ids, check_id)?
            .filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        listing.all_known(|id| find(&tables, account, id).is_ok(), not_found)?;
        let found: Vec<v1::Volume> = tables
            .volumes
            .iter()
            .filter(|(id, spec)| spec.account_id == account && listing.wants(id))
            .map(|(_, spec)| volumes::view(&self.core, &tables, spec))
            .filter(|volume| listing.matches(|name| filter_values(volume, name)))
            .collect();
        let (volumes, page) = listing.page(&found, |volume| &volume.volume_id);
        Ok(v1::ListVolumesResponse { volumes, page })
    }

    async fn do_delete_volume(&self, account: &str, id: &str) -> ApiResult<()> {
        self.core
            .update(|tables| {
                let spec = find(tables, account, id)?;
                match volumes::state_of(spec) {
                    VolumeState::Deleting => return Ok((None, ())),
                    VolumeState::Available | VolumeState::Error if spec.instance_id.is_empty() => {}
                    _ => return Err(wrong_state(spec, "deleted")),
                }
                let mut new = (*spec.value).clone();
                new.deleting = true;
                new.generation = new.generation.saturating_add(1);
                let key = keys::volume(account, id);
                let txn = Txn::new().compare_mod_revision(&key, spec.revision);
                // Where nothing of it is, there is nothing to wait for.
                let nowhere = spec.host_id.is_empty() || tables.host(&spec.host_id).is_none();
                let nowhere = nowhere && backends::of(spec).is_empty();
                Ok((Some(if nowhere { txn.delete(&key) } else { txn.put(&key, encode(&new)) }), ()))
            })
            .await
    }

    async fn do_modify_volume(
        &self,
        account: &str,
        request: v1::ModifyVolumeRequest,
    ) -> ApiResult<v1::VolumeModification> {
        let asked = request.size_bytes.is_some()
            || request.volume_type.is_some()
            || request.iops.is_some()
            || request.throughput_mibps.is_some();
        if !asked {
            return Err(ApiError::missing("size_bytes, volume_type, iops or throughput_mibps"));
        }
        self.core
            .update(|tables| {
                let spec = find(tables, account, &request.volume_id)?;
                if !matches!(volumes::state_of(spec), VolumeState::Available | VolumeState::InUse) {
                    return Err(wrong_state(spec, "modified"));
                }
                if spec.releasing {
                    // Its host uploads it with the size that it was told.
                    let message =
                        format!("volume {} is on its way to another host; try again when it is there", spec.volume_id);
                    return Err(ApiError::wrong_state("IncorrectState", message).with("volume_id", &spec.volume_id));
                }
                if modification::is_going_on(tables, spec) {
                    let message = format!(
                        "volume {} is still being modified: its guest has yet to get the last change",
                        spec.volume_id
                    );
                    let error = ApiError::wrong_state("IncorrectModificationState", message);
                    return Err(error.with("volume_id", &spec.volume_id));
                }
                let mut new = modified(spec, &request)?;
                let gib = |spec: &rec::VolumeSpec| spec.volume.as_ref().map_or(0, |v| v.size_bytes.div_ceil(GIB));
                let growth = Wanted { volume_gib: gib(&new).saturating_sub(gib(spec)), ..Wanted::default() };
                let key = keys::volume(account, &spec.volume_id);
                let mut txn = Txn::new().compare_mod_revision(&key, spec.revision);
                txn = quotas::check(&self.core.config, tables, account, &growth)?.apply(txn);
                let mut told_generation = 0;
                if let Some((instance, status)) = tables.instance(&spec.instance_id) {
                    let mut with = (*instance.value).clone();
                    with.generation = with.generation.saturating_add(1);
                    let of_instance = with.spec.iter_mut().flat_map(|spec| &mut spec.volumes);
                    let open = life::state_of(&instance, status.as_deref()) != InstanceState::Stopped;
                    for attached in of_instance.filter(|attached| volumes::id_of(attached) == spec.volume_id) {
                        attached.volume.clone_from(&new.volume);
                        told_generation = if open { with.generation } else { 0 };
                    }
                    let key = keys::instance_spec(account, &spec.instance_id);
                    let status_key = keys::instance_status(account, &spec.instance_id);
                    txn = txn
                        .compare_mod_revision(&key, instance.revision)
                        .compare_mod_revision(&status_key, status.map_or(0, |status| status.revision))
                        .put(&key, encode(&with));
                }
                if told_generation == 0 {
                    modification::end(&mut new);
                } else if let Some(change) = &mut new.modification {
                    change.told_generation = told_generation;
                }
                Ok((Some(txn.put(&key, encode(&new))), ()))
            })
            .await?;
        let tables = self.core.tables();
        let shown = volumes::view(&self.core, &tables, find(&tables, account, &request.volume_id)?).modification;
        shown.ok_or_else(|| ApiError::internal("the modification cannot be shown"))
    }

    fn do_list_modifications(
        &self,
        account: &str,
        mut request: v1::ListVolumeModificationsRequest,
    ) -> ApiResult<v1::ListVolumeModificationsResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListVolumeModifications", account, &request, page.as_ref())?
            .ids("volume_ids", &request.volume_ids, check_id)?
            .filters(&request.filters, &modification::FILTERS)?;
        let tables = self.core.tables();
        listing.all_known(|id| find(&tables, account, id).is_ok(), not_found)?;
        let found: Vec<v1::VolumeModification> = tables
            .volumes
            .iter()
            .filter(|(id, spec)| spec.account_id == account && listing.wants(id))
            .filter_map(|(_, spec)| modification::view(&tables, spec))
            .filter(|found| listing.matches(|name| modification::filter_values(found, name)))
            .collect();
        let (modifications, page) = listing.page(&found, |found| &found.volume_id);
        Ok(v1::ListVolumeModificationsResponse { modifications, page })
    }
}

fn modified(spec: &rec::VolumeSpec, request: &v1::ModifyVolumeRequest) -> ApiResult<rec::VolumeSpec> {
    let mut new = spec.clone();
    let volume = new.volume.get_or_insert_default();
    let size = request.size_bytes.unwrap_or(volume.size_bytes);
    if size < volume.size_bytes {
        let message = format!("is {size}, the volume has {}; volumes only grow", volume.size_bytes);
        return Err(ApiError::invalid("size_bytes", message));
    }
    let kind = request.volume_type.as_deref().unwrap_or(&spec.volume_type);
    // What was provisioned is kept with the type; another type begins with its own figures.
    let same = kind == spec.volume_type;
    let provisioned = same && matches!(kind, "gp3" | "io1" | "io2");
    let kept = (provisioned || (same && volume.iops == 0)).then_some(volume.iops);
    // A type that is unknown is refused below.
    let iops_after = |size| kind.parse::<VolumeType>().ok().and_then(|kind| kind.iops_after_change(size));
    let iops = request.iops.or(kept).or_else(|| iops_after(size).filter(|_| !same));
    let throughput = request
        .throughput_mibps
        .or_else(|| (same && (kind == "gp3" || volume.throughput_mibps == 0)).then_some(volume.throughput_mibps));
    let shape = Shape::new(kind, size, volume.size_bytes, iops, throughput)?;
    let old = rec::VolumeModification {
        original_size_bytes: volume.size_bytes,
        original_volume_type: spec.volume_type.clone(),
        original_iops: volume.iops,
        original_throughput_mibps: volume.throughput_mibps,
        started_ms: clock::now_ms(),
        ended_ms: 0,
        told_generation: 0,
        error: String::new(),
        target_size_bytes: shape.size_bytes,
        target_volume_type: shape.kind.name().to_owned(),
        target_iops: shape.iops,
        target_throughput_mibps: shape.throughput_mibps,
    };
    volume.size_bytes = shape.size_bytes;
    volume.iops = shape.iops;
    volume.throughput_mibps = shape.throughput_mibps;
    new.volume_type = shape.kind.name().to_owned();
    new.modification = Some(old);
    Ok(new)
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::volume_service_server::VolumeService for Api {
    async fn create_volume(&self, request: Request<v1::CreateVolumeRequest>) -> Answer<v1::Volume> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_create_volume(&account, request.into_inner()).await?))
    }

    async fn list_volumes(&self, request: Request<v1::ListVolumesRequest>) -> Answer<v1::ListVolumesResponse> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_volumes(&account, request.into_inner())?))
    }

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Answer<v1::Volume> {
        let account = auth::caller(&request)?.account_id;
        let tables = self.core.tables();
        Ok(Response::new(volumes::view(&self.core, &tables, find(&tables, &account, &request.get_ref().volume_id)?)))
    }

    async fn delete_volume(&self, request: Request<v1::DeleteVolumeRequest>) -> Answer<v1::DeleteVolumeResponse> {
        let account = auth::caller(&request)?.account_id;
        self.do_delete_volume(&account, &request.into_inner().volume_id).await?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }

    async fn attach_volume(&self, request: Request<v1::AttachVolumeRequest>) -> Answer<v1::VolumeAttachment> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_attach_volume(&account, request.into_inner()).await?))
    }

    async fn detach_volume(&self, request: Request<v1::DetachVolumeRequest>) -> Answer<v1::VolumeAttachment> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_detach_volume(&account, request.into_inner()).await?))
    }

    async fn modify_volume(&self, request: Request<v1::ModifyVolumeRequest>) -> Answer<v1::VolumeModification> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_modify_volume(&account, request.into_inner()).await?))
    }

    async fn list_volume_modifications(
        &self,
        request: Request<v1::ListVolumeModificationsRequest>,
    ) -> Answer<v1::ListVolumeModificationsResponse> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_modifications(&account, request.into_inner())?))
    }

    type WatchVolumesStream = Pin<Box<dyn Stream<Item = Result<v1::Volume, Status>> + Send>>;

    async fn watch_volumes(&self, request: Request<v1::WatchVolumesRequest>) -> Answer<Self::WatchVolumesStream> {
        let account = auth::caller(&request)?.account_id;
        let ids = check::ids("volume_ids", &request.into_inner().volume_ids)?;
        Ok(Response::new(self.watch::<watch::Volumes>(account, ids)?))
    }
}
