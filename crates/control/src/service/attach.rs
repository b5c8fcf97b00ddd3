//! Attaching volumes to instances and detaching them.

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::volume::recommended_device_names;
use hearth_types::{AttachmentState, InstanceState, VolumeState, check_device_name};
use tonic::Code;

use super::Api;
use super::instance::{self, Found};
use super::volume::{find, wrong_state};
use crate::api_error::{ApiError, ApiResult};
use crate::backends;
use crate::clock;
use crate::core::encode;
use crate::keys;
use crate::life;
use crate::tables::{Tables, Versioned, account_of};
use crate::volumes;

/// Most EBS volumes of one instance: the VMM has 31 PCI slots, some of which are NICs, instance store and the like.
pub(crate) const MAX_VOLUMES_PER_INSTANCE: usize = 20;

/// Device names that are taken in an instance.
fn taken(tables: &Tables, instance: &rec::InstanceSpec) -> Vec<String> {
    let agent_spec = instance.spec.clone().unwrap_or_default();
    let volumes = agent_spec.volumes.iter().map(|attached| attached.device_name.clone());
    let store = instance::instance_store_devices(&agent_spec).into_iter().map(|device| device.device_name);
    // Those on their way here from other hosts have no place in the instance yet.
    let wanted = tables.volumes.values().filter(|volume| volume.instance_id == instance.instance_id);
    let root = agent_spec.bundle_root.as_ref().map(|_| agent_spec.root_device_name.clone());
    let mut names: Vec<String> =
        volumes.chain(root).chain(store).chain(wanted.map(|volume| volume.device_name.clone())).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn choose_device(tables: &Tables, instance: &rec::InstanceSpec, asked: &str) -> ApiResult<String> {
    let taken = taken(tables, instance);
    if taken.len() >= MAX_VOLUMES_PER_INSTANCE {
        let message =
            format!("instance {} has {} disks, at most {MAX_VOLUMES_PER_INSTANCE}", instance.instance_id, taken.len());
        return Err(ApiError::exhausted("AttachmentLimitExceeded", message));
    }
    if asked.is_empty() {
        return recommended_device_names()
            .find(|name| !taken.contains(name))
            .ok_or_else(|| ApiError::invalid("device", "must be given: /dev/sdf to /dev/sdp are all in use"));
    }
    check_device_name(asked).map_err(|message| ApiError::invalid("device", message))?;
    match taken.iter().any(|name| name == asked) {
        true => Err(ApiError::invalid("device", format!("{asked} is in use by instance {}", instance.instance_id))),
        false => Ok(asked.to_owned()),
    }
}

/// The transaction that puts a volume into its instance on the same host.
pub(crate) fn place_txn(volume: &Versioned<rec::VolumeSpec>, mut new: rec::VolumeSpec, found: &Found) -> Txn {
    let (instance, status) = found;
    let mut with = (*instance.value).clone();
    volumes::place(&mut new, &mut with);
    let account = account_of(instance);
    let volume_key = keys::volume(&new.account_id, &new.volume_id);
    let (key, status_key) =
        (keys::instance_spec(account, &instance.instance_id), keys::instance_status(account, &instance.instance_id));
    Txn::new()
        .compare_mod_revision(&volume_key, volume.revision)
        .compare_mod_revision(&key, instance.revision)
        .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision))
        .put(&volume_key, encode(&new))
        .put(&key, encode(&with))
}

impl Api {
    pub(crate) async fn do_attach_volume(
        &self,
        account: &str,
        request: v1::AttachVolumeRequest,
    ) -> ApiResult<v1::VolumeAttachment> {
        self.core
            .update(|tables| {
                let volume = find(tables, account, &request.volume_id)?;
                let found = instance::find(tables, account, &request.instance_id)?;
                if volumes::state_of(volume) != VolumeState::Available {
                    return Err(wrong_state(volume, "attached"));
                }
                let (spec, status) = &found;
                let state = life::state_of(spec, status.as_deref());
                if !matches!(state, InstanceState::Running | InstanceState::Stopped) {
                    let message = format!(
                        "instance {} is {state}; volumes are attached to running and stopped ones",
                        spec.instance_id
                    );
                    return Err(ApiError::wrong_state("IncorrectState", message).with("instance_id", &spec.instance_id));
                }
                let zone = spec.spec.as_ref().map_or("", |spec| spec.availability_zone.as_str());
                if !volume.availability_zone.is_empty() && volume.availability_zone != zone {
                    let message = format!(
                        "volume {} is in zone {}, instance {} in {zone}",
                        volume.volume_id, volume.availability_zone, spec.instance_id
                    );
                    return Err(ApiError::new(Code::InvalidArgument, "InvalidVolume.ZoneMismatch", message));
                }
                let device = choose_device(tables, spec, &request.device)?;
                let backend = backends::of(volume);
                if !backend.is_empty() {
                    let root = spec.spec.as_ref().map_or("", |spec| spec.root_device_name.as_str());
                    if device == root {
                        backends::must_be_local(volume, "a root volume")?;
                    }
                    if !backends::offers(tables, &spec.host_id, backend) {
                        let message = format!(
                            "volume {} is kept by volume backend '{backend}', which the host of instance {} does not have",
                            volume.volume_id, spec.instance_id
                        );
                        let error = ApiError::wrong_state("UnsupportedOperation", message);
                        return Err(error.with("volume_id", &volume.volume_id).with("instance_id", &spec.instance_id));
                    }
                }
                let mut wanted = volumes::want_attached(
                    volume,
                    &spec.instance_id,
                    &device,
                    request.delete_on_termination,
                    clock::now_ms(),
                );
                let free = volume.host_id.is_empty() || volume.host_id == spec.host_id || !backend.is_empty();
                if !volume.releasing && free {
                    return Ok((Some(place_txn(volume, wanted, &found)), ()));
                }
                // Its data is on another host, which uploads it first; the volumes' reconciler does the rest. An upload that an
                // earlier attachment has begun goes on, wherever the volume goes now.
                if !volume.releasing {
                    wanted.releasing = true;
                    wanted.generation = wanted.generation.saturating_add(1);
                    wanted.release_epoch = crate::storage::epoch(tables);
                }
                let key = keys::volume(account, &wanted.volume_id);
                let txn = Txn::new()
                    .compare_mod_revision(&key, volume.revision)
                    .compare_mod_revision(keys::instance_spec(account, &spec.instance_id), spec.revision)
                    .put(&key, encode(&wanted));
                Ok((Some(crate::storage::guard_epoch(txn, tables)), ()))
            })
            .await?;
        let tables = self.core.tables();
        let shown = volumes::attachment(&self.core, &tables, find(&tables, account, &request.volume_id)?);
        shown.ok_or_else(|| ApiError::unavailable("the attachment ended at once"))
    }

