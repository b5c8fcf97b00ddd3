//! Stop, start, reboot, terminate: each changes what is wanted of its instances, all of them in one transaction or none.

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::InstanceState;
use tonic::Code;

use super::instance::{Found, find_all, state_to_proto};
use super::run::MAX_TXN_BYTES;
use super::{Api, instance};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, encode};
use crate::keys;
use crate::life;
use crate::tables::Tables;
use crate::volumes;

/// Attempts of a start when instances change under the call.
const MAX_ATTEMPTS: u32 = 20;

pub(crate) fn wrong_state(id: &str, state: InstanceState, action: &str) -> ApiError {
    let message = format!("instance {id} is {state}; it cannot be {action}");
    ApiError::wrong_state("IncorrectInstanceState", message).with("instance_id", id).with("state", state)
}

/// New specs for those that change, and what to tell the caller.
fn plan(
    found: &[Found],
    mut change: impl FnMut(&rec::InstanceSpec, InstanceState) -> ApiResult<Option<rec::InstanceSpec>>,
) -> ApiResult<(Option<Txn>, Vec<v1::InstanceStateChange>)> {
    let mut txn = Txn::new();
    let mut changes = Vec::new();
    for (spec, status) in found {
        let before = life::state_of(spec, status.as_deref());
        let new = change(spec, before)?;
        let after = new.as_ref().map_or(before, |new| life::state_of(new, status.as_deref()));
        changes.push(v1::InstanceStateChange {
            instance_id: spec.instance_id.clone(),
            previous_state: state_to_proto(before).into(),
            current_state: state_to_proto(after).into(),
        });
        if let Some(new) = new {
            let account = crate::tables::account_of(spec);
            let key = keys::instance_spec(account, &spec.instance_id);
            // What the host says decides too: an instance must not be started on the strength of an outdated status.
            let status_key = keys::instance_status(account, &spec.instance_id);
            let status_revision = status.as_ref().map_or(0, |status| status.revision);
            txn = txn
                .compare_mod_revision(&key, spec.revision)
                .compare_mod_revision(&status_key, status_revision)
                .put(&key, encode(&new));
        }
    }
    if txn.size() > MAX_TXN_BYTES {
        let message = "too many instances with much user data at once; name fewer in one call";
        return Err(ApiError::invalid("instance_ids", message));
    }
    Ok(((!txn.ops.is_empty()).then_some(txn), changes))
}

/// Most instances in one call: each needs two compares.
fn checked_ids(ids: &[String]) -> ApiResult<Vec<String>> {
    const MOST: usize = hearth_store::limits::MAX_TXN_OPS / 2 - 4;
    let ids = check::ids("instance_ids", ids)?;
    match ids.len() <= MOST {
        true => Ok(ids),
        false => Err(ApiError::invalid("instance_ids", format!("{} ids, at most {MOST} in one call", ids.len()))),
    }
}

impl Api {
    async fn change_instances(
        &self,
        account: &str,
        ids: &[String],
        mut change: impl FnMut(&rec::InstanceSpec, InstanceState) -> ApiResult<Option<rec::InstanceSpec>>,
    ) -> ApiResult<Vec<v1::InstanceStateChange>> {
        let ids = checked_ids(ids)?;
        self.core.update(|tables| plan(&find_all(tables, account, &ids)?, &mut change)).await
    }

    pub(crate) async fn do_stop(
        &self,
        account: &str,
        ids: &[String],
        force: bool,
    ) -> ApiResult<Vec<v1::InstanceStateChange>> {
        let (reason, text) = life::by_user(clock::now_ms());
        self.change_instances(account, ids, |spec, state| match state {
            InstanceState::Pending | InstanceState::Running if life::has_store_root(spec) => {
                let id = &spec.instance_id;
                let message =
                    format!("the instance '{id}' does not have an 'ebs' root device type and cannot be stopped");
                Err(ApiError::wrong_state("UnsupportedOperation", message).with("instance_id", id))
            }
            InstanceState::Pending | InstanceState::Running => {
                Ok(Some(life::want(spec, v1::RunState::Stopped, force, reason.clone(), text.clone())))
            }
            // A second stop may only make it harder.
            InstanceState::Stopping if force && !spec.force => {
                Ok(Some(life::want(spec, v1::RunState::Stopped, true, reason.clone(), text.clone())))
            }
            InstanceState::Stopping | InstanceState::Stopped => Ok(None),
            state => Err(wrong_state(&spec.instance_id, state, "stopped")),
        })
        .await
    }

    pub(crate) async fn do_reboot(&self, account: &str, ids: &[String]) -> ApiResult<()> {
        self.change_instances(account, ids, |spec, state| match state {
            InstanceState::Running => Ok(Some(rec::InstanceSpec {
                generation: spec.generation.saturating_add(1),
                reboot_generation: spec.reboot_generation.saturating_add(1),
                ..spec.clone()
            })),
            state => Err(wrong_state(&spec.instance_id, state, "rebooted")),
        })
        .await
        .map(|_| ())
    }

