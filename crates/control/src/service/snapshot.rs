//! EBS snapshots: making, finding, listing and deleting them. Those that no host makes are in `copy_snapshot`.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateSnapshot.html> and its neighbours.

use std::borrow::Cow;
use std::pin::Pin;
use std::time::Duration;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::{Revision, Txn};
use hearth_types::volume::GIB;
use hearth_types::{SnapshotId, SnapshotState, VolumeState, VolumeType};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::idempotency::ClientToken;
use super::{Api, detached, instance, snapshot_set, volume, watch};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::backends;
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode};
use crate::keys;
use crate::listing::Listing;
use crate::quotas::{self, Wanted};
use crate::storage;
use crate::tables::{SCHEMA_VERSION, SnapshotEntry, Tables, Versioned};
use crate::volumes;

const FILTERS: [&str; 12] = [
    "snapshot-id",
    "volume-id",
    "volume-size",
    "description",
    "status",
    "progress",
    "start-time",
    "encrypted",
    "owner-id",
    "tag-key",
    "tag-value",
    "tag:",
];
const MAX_DESCRIPTION_CHARS: usize = 255;
/// How long the host has to fix the point in time.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(20);
/// What EC2 shows as the volume of a snapshot that was made of none.
pub(crate) const NO_VOLUME: &str = "vol-ffffffffffffffff0";

pub(crate) fn not_found(ids: &[&str]) -> ApiError {
    ApiError::not_found("InvalidSnapshot.NotFound", "snapshot", ids)
}

pub(crate) fn check_id(id: &str) -> ApiResult<()> {
    match id.parse::<SnapshotId>() {
        Ok(_) => Ok(()),
        Err(error) => Err(ApiError::malformed_id("InvalidSnapshotID.Malformed", "snapshot_id", &error)),
    }
}

pub(crate) fn state_of(status: Option<&rec::SnapshotStatus>) -> SnapshotState {
    match status.map(|status| status.state()) {
        Some(v1::SnapshotState::Completed) => SnapshotState::Completed,
        Some(v1::SnapshotState::Error) => SnapshotState::Error,
        _ => SnapshotState::Pending,
    }
}

/// A snapshot as the API shows it.
pub(crate) fn view(core: &Core, spec: &rec::SnapshotSpec, status: Option<&rec::SnapshotStatus>) -> v1::Snapshot {
    let state = state_of(status);
    let status = status.cloned().unwrap_or_default();
    let progress = match state {
        SnapshotState::Completed => 100,
        SnapshotState::Error => 0,
        // It waits for the others of its instant.
        SnapshotState::Pending if status.stored => 100,
        SnapshotState::Pending => core.live.percent(&spec.snapshot_id),
    };
    v1::Snapshot {
        snapshot_id: spec.snapshot_id.clone(),
        account_id: spec.account_id.clone(),
        volume_id: spec.volume_id.clone(),
        volume_size_bytes: spec.volume_bytes,
        description: spec.description.clone(),
        state: match state {
            SnapshotState::Pending => v1::SnapshotState::Pending,
            SnapshotState::Completed => v1::SnapshotState::Completed,
            SnapshotState::Error => v1::SnapshotState::Error,
        }
        .into(),
        state_reason: status.reason,
        progress,
        start_time: clock::rfc3339(spec.created_ms),
        completion_time: if status.completed_ms == 0 { String::new() } else { clock::rfc3339(status.completed_ms) },
        encrypted: spec.encrypted,
        tags: spec.tags.clone(),
        incremental_bytes: status.incremental_bytes,
        full_snapshot_bytes: status.full_bytes,
    }
}

fn shown(entry: &SnapshotEntry) -> Option<&Versioned<rec::SnapshotSpec>> {
    entry.spec.as_ref().filter(|spec| !spec.deleted)
}

