//! Another root volume for a running instance: the swap stands in the instance's record, its host carries it out with a reboot. The
//! volume that was replaced stays with the instance until then.
//! Sources: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateReplaceRootVolumeTask.html>,
//! `API_DescribeReplaceRootVolumeTasks`.

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::{AttachmentState, InstanceState};
use rec::TaskState;
use rec::task::Kind;

use super::idempotency::ClientToken;
use super::lifecycle::wrong_state;
use super::{Api, image, instance, snapshot, task, volume};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode};
use crate::keys;
use crate::life;
use crate::listing::Listing;
use crate::quotas::{self, Wanted};
use crate::tables::{Tables, Versioned};
use crate::volumes;

pub(crate) const PREFIX: &str = "replacevol";

fn job(task: &rec::Task) -> Option<&rec::ReplaceRootJob> {
    match &task.kind {
        Some(Kind::ReplaceRoot(job)) => Some(job),
        _ => None,
    }
}

fn view(task: &rec::Task, job: &rec::ReplaceRootJob) -> v1::ReplaceRootVolumeTask {
    use v1::ReplaceRootVolumeTaskState as S;
    let ended = !task::is_open(task);
    v1::ReplaceRootVolumeTask {
        task_id: task.task_id.clone(),
        instance_id: job.instance_id.clone(),
        state: match task.state() {
            TaskState::Complete => S::Succeeded,
            TaskState::Failed => S::Failed,
            TaskState::Running => S::InProgress,
            TaskState::Pending | TaskState::Unspecified => S::Pending,
        }
        .into(),
        state_reason: task.reason.clone(),
        start_time: clock::rfc3339(task.created_ms),
        complete_time: if ended { clock::rfc3339(task.updated_ms) } else { String::new() },
        snapshot_id: job.snapshot_id.clone(),
        image_id: job.image_id.clone(),
        delete_replaced_root_volume: job.delete_replaced,
        replaced_volume_id: job.old_volume_id.clone(),
        volume_id: job.new_volume_id.clone(),
    }
}

fn not_found(ids: &[&str]) -> ApiError {
    ApiError::not_found("InvalidReplaceRootVolumeTaskId.NotFound", "replace root volume task", ids)
}

fn find<'a>(tables: &'a Tables, account: &str, id: &str) -> ApiResult<(&'a rec::Task, &'a rec::ReplaceRootJob)> {
    task::check_id(PREFIX, id)?;
    let found = tables.tasks.get(id).filter(|task| task.account_id == account);
    found.and_then(|task| Some((&*task.value, job(task)?))).ok_or_else(|| not_found(&[id]))
}

/// What the new root volume begins as, the id of its snapshot, and the guard of both.
fn source(
    tables: &Tables,
    account: &str,
    request: &v1::CreateReplaceRootVolumeTaskRequest,
    old: &rec::VolumeSpec,
) -> ApiResult<(v1::BaseSnapshot, Txn)> {
    let of_snapshot = |id: &str| {
        let source = snapshot::find_completed(tables, account, id)?;
        Ok((source.base(), source.guard(Txn::new())))
    };
    match (request.snapshot_id.as_str(), request.image_id.as_str()) {
        ("", "") => {
            // As it was launched. That snapshot stays readable for the sake of the volume, even when it is deleted.
            let base = old.volume.as_ref().and_then(|volume| volume.base.clone());
            match base.filter(|base| base.snapshot_id == old.snapshot_id) {
                Some(base) => Ok((base, Txn::new())),
                None => of_snapshot(&old.snapshot_id),
            }
        }
        (id, "") => of_snapshot(id),
        ("", id) => {
            let (spec, status) = image::find(tables, account, id)?;
            if status.is_none_or(|status| status.state() != v1::ImageState::Available) {
                let message = format!("image {id} is not available");
                return Err(ApiError::wrong_state("InvalidAMIID.Unavailable", message).with("image_id", id));
            }
            let root = image::root_snapshot(spec);
            of_snapshot(root.ok_or_else(|| ApiError::invalid("image_id", "has no EBS root volume"))?)
        }
        _ => Err(ApiError::invalid("snapshot_id", "only one of snapshot_id and image_id may be given")),
    }
}

