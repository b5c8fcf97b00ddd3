//! What hosts tell of volumes that leave them and of snapshots that they make.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::SnapshotState;

use super::snapshot_set::{Stored, is_being_made};
use super::{snapshot, snapshot_set};
use crate::api_error::ApiResult;
use crate::core::{Core, encode};
use crate::keys;
use crate::live::Departure;
use crate::storage;
use crate::tables::SCHEMA_VERSION;
use crate::volumes;

const MAX_TEXT_CHARS: usize = 1000;

fn is_root(text: &str) -> bool {
    text.parse::<hearth_snapshot::RootHash>().is_ok()
}

fn percent(done: u64, total: u64) -> u32 {
    match total {
        0 => 0,
        total => u32::try_from(u128::from(done.min(total)) * 100 / u128::from(total)).unwrap_or(100),
    }
}

/// Keeps how far a volume that is to leave the host is, for whoever waits for it.
fn note_departure(core: &Core, host: &str, report: &v1::VolumeReport) {
    let is_expected = core.tables().volumes.get(&report.volume_id).is_some_and(|spec| {
        spec.host_id == host && (spec.releasing || spec.deleting) && report.observed_generation >= spec.generation
    });
    let departure = match report.outcome() {
        _ if !is_expected => return,
        v1::VolumeOutcome::Working | v1::VolumeOutcome::Failed => Some(Departure {
            percent: percent(report.done_chunks, report.total_chunks),
            error: report.error.chars().take(MAX_TEXT_CHARS).collect(),
        }),
        _ => None,
    };
    if core.live.set_departure(&report.volume_id, departure) {
        core.announce_volume(&report.volume_id);
    }
}

/// Works in what became of a volume that is to leave the host.
pub(crate) async fn apply_volume(core: &Arc<Core>, host: &str, report: v1::VolumeReport) -> ApiResult<()> {
    note_departure(core, host, &report);
    let gone = core.tables().volumes.get(&report.volume_id).cloned().filter(|spec| {
        spec.host_id == host && spec.releasing && !spec.deleting && report.outcome() == v1::VolumeOutcome::Gone
    });
    // The host may have released it before its report got lost.
    let published = match gone {
        Some(spec) => storage::published(core, &storage::release_manifest_id(&spec)).await?,
        None => None,
    };
    core.update(|tables| {
        let Some(spec) = tables.volumes.get(&report.volume_id).filter(|spec| spec.host_id == host) else {
            return Ok((None, ()));
        };
        if report.observed_generation < spec.generation {
            return Ok((None, ()));
        }
        let key = keys::volume(&spec.account_id, &spec.volume_id);
        let txn = Txn::new().compare_mod_revision(&key, spec.revision);
        match report.outcome() {
            v1::VolumeOutcome::Gone if spec.deleting => {
                tracing::info!(volume = spec.volume_id, host, "volume deleted");
                Ok((Some(txn.delete(&key)), ()))
            }
            v1::VolumeOutcome::Released if spec.releasing && is_root(&report.root) => {
                let new = volumes::released(spec, release_base(spec, &report.root));
                tracing::info!(volume = spec.volume_id, host, "volume has left its host");
                Ok((Some(txn.put(&key, encode(&new))), ()))
            }
            v1::VolumeOutcome::Gone if spec.releasing => {
                let new = match &published {
                    Some(published) => volumes::released(spec, release_base(spec, &published.root)),
                    // It never had it open, so there is nothing that could be missing.
                    None if !spec.opened => volumes::nowhere(spec),
                    None => {
                        tracing::error!(volume = spec.volume_id, host, "the host has lost the volume");
                        volumes::lost(spec, "has nothing of it any more")
                    }
                };
                Ok((Some(txn.put(&key, encode(&new))), ()))
            }
            v1::VolumeOutcome::Created if spec.creating => {
                tracing::info!(volume = spec.volume_id, host, "volume made at its backend");
                let new = rec::VolumeSpec { creating: false, ..(*spec.value).clone() };
                Ok((Some(txn.put(&key, encode(&new))), ()))
            }
            v1::VolumeOutcome::Failed if spec.creating => {
                let error: String = report.error.chars().take(MAX_TEXT_CHARS).collect();
                tracing::warn!(volume = spec.volume_id, host, error, "the volume cannot be made");
                let new = rec::VolumeSpec { creating: false, error, ..(*spec.value).clone() };
                Ok((Some(txn.put(&key, encode(&new))), ()))
            }
            v1::VolumeOutcome::Failed => {
                tracing::warn!(volume = spec.volume_id, host, report.error, "the volume cannot leave its host yet");
                Ok((None, ()))
            }
            _ => Ok((None, ())),
        }
    })
    .await
}

/// The manifest that a volume left its host with.
fn release_base(spec: &rec::VolumeSpec, root: &str) -> v1::BaseSnapshot {
    v1::BaseSnapshot {
        snapshot_id: storage::release_manifest_id(spec),
        root: root.to_owned(),
        size_bytes: spec.volume.as_ref().map_or(0, |volume| volume.size_bytes),
        key_domain: Some(v1::KeyDomain { name: storage::domain_of(spec), ..Default::default() }),
    }
}