/// An account's snapshot.
pub(crate) fn find<'a>(
    tables: &'a Tables,
    account: &str,
    id: &str,
) -> ApiResult<(&'a Versioned<rec::SnapshotSpec>, Option<&'a Versioned<rec::SnapshotStatus>>)> {
    check_id(id)?;
    let entry = tables.snapshots.get(id).ok_or_else(|| not_found(&[id]))?;
    let spec = shown(entry).filter(|spec| spec.account_id == account).ok_or_else(|| not_found(&[id]))?;
    Ok((spec, entry.status.as_ref()))
}

/// A snapshot that something can be made from.
pub(crate) struct Source {
    pub spec: rec::SnapshotSpec,
    revision: Revision,
    root: String,
}

impl Source {
    /// The snapshot must still be there when the transaction is done.
    pub fn guard(&self, txn: Txn) -> Txn {
        txn.compare_mod_revision(keys::snapshot_spec(&self.spec.account_id, &self.spec.snapshot_id), self.revision)
    }

    /// As [`Self::guard`], for an image that is to stand on it: whoever deletes the snapshot at the same time has to look again.
    pub fn pin(&self, txn: Txn) -> Txn {
        let key = keys::snapshot_spec(&self.spec.account_id, &self.spec.snapshot_id);
        let (key_bytes, record) = (key.clone(), encode(&self.spec));
        let is_there = txn.ops.iter().any(|op| matches!(op, hearth_store::Op::Put { key, .. } if *key == key_bytes));
        if is_there { txn } else { self.guard(txn).put(key, record) }
    }

    /// What a volume made from it starts with.
    pub fn base(&self) -> v1::BaseSnapshot {
        v1::BaseSnapshot {
            snapshot_id: self.spec.snapshot_id.clone(),
            root: self.root.clone(),
            size_bytes: self.spec.volume_bytes,
            key_domain: Some(v1::KeyDomain { name: self.spec.key_domain.clone(), ..Default::default() }),
        }
    }
}

/// A complete snapshot of the account, or one of an operator that a registered image stands on.
pub(crate) fn find_completed(tables: &Tables, account: &str, id: &str) -> ApiResult<Source> {
    check_id(id)?;
    let usable = |spec: &rec::SnapshotSpec| {
        let owner = tables.accounts.get(&spec.account_id);
        // What is encrypted is for its account alone.
        spec.account_id == account
            || (owner.is_some_and(|owner| owner.is_operator)
                && !spec.encrypted
                && !images_with(tables, &spec.snapshot_id).is_empty())
    };
    let entry = tables.snapshots.get(id).ok_or_else(|| not_found(&[id]))?;
    let spec = shown(entry).filter(|spec| usable(spec)).ok_or_else(|| not_found(&[id]))?;
    let status = entry.status.as_deref();
    if state_of(status) != SnapshotState::Completed {
        let message = format!("snapshot {id} is {}, not completed", state_of(status));
        return Err(ApiError::wrong_state("IncorrectState", message).with("snapshot_id", id));
    }
    let root = status.map(|status| status.root.clone()).unwrap_or_default();
    Ok(Source { spec: (*spec.value).clone(), revision: spec.revision, root })
}

/// Images of any account that stand on a snapshot.
fn images_with<'a>(tables: &'a Tables, id: &str) -> Vec<&'a str> {
    let uses = |spec: &rec::ImageSpec| {
        let of_mappings = spec.block_device_mappings.iter().filter_map(|mapping| mapping.ebs.as_ref());
        !spec.deregistered && of_mappings.into_iter().any(|ebs| ebs.snapshot_id == id)
    };
    let found = tables.images.iter().filter(|(_, entry)| entry.spec.as_deref().is_some_and(uses));
    found.map(|(id, _)| id.as_str()).collect()
}

/// What all snapshots of one call share.
pub(crate) struct Order {
    pub account: String,
    pub description: String,
    pub tags: Vec<v1::Tag>,
    pub client_token: String,
    pub set_id: String,
}

