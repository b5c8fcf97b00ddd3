//! The life of EBS volumes as functions of records: what the API shows, and what attaching, detaching and the end of an
//! instance change. A volume's record says what is wanted; what was seen of an attachment stands in its instance's status.

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_types::{AttachmentState, InstanceState, VolumeId, VolumeState};
use v1::ObservedAttachment as Seen;

use crate::backends;
use crate::clock;
use crate::core::Core;
use crate::life;
use crate::live::Departure;
use crate::modification;
use crate::tables::Tables;

/// EC2's state of a volume.
pub(crate) fn state_of(spec: &rec::VolumeSpec) -> VolumeState {
    if spec.deleting {
        VolumeState::Deleting
    } else if !spec.error.is_empty() {
        VolumeState::Error
    } else if spec.creating {
        VolumeState::Creating
    } else if !spec.instance_id.is_empty() {
        VolumeState::InUse
    } else {
        VolumeState::Available
    }
}

/// The volume's place in its instance.
pub(crate) fn slot<'a>(instance: &'a rec::InstanceSpec, volume_id: &str) -> Option<&'a v1::AttachedVolume> {
    let volumes = instance.spec.iter().flat_map(|spec| &spec.volumes);
    volumes.into_iter().find(|attached| id_of(attached) == volume_id)
}

/// Id of an attached volume.
pub(crate) fn id_of(attached: &v1::AttachedVolume) -> &str {
    attached.volume.as_ref().map_or("", |volume| volume.volume_id.as_str())
}

/// What the host said last of this very attachment.
pub(crate) fn seen<'a>(
    status: Option<&'a rec::InstanceStatus>,
    attached: &v1::AttachedVolume,
) -> Option<&'a v1::AttachedVolumeReport> {
    let wanted = attached.volume.as_ref()?;
    let reports = status?.volumes.iter();
    reports
        .into_iter()
        .find(|report| report.volume_id == wanted.volume_id && report.attach_generation == wanted.attach_generation)
}

/// EC2's state of an attachment, from its instance's records.
pub(crate) fn attachment_state(
    instance: &rec::InstanceSpec,
    status: Option<&rec::InstanceStatus>,
    volume_id: &str,
) -> AttachmentState {
    let Some(attached) = slot(instance, volume_id) else { return AttachmentState::Attaching };
    let report = seen(status, attached);
    match attached.detach() {
        // Without a running guest there is nothing to wait for.
        v1::DetachWish::Unspecified
            if matches!(
                life::state_of(instance, status),
                InstanceState::Stopped | InstanceState::Stopping | InstanceState::ShuttingDown
            ) =>
        {
            AttachmentState::Attached
        }
        v1::DetachWish::Unspecified => match report.map(v1::AttachedVolumeReport::state) {
            Some(Seen::Attached) => AttachmentState::Attached,
            _ => AttachmentState::Attaching,
        },
        _ if report.is_some_and(|report| report.state() == Seen::Busy) => AttachmentState::Busy,
        _ => AttachmentState::Detaching,
    }
}

pub(crate) fn attachment_to_proto(state: AttachmentState) -> v1::AttachmentState {
    match state {
        AttachmentState::Attaching => v1::AttachmentState::Attaching,
        AttachmentState::Attached => v1::AttachmentState::Attached,
        AttachmentState::Detaching => v1::AttachmentState::Detaching,
        AttachmentState::Detached => v1::AttachmentState::Detached,
        AttachmentState::Busy => v1::AttachmentState::Busy,
    }
}

pub(crate) fn state_to_proto(state: VolumeState) -> v1::VolumeState {
    match state {
        VolumeState::Creating => v1::VolumeState::Creating,
        VolumeState::Available => v1::VolumeState::Available,
        VolumeState::InUse => v1::VolumeState::InUse,
        VolumeState::Deleting => v1::VolumeState::Deleting,
        VolumeState::Deleted => v1::VolumeState::Deleted,
        VolumeState::Error => v1::VolumeState::Error,
    }
}

/// What the guest reads as the disk's serial number.
pub(crate) fn serial(volume_id: &str) -> String {
    volume_id.parse::<VolumeId>().map(|id| id.serial()).unwrap_or_default()
}

fn attachment_of(tables: &Tables, spec: &rec::VolumeSpec) -> AttachmentState {
    tables.instance(&spec.instance_id).map_or(AttachmentState::Attaching, |(instance, status)| {
        attachment_state(&instance, status.as_deref(), &spec.volume_id)
    })
}

/// Host that has the volume's data or, of one that a volume backend keeps, its guest; empty = none.
fn host_of(tables: &Tables, spec: &rec::VolumeSpec) -> String {
    match backends::of(spec) {
        "" => spec.host_id.clone(),
        _ => tables.instance(&spec.instance_id).map(|(instance, _)| instance.host_id.clone()).unwrap_or_default(),
    }
}