/// Works in how far a snapshot is.
pub(crate) async fn apply_snapshot(core: &Arc<Core>, host: &str, report: v1::SnapshotReport) -> ApiResult<()> {
    let id = report.snapshot_id.as_str();
    let percent = percent(report.done_chunks, report.total_chunks);
    let known = core.tables().snapshot(id).filter(|(spec, _)| spec.host_id == host);
    match known.map(|(_, status)| snapshot::state_of(status.as_deref())) {
        Some(SnapshotState::Pending) => {}
        Some(SnapshotState::Error) if report.state() == v1::ObservedSnapshot::Completed => {
            return inherit(core, host, &report).await;
        }
        _ => return Ok(()),
    }
    let uploading = report.state() == v1::ObservedSnapshot::Frozen;
    if core.live.set_percent(id, uploading.then_some(percent)) {
        core.announce_snapshot(id);
    }
    match report.state() {
        v1::ObservedSnapshot::Frozen => note_frozen(core, host, id).await,
        v1::ObservedSnapshot::Completed if is_root(&report.root) => {
            let stored = Stored {
                root: report.root.clone(),
                incremental_bytes: report.incremental_bytes,
                full_bytes: report.full_bytes,
                certain: true,
            };
            snapshot_set::store(core, host, id, &stored).await
        }
        v1::ObservedSnapshot::Failed => {
            tracing::warn!(snapshot = id, host, report.error, "the snapshot failed");
            snapshot_set::fail(core, id, &report.error).await
        }
        _ => Ok(()),
    }
}

/// Notes that the host has fixed a snapshot's point in time.
async fn note_frozen(core: &Arc<Core>, host: &str, id: &str) -> ApiResult<()> {
    core.update(|tables| {
        let Some((spec, status)) = tables.snapshot(id).filter(|(spec, _)| spec.host_id == host) else {
            return Ok((None, ()));
        };
        if !is_being_made(status.as_deref()) || status.as_ref().is_some_and(|status| status.frozen) {
            return Ok((None, ()));
        }
        let new = rec::SnapshotStatus {
            schema_version: SCHEMA_VERSION,
            state: v1::SnapshotState::Pending.into(),
            frozen: true,
            ..Default::default()
        };
        let key = keys::snapshot_status(&spec.account_id, id);
        let txn = Txn::new()
            .compare_exists(keys::snapshot_spec(&spec.account_id, id))
            .compare_mod_revision(&key, status.as_ref().map_or(0, |status| status.revision))
            .put(&key, encode(&new));
        Ok((Some(txn), ()))
    })
    .await
}

/// A snapshot that was given up has completed after all. Its user was told otherwise, but the volume's next snapshot builds on it.
async fn inherit(core: &Arc<Core>, host: &str, report: &v1::SnapshotReport) -> ApiResult<()> {
    let id = report.snapshot_id.as_str();
    if !is_root(&report.root) || storage::published(core, id).await?.is_none_or(|found| found.root != report.root) {
        return Ok(());
    }
    core.update(|tables| {
        let Some((spec, _)) = tables.snapshot(id) else { return Ok((None, ())) };
        let Some(volume) = snapshot_set::heir(tables, host, &spec) else { return Ok((None, ())) };
        if volume.last_snapshot.as_ref().is_some_and(|last| last.snapshot_id == id) {
            return Ok((None, ()));
        }
        let updated = volumes::with_last_snapshot(volume, snapshot_set::base_of(&spec, &report.root), true);
        let key = keys::volume(&volume.account_id, &volume.volume_id);
        let txn = Txn::new()
            .compare_exists(keys::snapshot_spec(&spec.account_id, id))
            .compare_mod_revision(&key, volume.revision)
            .put(&key, encode(&updated));
        Ok((Some(txn), ()))
    })
    .await
}

/// Snapshots whose point in time the host had fixed and that its first full report lacks: those that are whole in the object
/// store have completed without the report of it arriving, all others will never complete.
pub(crate) async fn settle_missing(core: &Arc<Core>, host: &str, reported: &HashSet<String>) -> ApiResult<()> {
    let mut sets: BTreeMap<String, Vec<String>> = BTreeMap::new();
    {
        let tables = core.tables();
        for (id, entry) in tables.snapshots.iter().filter(|(id, _)| !reported.contains(*id)) {
            let Some(spec) = entry.spec.as_ref().filter(|spec| spec.host_id == host) else { continue };
            let status = entry.status.as_deref();
            if is_being_made(status) && status.is_some_and(|status| status.frozen) {
                sets.entry(spec.set_id.clone()).or_default().push(id.clone());
            }
        }
    }
    for ids in sets.into_values() {
        let mut found = Vec::new();
        for id in &ids {
            found.extend(storage::published(core, id).await?.map(|published| (id, published)));
        }
        if found.len() == ids.len() {
            for (id, published) in found {
                tracing::info!(host, snapshot = id, "a snapshot is complete whose report got lost");
                let stored = Stored {
                    root: published.root,
                    incremental_bytes: 0,
                    full_bytes: published.full_bytes,
                    certain: false,
                };
                snapshot_set::store(core, host, id, &stored).await?;
            }
            continue;
        }
        // A point in time that was promised cannot be fixed anew.
        for id in &ids {
            tracing::warn!(host, snapshot = id, "the host has lost a snapshot's point in time");
            snapshot_set::fail(core, id, "the host has lost what it had of it").await?;
        }
    }
    Ok(())
}