    pub(crate) async fn do_terminate(&self, account: &str, ids: &[String]) -> ApiResult<Vec<v1::InstanceStateChange>> {
        let (reason, text) = life::by_user(clock::now_ms());
        self.change_instances(account, ids, |spec, state| match state {
            InstanceState::ShuttingDown | InstanceState::Terminated => Ok(None),
            _ if spec.disable_api_termination => {
                let id = &spec.instance_id;
                let message = format!("instance {id} is protected: its attribute disable_api_termination is set");
                let error = ApiError::new(Code::FailedPrecondition, "OperationNotPermitted", message);
                Err(error.with("instance_id", id))
            }
            _ => Ok(Some(life::want(spec, v1::RunState::Terminated, false, reason.clone(), text.clone()))),
        })
        .await
    }

    /// Starting admits an instance on its host again, where its root volume is. There is no room elsewhere for it.
    pub(crate) async fn do_start(&self, account: &str, ids: &[String]) -> ApiResult<Vec<v1::InstanceStateChange>> {
        let ids = checked_ids(ids)?;
        for _ in 0..MAX_ATTEMPTS {
            let prepared = self.prepare_start(&self.core.tables(), account, &ids);
            let outcome = match prepared {
                Ok((None, changes)) => return Ok(changes),
                Ok((Some(txn), changes)) => self.core.commit(txn).await.map(|commit| (commit, changes)),
                Err(error) => Err(error),
            };
            // Whatever happened, the tables know it now.
            self.core.with_placement(|tables, books| ids.iter().for_each(|id| books.sync_instance(tables, id)));
            match outcome? {
                (Commit::Done, changes) => return Ok(changes),
                (Commit::Conflict(_), _) => {}
            }
        }
        Err(ApiError::unavailable("the instances change too fast; try again"))
    }

    fn prepare_start(
        &self,
        tables: &Tables,
        account: &str,
        ids: &[String],
    ) -> ApiResult<(Option<Txn>, Vec<v1::InstanceStateChange>)> {
        let found = find_all(tables, account, ids)?;
        let mut books = self.core.placement(tables);
        let mut opened = Vec::new();
        let (txn, changes) = plan(&found, |spec, state| match state {
            InstanceState::Pending | InstanceState::Running => Ok(None),
            InstanceState::Stopped => {
                let agent_spec = spec.spec.clone().unwrap_or_default();
                let root = &agent_spec.root_device_name;
                let has_root = agent_spec.volumes.iter().any(|slot| slot.device_name == *root);
                if agent_spec.bundle_root.is_none() && !has_root {
                    let message =
                        format!("instance {} has no volume attached at its root device {root}", spec.instance_id);
                    return Err(
                        ApiError::wrong_state("IncorrectInstanceState", message).with("instance_id", &spec.instance_id)
                    );
                }
                books.readmit(tables, spec).map_err(|error| {
                    let host = &spec.host_id;
                    error.with("instance_id", &spec.instance_id).with("host_id", host)
                })?;
                let slots = agent_spec.volumes.iter().filter_map(|slot| tables.volumes.get(volumes::id_of(slot)));
                opened.extend(slots.filter(|volume| !volume.opened).cloned());
                let mut new = life::want(spec, v1::RunState::Running, false, None, String::new());
                // EC2 gives a started instance a new launch time.
                new.launched_ms = clock::now_ms();
                if let Some(agent_spec) = &mut new.spec {
                    agent_spec.launch_time = clock::rfc3339(new.launched_ms);
                }
                Ok(Some(new))
            }
            state => Err(wrong_state(&spec.instance_id, state, "started")),
        })?;
        let txn = opened.iter().fold(txn, |txn, volume| {
            let new = rec::VolumeSpec { opened: true, ..(*volume.value).clone() };
            let key = keys::volume(&volume.account_id, &volume.volume_id);
            txn.map(|txn| txn.compare_mod_revision(&key, volume.revision).put(&key, encode(&new)))
        });
        const MOST: usize = hearth_store::limits::MAX_TXN_OPS - 4;
        if txn.as_ref().is_some_and(|txn| txn.compares.len() > MOST || txn.ops.len() > MOST) {
            let message = "too many instances with volumes that were never open; name fewer in one call";
            return Err(ApiError::invalid("instance_ids", message));
        }
        Ok((txn, changes))
    }

    /// An account's instance that is running, for consoles.
    pub(crate) fn placed(&self, account: &str, id: &str) -> ApiResult<(String, InstanceState)> {
        let (spec, status) = instance::find(&self.core.tables(), account, id)?;
        Ok((spec.host_id.clone(), life::state_of(&spec, status.as_deref())))
    }
}