/// The records of a new snapshot of a volume as it is now, in the current epoch.
pub(crate) fn new_record(tables: &Tables, order: &Order, spec: &rec::VolumeSpec) -> ApiResult<rec::SnapshotSpec> {
    let host_volume = v1::HostVolume { opened: spec.opened, ..spec.volume.clone().unwrap_or_default() };
    Ok(rec::SnapshotSpec {
        schema_version: SCHEMA_VERSION,
        snapshot_id: SnapshotId::generate()?.to_string(),
        account_id: order.account.clone(),
        volume_id: spec.volume_id.clone(),
        volume_bytes: host_volume.size_bytes,
        description: order.description.clone(),
        tags: order.tags.clone(),
        created_ms: clock::now_ms(),
        client_token: order.client_token.clone(),
        encrypted: spec.encrypted,
        key_domain: storage::domain_of(spec),
        host_id: spec.host_id.clone(),
        set_id: order.set_id.clone(),
        instance_id: spec.instance_id.clone(),
        parent: storage::parent_of(spec),
        epoch: storage::epoch(tables),
        volume: Some(host_volume),
        deleted: false,
        fast_restores: Vec::new(),
    })
}

fn check_volume(tables: &Tables, core: &Core, spec: &rec::VolumeSpec) -> ApiResult<()> {
    if !matches!(volumes::state_of(spec), VolumeState::Available | VolumeState::InUse) {
        return Err(volume::wrong_state(spec, "snapshotted"));
    }
    backends::must_be_local(spec, "snapshotted")?;
    if spec.releasing {
        let message = format!("volume {} is on its way to another host; try again when it is there", spec.volume_id);
        return Err(ApiError::wrong_state("IncorrectState", message).with("volume_id", &spec.volume_id));
    }
    let pending = tables.snapshots.values().filter(|entry| {
        entry.spec.as_ref().is_some_and(|other| other.volume_id == spec.volume_id)
            && state_of(entry.status.as_deref()) == SnapshotState::Pending
    });
    let kind: VolumeType = spec.volume_type.parse().unwrap_or(volume::DEFAULT_TYPE);
    let (pending, limit) = (pending.count(), kind.max_pending_snapshots());
    if pending >= limit {
        let message =
            format!("{kind} volume {} has {pending} of at most {limit} snapshots in the making", spec.volume_id);
        let error = ApiError::exhausted("ConcurrentSnapshotLimitExceeded", message);
        return Err(error.with("volume_id", &spec.volume_id).with("limit", limit));
    }
    if !spec.host_id.is_empty() && !core.live.is_up(&spec.host_id) {
        return Err(ApiError::unavailable(format!(
            "host {}, which holds volume {}, is not connected",
            spec.host_id, spec.volume_id
        )));
    }
    Ok(())
}

impl Api {
    /// Makes snapshots of the volumes that `choose` names, at one instant; answers when the point in time is fixed.
    pub(crate) async fn make_snapshots(
        &self,
        order: Order,
        token: Option<ClientToken>,
        mut choose: impl FnMut(&Tables) -> ApiResult<Vec<Versioned<rec::VolumeSpec>>>,
    ) -> ApiResult<Vec<v1::Snapshot>> {
        let mut ids = None;
        for _ in 0..super::MAX_ATTEMPTS {
            let (specs, txn) = {
                let tables = self.core.tables();
                if let Some(known) = token.as_ref().map(|token| token.replay(&tables)).transpose()?.flatten() {
                    ids = Some(known);
                    break;
                }
                let chosen = choose(&tables)?;
                let wanted = Wanted::snapshots(chosen.len());
                let guard = quotas::check(&self.core.config, &tables, &order.account, &wanted)?;
                let mut txn = guard.apply(storage::guard_epoch(Txn::new(), &tables));
                let mut specs = Vec::new();
                for volume in &chosen {
                    check_volume(&tables, &self.core, volume)?;
                    let spec = new_record(&tables, &order, volume)?;
                    // Writing the volume's record again lets one call at a time in, so that the limit of pending ones holds.
                    let volume_key = keys::volume(&volume.account_id, &volume.volume_id);
                    txn = txn
                        .compare_mod_revision(&volume_key, volume.revision)
                        .put(&volume_key, encode(&*volume.value))
                        .put(keys::snapshot_spec(&order.account, &spec.snapshot_id), encode(&spec));
                    specs.push(spec);
                }
                (specs, txn)
            };
            let made: Vec<String> = specs.iter().map(|spec| spec.snapshot_id.clone()).collect();
            let txn = token.as_ref().map_or(txn.clone(), |token| token.record(txn, &made));
            if self.core.commit(txn).await? == Commit::Done {
                for spec in specs.iter().filter(|spec| spec.host_id.is_empty()) {
                    self.finish(spec).await?;
                }
                ids = Some(made);
                break;
            }
        }
        let ids = ids.ok_or_else(|| ApiError::unavailable("too many changes at the same time; try again"))?;
        self.await_freeze(&order.account, &ids).await?;
        let tables = self.core.tables();
        let found = ids.iter().filter_map(|id| find(&tables, &order.account, id).ok());
        Ok(found.map(|(spec, status)| view(&self.core, spec, status.map(|status| &*status.value))).collect())
    }

