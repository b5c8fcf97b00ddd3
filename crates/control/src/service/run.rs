//! RunInstances: check, claim room and addresses in memory, write all instances of the call in one transaction.

use std::net::Ipv4Addr;
use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::{Revision, Txn, limits};
use hearth_types::{InstanceId, InstanceType, ReservationId};

use super::attach::MAX_VOLUMES_PER_INSTANCE;
use super::idempotency::ClientToken;
use super::{Api, host, image, instance, instance_type, key_pair, volume};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode, id_value};
use crate::keys;
use crate::life::{SHUTDOWN_STOP, SHUTDOWN_TERMINATE};
use crate::mappings::{self, PlannedDevices, Root};
use crate::placement::{self, HostKey, InstanceKey};
use crate::quotas;
use crate::tables::{SCHEMA_VERSION, Tables};
use crate::volumes;

const CALL: &str = "RunInstances";
/// Volumes that an image brings along usually; one with more may need smaller calls.
const MOST_IMAGE_VOLUMES: usize = 4;
/// EC2's limit for raw user data.
const MAX_USER_DATA_BYTES: usize = 16 * 1024;
/// Longest zone, host or group name.
const MAX_PLACEMENT_CHARS: usize = 255;
/// Room left in the store's largest transaction for keys and framing.
pub(crate) const MAX_TXN_BYTES: usize = limits::MAX_REQUEST_BYTES - 64 * 1024;
/// Attempts when instances, addresses or hosts change under the call.
const MAX_ATTEMPTS: u32 = 20;

/// A request that is in itself sound.
struct Plan {
    request: v1::RunInstancesRequest,
    kind: InstanceType,
    min: usize,
    max: usize,
    nics: u32,
    behavior: String,
}

/// Room and addresses that this call holds; given back when it ends, however that is. What was committed is in the tables by
/// then and stays.
pub(crate) struct Claim {
    core: Arc<Core>,
    account: String,
    counted: u32,
    /// Instances whose place in the books is to agree with the tables in the end.
    pub ids: Vec<String>,
    /// Host and address.
    pub addresses: Vec<(String, Ipv4Addr)>,
}

impl Claim {
    pub fn new(core: &Arc<Core>, account: &str) -> Self {
        Self { core: core.clone(), account: account.to_owned(), counted: 0, ids: Vec::new(), addresses: Vec::new() }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.core.with_placement(|tables, placement| {
            for (host, address) in &self.addresses {
                placement.unclaim_address(host, *address);
            }
            for id in &self.ids {
                placement.sync_instance(tables, id);
            }
            placement.unclaim_instances(&self.account, self.counted);
        });
    }
}

/// What the claim led to.
struct Prepared {
    claim: Claim,
    specs: Vec<rec::InstanceSpec>,
    txn: Txn,
}

/// An instance to be, with its volumes.
struct Wanted {
    spec: rec::InstanceSpec,
    volumes: Vec<rec::VolumeSpec>,
}