impl Api {
    pub(crate) async fn do_replace_root(
        &self,
        account: &str,
        mut request: v1::CreateReplaceRootVolumeTaskRequest,
    ) -> ApiResult<v1::ReplaceRootVolumeTask> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let token = ClientToken::new(account, "CreateReplaceRootVolumeTask", &token_text, &request);
        for _ in 0..super::MAX_ATTEMPTS {
            let (task, txn) = {
                let tables = self.core.tables();
                if let Some(ids) = token.as_ref().map(|token| token.replay(&tables)).transpose()?.flatten() {
                    let (task, job) = find(&tables, account, ids.first().map_or("", String::as_str))?;
                    return Ok(view(task, job));
                }
                let (job, txn) = swap(&self.core, &tables, account, &request)?;
                let task = task::new(account, PREFIX, &token_text, Kind::ReplaceRoot(job))?;
                let txn = txn.put(keys::task(account, &task.task_id), encode(&task));
                let ids = std::slice::from_ref(&task.task_id);
                (task.clone(), token.as_ref().map_or(txn.clone(), |token| token.record(txn, ids)))
            };
            if self.core.commit(txn).await? == Commit::Done {
                tracing::info!(task = task.task_id, instance = request.instance_id, "a root volume is to be replaced");
                return Ok(view(&task, &job(&task).cloned().unwrap_or_default()));
            }
        }
        Err(ApiError::unavailable("too many changes at the same time; try again"))
    }

    pub(crate) fn do_list_replacements(
        &self,
        account: &str,
        mut request: v1::ListReplaceRootVolumeTasksRequest,
    ) -> ApiResult<v1::ListReplaceRootVolumeTasksResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListReplaceRootVolumeTasks", account, &request, page.as_ref())?.ids(
            "task_ids",
            &request.task_ids,
            |id| task::check_id(PREFIX, id),
        )?;
        let tables = self.core.tables();
        listing.all_known(|id| find(&tables, account, id).is_ok(), not_found)?;
        let found: Vec<v1::ReplaceRootVolumeTask> = tables
            .tasks
            .iter()
            .filter(|(id, task)| task.account_id == account && listing.wants(id))
            .filter_map(|(_, task)| Some(view(task, job(task)?)))
            .collect();
        let (tasks, page) = listing.page(&found, |found| &found.task_id);
        Ok(v1::ListReplaceRootVolumeTasksResponse { tasks, page })
    }
}

/// The new volume in the place of the old one.
fn swap(
    core: &Core,
    tables: &Tables,
    account: &str,
    request: &v1::CreateReplaceRootVolumeTaskRequest,
) -> ApiResult<(rec::ReplaceRootJob, Txn)> {
    let (spec, status) = instance::find(tables, account, &request.instance_id)?;
    let id = &spec.instance_id;
    if life::has_store_root(&spec) {
        let message = format!("the instance '{id}' does not have an 'ebs' root device type");
        return Err(ApiError::wrong_state("UnsupportedOperation", message).with("instance_id", id));
    }
    let state = life::state_of(&spec, status.as_deref());
    if state != InstanceState::Running {
        return Err(wrong_state(id, state, "given another root volume"));
    }
    if task::open(tables).filter_map(|task| job(task)).any(|job| job.instance_id == *id) {
        let message = format!("a root volume of instance {id} is being replaced");
        return Err(ApiError::wrong_state("IncorrectInstanceState", message).with("instance_id", id));
    }
    let agent_spec = spec.spec.clone().unwrap_or_default();
    let at = agent_spec.volumes.iter().position(|slot| slot.device_name == agent_spec.root_device_name);
    let slot = at.and_then(|at| Some((at, agent_spec.volumes.get(at)?)));
    let Some((at, slot)) = slot else { return Err(ApiError::internal("the instance has no root volume")) };
    let old = volume::find(tables, account, volumes::id_of(slot))?;
    let (base, guard) = source(tables, account, request, old)?;
    // As the one before, at least as large as its content.
    let before = old.volume.clone().unwrap_or_default();
    let shape = volume::Shape {
        kind: old.volume_type.parse().map_err(|error| ApiError::internal(format!("{error}")))?,
        size_bytes: before.size_bytes.max(base.size_bytes),
        iops: before.iops,
        throughput_mibps: before.throughput_mibps,
    };
    let snapshot_id = base.snapshot_id.clone();
    let now_ms = clock::now_ms();
    let guard = quotas::check(&core.config, tables, account, &Wanted::volume(shape.size_bytes))?.apply(guard);
    let new = volume::new_record(&core.storage, account, &shape, Some(base), old.encrypted, now_ms)?;
    let mut new = volumes::want_attached(&new, id, &slot.device_name, old.delete_on_termination, now_ms);
    new.availability_zone.clone_from(&old.availability_zone);
    let mut with = (*spec.value).clone();
    volumes::place(&mut new, &mut with);
    if let Some(agent_spec) = &mut with.spec {
        // It was put behind all others.
        agent_spec.volumes.swap_remove(at);
    }
    with.reboot_generation = with.reboot_generation.saturating_add(1);
    let replaced = rec::VolumeSpec { replaced: true, ..(*old.value).clone() };
    let (key, status_key) = (keys::instance_spec(account, id), keys::instance_status(account, id));
    let old_key = keys::volume(account, &old.volume_id);
    let txn = guard
        .compare_mod_revision(&key, spec.revision)
        .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision))
        .compare_mod_revision(&old_key, old.revision)
        .put(&key, encode(&with))
        .put(&old_key, encode(&replaced))
        .put(keys::volume(account, &new.volume_id), encode(&new));
    let job = rec::ReplaceRootJob {
        instance_id: id.clone(),
        old_volume_id: old.volume_id.clone(),
        new_volume_id: new.volume_id,
        delete_replaced: request.delete_replaced_root_volume,
        snapshot_id,
        image_id: request.image_id.clone(),
        reboot_generation: with.reboot_generation,
    };
    Ok((job, txn))
}

