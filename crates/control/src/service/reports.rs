//! Reports of agents become status records, and now and then a change of what is wanted.

use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;

use super::instance::check_id;
use super::run::Claim;
use crate::api_error::{ApiError, ApiResult};
use crate::clock;
use crate::core::{Commit, Core, encode, id_value};
use crate::keys;
use crate::life::{self, Change, Origin};
use crate::modification;
use crate::placement;
use crate::tables::{SCHEMA_VERSION, Versioned, account_of};
use crate::volumes;

const MAX_ATTEMPTS: u32 = 20;
/// Longest reason text that is kept, in characters.
const MAX_REASON_CHARS: usize = 1000;

type Spec = Versioned<rec::InstanceSpec>;
type InstanceStatus = Option<Versioned<rec::InstanceStatus>>;

/// What a host is told about an instance that it must not have (any more).
pub(crate) fn evicted(id: &str, eviction: &rec::Eviction) -> v1::DesiredInstance {
    v1::DesiredInstance {
        instance_id: id.to_owned(),
        generation: eviction.generation,
        run: v1::RunState::Terminated.into(),
        force: true,
        reboot_generation: 0,
        spec: eviction.spec.clone(),
    }
}

/// Gives an instance's addresses back, in the transaction that notes its end.
pub(crate) fn release_addresses(mut txn: Txn, spec: &rec::InstanceSpec) -> Txn {
    for nic in spec.spec.iter().flat_map(|spec| &spec.network_interfaces) {
        txn = txn.delete(keys::address(&spec.host_id, &nic.private_ip_address)).delete(keys::mac(&nic.mac_address));
    }
    txn
}

fn trimmed(report: &v1::InstanceReport) -> v1::InstanceReport {
    let mut report = report.clone();
    if let Some(reason) = &mut report.reason {
        if reason.code.is_empty() && reason.message.is_empty() {
            report.reason = None;
        } else {
            reason.code = reason.code.chars().take(MAX_REASON_CHARS).collect();
            reason.message = reason.message.chars().take(MAX_REASON_CHARS).collect();
        }
    }
    report
}

/// Works in one report. Answers what the host must be told at once, if it has something that it should not have.
pub(crate) async fn apply(
    core: &Arc<Core>,
    origin: Origin<'_>,
    report: &v1::InstanceReport,
) -> ApiResult<Option<v1::DesiredInstance>> {
    let id = report.instance_id.as_str();
    check_id(id)?;
    let report = trimmed(report);
    for _ in 0..MAX_ATTEMPTS {
        let found = core.tables().instance(id);
        let Some((spec, status)) = found else {
            if report.state() != v1::ObservedState::Gone {
                tracing::warn!(
                    host = origin.host_id,
                    instance = id,
                    "the host has an instance that nobody knows; it is left alone"
                );
            }
            return Ok(None);
        };
        if spec.host_id != origin.host_id {
            return elsewhere(core, origin, &spec, &report).await;
        }
        if life::state_of(&spec, status.as_deref()).is_final() {
            let still_there = report.state() != v1::ObservedState::Gone;
            return Ok(still_there.then(|| life::desired(&spec)));
        }
        let progress = report.progress.clone().filter(|_| report.state() == v1::ObservedState::Preparing);
        if core.live.set_progress(id, progress) {
            core.announce_view(id);
        }
        let change = life::apply_report(&spec, status.as_deref(), &report, origin);
        if commit_change(core, &spec, &status, change).await? {
            return Ok(None);
        }
    }
    Err(ApiError::unavailable("the instance changes too fast"))
}

/// Works in that a host has no trace of an instance.
pub(crate) async fn apply_missing(core: &Arc<Core>, origin: Origin<'_>, id: &str) -> ApiResult<()> {
    for _ in 0..MAX_ATTEMPTS {
        let found = core.tables().instance(id);
        let here = found.filter(|(spec, _)| spec.host_id == origin.host_id);
        let Some((spec, status)) = here else {
            return core.commit(Txn::new().delete(keys::eviction(origin.host_id, id))).await.map(|_| ());
        };
        let change = life::apply_missing(&spec, status.as_deref(), origin);
        if change.status.is_some() {
            tracing::warn!(host = origin.host_id, instance = id, "the host has lost an instance");
        }
        if commit_change(core, &spec, &status, change).await? {
            return Ok(());
        }
    }
    Err(ApiError::unavailable("the instance changes too fast"))
}

/// A report from a host where the instance is not (any more).
async fn elsewhere(
    core: &Arc<Core>,
    origin: Origin<'_>,
    spec: &rec::InstanceSpec,
    report: &v1::InstanceReport,
) -> ApiResult<Option<v1::DesiredInstance>> {
    let id = spec.instance_id.as_str();
    let eviction = core.tables().evictions.get(origin.host_id).and_then(|of_host| of_host.get(id).cloned());
    if report.state() == v1::ObservedState::Gone {
        if eviction.is_some() {
            core.commit(Txn::new().delete(keys::eviction(origin.host_id, id))).await?;
        }
        return Ok(None);
    }
    Ok(Some(match eviction {
        Some(eviction) => evicted(id, &eviction),
        None => {
            let record = rec::Eviction { generation: spec.generation, spec: spec.spec.clone(), ..Default::default() };
            evicted(id, &record)
        }
    }))
}