fn plan(core: &Core, request: v1::RunInstancesRequest) -> ApiResult<Plan> {
    if request.image_id.is_empty() {
        return Err(ApiError::missing("image_id"));
    }
    if request.instance_type.is_empty() {
        return Err(ApiError::missing("instance_type"));
    }
    let kind = instance_type::find(core, &request.instance_type)?;
    let min = request.min_count.max(1) as usize;
    let max = if request.max_count == 0 { min } else { request.max_count as usize };
    if min > max {
        return Err(ApiError::invalid("min_count", format!("is {min}, max_count is {max}")));
    }
    let nics = request.network_interface_count.max(1);
    if nics > kind.max_network_interfaces {
        let message = format!("{} takes at most {}", kind.name, kind.max_network_interfaces);
        return Err(ApiError::invalid("network_interface_count", message));
    }
    mappings::check(&request.block_device_mappings)?;
    // Per instance: its spec, its volumes, and each interface's address and MAC with a compare each; then token, image, its
    // snapshots, account and hosts.
    let volumes = 1 + request.block_device_mappings.len() + MOST_IMAGE_VOLUMES;
    let most = (limits::MAX_TXN_OPS - 6 - volumes) / (2 + request.block_device_mappings.len() + 2 * nics as usize);
    if max > most {
        let message = format!(
            "is {max}; one call makes at most {most} instances with {nics} network interfaces: call again for more"
        );
        return Err(ApiError::invalid("max_count", message));
    }
    check_user_data(&request.user_data)?;
    check::client_token(&request.client_token)?;
    check::tags(&request.tags)?;
    check::tags_of("volume_tags", &request.volume_tags)?;
    let behavior = match request.instance_initiated_shutdown_behavior.as_str() {
        "" => SHUTDOWN_STOP,
        other => check_shutdown_behavior(other)?,
    };
    if let Some(wish) = &request.placement {
        check::text("placement.availability_zone", &wish.availability_zone, MAX_PLACEMENT_CHARS)?;
        check::text("placement.host_id", &wish.host_id, MAX_PLACEMENT_CHARS)?;
        check::text("placement.spread_group", &wish.spread_group, MAX_PLACEMENT_CHARS)?;
    }
    let behavior = behavior.to_owned();
    Ok(Plan { request, kind, min, max, nics, behavior })
}

pub(crate) fn check_user_data(user_data: &[u8]) -> ApiResult<()> {
    if user_data.len() > MAX_USER_DATA_BYTES {
        let message = format!("has {} bytes, at most {MAX_USER_DATA_BYTES}", user_data.len());
        return Err(ApiError::invalid("user_data", message));
    }
    Ok(())
}

pub(crate) fn check_shutdown_behavior(behavior: &str) -> ApiResult<&'static str> {
    match behavior {
        SHUTDOWN_STOP => Ok(SHUTDOWN_STOP),
        SHUTDOWN_TERMINATE => Ok(SHUTDOWN_TERMINATE),
        other => {
            let message = format!("is '{other:.20}', must be '{SHUTDOWN_STOP}' or '{SHUTDOWN_TERMINATE}'");
            Err(ApiError::invalid("instance_initiated_shutdown_behavior", message))
        }
    }
}

/// A locally administered unicast address that looks like no vendor's.
fn new_mac() -> ApiResult<String> {
    let mut tail = [0u8; 5];
    getrandom::fill(&mut tail)?;
    let [a, b, c, d, e] = tail;
    Ok(format!("0e:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}"))
}

/// The mapped instance-store disks of a type. Serials are what the guest reads, 20 bytes at most: `is`, the instance's 17
/// digits, a letter.
pub(crate) fn instance_store(
    kind: &InstanceType,
    id: &InstanceId,
    mapped: &[(String, usize)],
) -> Vec<v1::InstanceStoreDisk> {
    let disk = |(device_name, number): &(String, usize)| {
        Some(v1::InstanceStoreDisk {
            virtual_name: format!("ephemeral{number}"),
            serial: format!("is{}{}", id.hex(), ('a'..='z').nth(*number)?),
            size_bytes: kind.instance_store_gib.get(*number)? << 30,
            device_name: device_name.clone(),
        })
    };
    mapped.iter().filter_map(disk).collect()
}

