//! Volumes that a volume backend keeps, and the hosts that can reach it. What a host's disk keeps has no backend.

use hearth_proto::record::v1 as rec;
use hearth_store::Txn;

use crate::api_error::{ApiError, ApiResult};
use crate::core::encode;
use crate::keys;
use crate::tables::{Tables, Versioned};

/// What users may call the hosts' own disks.
const LOCAL: &str = "local";

/// The backend that keeps a volume; empty = its host's disk.
pub(crate) fn of(spec: &rec::VolumeSpec) -> &str {
    spec.volume.as_ref().map_or("", |volume| volume.backend.as_str())
}

/// Whether a host has a backend.
pub(crate) fn offers(tables: &Tables, host: &str, backend: &str) -> bool {
    let status = tables.host(host).and_then(|(_, status)| status);
    status.is_some_and(|status| status.volume_backends.iter().any(|name| name == backend))
}

/// A host of a zone that has a backend and is up.
fn worker(tables: &Tables, zone: &str, backend: &str, is_up: &dyn Fn(&str) -> bool) -> Option<String> {
    let statuses = tables.hosts.iter().filter_map(|(id, entry)| Some((id, entry.status.as_ref()?)));
    let mut fit = statuses.filter(|(id, status)| {
        status.availability_zone == zone && status.volume_backends.iter().any(|name| name == backend) && is_up(id)
    });
    fit.next().map(|(id, _)| id.clone())
}

/// For a new volume: the backend (empty = the hosts' disks) and the host that is to make it there.
pub(crate) fn choose(
    tables: &Tables,
    asked: &str,
    zone: &str,
    is_up: &dyn Fn(&str) -> bool,
) -> ApiResult<(String, String)> {
    if asked.is_empty() || asked == LOCAL {
        return Ok(Default::default());
    }
    if let Some(host) = worker(tables, zone, asked, is_up) {
        return Ok((asked.to_owned(), host));
    }
    if worker(tables, zone, asked, &|_| true).is_some() {
        return Err(ApiError::unavailable(format!("no host with volume backend '{asked:.40}' is connected")));
    }
    let statuses = tables.hosts.values().filter_map(|entry| entry.status.as_ref());
    let mut there: Vec<&str> = statuses
        .filter(|status| status.availability_zone == zone)
        .flat_map(|status| status.volume_backends.iter().map(String::as_str))
        .chain([LOCAL])
        .collect();
    there.sort_unstable();
    there.dedup();
    let message = format!("'{asked:.40}' does not exist in zone {zone}; there are: {}", there.join(", "));
    Err(ApiError::invalid("backend", message))
}

/// A volume that is to be made or deleted at its backend is given to another host when its own cannot do it; one that is detached
/// is on no host. `None` = all is well, or nobody can.
pub(crate) fn hand_over(
    tables: &Tables,
    volume: &Versioned<rec::VolumeSpec>,
    is_up: &dyn Fn(&str) -> bool,
) -> Option<Txn> {
    let backend = of(volume);
    if backend.is_empty() || !volume.instance_id.is_empty() {
        return None;
    }
    let host = if volume.creating || volume.deleting {
        let can = |host: &str| offers(tables, host, backend) && is_up(host);
        if can(&volume.host_id) {
            return None;
        }
        worker(tables, &volume.availability_zone, backend, is_up)?
    } else if tables.host(&volume.host_id).is_none() {
        String::new()
    } else {
        return None;
    };
    if host == volume.host_id {
        return None;
    }
    let generation = volume.generation.saturating_add(1);
    let new = rec::VolumeSpec { host_id: host, generation, ..(*volume.value).clone() };
    let key = keys::volume(&volume.account_id, &volume.volume_id);
    Some(Txn::new().compare_mod_revision(&key, volume.revision).put(&key, encode(&new)))
}

/// Refuses what is done only with volumes on hosts' disks.
pub(crate) fn must_be_local(spec: &rec::VolumeSpec, action: &str) -> ApiResult<()> {
    match of(spec) {
        "" => Ok(()),
        backend => {
            let message =
                format!("volume {} is kept by volume backend '{backend}'; it cannot be {action}", spec.volume_id);
            Err(ApiError::wrong_state("UnsupportedOperation", message).with("volume_id", &spec.volume_id))
        }
    }
}
