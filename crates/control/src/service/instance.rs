//! Instances as users see them, and the service's dispatch.

use std::borrow::Cow;
use std::pin::Pin;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_types::{InstanceId, InstanceState};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, detached};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::check;
use crate::clock;
use crate::core::Core;
use crate::life;
use crate::paging::Pager;
use crate::tables::{Tables, Versioned, account_of};
use crate::volumes;

const FILTERS: [&str; 20] = [
    "instance-id",
    "image-id",
    "instance-type",
    "instance-state-name",
    "instance-state-code",
    "reservation-id",
    "key-name",
    "private-ip-address",
    "network-interface.mac-address",
    "availability-zone",
    "host-id",
    "client-token",
    "owner-id",
    "launch-time",
    "state-reason-code",
    "instance-status.status",
    "system-status.status",
    "tag-key",
    "tag-value",
    "tag:",
];

pub(crate) type Found = (Versioned<rec::InstanceSpec>, Option<Versioned<rec::InstanceStatus>>);

pub(crate) fn not_found(ids: &[&str]) -> ApiError {
    ApiError::not_found("InvalidInstanceID.NotFound", "instance", ids)
}

pub(crate) fn check_id(id: &str) -> ApiResult<()> {
    match id.parse::<InstanceId>() {
        Ok(_) => Ok(()),
        Err(error) => Err(ApiError::malformed_id("InvalidInstanceID.Malformed", "instance_id", &error)),
    }
}

/// An account's instance.
pub(crate) fn find(tables: &Tables, account: &str, id: &str) -> ApiResult<Found> {
    check_id(id)?;
    tables.instance(id).filter(|(spec, _)| account_of(spec) == account).ok_or_else(|| not_found(&[id]))
}

/// All of an account's instances with these ids, or an error that names every unknown one.
pub(crate) fn find_all(tables: &Tables, account: &str, ids: &[String]) -> ApiResult<Vec<Found>> {
    ids.iter().try_for_each(|id| check_id(id))?;
    let found: Vec<_> = ids.iter().map(|id| find(tables, account, id).ok()).collect();
    let missing: Vec<&str> =
        ids.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(id, _)| id.as_str()).collect();
    match missing.is_empty() {
        true => Ok(found.into_iter().flatten().collect()),
        false => Err(not_found(&missing)),
    }
}

pub(crate) fn state_to_proto(state: InstanceState) -> v1::InstanceState {
    match state {
        InstanceState::Pending => v1::InstanceState::Pending,
        InstanceState::Running => v1::InstanceState::Running,
        InstanceState::ShuttingDown => v1::InstanceState::ShuttingDown,
        InstanceState::Terminated => v1::InstanceState::Terminated,
        InstanceState::Stopping => v1::InstanceState::Stopping,
        InstanceState::Stopped => v1::InstanceState::Stopped,
    }
}

/// EC2's system and instance status checks. The first is about the host and the VMM, the second about the guest.
fn status_checks(
    core: &Core,
    spec: &rec::InstanceSpec,
    status: Option<&rec::InstanceStatus>,
    state: InstanceState,
) -> (v1::StatusCheck, v1::StatusCheck) {
    use v1::StatusCheck as C;
    match state {
        InstanceState::Running => {}
        InstanceState::Pending => return (C::Initializing, C::Initializing),
        _ => return (C::NotApplicable, C::NotApplicable),
    }
    if !core.live.is_up(&spec.host_id) {
        return (C::Impaired, C::InsufficientData);
    }
    let Some(status) = status.filter(|status| status.state() == v1::ObservedState::Running) else {
        return (C::Impaired, C::InsufficientData);
    };
    let waited = clock::now_ms().saturating_sub(status.running_since_ms);
    let instance = match status.guest_responded {
        true => C::Ok,
        false if waited < clock::as_ms(core.config.guest_timeout) => C::Initializing,
        false => C::Impaired,
    };
    (C::Ok, instance)
}

/// Instance-store disks as block devices.
pub(crate) fn instance_store_devices(agent_spec: &v1::InstanceSpec) -> Vec<v1::BlockDevice> {
    let device = |disk: &v1::InstanceStoreDisk| v1::BlockDevice {
        device_name: disk.device_name.clone(),
        virtual_name: disk.virtual_name.clone(),
        size_bytes: disk.size_bytes,
        serial: disk.serial.clone(),
        ..Default::default()
    };
    agent_spec.instance_store.iter().map(device).collect()
}