impl Plan {
    /// The wishes of one instance; host, zone and interfaces are filled in when it is placed.
    fn spec(
        &self,
        core: &Core,
        account: &str,
        reservation: &ReservationId,
        index: u32,
        now_ms: u64,
        parts: &Parts,
    ) -> ApiResult<Wanted> {
        let id = InstanceId::generate()?;
        let wish = self.request.placement.clone().unwrap_or_default();
        let agent_spec = v1::InstanceSpec {
            account_id: account.to_owned(),
            reservation_id: reservation.to_string(),
            image_id: parts.image.image_id.clone(),
            boot: parts.image.boot.as_ref().map(|boot| v1::BootOverrideSpec {
                extra_cmdline: boot.extra_cmdline.clone(),
                cmdline: boot.cmdline.clone(),
            }),
            instance_type: self.kind.name.clone(),
            resources: Some(parts.resources(&self.kind)),
            ecu_milli_quota: self.kind.ecu_milli.unwrap_or(0),
            root_device_name: parts.root_device_name.clone(),
            volumes: Vec::new(),
            bundle_root: parts.bundle_root(&id),
            instance_store: instance_store(&self.kind, &id, &parts.devices.ephemeral),
            network_interfaces: Vec::new(),
            network_mbps: self.kind.network_mbps,
            user_data: self.request.user_data.clone(),
            key_name: parts.key_name.clone(),
            public_key: parts.public_key.clone(),
            ami_launch_index: index,
            availability_zone: String::new(),
            region: core.config.region.clone(),
            launch_time: clock::rfc3339(now_ms),
            tags: self.request.tags.clone(),
        };
        let volumes = parts.devices.volumes.iter().map(|planned| {
            let base = planned.source.as_ref().map(|source| source.base());
            let mut new = volume::new_record(&core.storage, account, &planned.shape, base, planned.encrypted, now_ms)?;
            new.tags.clone_from(&self.request.volume_tags);
            let delete = planned.delete_on_termination;
            Ok(volumes::want_attached(&new, id.as_str(), &planned.device_name, delete, now_ms))
        });
        let volumes = volumes.collect::<ApiResult<Vec<_>>>()?;
        let spec = rec::InstanceSpec {
            schema_version: SCHEMA_VERSION,
            instance_id: id.to_string(),
            generation: 1,
            run_generation: 1,
            run: v1::RunState::Running.into(),
            spec: Some(agent_spec),
            // What cannot be stopped ends.
            instance_initiated_shutdown_behavior: match parts.bundle.is_some() {
                true => SHUTDOWN_TERMINATE.to_owned(),
                false => self.behavior.clone(),
            },
            disable_api_termination: self.request.disable_api_termination,
            client_token: self.request.client_token.clone(),
            launched_ms: now_ms,
            wanted_zone: wish.availability_zone,
            wanted_host: wish.host_id,
            spread: wish.strategy == i32::from(v1::PlacementStrategy::Spread),
            spread_group: wish.spread_group,
            ..Default::default()
        };
        Ok(Wanted { spec, volumes })
    }
}

/// What the request's names stand for.
struct Parts {
    image: rec::ImageSpec,
    image_revision: Revision,
    root_device_name: String,
    /// Size of the root disk, which is made of the image's bundle.
    bundle: Option<u64>,
    devices: PlannedDevices,
    /// So many instances with their volumes the account may have.
    most: usize,
    quota: quotas::Guard,
    key_name: String,
    public_key: String,
}

impl Parts {
    fn bundle_root(&self, id: &InstanceId) -> Option<v1::BundleRoot> {
        Some(v1::BundleRoot {
            manifest_location: self.image.image_location.clone(),
            manifest_sha256: self.image.bundle_sha256.clone(),
            size_bytes: self.bundle?,
            // No instance-store disk has this letter: there are 24 of them at most.
            serial: format!("is{}z", id.hex()),
        })
    }

    /// The root disk takes room beside the instance store.
    fn resources(&self, kind: &InstanceType) -> v1::Resources {
        let mut resources = instance_type::resources(kind);
        resources.instance_store_bytes = resources.instance_store_bytes.saturating_add(self.bundle.unwrap_or(0));
        resources
    }
}