/// Writes a change; `false` when the records have changed meanwhile.
async fn commit_change(core: &Arc<Core>, spec: &Spec, status: &InstanceStatus, change: Change) -> ApiResult<bool> {
    let id = spec.instance_id.as_str();
    // The host of a volume with content is the only one that can run its instance.
    if change.refused
        && volumes::are_untouched(spec)
        && let Some((txn, _claim)) = replace(core, spec, status)
    {
        return core.commit(txn).await.map(|outcome| outcome == Commit::Done);
    }
    if change.status.is_none() && change.spec.is_none() {
        return Ok(true);
    }
    let account = account_of(spec);
    let spec_key = keys::instance_spec(account, id);
    let status_key = keys::instance_status(account, id);
    let mut txn = Txn::new()
        .compare_mod_revision(&spec_key, spec.revision)
        .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision));
    let mut ended = false;
    if let Some(new) = &change.status {
        txn = txn.put(&status_key, encode(new));
        ended = life::state_of(change.spec.as_ref().unwrap_or(spec), Some(new)).is_final();
    }
    if let Some(new) = &change.spec {
        txn = txn.put(&spec_key, encode(new));
        let why = new.reason.as_ref().map_or("", |reason| reason.message.as_str());
        tracing::info!(instance = id, run = new.run().as_str_name(), why, "wanted state changed by itself");
    }
    if ended {
        txn = release_addresses(txn, spec);
    }
    let txn = {
        let tables = core.tables();
        let wanted = change.spec.as_ref().unwrap_or(spec);
        let seen = change.status.as_ref().or(status.as_deref());
        let of_instance = tables.volumes.values().filter(|volume| volume.instance_id == id);
        of_instance.fold(txn, |txn, volume| {
            let new = match (ended, change.detached.contains(&volume.volume_id)) {
                (true, _) => volumes::instance_ended(volume),
                (false, true) => volumes::detached(volume),
                (false, false) => match modification::settled(volume, wanted, seen, clock::now_ms()) {
                    Some(new) => new,
                    None => return txn,
                },
            };
            let key = keys::volume(&volume.account_id, &volume.volume_id);
            txn.compare_mod_revision(&key, volume.revision).put(&key, encode(&new))
        })
    };
    let done = core.commit(txn).await? == Commit::Done;
    if done && ended {
        core.live.set_progress(id, None);
    }
    Ok(done)
}

/// The host refused the launch for want of room: makes the transaction that moves the instance, which has nothing anywhere yet,
/// to another host and has the first one forget it. `None` when no other host has room.
fn replace(core: &Arc<Core>, spec: &Spec, status: &InstanceStatus) -> Option<(Txn, Claim)> {
    let mut new = (*spec.value).clone();
    new.refused_by.push(spec.host_id.clone());
    new.generation = spec.generation.saturating_add(1);
    new.run_generation = new.generation;
    let id = spec.instance_id.as_str();
    let mut claim = Claim::new(core, account_of(spec));
    claim.ids.push(id.to_owned());
    let host_revision = core.with_placement(|tables, books| {
        let host = books.relocate(id, &placement::request(&new))?;
        let (host_spec, host_status) = tables.host(&host)?;
        let agent_spec = new.spec.as_mut()?;
        for nic in &mut agent_spec.network_interfaces {
            let address = books.claim_address(tables, &host)?;
            claim.addresses.push((host.clone(), address));
            nic.private_ip_address = address.to_string();
        }
        agent_spec.availability_zone = host_status.map(|s| s.availability_zone.clone()).unwrap_or_default();
        new.host_id = host;
        Some(host_spec.revision)
    })?;
    tracing::warn!(
        instance = id,
        from = spec.host_id,
        to = new.host_id,
        "the host refused the launch; another one is tried"
    );
    let account = account_of(spec);
    let spec_key = keys::instance_spec(account, id);
    let status_key = keys::instance_status(account, id);
    let eviction =
        rec::Eviction { schema_version: SCHEMA_VERSION, generation: new.generation, spec: spec.spec.clone() };
    let mut txn = Txn::new()
        .compare_mod_revision(&spec_key, spec.revision)
        .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision))
        .compare_mod_revision(keys::host_spec(&new.host_id), host_revision)
        .put(&spec_key, encode(&new))
        .delete(&status_key)
        .put(keys::eviction(&spec.host_id, id), encode(&eviction));
    // Its volumes have nothing there either.
    {
        let tables = core.tables();
        for volume in
            tables.volumes.values().filter(|volume| volume.instance_id == id && volume.host_id == spec.host_id)
        {
            let moved = rec::VolumeSpec { host_id: new.host_id.clone(), ..(*volume.value).clone() };
            let key = keys::volume(&volume.account_id, &volume.volume_id);
            txn = txn.compare_mod_revision(&key, volume.revision).put(&key, encode(&moved));
        }
    }
    // MAC addresses stay; they are unique in the region.
    for nic in spec.spec.iter().flat_map(|spec| &spec.network_interfaces) {
        txn = txn.delete(keys::address(&spec.host_id, &nic.private_ip_address));
    }
    for nic in new.spec.iter().flat_map(|spec| &spec.network_interfaces) {
        let key = keys::address(&new.host_id, &nic.private_ip_address);
        txn = txn.compare_absent(&key).put(&key, id_value(id));
    }
    Some((txn, claim))
}