/// What goes on with a volume that is to leave its host.
fn departure_detail(spec: &rec::VolumeSpec, departure: &Departure) -> String {
    let host = &spec.host_id;
    match (spec.deleting, departure.error.as_str()) {
        (true, "") => String::new(),
        (true, error) => format!("it cannot be deleted on host {host} yet: {error}"),
        (false, "") => format!("its data comes from host {host}: {} %", departure.percent),
        (false, error) => format!("its data cannot leave host {host} yet: {error}"),
    }
}

/// Status and its detail.
fn status(core: &Core, tables: &Tables, spec: &rec::VolumeSpec) -> (v1::VolumeStatus, String) {
    use v1::VolumeStatus::{Impaired, InsufficientData, Ok};
    if !spec.error.is_empty() {
        return (Impaired, spec.error.clone());
    }
    let host = host_of(tables, spec);
    if !host.is_empty() && !core.live.connected(&host) {
        return (InsufficientData, format!("host {host}, which has it, is not connected"));
    }
    let report = tables.instance(&spec.instance_id).and_then(|(instance, status)| {
        let attached = slot(&instance, &spec.volume_id)?;
        seen(status.as_deref(), attached).cloned()
    });
    let trouble = report.map(|report| if report.impaired.is_empty() { report.error } else { report.impaired });
    if let Some(text) = trouble.filter(|text| !text.is_empty()) {
        return (Impaired, text);
    }
    if !spec.releasing && !spec.deleting {
        return (Ok, String::new());
    }
    let departure = core.live.departure(&spec.volume_id);
    (if departure.error.is_empty() { Ok } else { Impaired }, departure_detail(spec, &departure))
}

/// The attachment of a volume as the API shows it; `None` when nobody wants one.
pub(crate) fn attachment(core: &Core, tables: &Tables, spec: &rec::VolumeSpec) -> Option<v1::VolumeAttachment> {
    if spec.instance_id.is_empty() {
        return None;
    }
    let (progress, detail) = match spec.releasing {
        true => (core.live.departure(&spec.volume_id).percent, status(core, tables, spec).1),
        false => (0, String::new()),
    };
    let state = if spec.replaced { AttachmentState::Detaching } else { attachment_of(tables, spec) };
    Some(v1::VolumeAttachment {
        volume_id: spec.volume_id.clone(),
        instance_id: spec.instance_id.clone(),
        device: spec.device_name.clone(),
        state: attachment_to_proto(state).into(),
        delete_on_termination: spec.delete_on_termination,
        attach_time: clock::rfc3339(spec.attach_wanted_ms),
        serial: serial(&spec.volume_id),
        progress,
        detail,
    })
}

/// A volume as the API shows it.
pub(crate) fn view(core: &Core, tables: &Tables, spec: &rec::VolumeSpec) -> v1::Volume {
    let volume = spec.volume.clone().unwrap_or_default();
    let (status, status_detail) = status(core, tables, spec);
    let reason = (!spec.error.is_empty()).then(|| {
        let code = if volume.backend.is_empty() { "Server.VolumeLost" } else { "Server.InternalError" };
        v1::StateReason { code: code.to_owned(), message: spec.error.clone() }
    });
    v1::Volume {
        volume_id: spec.volume_id.clone(),
        account_id: spec.account_id.clone(),
        size_bytes: volume.size_bytes,
        volume_type: spec.volume_type.clone(),
        iops: volume.iops,
        throughput_mibps: volume.throughput_mibps,
        snapshot_id: spec.snapshot_id.clone(),
        availability_zone: spec.availability_zone.clone(),
        encrypted: spec.encrypted,
        state: state_to_proto(state_of(spec)).into(),
        state_reason: reason,
        attachments: attachment(core, tables, spec).into_iter().collect(),
        tags: spec.tags.clone(),
        create_time: clock::rfc3339(spec.created_ms),
        status: status.into(),
        status_detail,
        modification: modification::view(tables, spec),
        host_id: if volume.backend.is_empty() { spec.host_id.clone() } else { String::new() },
        backend: volume.backend,
    }
}

/// The volume's record with the wish that `instance` has it.
pub(crate) fn want_attached(
    spec: &rec::VolumeSpec,
    instance_id: &str,
    device_name: &str,
    delete_on_termination: bool,
    now_ms: u64,
) -> rec::VolumeSpec {
    rec::VolumeSpec {
        instance_id: instance_id.to_owned(),
        device_name: device_name.to_owned(),
        delete_on_termination,
        attach_wanted_ms: now_ms,
        ..spec.clone()
    }
}