fn resolve(core: &Core, tables: &Tables, account: &str, plan: &Plan) -> ApiResult<Parts> {
    let request = &plan.request;
    let (spec, status) = image::find(tables, account, &request.image_id)?;
    let status = status.cloned().unwrap_or_default();
    if status.state() != v1::ImageState::Available {
        let message = format!("image {} is not available", request.image_id);
        return Err(ApiError::wrong_state("InvalidAMIID.Unavailable", message).with("image_id", &request.image_id));
    }
    let root_device_name = image::root_device_name(spec);
    let bundle = (!spec.image_location.is_empty()).then_some(status.size_bytes);
    let store_disks = plan.kind.instance_store_gib.len();
    let mut merged = mappings::merge(&spec.block_device_mappings, &request.block_device_mappings);
    if bundle.is_some() {
        if request.instance_initiated_shutdown_behavior == SHUTDOWN_STOP {
            let message =
                format!("image {} has an instance-store root device: its instances cannot be stopped", spec.image_id);
            return Err(ApiError::wrong_state("UnsupportedOperation", message).with("image_id", &spec.image_id));
        }
        mappings::add_store_disks(
            &mut merged,
            [&spec.block_device_mappings, &request.block_device_mappings],
            store_disks,
        );
    }
    let root = if bundle.is_some() { Root::Bundle(&root_device_name) } else { Root::Ebs(&root_device_name) };
    // The image's owner vouches for its snapshots.
    let devices = mappings::plan(tables, account, root, &merged, store_disks)?;
    let disks = devices.volumes.len() + devices.ephemeral.len() + usize::from(bundle.is_some());
    if disks > MAX_VOLUMES_PER_INSTANCE {
        let message = format!("{disks} disks, at most {MAX_VOLUMES_PER_INSTANCE} fit into an instance");
        return Err(mappings::refused(message));
    }
    let of_one = devices.volumes.iter().map(|volume| quotas::Wanted::volume(volume.shape.size_bytes)).sum();
    let (most, quota) = quotas::fitting(&core.config, tables, account, of_one, (plan.min, plan.max))?;
    let (key_name, public_key) = match request.key_name.as_str() {
        "" => (String::new(), String::new()),
        name => key_pair::find(tables, account, name)
            .map(|key| (key.name.clone(), key.public_key.clone()))
            .ok_or_else(|| ApiError::not_found("InvalidKeyPair.NotFound", "key pair", &[name]))?,
    };
    Ok(Parts {
        image: (*spec.value).clone(),
        image_revision: spec.revision,
        root_device_name,
        bundle,
        devices,
        most,
        quota,
        key_name,
        public_key,
    })
}

/// Refusal of the scheduler in EC2's words.
pub(crate) fn no_capacity(error: &hearth_scheduler::NoCapacity) -> ApiError {
    let short = error.shortfalls.iter().map(|short| short.resource.to_string()).collect::<Vec<_>>().join(",");
    ApiError::exhausted("InsufficientInstanceCapacity", error.to_string())
        .with("short_resources", short)
        .with("eligible_hosts", error.eligible)
        .with("hosts", error.hosts)
        .with("placeable", error.placeable)
}

impl Api {
    /// Claims everything and makes the transaction. The claim is dropped, and so given back, on every error.
    fn prepare(&self, account: &str, plan: &Plan, token: Option<&ClientToken>) -> ApiResult<Prepared> {
        let core = &self.core;
        let now_ms = clock::now_ms();
        let reservation = ReservationId::generate()?;
        let parts = resolve(core, &core.tables(), account, plan)?;
        let wanted = (0..parts.most)
            .zip(0u32..)
            .map(|(_, index)| plan.spec(core, account, &reservation, index, now_ms, &parts))
            .collect::<ApiResult<Vec<_>>>()?;
        let mut claim = Claim::new(core, account);
        let placed = core.with_placement(|tables, books| place(tables, books, plan, wanted, &mut claim, core));
        let (wanted, hosts) = placed?;
        let mut txn = Txn::new().compare_mod_revision(
            keys::image_spec(&parts.image.account_id, &parts.image.image_id),
            parts.image_revision,
        );
        txn = parts.quota.apply(txn);
        for (host, revision) in hosts {
            // The host may have been drained or removed since.
            txn = txn.compare_mod_revision(keys::host_spec(&host), revision);
        }
        for source in parts.devices.volumes.iter().filter_map(|planned| planned.source.as_ref()) {
            txn = source.guard(txn);
        }
        for Wanted { spec, volumes } in &wanted {
            txn = txn.put(keys::instance_spec(account, &spec.instance_id), encode(spec));
            for volume in volumes {
                txn = txn.put(keys::volume(account, &volume.volume_id), encode(volume));
            }
            for nic in spec.spec.iter().flat_map(|spec| &spec.network_interfaces) {
                for key in [keys::address(&spec.host_id, &nic.private_ip_address), keys::mac(&nic.mac_address)] {
                    txn = txn.compare_absent(&key).put(&key, id_value(&spec.instance_id));
                }
            }
        }
        if let Some(token) = token {
            txn = token.record(txn, &claim.ids);
        }
        if txn.ops.len() > limits::MAX_TXN_OPS || txn.compares.len() >= limits::MAX_TXN_OPS {
            let message = "too many instances with so many volumes and network interfaces; make fewer in one call";
            return Err(ApiError::invalid("max_count", message));
        }
        if txn.size() > MAX_TXN_BYTES {
            let message = "too many instances with so much user data and so many tags; make fewer in one call";
            return Err(ApiError::invalid("max_count", message));
        }
        let specs = wanted.into_iter().map(|wanted| wanted.spec).collect();
        Ok(Prepared { claim, specs, txn })
    }