/// Whether the host has carried it out; `Err` when it never will.
fn outcome(tables: &Tables, job: &rec::ReplaceRootJob) -> Result<bool, String> {
    let Some((spec, status)) = tables.instance(&job.instance_id) else {
        return Err(format!("instance {} is gone", job.instance_id));
    };
    let status = status.as_deref();
    match life::state_of(&spec, status) {
        InstanceState::Running => {
            let attached = volumes::attachment_state(&spec, status, &job.new_volume_id) == AttachmentState::Attached;
            let rebooted = status.is_some_and(|status| status.observed_reboot_generation >= job.reboot_generation);
            Ok(attached && rebooted)
        }
        InstanceState::Stopped => {
            // The next start takes the new one.
            match status.and_then(|status| status.reason.as_ref()).filter(|reason| !reason.message.is_empty()) {
                Some(reason) => Err(format!("instance {} is stopped: {}", job.instance_id, reason.message)),
                None => Ok(true),
            }
        }
        state @ (InstanceState::ShuttingDown | InstanceState::Terminated) => {
            Err(format!("instance {} is {state}", job.instance_id))
        }
        InstanceState::Pending | InstanceState::Stopping => Ok(false),
    }
}

/// Looks how far it is, and ends it with what follows for the volume that was replaced.
pub(crate) async fn advance(core: &Core, task: &Versioned<rec::Task>) -> ApiResult<()> {
    let Some(job) = job(task) else { return Ok(()) };
    let outcome = outcome(&core.tables(), job);
    if outcome == Ok(false) {
        let heard = core
            .tables()
            .instance(&job.instance_id)
            .is_some_and(|(spec, status)| status.is_some_and(|status| status.observed_generation >= spec.generation));
        return if heard { task::begin(core, &task.task_id).await.map(|_| ()) } else { Ok(()) };
    }
    let key = keys::task(&task.account_id, &task.task_id);
    core.update(|tables| {
        let Some(known) = tables.tasks.get(&task.task_id).filter(|task| task::is_open(task)) else {
            return Ok((None, ()));
        };
        let mut new = (*known.value).clone();
        new.updated_ms = clock::now_ms();
        match &outcome {
            Ok(_) => new.set_state(TaskState::Complete),
            Err(why) => {
                new.set_state(TaskState::Failed);
                new.reason = Some(task::failure(why.clone()));
            }
        }
        let mut txn = Txn::new().compare_mod_revision(&key, known.revision).put(&key, encode(&new));
        // One whose instance has ended goes its way already.
        if let Some(old) = tables.volumes.get(&job.old_volume_id).filter(|old| old.replaced) {
            let mut left = volumes::detached(old);
            if job.delete_replaced && outcome.is_ok() {
                left.deleting = true;
                left.generation = left.generation.saturating_add(1);
            }
            let ends_with_instance = tables.instance(&job.instance_id).is_none_or(|(spec, status)| {
                matches!(
                    life::state_of(&spec, status.as_deref()),
                    InstanceState::ShuttingDown | InstanceState::Terminated
                )
            });
            if !ends_with_instance {
                let key = keys::volume(&old.account_id, &old.volume_id);
                txn = txn.compare_mod_revision(&key, old.revision).put(&key, encode(&left));
            }
        }
        Ok((Some(txn), ()))
    })
    .await
}
