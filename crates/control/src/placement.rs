//! Who is placed where, in memory: the scheduler and the claims of calls whose transaction is not in the tables yet. Rebuilt
//! from the tables at start; only the leader has one, and every transaction that makes it true carries the leader's term.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_scheduler::{
    Config, GroupStrategy, HostSpec, HostState, NoCapacity, Overcommit, PlacementGroup, Request, Reservation,
    ResourceVector, Scheduler, SpreadLevel, Strategy,
};
use hearth_types::{HostId, InstanceId, Packed};
use ipnet::Ipv4Net;

use crate::api_error::{ApiError, ApiResult};
use crate::life;
use crate::service::run::no_capacity;
use crate::tables::{Tables, account_of};

/// First addresses of a network that no instance gets: the network's own, router, DNS, and one in reserve, as in EC2's
/// subnets.
const RESERVED_ADDRESSES: u32 = 4;

/// A host's place in the scheduler and the addresses given out there.
#[derive(Default)]
struct Addresses {
    claimed: HashSet<Ipv4Addr>,
    /// Where the last search ended, so that a freed address rests before it is used again.
    cursor: u32,
}

/// A host as the scheduler knows it. Its tables are large, so they hold ids as numbers; here is where texts become that.
pub(crate) type HostKey = Packed<HostId>;
/// An instance as the scheduler knows it.
pub(crate) type InstanceKey = Packed<InstanceId>;

pub(crate) struct Placement {
    scheduler: Scheduler<HostKey, InstanceKey>,
    addresses: HashMap<String, Addresses>,
    /// Accounts of all instances that are not terminated.
    standing: HashMap<String, String>,
    /// How many instances an account has: standing ones and those that running calls are about to make.
    counts: HashMap<String, Count>,
}

/// See [`Placement::room`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Room {
    pub allocated: v1::Resources,
    pub allocatable: v1::Resources,
}

#[derive(Clone, Copy, Default)]
struct Count {
    standing: u32,
    claimed: u32,
}

/// What an instance takes of the dimensions that hosts report.
pub(crate) fn vector(resources: &v1::Resources) -> ResourceVector {
    ResourceVector {
        vcpus: resources.vcpus,
        memory_mib: resources.memory_mib,
        ecu_milli: resources.ecu_milli,
        instance_store_bytes: resources.instance_store_bytes,
        ..ResourceVector::default()
    }
}

fn to_proto(vector: &ResourceVector) -> v1::Resources {
    v1::Resources {
        vcpus: vector.vcpus,
        memory_mib: vector.memory_mib,
        ecu_milli: vector.ecu_milli,
        instance_store_bytes: vector.instance_store_bytes,
    }
}

/// Groups are an account's own.
fn group_name(account: &str, group: &str) -> Arc<str> {
    format!("{account}/{group}").into()
}

/// What to ask the scheduler for an instance with these wishes.
pub(crate) fn request(spec: &rec::InstanceSpec) -> Request<HostKey> {
    let agent_spec = spec.spec.as_ref();
    let resources = agent_spec.and_then(|s| s.resources).unwrap_or_default();
    let mut request = Request::new(vector(&resources));
    request.strategy = if spec.spread { Strategy::Spread } else { Strategy::Pack };
    request.zone = Some(spec.wanted_zone.as_str()).filter(|zone| !zone.is_empty()).map(Arc::from);
    // An id: the call that wrote it looked the host up.
    request.host = HostKey::parse(&spec.wanted_host);
    request.exclude_hosts = spec.refused_by.iter().filter_map(|host| HostKey::parse(host)).collect();
    request.placement_group = placement_group(spec);
    request.prefer_image = agent_spec.map(|s| Arc::from(s.image_id.as_str()));
    request
}

fn placement_group(spec: &rec::InstanceSpec) -> Option<PlacementGroup> {
    (!spec.spread_group.is_empty()).then(|| PlacementGroup {
        name: group_name(account_of(spec), &spec.spread_group),
        strategy: GroupStrategy::Spread { level: SpreadLevel::Host, max_per_zone: None },
    })
}

