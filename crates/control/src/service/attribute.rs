//! ModifyInstanceAttribute: what an instance was launched with, changed later.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_ModifyInstanceAttribute.html>

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::{Revision, Txn};
use hearth_types::{InstanceId, InstanceState, InstanceType};

use super::instance::{Found, find, view};
use super::lifecycle::wrong_state;
use super::{Api, instance_type, run};
use crate::api_error::{ApiError, ApiResult};
use crate::core::encode;
use crate::keys;
use crate::life;
use crate::tables::Tables;

/// A request that is in itself sound.
struct Changes {
    disable_api_termination: Option<bool>,
    shutdown_behavior: Option<&'static str>,
    kind: Option<InstanceType>,
    user_data: Option<bytes::Bytes>,
    delete_on_termination: Vec<v1::DeleteOnTermination>,
}

impl Changes {
    fn apply(&self, found: &Found) -> ApiResult<rec::InstanceSpec> {
        let (old, status) = found;
        let id = &old.instance_id;
        let state = life::state_of(old, status.as_deref());
        if matches!(state, InstanceState::ShuttingDown | InstanceState::Terminated) {
            return Err(wrong_state(id, state, "modified"));
        }
        let only_stopped = [("instance type", self.kind.is_some()), ("user data", self.user_data.is_some())];
        if let Some((what, _)) = only_stopped.iter().find(|(_, set)| *set && state != InstanceState::Stopped) {
            let message = format!("instance {id} is {state}; its {what} can only be changed while it is stopped");
            let error = ApiError::wrong_state("IncorrectInstanceState", message);
            return Err(error.with("instance_id", id).with("state", state));
        }
        let mut new = (*old.value).clone();
        if let Some(disabled) = self.disable_api_termination {
            new.disable_api_termination = disabled;
        }
        if let Some(behavior) = self.shutdown_behavior {
            if behavior == life::SHUTDOWN_STOP && life::has_store_root(old) {
                let message = format!("instance {id} has an instance-store root device and cannot be stopped");
                return Err(ApiError::wrong_state("UnsupportedOperation", message).with("instance_id", id));
            }
            behavior.clone_into(&mut new.instance_initiated_shutdown_behavior);
        }
        let mut agent_spec = new.spec.take().unwrap_or_default();
        if let Some(user_data) = &self.user_data {
            agent_spec.user_data = user_data.clone();
        }
        if let Some(kind) = &self.kind {
            resize(&mut agent_spec, id, kind)?;
        }
        new.spec = Some(agent_spec);
        if new.spec != old.spec {
            // The host has to know.
            new.generation = new.generation.saturating_add(1);
        }
        Ok(new)
    }
}

impl Changes {
    /// New records of attached volumes.
    fn of_volumes(&self, tables: &Tables, id: &str) -> ApiResult<Vec<(Revision, rec::VolumeSpec)>> {
        let mut changed: Vec<(Revision, rec::VolumeSpec)> = Vec::new();
        for wish in &self.delete_on_termination {
            let device = &wish.device_name;
            let volume = tables
                .volumes
                .values()
                .find(|volume| volume.instance_id == id && volume.device_name == *device && !volume.replaced);
            let Some(volume) = volume else {
                let message = format!("instance {id} has no volume at {device:.40}");
                return Err(ApiError::invalid("delete_on_termination", message));
            };
            if changed.iter().any(|(_, other)| other.volume_id == volume.volume_id) {
                return Err(ApiError::invalid("delete_on_termination", format!("{device} is named twice")));
            }
            let new = rec::VolumeSpec { delete_on_termination: wish.delete_on_termination, ..(*volume.value).clone() };
            if new != *volume.value {
                changed.push((volume.revision, new));
            }
        }
        Ok(changed)
    }
}

/// Everything that follows from the type. A stopped instance takes no room on its host; its start claims what stands here.
fn resize(agent_spec: &mut v1::InstanceSpec, id: &str, kind: &InstanceType) -> ApiResult<()> {
    let nics = agent_spec.network_interfaces.len();
    if nics > kind.max_network_interfaces as usize {
        let most = kind.max_network_interfaces;
        let message = format!("{} takes at most {most} network interfaces, the instance has {nics}", kind.name);
        return Err(ApiError::invalid("instance_type", message).with("instance_id", id));
    }
    let parsed: InstanceId =
        id.parse().map_err(|error| ApiError::malformed_id("InvalidInstanceID.Malformed", "instance_id", &error))?;
    agent_spec.instance_type.clone_from(&kind.name);
    agent_spec.resources = Some(instance_type::resources(kind));
    agent_spec.ecu_milli_quota = kind.ecu_milli.unwrap_or(0);
    let number = |disk: &v1::InstanceStoreDisk| disk.virtual_name.strip_prefix("ephemeral")?.parse().ok();
    let mapped: Vec<(String, usize)> =
        agent_spec.instance_store.iter().filter_map(|disk| Some((disk.device_name.clone(), number(disk)?))).collect();
    agent_spec.instance_store = run::instance_store(kind, &parsed, &mapped);
    agent_spec.network_mbps = kind.network_mbps;
    Ok(())
}

impl Api {
    pub(crate) async fn do_modify_instance_attribute(
        &self,
        account: &str,
        request: v1::ModifyInstanceAttributeRequest,
    ) -> ApiResult<v1::Instance> {
        let id = request.instance_id;
        let behavior = request.instance_initiated_shutdown_behavior;
        let changes = Changes {
            disable_api_termination: request.disable_api_termination,
            shutdown_behavior: behavior.as_deref().map(run::check_shutdown_behavior).transpose()?,
            kind: request.instance_type.map(|name| instance_type::find(&self.core, &name)).transpose()?,
            user_data: request.user_data,
            delete_on_termination: request.delete_on_termination,
        };
        if let Some(user_data) = &changes.user_data {
            run::check_user_data(user_data)?;
        }
        let nothing = changes.disable_api_termination.is_none()
            && changes.shutdown_behavior.is_none()
            && changes.kind.is_none()
            && changes.user_data.is_none()
            && changes.delete_on_termination.is_empty();
        if nothing {
            return Err(ApiError::missing("an attribute to modify"));
        }
        self.core
            .update(|tables| {
                let found = find(tables, account, &id)?;
                let new = changes.apply(&found)?;
                let (old, status) = found;
                let volumes = changes.of_volumes(tables, &id)?;
                if new == *old.value && volumes.is_empty() {
                    return Ok((None, ()));
                }
                // A start or a report in between may have changed the state that allowed it.
                let (key, status_key) = (keys::instance_spec(account, &id), keys::instance_status(account, &id));
                let txn = Txn::new()
                    .compare_mod_revision(&key, old.revision)
                    .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision))
                    .put(&key, encode(&new));
                let txn = volumes.iter().fold(txn, |txn, (revision, volume)| {
                    let key = keys::volume(account, &volume.volume_id);
                    txn.compare_mod_revision(&key, *revision).put(&key, encode(volume))
                });
                Ok((Some(txn), ()))
            })
            .await?;
        let (spec, status) = find(&self.core.tables(), account, &id)?;
        Ok(view(&self.core, &spec, status.as_deref()))
    }
}