fn block_devices(
    spec: &rec::InstanceSpec,
    status: Option<&rec::InstanceStatus>,
    tables: &Tables,
) -> Vec<v1::BlockDevice> {
    let agent_spec = spec.spec.clone().unwrap_or_default();
    let device = |attached: &v1::AttachedVolume| {
        let id = volumes::id_of(attached);
        let state = volumes::attachment_state(spec, status, id);
        v1::BlockDevice {
            device_name: attached.device_name.clone(),
            volume_id: id.to_owned(),
            virtual_name: String::new(),
            size_bytes: attached.volume.as_ref().map_or(0, |volume| volume.size_bytes),
            serial: volumes::serial(id),
            state: volumes::attachment_to_proto(state).into(),
            delete_on_termination: tables.volumes.get(id).is_some_and(|volume| volume.delete_on_termination),
        }
    };
    let volumes = agent_spec.volumes.iter().map(device);
    volumes.chain(instance_store_devices(&agent_spec)).collect()
}

/// An instance as the API shows it. The tables must not be held.
pub(crate) fn view(core: &Core, spec: &rec::InstanceSpec, status: Option<&rec::InstanceStatus>) -> v1::Instance {
    let devices = block_devices(spec, status, &core.tables());
    let agent_spec = spec.spec.clone().unwrap_or_default();
    let state = life::state_of(spec, status);
    let (system_status, instance_status) = status_checks(core, spec, status, state);
    let gone = state.is_final();
    v1::Instance {
        instance_id: spec.instance_id.clone(),
        state: state_to_proto(state).into(),
        // What is wanted has the word; while nobody wants a change, what the host says.
        state_reason: spec.reason.clone().or_else(|| status.and_then(|status| status.reason.clone())),
        state_transition_reason: spec.transition_reason.clone(),
        host_id: spec.host_id.clone(),
        block_devices: if gone { Vec::new() } else { devices },
        network_interfaces: if gone { Vec::new() } else { agent_spec.network_interfaces },
        launch_time: clock::rfc3339(spec.launched_ms),
        system_status: system_status.into(),
        instance_status: instance_status.into(),
        progress: if gone { None } else { core.live.progress(&spec.instance_id) },
        client_token: spec.client_token.clone(),
        instance_initiated_shutdown_behavior: spec.instance_initiated_shutdown_behavior.clone(),
        disable_api_termination: spec.disable_api_termination,
        reservation_id: agent_spec.reservation_id,
        account_id: agent_spec.account_id,
        image_id: agent_spec.image_id,
        instance_type: agent_spec.instance_type,
        key_name: agent_spec.key_name,
        tags: agent_spec.tags,
        ami_launch_index: agent_spec.ami_launch_index,
        availability_zone: agent_spec.availability_zone,
        root_device_type: if agent_spec.bundle_root.is_some() { "instance-store" } else { "ebs" }.to_owned(),
        root_device_name: agent_spec.root_device_name,
    }
}

fn check_name(check: v1::StatusCheck) -> &'static str {
    match check {
        v1::StatusCheck::Ok => "ok",
        v1::StatusCheck::Impaired => "impaired",
        v1::StatusCheck::Initializing => "initializing",
        v1::StatusCheck::InsufficientData => "insufficient-data",
        v1::StatusCheck::NotApplicable | v1::StatusCheck::Unspecified => "not-applicable",
    }
}

fn filter_values<'a>(instance: &'a v1::Instance, state: InstanceState, name: &str) -> Vec<Cow<'a, str>> {
    let one = |text: &'a str| vec![Cow::Borrowed(text)];
    match name {
        "instance-id" => one(&instance.instance_id),
        "image-id" => one(&instance.image_id),
        "instance-type" => one(&instance.instance_type),
        "instance-state-name" => one(state.name()),
        "instance-state-code" => vec![state.code().to_string().into()],
        "reservation-id" => one(&instance.reservation_id),
        "key-name" => one(&instance.key_name),
        "private-ip-address" => {
            instance.network_interfaces.iter().map(|nic| nic.private_ip_address.as_str().into()).collect()
        }
        "network-interface.mac-address" => {
            instance.network_interfaces.iter().map(|nic| nic.mac_address.as_str().into()).collect()
        }
        "availability-zone" => one(&instance.availability_zone),
        "host-id" => one(&instance.host_id),
        "client-token" => one(&instance.client_token),
        "owner-id" => one(&instance.account_id),
        "launch-time" => one(&instance.launch_time),
        "state-reason-code" => instance.state_reason.iter().map(|reason| reason.code.as_str().into()).collect(),
        "instance-status.status" => one(check_name(instance.instance_status())),
        "system-status.status" => one(check_name(instance.system_status())),
        other => check::tag_values(&instance.tags, other).unwrap_or_default(),
    }
}

