//! Hosts, for operators.

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use tonic::{Request, Response, Status};

use super::{Api, enroll};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::backends;
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode};
use crate::keys;
use crate::life;
use crate::paging::Pager;
use crate::tables::{Tables, Versioned, account_of};

const FILTERS: [&str; 6] = ["host-id", "host-name", "availability-zone", "state", "connected", "label:"];

fn state_name(state: v1::HostState) -> &'static str {
    match state {
        v1::HostState::Draining => "draining",
        _ => "active",
    }
}

fn view(core: &Core, spec: &rec::HostSpec, status: Option<&rec::HostStatus>) -> v1::Host {
    let status = status.cloned().unwrap_or_default();
    let seen = core.live.last_seen_ms(&spec.host_id).max(status.last_seen_ms);
    v1::Host {
        host_id: spec.host_id.clone(),
        name: spec.name.clone(),
        availability_zone: status.availability_zone,
        state: spec.state,
        connected: core.live.connected(&spec.host_id),
        last_seen: if seen == 0 { String::new() } else { clock::rfc3339(seen) },
        capacity: status.capacity,
        vcpu_overcommit_percent: status.vcpu_overcommit_percent,
        agent_version: status.agent_version,
        kernel_version: status.kernel_version,
        instance_cidr: status.instance_cidr,
        labels: status.labels,
        boot_id: status.boot_id,
        volume_backends: status.volume_backends,
        ..Default::default()
    }
}

/// A host by id or name.
pub(crate) fn find(tables: &Tables, id_or_name: &str) -> ApiResult<Versioned<rec::HostSpec>> {
    let by_id = tables.host(id_or_name).map(|(spec, _)| spec);
    let specs = || tables.hosts.values().filter_map(|entry| entry.spec.as_ref());
    by_id
        .or_else(|| specs().find(|spec| spec.name == id_or_name).cloned())
        .ok_or_else(|| ApiError::not_found("InvalidHostID.NotFound", "host", &[id_or_name]))
}

impl Api {
    fn host_view(&self, id_or_name: &str) -> ApiResult<v1::Host> {
        let mut host = {
            let tables = self.core.tables();
            let spec = find(&tables, id_or_name)?;
            let status = tables.host(&spec.host_id).and_then(|(_, status)| status);
            view(&self.core, &spec, status.as_deref())
        };
        self.add_allocations(std::slice::from_mut(&mut host));
        Ok(host)
    }

    fn add_allocations(&self, hosts: &mut [v1::Host]) {
        self.core.with_placement(|tables, placement| {
            for host in hosts {
                let room = placement.room(&host.host_id);
                host.allocated = Some(room.allocated);
                host.allocatable = Some(room.allocatable);
                let placed = tables.instances_on.get(&host.host_id).into_iter().flatten();
                let count = placed.filter(|id| is_there(tables, id)).count();
                host.instance_count = u32::try_from(count).unwrap_or(u32::MAX);
            }
        });
    }

    async fn set_host_state(&self, id_or_name: &str, state: v1::HostState) -> ApiResult<v1::Host> {
        self.core
            .update(|tables| {
                let spec = find(tables, id_or_name)?;
                if spec.state() == state {
                    return Ok((None, ()));
                }
                let new = rec::HostSpec { state: state.into(), ..(*spec.value).clone() };
                let key = keys::host_spec(&spec.host_id);
                Ok((Some(Txn::new().compare_mod_revision(&key, spec.revision).put(&key, encode(&new))), ()))
            })
            .await?;
        self.host_view(id_or_name)
    }

    fn do_list_hosts(&self, account: &str, mut request: v1::ListHostsRequest) -> ApiResult<v1::ListHostsResponse> {
        let page = request.page.take();
        let pager = Pager::new(&self.core, "ListHosts", account, &request, page.as_ref())?;
        let ids = check::optional_ids("host_ids", &request.host_ids)?;
        let filters = check::filters(&request.filters, &FILTERS)?;
        let (mut hosts, page) = {
            let tables = self.core.tables();
            let missing: Vec<&str> = ids.iter().map(String::as_str).filter(|id| tables.host(id).is_none()).collect();
            if !missing.is_empty() {
                return Err(ApiError::not_found("InvalidHostID.NotFound", "host", &missing));
            }
            let found: Vec<v1::Host> = tables
                .hosts
                .iter()
                .filter(|(id, _)| pager.wants(id) && (ids.is_empty() || ids.contains(id)))
                .filter_map(|(_, entry)| Some(view(&self.core, entry.spec.as_deref()?, entry.status.as_deref())))
                .filter(|host| {
                    filters.matches(|name| match name {
                        "host-id" => vec![host.host_id.as_str().into()],
                        "host-name" => vec![host.name.as_str().into()],
                        "availability-zone" => vec![host.availability_zone.as_str().into()],
                        "state" => vec![state_name(host.state()).into()],
                        "connected" => vec![host.connected.to_string().into()],
                        label => {
                            let key = label.strip_prefix("label:").unwrap_or_default();
                            let of_key = host.labels.iter().filter(|label| label.key == key);
                            of_key.map(|label| label.value.as_str().into()).collect()
                        }
                    })
                })
                .collect();
            pager.collect(found.iter().map(|host| (host.host_id.as_str(), host.clone())))
        };
        self.add_allocations(&mut hosts);
        Ok(v1::ListHostsResponse { hosts, page })
    }

