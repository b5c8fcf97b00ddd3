//! Volumes that wait for something, and snapshots that nobody needs any more.

use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_store::Txn;
use hearth_types::{InstanceState, SnapshotState};

use crate::api_error::ApiResult;
use crate::backends;
use crate::core::{Core, encode};
use crate::keys;
use crate::life;
use crate::service::{attach, import, snapshot, snapshot_set, store_image};
use crate::storage;
use crate::tables::{Tables, Versioned};
use crate::volumes;

/// Most objects dealt with in one look at the tables.
const BATCH: usize = 50;

/// What is to be done with a volume; `None` = nothing now.
fn next_step(tables: &Tables, volume: &Versioned<rec::VolumeSpec>, is_up: &dyn Fn(&str) -> bool) -> Option<Txn> {
    let key = keys::volume(&volume.account_id, &volume.volume_id);
    let txn = Txn::new().compare_mod_revision(&key, volume.revision);
    let host_is_gone = !volume.host_id.is_empty() && tables.host(&volume.host_id).is_none();
    let is_local = backends::of(volume).is_empty();
    if volume.deleting && is_local && (volume.host_id.is_empty() || host_is_gone) {
        return Some(txn.delete(&key));
    }
    let found = tables.instance(&volume.instance_id);
    let ended = found
        .as_ref()
        .is_none_or(|(instance, status)| life::state_of(instance, status.as_deref()) == InstanceState::Terminated);
    // Before its host's end: DeleteOnTermination holds for an instance that went with its host.
    if !volume.instance_id.is_empty() && !volume.deleting && ended {
        return Some(txn.put(&key, encode(&volumes::instance_ended(volume))));
    }
    if !is_local && let Some(step) = backends::hand_over(tables, volume, is_up) {
        return Some(step);
    }
    if host_is_gone && is_local && volume.error.is_empty() {
        return Some(txn.put(&key, encode(&volumes::lost(volume, "was removed"))));
    }
    // What replaces it has its place.
    if volume.instance_id.is_empty() || volume.deleting || volume.replaced {
        return None;
    }
    let found = found?;
    let (instance, status) = &found;
    let state = life::state_of(instance, status.as_deref());
    let there =
        instance.spec.iter().flat_map(|spec| &spec.volumes).any(|slot| volumes::id_of(slot) == volume.volume_id);
    // Its data has come from another host: now it can go to the instance.
    let movable = matches!(state, InstanceState::Running | InstanceState::Stopped);
    let free = volume.host_id.is_empty() || volume.host_id == instance.host_id || !is_local;
    (!there && !volume.releasing && free && movable).then(|| attach::place_txn(volume, (*volume.value).clone(), &found))
}

/// Lets volumes go on that waited.
pub(crate) async fn advance(core: &Core) -> ApiResult<()> {
    let is_up = |host: &str| core.live.is_up(host);
    loop {
        let steps: Vec<(String, Txn)> = {
            let tables = core.tables();
            let steps = tables
                .volumes
                .values()
                .filter_map(|volume| Some((volume.volume_id.clone(), next_step(&tables, volume, &is_up)?)));
            steps.take(BATCH).collect()
        };
        if steps.is_empty() {
            return Ok(());
        }
        for (volume, txn) in steps {
            tracing::debug!(volume, "a volume goes on");
            core.commit(txn).await?;
        }
    }
}

/// Forgets deleted snapshots when they are no longer pending and nothing stands on them; fails those whose host is gone.
pub(crate) async fn snapshots(core: &Arc<Core>) -> ApiResult<()> {
    let (forget, lost) = {
        let tables = core.tables();
        let needed: std::collections::HashSet<String> =
            storage::needed_manifests(&tables).into_iter().map(|base| base.snapshot_id).collect();
        let (mut forget, mut lost) = (Vec::new(), Vec::new());
        for (id, entry) in &tables.snapshots {
            let Some(spec) = &entry.spec else { continue };
            let state = snapshot::state_of(entry.status.as_deref());
            let gone = !spec.host_id.is_empty() && tables.host(&spec.host_id).is_none();
            if state == SnapshotState::Pending && gone {
                lost.push(id.clone());
            } else if state != SnapshotState::Pending && spec.deleted && !needed.contains(id) {
                let key = keys::snapshot_spec(&spec.account_id, id);
                let txn = Txn::new()
                    .compare_mod_revision(&key, spec.revision)
                    .delete(&key)
                    .delete(keys::snapshot_status(&spec.account_id, id));
                forget.push(txn);
            }
        }
        (forget, lost)
    };
    for id in lost {
        snapshot_set::fail(core, &id, "the host that made it was removed").await?;
    }
    for txn in forget.into_iter().take(BATCH) {
        core.commit(txn).await?;
    }
    Ok(())
}

/// Snapshots that this control plane was making when it ended, but for those of imports and tasks, which go on by themselves.
pub(crate) fn interrupted(tables: &Tables) -> Vec<rec::SnapshotSpec> {
    let pending =
        tables.snapshots.values().filter(|entry| snapshot::state_of(entry.status.as_deref()) == SnapshotState::Pending);
    let ours = pending.filter_map(|entry| entry.spec.as_deref()).filter(|spec| spec.host_id.is_empty());
    let goes_on = |id: &str| store_image::is_being_restored(tables, id) || import::is_being_imported(tables, id);
    ours.filter(|spec| !goes_on(&spec.snapshot_id)).cloned().collect()
}
