//! How snapshots that a host makes end: all of one instant complete together, or none does.

use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::SnapshotState;

use super::snapshot;
use crate::api_error::ApiResult;
use crate::clock;
use crate::core::{Core, encode};
use crate::keys;
use crate::tables::{SCHEMA_VERSION, SnapshotEntry, Tables, Versioned};
use crate::volumes;

/// Longest reason that is kept, in characters.
const MAX_TEXT_CHARS: usize = 1000;

/// Content that is whole in the object store.
pub(crate) struct Stored {
    /// Of the manifest, hex.
    pub root: String,
    pub incremental_bytes: u64,
    pub full_bytes: u64,
    /// The host has said so itself.
    pub certain: bool,
}

/// Whether its host still has to do something for a snapshot.
pub(crate) fn is_being_made(status: Option<&rec::SnapshotStatus>) -> bool {
    snapshot::state_of(status) == SnapshotState::Pending && !status.is_some_and(|status| status.stored)
}

/// The others of the same instant that have not ended.
fn pending_others<'a>(
    tables: &'a Tables,
    spec: &rec::SnapshotSpec,
) -> Vec<(&'a rec::SnapshotSpec, Option<&'a Versioned<rec::SnapshotStatus>>)> {
    let pick = |entry: &'a SnapshotEntry| {
        let other = entry.spec.as_deref()?;
        let same = !spec.set_id.is_empty() && other.set_id == spec.set_id && other.snapshot_id != spec.snapshot_id;
        let pending = snapshot::state_of(entry.status.as_deref()) == SnapshotState::Pending;
        (same && pending).then_some((other, entry.status.as_ref()))
    };
    tables.snapshots.values().filter_map(pick).collect()
}

/// The manifest of a snapshot, for the volume's next one.
pub(crate) fn base_of(spec: &rec::SnapshotSpec, root: &str) -> v1::BaseSnapshot {
    v1::BaseSnapshot {
        snapshot_id: spec.snapshot_id.clone(),
        root: root.to_owned(),
        size_bytes: spec.volume_bytes,
        key_domain: Some(v1::KeyDomain { name: spec.key_domain.clone(), ..Default::default() }),
    }
}

/// The volume whose next snapshot builds on this one, unless it has moved or a newer one was faster.
pub(crate) fn heir<'a>(
    tables: &'a Tables,
    host: &str,
    spec: &rec::SnapshotSpec,
) -> Option<&'a Versioned<rec::VolumeSpec>> {
    tables.volumes.get(&spec.volume_id).filter(|volume| {
        let newer = volume.last_snapshot.as_ref().and_then(|last| tables.snapshot(&last.snapshot_id));
        volume.host_id == host && newer.is_none_or(|(other, _)| other.created_ms <= spec.created_ms)
    })
}

fn completed(status: &rec::SnapshotStatus, now_ms: u64) -> rec::SnapshotStatus {
    rec::SnapshotStatus { state: v1::SnapshotState::Completed.into(), completed_ms: now_ms, ..status.clone() }
}

/// Notes that a snapshot's content is stored. The last one of its instant completes all of them; the volume's next snapshot builds
/// on it in any case, for its host does.
pub(crate) async fn store(core: &Arc<Core>, host: &str, id: &str, stored: &Stored) -> ApiResult<()> {
    core.update(|tables| {
        let Some((spec, status)) = tables.snapshot(id).filter(|(spec, _)| spec.host_id == host) else {
            return Ok((None, ()));
        };
        if !is_being_made(status.as_deref()) {
            return Ok((None, ()));
        }
        let new = rec::SnapshotStatus {
            schema_version: SCHEMA_VERSION,
            state: v1::SnapshotState::Pending.into(),
            frozen: true,
            stored: true,
            root: stored.root.clone(),
            incremental_bytes: stored.incremental_bytes,
            full_bytes: stored.full_bytes,
            ..Default::default()
        };
        let key = keys::snapshot_status(&spec.account_id, id);
        let mut txn = Txn::new()
            .compare_exists(keys::snapshot_spec(&spec.account_id, id))
            .compare_mod_revision(&key, status.as_ref().map_or(0, |status| status.revision));
        let others = pending_others(tables, &spec);
        let is_last = !others.iter().any(|(_, status)| is_being_made(status.map(|status| &*status.value)));
        let now_ms = clock::now_ms();
        for (other, status) in &others {
            let key = keys::snapshot_status(&other.account_id, &other.snapshot_id);
            // Two that are the last ones at the same moment have to look again.
            txn = txn.compare_mod_revision(&key, status.map_or(0, |status| status.revision));
            if let Some(status) = status.filter(|_| is_last) {
                txn = txn.put(&key, encode(&completed(status, now_ms)));
            }
        }
        txn = txn.put(&key, encode(&if is_last { completed(&new, now_ms) } else { new }));
        if let Some(volume) = heir(tables, host, &spec) {
            let updated = volumes::with_last_snapshot(volume, base_of(&spec, &stored.root), stored.certain);
            let key = keys::volume(&volume.account_id, &volume.volume_id);
            txn = txn.compare_mod_revision(&key, volume.revision).put(&key, encode(&updated));
        }
        Ok((Some(txn), ()))
    })
    .await
}

/// Ends a snapshot that will never complete, unless it has ended, and with it all others of the same instant.
pub(crate) async fn fail(core: &Core, id: &str, why: &str) -> ApiResult<()> {
    core.update(|tables| {
        let Some((spec, status)) = tables.snapshot(id) else { return Ok((None, ())) };
        if snapshot::state_of(status.as_deref()) != SnapshotState::Pending {
            return Ok((None, ()));
        }
        let failed = |message: String| rec::SnapshotStatus {
            schema_version: SCHEMA_VERSION,
            state: v1::SnapshotState::Error.into(),
            reason: Some(v1::StateReason {
                code: "Server.InternalError".to_owned(),
                message: message.chars().take(MAX_TEXT_CHARS).collect(),
            }),
            ..Default::default()
        };
        let key = keys::snapshot_status(&spec.account_id, id);
        let mut txn = Txn::new()
            .compare_exists(keys::snapshot_spec(&spec.account_id, id))
            .compare_mod_revision(&key, status.as_ref().map_or(0, |status| status.revision))
            .put(&key, encode(&failed(why.to_owned())));
        for (other, status) in pending_others(tables, &spec) {
            let key = keys::snapshot_status(&other.account_id, &other.snapshot_id);
            let message = format!("snapshot {id} of the same instant failed: {why}");
            txn = txn
                .compare_mod_revision(&key, status.map_or(0, |status| status.revision))
                .put(&key, encode(&failed(message)));
        }
        Ok((Some(txn), ()))
    })
    .await
}