    /// See the module.
    pub(crate) async fn do_run_instances(
        &self,
        account: String,
        mut request: v1::RunInstancesRequest,
    ) -> ApiResult<v1::RunInstancesResponse> {
        let client_token = std::mem::take(&mut request.client_token);
        check::client_token(&client_token)?;
        let token = ClientToken::new(&account, CALL, &client_token, &request);
        request.client_token = client_token;
        let _turn = match &token {
            Some(token) => Some(self.core.token_locks.lock(token).await),
            None => None,
        };
        if let Some(answer) = self.replay_run(token.as_ref())? {
            return Ok(answer);
        }
        let plan = plan(&self.core, request)?;
        for _ in 0..MAX_ATTEMPTS {
            let Prepared { claim, specs, txn } = self.prepare(&account, &plan, token.as_ref())?;
            if plan.request.dry_run {
                drop(claim);
                let message = "the request would have succeeded, but dry_run is set";
                return Err(ApiError::wrong_state("DryRunOperation", message));
            }
            if self.core.commit(txn).await? == Commit::Done {
                drop(claim);
                let instances = specs.iter().map(|spec| instance::view(&self.core, spec, None)).collect();
                let reservation_id = specs
                    .iter()
                    .find_map(|spec| spec.spec.as_ref())
                    .map_or(String::new(), |s| s.reservation_id.clone());
                return Ok(v1::RunInstancesResponse { reservation_id, instances });
            }
            drop(claim);
            if let Some(answer) = self.replay_run(token.as_ref())? {
                return Ok(answer);
            }
        }
        Err(ApiError::unavailable("hosts and addresses change too fast; try again"))
    }

    /// The answer of an earlier call with this token: the same instances, as they are now.
    fn replay_run(&self, token: Option<&ClientToken>) -> ApiResult<Option<v1::RunInstancesResponse>> {
        let found: Vec<(String, Option<instance::Found>)> = {
            let tables = self.core.tables();
            let Some(ids) = token.map(|token| token.replay(&tables)).transpose()?.flatten() else { return Ok(None) };
            ids.into_iter().map(|id| (id.clone(), tables.instance(&id))).collect()
        };
        let instances: Vec<v1::Instance> = found
            .into_iter()
            .map(|(instance_id, found)| match found {
                Some((spec, status)) => instance::view(&self.core, &spec, status.as_deref()),
                // Terminated so long ago that it is forgotten.
                None => v1::Instance { instance_id, state: v1::InstanceState::Terminated.into(), ..Default::default() },
            })
            .collect();
        let reservation_id = instances.iter().map(|i| i.reservation_id.clone()).find(|id| !id.is_empty());
        Ok(Some(v1::RunInstancesResponse { reservation_id: reservation_id.unwrap_or_default(), instances }))
    }
}

type Placed = (Vec<Wanted>, Vec<(String, Revision)>);

