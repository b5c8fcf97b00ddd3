//! The scheduler's promises once more, in the plainest way: lists, linear scans, no index.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_scheduler::{
    GroupStrategy, HostSpec, HostState, Placement, Request, Reservation, ResourceVector, SpreadLevel, Strategy,
};

#[derive(Clone, Debug)]
pub struct Allocation {
    pub host: u32,
    pub reservation: Reservation,
}

#[derive(Clone, Debug, Default)]
pub struct Model {
    pub hosts: BTreeMap<u32, HostSpec<u32>>,
    pub allocations: BTreeMap<u32, Allocation>,
}

/// Exact first, then `1 << precision` steps per doubling.
fn bucket(value: u64, precision: u32, last: u64) -> u64 {
    let mut step = 1;
    let mut start = 0;
    let mut number = 0;
    let mut width = 2 << precision;
    loop {
        if value < start + width * step {
            return (number + (value - start) / step).min(last);
        }
        start += width * step;
        number += width;
        step *= 2;
        width = 1 << precision;
    }
}

impl Model {
    pub fn allocatable(&self, host: u32) -> ResourceVector {
        let spec = &self.hosts[&host];
        spec.overcommit.apply(&spec.capacity)
    }

    pub fn on_host(&self, host: u32) -> impl Iterator<Item = &Allocation> {
        self.allocations.values().filter(move |allocation| allocation.host == host)
    }

    pub fn allocated(&self, host: u32) -> ResourceVector {
        self.on_host(host).fold(ResourceVector::default(), |sum, a| sum.saturating_add(&a.reservation.resources))
    }

    pub fn free(&self, host: u32) -> ResourceVector {
        self.allocatable(host).saturating_sub(&self.allocated(host))
    }

    fn domain(&self, host: u32) -> (Arc<str>, String) {
        let spec = &self.hosts[&host];
        let domain = spec.rack.as_ref().map_or(format!("host {host}"), |rack| format!("rack {rack}"));
        (spec.zone.clone(), domain)
    }

    fn holds(&self, host: u32, group: &Arc<str>) -> bool {
        self.on_host(host).any(|allocation| allocation.reservation.groups.contains(group))
    }

    /// Host and partition of each member of a placement group.
    fn members<'a>(&'a self, name: &'a Arc<str>) -> impl Iterator<Item = (u32, Option<u32>)> + 'a {
        self.allocations.values().filter_map(move |allocation| match &allocation.reservation.placement_group {
            Some((group, partition)) if group == name => Some((allocation.host, *partition)),
            _ => None,
        })
    }

    fn placement_allows(&self, request: &Request<u32>, host: u32, partition: Option<u32>) -> bool {
        let Some(group) = &request.placement_group else { return true };
        let domain = self.domain(host);
        match group.strategy {
            GroupStrategy::Cluster => {
                let members: Vec<u32> = self.members(&group.name).map(|(member, _)| member).collect();
                let racks = members.iter().any(|member| self.hosts[member].rack.is_some());
                members.is_empty()
                    || members.iter().any(|member| {
                        let theirs = self.domain(*member);
                        if racks { theirs == domain } else { theirs.0 == domain.0 }
                    })
            }
            GroupStrategy::Spread { level, max_per_zone } => {
                let in_zone =
                    self.members(&group.name).filter(|(member, _)| self.domain(*member).0 == domain.0).count();
                let apart = self.members(&group.name).all(|(member, _)| match level {
                    SpreadLevel::Host => member != host,
                    SpreadLevel::Rack => self.domain(member) != domain,
                });
                apart && max_per_zone.is_none_or(|limit| in_zone < limit as usize)
            }
            GroupStrategy::Partition { .. } => {
                self.members(&group.name).all(|(member, theirs)| self.domain(member) != domain || theirs == partition)
            }
        }
    }

    fn admits(&self, request: &Request<u32>, host: u32, partition: Option<u32>) -> bool {
        let spec = &self.hosts[&host];
        let (free, want) = (self.free(host), &request.resources);
        spec.state == HostState::Active
            && request.host.is_none_or(|wanted| wanted == host)
            && request.zone.as_ref().is_none_or(|zone| *zone == spec.zone)
            && !request.exclude_hosts.contains(&host)
            && request.labels.iter().all(|(name, value)| spec.labels.get(name) == Some(value))
            && self.placement_allows(request, host, partition)
            && request.affinity.iter().all(|group| {
                let exists = self.allocations.values().any(|a| a.reservation.groups.contains(group));
                self.holds(host, group) || (!exists && request.groups.contains(group))
            })
            && !request.anti_affinity.iter().any(|group| self.holds(host, group))
            && free.fits(want)
    }

    /// How good a host is; the smaller, the better.
    fn rank(&self, request: &Request<u32>, host: u32, descending: bool) -> (u8, i64) {
        let avoid = request.avoid_groups.iter().any(|group| self.holds(host, group));
        // An image that no host holds is no wish.
        let image = request.prefer_image.as_ref().is_some_and(|image| !self.hosts[&host].images.contains(image));
        let known = request.prefer_image.as_ref().is_some_and(|i| self.hosts.values().any(|h| h.images.contains(i)));
        let free = self.free(host);
        let empty = u64::from(self.on_host(host).next().is_none());
        let order = (empty * 256 + bucket(free.memory_mib / 256, 4, 255)) * 128 + bucket(u64::from(free.vcpus), 3, 127);
        let order = order as i64;
        (u8::from(avoid) * 2 + u8::from(image && known), if descending { -order } else { order })
    }

    /// All hosts among which the scheduler may choose, each with the partition it may answer.
    pub fn choices(&self, request: &Request<u32>) -> BTreeSet<(u32, Option<u32>)> {
        let best_of = |partition: Option<u32>, descending: bool| {
            let able: Vec<u32> =
                self.hosts.keys().copied().filter(|host| self.admits(request, *host, partition)).collect();
            let best = able.iter().map(|host| self.rank(request, *host, descending)).min();
            let is_best = |host: &u32| Some(self.rank(request, *host, descending)) == best;
            able.into_iter().filter(is_best).map(|host| (host, partition)).collect::<BTreeSet<_>>()
        };
        let spread = request.strategy == Strategy::Spread;
        match request.placement_group.as_ref().map(|group| (group, group.strategy)) {
            Some((group, GroupStrategy::Partition { count, number })) => {
                let mut numbers: Vec<u32> = (1..=count).filter(|this| number.is_none_or(|n| n == *this)).collect();
                let filled = |number: u32| self.members(&group.name).filter(|(_, p)| *p == Some(number)).count();
                numbers.sort_by_key(|number| filled(*number));
                let first = numbers.iter().map(|number| best_of(Some(*number), spread)).find(|set| !set.is_empty());
                first.unwrap_or_default()
            }
            Some((group, GroupStrategy::Cluster)) => {
                best_of(None, spread || self.members(&group.name).next().is_none())
            }
            _ => best_of(None, spread),
        }
    }

    pub fn record(&mut self, allocation: u32, request: &Request<u32>, placement: &Placement<u32>) {
        let reservation = Reservation {
            resources: request.resources,
            placement_group: request.placement_group.as_ref().map(|group| (group.name.clone(), placement.partition)),
            groups: request.groups.clone(),
        };
        self.allocations.insert(allocation, Allocation { host: placement.host, reservation });
    }
}