    pub(crate) async fn do_detach_volume(
        &self,
        account: &str,
        request: v1::DetachVolumeRequest,
    ) -> ApiResult<v1::VolumeAttachment> {
        self.core
            .update(|tables| {
                let volume = find(tables, account, &request.volume_id)?;
                let mismatch = |asked: &str, have: &str| {
                    let message = format!("volume {} is attached to {have}, not to {asked:.40}", volume.volume_id);
                    let error = ApiError::new(Code::NotFound, "InvalidAttachment.NotFound", message);
                    error.with("volume_id", &volume.volume_id)
                };
                if volume.instance_id.is_empty() {
                    let message = format!("volume {} is not attached", volume.volume_id);
                    return Err(ApiError::wrong_state("IncorrectState", message).with("volume_id", &volume.volume_id));
                }
                if !request.instance_id.is_empty() && request.instance_id != volume.instance_id {
                    return Err(mismatch(&request.instance_id, &volume.instance_id));
                }
                if !request.device.is_empty() && request.device != volume.device_name {
                    return Err(mismatch(&request.device, &volume.device_name));
                }
                if volume.replaced {
                    let message = format!("volume {} is being replaced as root volume", volume.volume_id);
                    return Err(ApiError::wrong_state("IncorrectState", message).with("volume_id", &volume.volume_id));
                }
                let volume_key = keys::volume(account, &volume.volume_id);
                let txn = Txn::new().compare_mod_revision(&volume_key, volume.revision);
                let found = tables.instance(&volume.instance_id);
                let slot = found.as_ref().and_then(|(spec, _)| {
                    spec.spec.as_ref()?.volumes.iter().position(|attached| volumes::id_of(attached) == volume.volume_id)
                });
                let (Some((spec, status)), Some(slot)) = (found, slot) else {
                    // It never got there.
                    return Ok((Some(txn.put(&volume_key, encode(&volumes::detached(volume)))), ()));
                };
                let state = life::state_of(&spec, status.as_deref());
                let mut with = (*spec.value).clone();
                let agent_spec = with.spec.get_or_insert_default();
                let stopped = state == InstanceState::Stopped;
                if volume.device_name == agent_spec.root_device_name && !stopped {
                    let message = format!(
                        "volume {} is the root volume of instance {}, which is {state}; stop it first",
                        volume.volume_id, spec.instance_id
                    );
                    return Err(ApiError::wrong_state("OperationNotPermitted", message));
                }
                let Some(attached) = agent_spec.volumes.get_mut(slot) else {
                    return Err(ApiError::internal("the instance's volumes changed"));
                };
                let wish = if request.force { v1::DetachWish::Force } else { v1::DetachWish::Ask };
                if !stopped && (attached.detach() == wish || attached.detach() == v1::DetachWish::Force) {
                    let seen = volumes::attachment_state(&spec, status.as_deref(), &volume.volume_id);
                    if seen != AttachmentState::Busy {
                        return Ok((None, ()));
                    }
                    // The guest did not let go of it: it is asked once more.
                    attached.detach_attempt = attached.detach_attempt.saturating_add(1);
                } else {
                    attached.set_detach(wish);
                }
                let mut txn = txn;
                if stopped {
                    // No VMM has it open: it is off with the record.
                    agent_spec.volumes.remove(slot);
                    txn = txn.put(&volume_key, encode(&volumes::detached(volume)));
                }
                with.generation = with.generation.saturating_add(1);
                let key = keys::instance_spec(account, &spec.instance_id);
                let status_key = keys::instance_status(account, &spec.instance_id);
                let txn = txn
                    .compare_mod_revision(&key, spec.revision)
                    .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision))
                    .put(&key, encode(&with));
                Ok((Some(txn), ()))
            })
            .await?;
        let tables = self.core.tables();
        let volume = find(&tables, account, &request.volume_id)?;
        Ok(volumes::attachment(&self.core, &tables, volume).unwrap_or_else(|| v1::VolumeAttachment {
            volume_id: request.volume_id,
            instance_id: request.instance_id,
            device: request.device,
            state: v1::AttachmentState::Detached.into(),
            ..Default::default()
        }))
    }
}