/// Chooses hosts and addresses; what it takes stands in `claim`.
fn place(
    tables: &Tables,
    books: &mut placement::Placement,
    plan: &Plan,
    mut wishes: Vec<Wanted>,
    claim: &mut Claim,
    core: &Core,
) -> ApiResult<Placed> {
    let limit = core.config.max_instances_per_account as usize;
    let used = books.instance_count(&claim.account) as usize;
    let free = limit.saturating_sub(used);
    if free < plan.min {
        let message = format!("the account has {used} instances of at most {limit}, {} more were asked for", plan.min);
        return Err(ApiError::exhausted("InstanceLimitExceeded", message).with("limit", limit));
    }
    wishes.truncate(free);
    let wanted_host = plan.request.placement.as_ref().map_or("", |wish| wish.host_id.as_str());
    if !wanted_host.is_empty() {
        let host = host::find(tables, wanted_host)?;
        wishes.iter_mut().for_each(|wanted| wanted.spec.wanted_host.clone_from(&host.host_id));
    }
    let Some(first) = wishes.first() else { return Err(ApiError::internal("a request for no instance")) };
    let mut request = placement::request(&first.spec);
    let wanted: Vec<InstanceKey> =
        wishes.iter().filter_map(|wish| InstanceKey::parse(&wish.spec.instance_id)).collect();
    let mut full_networks = Vec::new();
    let hosts = loop {
        let hosts = books.place_many(&wanted, plan.min, &request).map_err(|error| match full_networks.is_empty() {
            true => no_capacity(&error),
            false => {
                let message = format!("no free addresses left on {}", full_networks.join(", "));
                ApiError::exhausted("InsufficientFreeAddressesInSubnet", message)
            }
        })?;
        match claim_addresses(tables, books, plan, &hosts) {
            Ok(addresses) => {
                claim.addresses = addresses;
                break hosts;
            }
            Err(full) => {
                wanted.iter().for_each(|id| books.release(id));
                request.exclude_hosts.extend(HostKey::parse(&full));
                full_networks.push(full);
            }
        }
    };
    wishes.truncate(hosts.len());
    claim.ids = wishes.iter().map(|wish| wish.spec.instance_id.clone()).collect();
    claim.counted = u32::try_from(wishes.len()).unwrap_or(u32::MAX);
    books.claim_instances(&claim.account, claim.counted);
    let mut addresses = claim.addresses.iter();
    for (Wanted { spec, volumes }, host) in wishes.iter_mut().zip(&hosts) {
        let mut nics = Vec::new();
        for device_index in 0..plan.nics {
            let (_, address) = addresses.next().ok_or_else(|| ApiError::internal("fewer addresses than interfaces"))?;
            nics.push(v1::NetworkInterface {
                device_index,
                mac_address: new_mac()?,
                private_ip_address: address.to_string(),
            });
        }
        spec.host_id.clone_from(host);
        let zone = tables.host(host).and_then(|(_, status)| status).map(|status| status.availability_zone.clone());
        if let Some(agent_spec) = &mut spec.spec {
            agent_spec.network_interfaces = nics;
            agent_spec.availability_zone = zone.clone().unwrap_or_default();
        }
        for volume in volumes {
            volume.availability_zone = zone.clone().unwrap_or_default();
            volumes::place(volume, spec);
        }
        spec.generation = 1;
    }
    let mut distinct = hosts;
    distinct.sort();
    distinct.dedup();
    let revisions = distinct
        .into_iter()
        .map(|host| {
            let revision = tables.host(&host).map_or(0, |(spec, _)| spec.revision);
            (host, revision)
        })
        .collect();
    Ok((wishes, revisions))
}

/// One address for each interface, in the order of hosts; `Err` names a host whose network is full, and nothing is claimed.
fn claim_addresses(
    tables: &Tables,
    books: &mut placement::Placement,
    plan: &Plan,
    hosts: &[String],
) -> Result<Vec<(String, Ipv4Addr)>, String> {
    let mut addresses = Vec::new();
    for host in hosts {
        for _ in 0..plan.nics {
            match books.claim_address(tables, host) {
                Some(address) => addresses.push((host.clone(), address)),
                None => {
                    for (host, address) in addresses {
                        books.unclaim_address(&host, address);
                    }
                    return Err(host.clone());
                }
            }
        }
    }
    Ok(addresses)
}