impl Placement {
    pub fn new() -> Self {
        Self {
            scheduler: Scheduler::new(Config::default()),
            addresses: HashMap::new(),
            standing: HashMap::new(),
            counts: HashMap::new(),
        }
    }

    /// Adds or changes a host as its records and its session say.
    pub fn sync_host(&mut self, tables: &Tables, host: &str, up: bool) {
        let Some(key) = HostKey::parse(host) else {
            return tracing::error!(host, "a host's id in the store is none; nothing is placed there");
        };
        let Some((spec, status)) = tables.host(host) else {
            self.scheduler.remove_host(&key);
            self.addresses.remove(host);
            return;
        };
        let status = status.map(|status| (*status.value).clone()).unwrap_or_default();
        let capacity = vector(&status.capacity.unwrap_or_default());
        let mut spec_of_host = HostSpec::new(key, status.availability_zone.as_str(), capacity);
        let percent = if status.vcpu_overcommit_percent == 0 { 100 } else { status.vcpu_overcommit_percent };
        spec_of_host.overcommit = Overcommit { vcpus_permille: percent.saturating_mul(10), ..Overcommit::default() };
        spec_of_host.labels =
            status.labels.iter().map(|tag| (Arc::from(tag.key.as_str()), Arc::from(tag.value.as_str()))).collect();
        spec_of_host.state = match spec.state() {
            _ if !up => HostState::Down,
            v1::HostState::Draining => HostState::Draining,
            _ => HostState::Active,
        };
        if let Some(known) = self.scheduler.host(&key) {
            spec_of_host.images = known.spec.images.clone();
        }
        self.scheduler.upsert_host(spec_of_host);
    }

    /// Makes the books agree with an instance's records. A stopped instance keeps its place in its groups, without
    /// resources.
    pub fn sync_instance(&mut self, tables: &Tables, id: &str) {
        let Some(key) = InstanceKey::parse(id) else {
            return tracing::error!(instance = id, "an instance's id in the store is none; it takes no room");
        };
        let found = tables.instance(id).filter(|(spec, status)| !life::state_of(spec, status.as_deref()).is_final());
        let Some((spec, status)) = found else {
            self.scheduler.release(&key);
            if let Some(account) = self.standing.remove(id) {
                let count = self.counts.entry(account).or_default();
                count.standing = count.standing.saturating_sub(1);
            }
            return;
        };
        let status = status.as_deref();
        if !self.standing.contains_key(id) {
            let account = account_of(&spec).to_owned();
            self.counts.entry(account.clone()).or_default().standing += 1;
            self.standing.insert(id.to_owned(), account);
        }
        let resources = match life::holds_resources(&spec, status) {
            true => vector(&spec.spec.as_ref().and_then(|s| s.resources).unwrap_or_default()),
            false => ResourceVector::default(),
        };
        let placement_group = placement_group(&spec).map(|group| (group.name, None));
        let reservation = Reservation { resources, placement_group, groups: Vec::new() };
        let Some(host) = HostKey::parse(&spec.host_id) else {
            return tracing::error!(instance = id, host = spec.host_id, "the id of an instance's host is none");
        };
        let stands = self.scheduler.allocation(&key);
        if stands.as_ref().is_some_and(|(on, has)| **on == host && *has == reservation) {
            return;
        }
        if let Err(error) = self.scheduler.reserve(&host, key, &reservation) {
            tracing::warn!(instance = id, %error, "an instance's host is not in the scheduler");
        }
        if let Some(image) = spec.spec.as_ref().map(|s| s.image_id.as_str()) {
            self.scheduler.set_host_image(&host, image, true);
        }
    }