impl Api {
    fn do_list_instances(
        &self,
        account: &str,
        mut request: v1::ListInstancesRequest,
    ) -> ApiResult<v1::ListInstancesResponse> {
        let page = request.page.take();
        let pager = Pager::new(&self.core, "ListInstances", account, &request, page.as_ref())?;
        let ids = check::optional_ids("instance_ids", &request.instance_ids)?;
        let filters = check::filters(&request.filters, &FILTERS)?;
        // Records are shared, so a long list holds the tables for a moment only.
        let candidates: Vec<Found> = {
            let tables = self.core.tables();
            match ids.is_empty() {
                false => find_all(&tables, account, &ids)?,
                true => {
                    let own = tables.instances_of.get(account);
                    own.into_iter().flatten().filter_map(|id| tables.instance(id)).collect()
                }
            }
        };
        let views = candidates
            .iter()
            .filter(|(spec, _)| pager.wants(&spec.instance_id))
            .map(|(spec, status)| (spec, status, view(&self.core, spec, status.as_deref())))
            .filter(|(spec, status, instance)| {
                let state = life::state_of(spec, status.as_deref());
                filters.is_empty() || filters.matches(|name| filter_values(instance, state, name))
            })
            .map(|(spec, _, instance)| (spec.instance_id.as_str(), instance))
            .collect::<Vec<_>>();
        let (instances, page) = pager.collect(views.into_iter());
        Ok(v1::ListInstancesResponse { instances, page })
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::instance_service_server::InstanceService for Api {
    async fn run_instances(&self, request: Request<v1::RunInstancesRequest>) -> Answer<v1::RunInstancesResponse> {
        let account = auth::caller(&request)?.account_id;
        let api = self.clone();
        let request = request.into_inner();
        Ok(Response::new(detached(&self.core, async move { api.do_run_instances(account, request).await }).await?))
    }

    async fn list_instances(&self, request: Request<v1::ListInstancesRequest>) -> Answer<v1::ListInstancesResponse> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_instances(&account, request.into_inner())?))
    }

    async fn get_instance(&self, request: Request<v1::GetInstanceRequest>) -> Answer<v1::Instance> {
        let account = auth::caller(&request)?.account_id;
        let (spec, status) = find(&self.core.tables(), &account, &request.get_ref().instance_id)?;
        Ok(Response::new(view(&self.core, &spec, status.as_deref())))
    }

    async fn start_instances(&self, request: Request<v1::StartInstancesRequest>) -> Answer<v1::StartInstancesResponse> {
        let account = auth::caller(&request)?.account_id;
        let api = self.clone();
        let ids = request.into_inner().instance_ids;
        let changes = detached(&self.core, async move { api.do_start(&account, &ids).await }).await?;
        Ok(Response::new(v1::StartInstancesResponse { changes }))
    }

    async fn stop_instances(&self, request: Request<v1::StopInstancesRequest>) -> Answer<v1::StopInstancesResponse> {
        let account = auth::caller(&request)?.account_id;
        let request = request.into_inner();
        let changes = self.do_stop(&account, &request.instance_ids, request.force).await?;
        Ok(Response::new(v1::StopInstancesResponse { changes }))
    }

    async fn reboot_instances(
        &self,
        request: Request<v1::RebootInstancesRequest>,
    ) -> Answer<v1::RebootInstancesResponse> {
        let account = auth::caller(&request)?.account_id;
        self.do_reboot(&account, &request.into_inner().instance_ids).await?;
        Ok(Response::new(v1::RebootInstancesResponse {}))
    }

    async fn terminate_instances(
        &self,
        request: Request<v1::TerminateInstancesRequest>,
    ) -> Answer<v1::TerminateInstancesResponse> {
        let account = auth::caller(&request)?.account_id;
        let changes = self.do_terminate(&account, &request.into_inner().instance_ids).await?;
        Ok(Response::new(v1::TerminateInstancesResponse { changes }))
    }

    async fn modify_instance_attribute(
        &self,
        request: Request<v1::ModifyInstanceAttributeRequest>,
    ) -> Answer<v1::Instance> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_modify_instance_attribute(&account, request.into_inner()).await?))
    }

    async fn create_replace_root_volume_task(
        &self,
        request: Request<v1::CreateReplaceRootVolumeTaskRequest>,
    ) -> Result<Response<v1::ReplaceRootVolumeTask>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_replace_root(&account, request.into_inner()).await?))
    }

    async fn list_replace_root_volume_tasks(
        &self,
        request: Request<v1::ListReplaceRootVolumeTasksRequest>,
    ) -> Result<Response<v1::ListReplaceRootVolumeTasksResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_replacements(&account, request.into_inner())?))
    }

    type WatchInstancesStream = Pin<Box<dyn Stream<Item = Result<v1::Instance, Status>> + Send>>;

    async fn watch_instances(&self, request: Request<v1::WatchInstancesRequest>) -> Answer<Self::WatchInstancesStream> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_watch(account, &request.into_inner().instance_ids)?))
    }

    async fn get_console_output(
        &self,
        request: Request<v1::GetConsoleOutputRequest>,
    ) -> Answer<v1::GetConsoleOutputResponse> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_get_console_output(&account, &request.into_inner().instance_id).await?))
    }

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<v1::ConsoleOutput, Status>> + Send>>;

    async fn console(&self, request: Request<Streaming<v1::ConsoleInput>>) -> Answer<Self::ConsoleStream> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_console(&account, request.into_inner()).await?))
    }
}