    /// Waits until the host has fixed the point in time of all of them. Those that it cannot fix are in error then.
    async fn await_freeze(&self, account: &str, ids: &[String]) -> ApiResult<()> {
        let mut changes = self.core.changes();
        let deadline = tokio::time::Instant::now() + FREEZE_TIMEOUT;
        loop {
            let (mut waiting, mut failed) = (false, None);
            {
                let tables = self.core.tables();
                for id in ids {
                    let Ok((_, status)) = find(&tables, account, id) else { continue };
                    match state_of(status.map(|status| &*status.value)) {
                        SnapshotState::Pending => waiting |= !status.is_some_and(|status| status.frozen),
                        SnapshotState::Error => failed = status.and_then(|status| status.reason.clone()).or(failed),
                        SnapshotState::Completed => {}
                    }
                }
            }
            if let Some(reason) = failed {
                return Err(ApiError::internal(format!("the snapshot failed: {}", reason.message)));
            }
            if !waiting {
                return Ok(());
            }
            tokio::select! {
                _ = changes.recv() => {}
                () = self.core.stop.cancelled() => return Err(ApiError::unavailable("this control plane is ending")),
                () = tokio::time::sleep_until(deadline) => {
                    for id in ids {
                        snapshot_set::fail(&self.core, id, "the host did not fix the point in time").await?;
                    }
                    return Err(ApiError::unavailable("the host did not fix the snapshot's point in time; try again"));
                }
            }
        }
    }