    async fn do_remove_host(&self, request: v1::RemoveHostRequest) -> ApiResult<()> {
        let spec = find(&self.core.tables(), &request.host)?;
        let host = spec.host_id.clone();
        if request.force && self.core.live.connected(&host) {
            let message =
                format!("host {host} is connected; stop its agent, or drain it and terminate what runs there");
            return Err(ApiError::wrong_state("IncorrectHostState", message).with("host_id", &host));
        }
        // First no new placements (their transactions compare the host's spec), then what is there, then the host itself.
        self.set_host_state(&host, v1::HostState::Draining).await?;
        if request.force {
            self.terminate_all_on(&host).await?;
        }
        self.core
            .update(|tables| {
                let spec = find(tables, &host)?;
                let placed = tables.instances_on.get(&host).into_iter().flatten();
                let there: Vec<&str> = placed.filter(|id| is_there(tables, id)).map(String::as_str).collect();
                if !there.is_empty() {
                    let message = format!("host {host} still has {} instances: {}", there.len(), there.join(", "));
                    return Err(ApiError::wrong_state("DependencyViolation", message).with("host_id", &host));
                }
                let data = tables.volumes_on.get(&host).into_iter().flatten();
                let kept: Vec<&str> = data
                    .filter(|id| tables.volumes.get(*id).is_some_and(|volume| !volume.deleting && backends::of(volume).is_empty()))
                    .map(String::as_str)
                    .collect();
                if !kept.is_empty() && !request.force {
                    let message = format!(
                        "host {host} holds the only data of {} volumes: {}; attach them elsewhere, delete them, or lose them with force",
                        kept.len(),
                        kept.join(", ")
                    );
                    return Err(ApiError::wrong_state("DependencyViolation", message).with("host_id", &host));
                }
                let key = keys::host_spec(&host);
                let txn = Txn::new()
                    .compare_mod_revision(&key, spec.revision)
                    .delete(&key)
                    .delete(keys::host_status(&host))
                    .delete(keys::host_name(&spec.name))
                    .delete_prefix(format!("/evictions/{host}/"))
                    .delete_prefix(format!("/addresses/{host}/"));
                Ok((Some(txn), ()))
            })
            .await?;
        self.core.live.forget(&host);
        self.core.host_changed(&host);
        tracing::info!(host, force = request.force, "host removed");
        Ok(())
    }

    async fn terminate_all_on(&self, host: &str) -> ApiResult<()> {
        loop {
            let next = {
                let tables = self.core.tables();
                let placed = tables.instances_on.get(host).into_iter().flatten();
                placed.filter(|id| is_there(&tables, id)).find_map(|id| tables.instance(id))
            };
            let Some((spec, status)) = next else { return Ok(()) };
            let (new_spec, new_status) = life::host_removed(&spec, status.as_deref(), clock::now_ms());
            let account = account_of(&spec).to_owned();
            let id = spec.instance_id.clone();
            let spec_key = keys::instance_spec(&account, &id);
            let status_key = keys::instance_status(&account, &id);
            let txn = Txn::new()
                .compare_mod_revision(&spec_key, spec.revision)
                .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision))
                .put(&spec_key, encode(&new_spec))
                .put(&status_key, encode(&new_status));
            if self.core.commit(super::reports::release_addresses(txn, &spec)).await? == Commit::Done {
                tracing::warn!(instance = id, host, "terminated because its host was removed");
            }
        }
    }
}

/// Whether an instance still stands on its host.
fn is_there(tables: &Tables, id: &str) -> bool {
    tables.instance(id).is_some_and(|(spec, status)| !life::state_of(&spec, status.as_deref()).is_final())
}

#[tonic::async_trait]
impl v1::host_service_server::HostService for Api {
    async fn list_hosts(
        &self,
        request: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        let caller = auth::operator(&request)?;
        Ok(Response::new(self.do_list_hosts(&caller.account_id, request.into_inner())?))
    }

    async fn get_host(&self, request: Request<v1::GetHostRequest>) -> Result<Response<v1::Host>, Status> {
        auth::operator(&request)?;
        Ok(Response::new(self.host_view(&request.into_inner().host)?))
    }

    async fn drain_host(&self, request: Request<v1::DrainHostRequest>) -> Result<Response<v1::Host>, Status> {
        auth::operator(&request)?;
        Ok(Response::new(self.set_host_state(&request.into_inner().host, v1::HostState::Draining).await?))
    }

    async fn activate_host(&self, request: Request<v1::ActivateHostRequest>) -> Result<Response<v1::Host>, Status> {
        auth::operator(&request)?;
        Ok(Response::new(self.set_host_state(&request.into_inner().host, v1::HostState::Active).await?))
    }

    async fn remove_host(
        &self,
        request: Request<v1::RemoveHostRequest>,
    ) -> Result<Response<v1::RemoveHostResponse>, Status> {
        auth::operator(&request)?;
        let api = self.clone();
        let request = request.into_inner();
        super::detached(&self.core, async move { api.do_remove_host(request).await }).await?;
        Ok(Response::new(v1::RemoveHostResponse {}))
    }

    async fn create_join_token(
        &self,
        request: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::CreateJoinTokenResponse>, Status> {
        auth::operator(&request)?;
        let ttl = enroll::join_token_ttl(request.into_inner().ttl_seconds)?;
        let (token, expires_ms) = enroll::create_join_token(&self.core, ttl).await?;
        Ok(Response::new(v1::CreateJoinTokenResponse { token: token.reveal(), expires_at: clock::rfc3339(expires_ms) }))
    }
}