/// Puts a volume into its instance on the same host: the next attach generation, in both records.
pub(crate) fn place(volume: &mut rec::VolumeSpec, instance: &mut rec::InstanceSpec) {
    volume.host_id.clone_from(&instance.host_id);
    volume.releasing = false;
    modification::end(volume);
    volume.opened |= instance.run() != v1::RunState::Stopped;
    let host_volume = volume.volume.get_or_insert_default();
    host_volume.volume_id.clone_from(&volume.volume_id);
    host_volume.attach_generation = host_volume.attach_generation.saturating_add(1);
    let attached = v1::AttachedVolume {
        device_name: volume.device_name.clone(),
        volume: Some(host_volume.clone()),
        detach: v1::DetachWish::Unspecified.into(),
        detach_attempt: 0,
    };
    let agent_spec = instance.spec.get_or_insert_default();
    agent_spec.volumes.retain(|other| id_of(other) != volume.volume_id);
    agent_spec.volumes.push(attached);
    instance.generation = instance.generation.saturating_add(1);
}

/// The volume's record after it left its instance. A release that has begun goes on: its host may have dropped the data already,
/// and only the host's report tells where the content is then.
pub(crate) fn detached(spec: &rec::VolumeSpec) -> rec::VolumeSpec {
    let mut new = rec::VolumeSpec {
        instance_id: String::new(),
        device_name: String::new(),
        delete_on_termination: false,
        attach_wanted_ms: 0,
        replaced: false,
        ..spec.clone()
    };
    modification::end(&mut new);
    new
}

/// The volume's record after its data was lost with its host, or by it; `how` says what the host did.
pub(crate) fn lost(spec: &rec::VolumeSpec, how: &str) -> rec::VolumeSpec {
    let error = format!("host {}, which held its data, {how}; restore it from a snapshot", spec.host_id);
    rec::VolumeSpec { error, releasing: false, ..detached(spec) }
}

/// The volume's record after its content has come to the object store whole, as manifest `base`, and its host has none of it.
pub(crate) fn released(spec: &rec::VolumeSpec, base: v1::BaseSnapshot) -> rec::VolumeSpec {
    let mut new = nowhere(spec);
    new.volume.get_or_insert_default().base = Some(base);
    new
}

/// The volume's record when no host has anything of it: it is what it was made from.
pub(crate) fn nowhere(spec: &rec::VolumeSpec) -> rec::VolumeSpec {
    rec::VolumeSpec {
        host_id: String::new(),
        releasing: false,
        opened: false,
        last_snapshot: None,
        older_snapshots: Vec::new(),
        ..spec.clone()
    }
}

/// Notes the manifest that the volume's next snapshot builds on. While it is not `certain` that the host knows of it, the one
/// before is kept too.
pub(crate) fn with_last_snapshot(spec: &rec::VolumeSpec, last: v1::BaseSnapshot, certain: bool) -> rec::VolumeSpec {
    let mut new = spec.clone();
    let before = new.last_snapshot.replace(last);
    match certain {
        true => new.older_snapshots.clear(),
        false => new.older_snapshots.extend(before),
    }
    new
}

/// Whether a launch that was refused on one host may try another: none of the instance's volumes can have content anywhere.
pub(crate) fn are_untouched(instance: &rec::InstanceSpec) -> bool {
    let volumes = instance.spec.iter().flat_map(|spec| &spec.volumes).filter_map(|slot| slot.volume.as_ref());
    volumes.into_iter().all(|volume| volume.attach_generation <= 1)
}

/// The volume's record after its instance ended.
pub(crate) fn instance_ended(spec: &rec::VolumeSpec) -> rec::VolumeSpec {
    let mut new = detached(spec);
    if spec.delete_on_termination {
        new.deleting = true;
        new.generation = new.generation.saturating_add(1);
    }
    new
}

/// Takes the volumes whose detachment the host has reported out of the instance; answers the new instance and the ids of those
/// volumes, or `None` when there are none. Of an instance that has `stopped` all go that are to go: no process has them open.
pub(crate) fn take_detached(
    instance: &rec::InstanceSpec,
    reports: &[v1::AttachedVolumeReport],
    stopped: bool,
) -> Option<(rec::InstanceSpec, Vec<String>)> {
    let gone = |attached: &v1::AttachedVolume| {
        let generation = attached.volume.as_ref().map_or(0, |volume| volume.attach_generation);
        attached.detach() != v1::DetachWish::Unspecified
            && (stopped
                || reports.iter().any(|report| {
                    report.volume_id == id_of(attached)
                        && report.attach_generation == generation
                        && report.state() == Seen::Detached
                }))
    };
    let mut new = instance.clone();
    let agent_spec = new.spec.as_mut()?;
    let (out, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut agent_spec.volumes).into_iter().partition(gone);
    if out.is_empty() {
        return None;
    }
    agent_spec.volumes = kept;
    new.generation = new.generation.saturating_add(1);
    Some((new, out.iter().map(|attached| id_of(attached).to_owned()).collect()))
}

#[cfg(test)]
#[path = "volumes_test.rs"]
mod tests;