    async fn do_create_snapshot(
        &self,
        account: String,
        mut request: v1::CreateSnapshotRequest,
    ) -> ApiResult<v1::Snapshot> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let token = ClientToken::new(&account, "CreateSnapshot", &token_text, &request);
        let order = order(&account, request.description, request.tags, token_text)?;
        let made = self
            .make_snapshots(order, token, |tables| {
                Ok(vec![volume::find(tables, &account, &request.volume_id)?.clone()])
            })
            .await?;
        made.into_iter().next().ok_or_else(|| ApiError::unavailable("the snapshot was deleted at once"))
    }

    async fn do_create_snapshots(
        &self,
        account: String,
        mut request: v1::CreateSnapshotsRequest,
    ) -> ApiResult<v1::CreateSnapshotsResponse> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let token = ClientToken::new(&account, "CreateSnapshots", &token_text, &request);
        let order =
            order(&account, std::mem::take(&mut request.description), std::mem::take(&mut request.tags), token_text)?;
        let excluded = check::optional_ids("exclude_data_volume_ids", &request.exclude_data_volume_ids)?;
        let snapshots = self
            .make_snapshots(order, token, |tables| {
                let (spec, _) = instance::find(tables, &account, &request.instance_id)?;
                let agent_spec = spec.spec.clone().unwrap_or_default();
                check_excluded(tables, &account, &agent_spec, &excluded)?;
                let wanted = agent_spec.volumes.iter().filter(|attached| {
                    let root = attached.device_name == agent_spec.root_device_name;
                    let id = volumes::id_of(attached);
                    let is_left_out = (root && request.exclude_boot_volume) || excluded.iter().any(|out| out == id);
                    !is_left_out
                });
                let found: ApiResult<Vec<_>> =
                    wanted.map(|attached| volume::find(tables, &account, volumes::id_of(attached)).cloned()).collect();
                let found = found?;
                match found.is_empty() {
                    true => Err(ApiError::invalid("instance_id", "has no volume to snapshot")),
                    false => Ok(found),
                }
            })
            .await?;
        Ok(v1::CreateSnapshotsResponse { snapshots })
    }

    fn do_list_snapshots(
        &self,
        account: &str,
        mut request: v1::ListSnapshotsRequest,
    ) -> ApiResult<v1::ListSnapshotsResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListSnapshots", account, &request, page.as_ref())?
            .ids("snapshot_ids", &request.snapshot_ids, check_id)?
            .filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        listing.all_known(|id| find(&tables, account, id).is_ok(), not_found)?;
        let found: Vec<v1::Snapshot> = tables
            .snapshots
            .iter()
            .filter(|(id, _)| listing.wants(id))
            .filter_map(|(_, entry)| Some((shown(entry)?, entry.status.as_deref())))
            .filter(|(spec, _)| spec.account_id == account)
            .map(|(spec, status)| view(&self.core, spec, status))
            .filter(|snapshot| listing.matches(|name| filter_values(snapshot, name)))
            .collect();
        let (snapshots, page) = listing.page(&found, |found| &found.snapshot_id);
        Ok(v1::ListSnapshotsResponse { snapshots, page })
    }

    pub(crate) async fn do_delete_snapshot(&self, account: &str, id: &str) -> ApiResult<()> {
        self.core
            .update(|tables| {
                let (spec, _) = find(tables, account, id)?;
                let images = images_with(tables, id);
                if !images.is_empty() {
                    let message = format!("snapshot {id} is in use by {}; deregister it first", images.join(", "));
                    return Err(
                        ApiError::wrong_state("InvalidSnapshot.InUse", message).with("image_ids", images.join(","))
                    );
                }
                // Gone for users at once; the snapshots' reconciler forgets the record when nothing stands on it.
                let new = rec::SnapshotSpec { deleted: true, ..(*spec.value).clone() };
                let key = keys::snapshot_spec(account, id);
                Ok((Some(Txn::new().compare_mod_revision(&key, spec.revision).put(&key, encode(&new))), ()))
            })
            .await
    }
}