    /// Chooses hosts for new instances and reserves the room there.
    pub fn place_many(
        &mut self,
        ids: &[InstanceKey],
        min: usize,
        request: &Request<HostKey>,
    ) -> Result<Vec<String>, NoCapacity> {
        let placements = self.scheduler.place_many(ids, min, request)?;
        Ok(placements.into_iter().map(|placement| placement.host.text()).collect())
    }

    /// Admits a stopped instance on its own host again.
    pub fn readmit(&mut self, tables: &Tables, spec: &rec::InstanceSpec) -> ApiResult<()> {
        let mut wish = request(spec);
        wish.host = HostKey::parse(&spec.host_id);
        wish.exclude_hosts.clear();
        let (Some(_), Some(key)) = (wish.host, InstanceKey::parse(&spec.instance_id)) else {
            return Err(ApiError::internal(format!("the record of instance {} is damaged", spec.instance_id)));
        };
        self.scheduler.release(&key);
        let placed = self.scheduler.place(key, &wish);
        if placed.is_err() {
            self.sync_instance(tables, &spec.instance_id);
        }
        placed.map(|_| ()).map_err(|error| no_capacity(&error))
    }

    /// Chooses another host for an instance that its present one has refused.
    pub fn relocate(&mut self, id: &str, request: &Request<HostKey>) -> Option<String> {
        self.scheduler.relocate(&InstanceKey::parse(id)?, request).ok().map(|placement| placement.host.text())
    }

    /// Frees what was reserved for an instance that is not in the tables.
    pub fn release(&mut self, id: &InstanceKey) {
        self.scheduler.release(id);
    }

    /// Takes a free address of the host's network. It must be given back with [`Self::unclaim_address`] once it is in the
    /// tables or not needed.
    pub fn claim_address(&mut self, tables: &Tables, host: &str) -> Option<Ipv4Addr> {
        let (_, status) = tables.host(host)?;
        let network: Ipv4Net = status?.instance_cidr.parse().ok()?;
        let first = u32::from(network.network()).checked_add(RESERVED_ADDRESSES)?;
        let last = u32::from(network.broadcast()).checked_sub(1)?;
        if last < first {
            return None;
        }
        let count = last - first + 1;
        let taken = tables.addresses.get(host);
        let of_host = self.addresses.entry(host.to_owned()).or_default();
        for step in 0..count {
            let offset = (u64::from(of_host.cursor) + u64::from(step)) % u64::from(count);
            let address = Ipv4Addr::from(first + u32::try_from(offset).unwrap_or(0));
            let in_use =
                of_host.claimed.contains(&address) || taken.is_some_and(|taken| taken.contains(&address.to_string()));
            if !in_use {
                of_host.claimed.insert(address);
                of_host.cursor = u32::try_from((offset + 1) % u64::from(count)).unwrap_or(0);
                return Some(address);
            }
        }
        None
    }

    pub fn unclaim_address(&mut self, host: &str, address: Ipv4Addr) {
        if let Some(of_host) = self.addresses.get_mut(host) {
            of_host.claimed.remove(&address);
        }
    }

    /// How many instances an account has or is about to have.
    pub fn instance_count(&self, account: &str) -> u32 {
        self.counts.get(account).map_or(0, |count| count.standing.saturating_add(count.claimed))
    }

    /// Counts instances that a call is about to make. To be taken back when they are in the tables, or will never be.
    pub fn claim_instances(&mut self, account: &str, more: u32) {
        self.counts.entry(account.to_owned()).or_default().claimed += more;
    }

    pub fn unclaim_instances(&mut self, account: &str, fewer: u32) {
        if let Some(count) = self.counts.get_mut(account) {
            count.claimed = count.claimed.saturating_sub(fewer);
        }
    }

    /// What is promised on a host, and what may be promised there all together.
    pub fn room(&self, host: &str) -> Room {
        let view = HostKey::parse(host).and_then(|key| self.scheduler.host(&key));
        view.map_or_else(Room::default, |view| Room {
            allocated: to_proto(&view.allocated),
            allocatable: to_proto(&view.allocatable),
        })
    }
}