/// Only data volumes of the instance can be left out by their ids.
fn check_excluded(tables: &Tables, account: &str, instance: &v1::InstanceSpec, excluded: &[String]) -> ApiResult<()> {
    let field = "exclude_data_volume_ids";
    for id in excluded {
        volume::find(tables, account, id)?;
        match instance.volumes.iter().find(|slot| volumes::id_of(slot) == id) {
            None => return Err(ApiError::invalid(field, format!("{id} is not attached to the instance"))),
            Some(slot) if slot.device_name == instance.root_device_name => {
                let message = format!("{id} is the root volume, which exclude_boot_volume leaves out");
                return Err(ApiError::invalid(field, message));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

pub(crate) fn order(account: &str, description: String, tags: Vec<v1::Tag>, client_token: String) -> ApiResult<Order> {
    check::text("description", &description, MAX_DESCRIPTION_CHARS)?;
    check::tags(&tags)?;
    let mut set = [0u8; 8];
    getrandom::fill(&mut set)?;
    Ok(Order { account: account.to_owned(), description, tags, client_token, set_id: hex::encode(set) })
}

fn filter_values<'a>(snapshot: &'a v1::Snapshot, name: &str) -> Vec<Cow<'a, str>> {
    let one = |text: &'a str| vec![Cow::Borrowed(text)];
    match name {
        "snapshot-id" => one(&snapshot.snapshot_id),
        "volume-id" => one(&snapshot.volume_id),
        "volume-size" => vec![snapshot.volume_size_bytes.div_ceil(GIB).to_string().into()],
        "description" => one(&snapshot.description),
        "status" => one(match snapshot.state() {
            v1::SnapshotState::Completed => "completed",
            v1::SnapshotState::Error => "error",
            v1::SnapshotState::Pending | v1::SnapshotState::Unspecified => "pending",
        }),
        "progress" => vec![format!("{}%", snapshot.progress).into()],
        "start-time" => one(&snapshot.start_time),
        "encrypted" => vec![snapshot.encrypted.to_string().into()],
        "owner-id" => one(&snapshot.account_id),
        other => check::tag_values(&snapshot.tags, other).unwrap_or_default(),
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::snapshot_service_server::SnapshotService for Api {
    async fn create_snapshot(&self, request: Request<v1::CreateSnapshotRequest>) -> Answer<v1::Snapshot> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        Ok(Response::new(detached(&self.core, async move { api.do_create_snapshot(account, request).await }).await?))
    }

    async fn create_snapshots(
        &self,
        request: Request<v1::CreateSnapshotsRequest>,
    ) -> Answer<v1::CreateSnapshotsResponse> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        Ok(Response::new(detached(&self.core, async move { api.do_create_snapshots(account, request).await }).await?))
    }

    async fn list_snapshots(&self, request: Request<v1::ListSnapshotsRequest>) -> Answer<v1::ListSnapshotsResponse> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_snapshots(&account, request.into_inner())?))
    }

    async fn get_snapshot(&self, request: Request<v1::GetSnapshotRequest>) -> Answer<v1::Snapshot> {
        let account = auth::caller(&request)?.account_id;
        let tables = self.core.tables();
        let (spec, status) = find(&tables, &account, &request.get_ref().snapshot_id)?;
        Ok(Response::new(view(&self.core, spec, status.map(|status| &*status.value))))
    }

    async fn delete_snapshot(&self, request: Request<v1::DeleteSnapshotRequest>) -> Answer<v1::DeleteSnapshotResponse> {
        let account = auth::caller(&request)?.account_id;
        self.do_delete_snapshot(&account, &request.into_inner().snapshot_id).await?;
        Ok(Response::new(v1::DeleteSnapshotResponse {}))
    }

    async fn copy_snapshot(&self, request: Request<v1::CopySnapshotRequest>) -> Answer<v1::Snapshot> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        Ok(Response::new(detached(&self.core, async move { api.do_copy_snapshot(account, request).await }).await?))
    }

    async fn enable_fast_snapshot_restores(
        &self,
        request: Request<v1::EnableFastSnapshotRestoresRequest>,
    ) -> Answer<v1::EnableFastSnapshotRestoresResponse> {
        let caller = auth::caller(&request)?;
        Ok(Response::new(self.do_enable_fast_restores(&caller, request.into_inner()).await?))
    }

    async fn disable_fast_snapshot_restores(
        &self,
        request: Request<v1::DisableFastSnapshotRestoresRequest>,
    ) -> Answer<v1::DisableFastSnapshotRestoresResponse> {
        let caller = auth::caller(&request)?;
        self.do_disable_fast_restores(&caller, request.into_inner()).await?;
        Ok(Response::new(v1::DisableFastSnapshotRestoresResponse {}))
    }

    async fn list_fast_snapshot_restores(
        &self,
        request: Request<v1::ListFastSnapshotRestoresRequest>,
    ) -> Answer<v1::ListFastSnapshotRestoresResponse> {
        let caller = auth::caller(&request)?;
        Ok(Response::new(self.do_list_fast_restores(&caller, request.into_inner())?))
    }

    type WatchSnapshotsStream = Pin<Box<dyn Stream<Item = Result<v1::Snapshot, Status>> + Send>>;

    async fn watch_snapshots(&self, request: Request<v1::WatchSnapshotsRequest>) -> Answer<Self::WatchSnapshotsStream> {
        let account = auth::caller(&request)?.account_id;
        let ids = check::ids("snapshot_ids", &request.into_inner().snapshot_ids)?;
        Ok(Response::new(self.watch::<watch::Snapshots>(account, ids)?))
    }
}
