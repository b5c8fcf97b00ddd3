//! Decisions: one place, several places, another place.

use crate::amounts::Amounts;
use crate::grid::Target;
use crate::groups::{GroupKind, Place};
use crate::no_capacity::{Exclusion, NoCapacity};
use crate::request::{GroupStrategy, Placement, Request, SpreadLevel, Strategy};
use crate::rules::{PlacementRule, Rules};
use crate::scheduler::{Key, Scheduler};

/// Most partitions a partition placement group can have here (EC2 has 7 per availability zone); more count as this many.
pub const MAX_PARTITIONS: u32 = 256;

impl<H: Key, A: Key> Scheduler<H, A> {
    /// Chooses a host and reserves the resources there. Asked again with the same allocation it answers the same
    /// (`existing`), whatever the request.
    pub fn place(&mut self, allocation: A, request: &Request<H>) -> Result<Placement<H>, NoCapacity> {
        self.place_within(allocation, request, None, None)
    }

    /// Places one instance for each of `allocations` (EC2's MaxCount), at least `min` of them (MinCount) or none at all.
    /// The answer has one placement for each of the first allocations, in their order.
    ///
    /// A cluster placement group that has no members yet starts in a rack that can take all of them, if there is one.
    pub fn place_many(
        &mut self,
        allocations: &[A],
        min: usize,
        request: &Request<H>,
    ) -> Result<Vec<Placement<H>>, NoCapacity> {
        let min = min.min(allocations.len());
        let mut starts: Vec<Option<Place>> = Vec::new();
        if allocations.len() > 1
            && let Some(group) = &request.placement_group
            && group.strategy == GroupStrategy::Cluster
            && self.engine.groups.find(GroupKind::Placement, &group.name).is_none()
        {
            starts.extend(self.cluster_starts(allocations.len(), request).into_iter().map(Some));
        }
        if starts.is_empty() {
            starts.push(None);
        }
        let mut best: Option<(usize, Option<Place>, NoCapacity)> = None;
        for start in starts {
            let (placements, problem) = self.place_in_order(allocations, request, start);
            let Some(problem) = problem else { return Ok(placements) };
            let count = placements.len();
            self.undo(allocations, &placements);
            if best.as_ref().is_none_or(|(most, _, _)| count > *most) {
                best = Some((count, start, problem));
            }
        }
        match best {
            Some((count, start, _)) if count >= min => Ok(self.place_in_order(allocations, request, start).0),
            Some((count, _, problem)) => Err(NoCapacity { placeable: count, wanted: min, ..problem }),
            None => Ok(Vec::new()),
        }
    }

    /// Chooses a new host for an existing allocation (to drain its host, or because that died) and moves it there: its
    /// present host is out, and it does not count as its own neighbour. Without capacity it stays where it is. An
    /// allocation that does not exist is simply placed.
    pub fn relocate(&mut self, allocation: &A, request: &Request<H>) -> Result<Placement<H>, NoCapacity> {
        let Some((_, reservation)) = self.allocation(allocation) else {
            return self.place(allocation.clone(), request);
        };
        let Some(old) = self.detach(allocation) else { return self.place(allocation.clone(), request) };
        let answer = self.place_within(allocation.clone(), request, None, Some(old.host));
        if answer.is_err() {
            self.record(old.host, allocation.clone(), &reservation, Some(old.sequence));
        }
        answer
    }

    /// Places until one fails.
    fn place_in_order(
        &mut self,
        allocations: &[A],
        request: &Request<H>,
        start: Option<Place>,
    ) -> (Vec<Placement<H>>, Option<NoCapacity>) {
        let mut placements = Vec::with_capacity(allocations.len());
        for allocation in allocations {
            let start = start.filter(|_| placements.is_empty());
            match self.place_within(allocation.clone(), request, start, None) {
                Ok(placement) => placements.push(placement),
                Err(problem) => return (placements, Some(problem)),
            }
        }
        (placements, None)
    }

    fn undo(&mut self, allocations: &[A], placements: &[Placement<H>]) {
        for (allocation, placement) in allocations.iter().zip(placements) {
            if !placement.existing {
                self.release(allocation);
            }
        }
    }

    /// Zones and racks where a cluster of so many could start: those with enough free in sum, the fullest first.
    fn cluster_starts(&mut self, count: usize, request: &Request<H>) -> Vec<Place> {
        let mut rules = self.rules.take().unwrap_or_default();
        self.resolve(request, &mut rules);
        let mut rooms: std::collections::BTreeMap<(u32, Option<u32>), (Place, usize)> = Default::default();
        let facts = self.engine.facts();
        for (slot, place, free) in self.engine.active() {
            if rules.exclusion(&facts, slot).is_none() {
                let (_, room) = rooms.entry((place.zone, place.rack())).or_insert((place, 0));
                *room = room.saturating_add(free.count_of(&rules.wanted));
            }
        }
        self.rules = Some(rules);
        let mut starts: Vec<(bool, usize, Place)> = rooms
            .into_values()
            .filter(|(_, room)| *room > 0)
            .map(|(place, room)| (room < count, room, place))
            .collect();
        // Where all fit: the least room first. Else, as much as possible: the most room first.
        starts.sort_by_key(|(too_small, room, _)| (*too_small, if *too_small { usize::MAX - room } else { *room }));
        starts.into_iter().map(|(_, _, place)| place).collect()
    }

    fn place_within(
        &mut self,
        allocation: A,
        request: &Request<H>,
        start: Option<Place>,
        not_on: Option<u32>,
    ) -> Result<Placement<H>, NoCapacity> {
        if let Some(placement) = self.existing(&allocation) {
            return Ok(placement);
        }
        let mut rules = self.rules.take().unwrap_or_default();
        self.resolve(request, &mut rules);
        rules.excluded.extend(not_on);
        if let Some(start) = start {
            rules.placement = PlacementRule::Only(start);
        }
        let answer = match self.choose(request, &mut rules) {
            Some((slot, partition)) => self.commit(allocation, request, &rules.wanted, slot, partition),
            None => None,
        };
        let answer = answer.ok_or_else(|| self.explain(request, &rules));
        self.rules = Some(rules);
        answer
    }

    fn existing(&self, allocation: &A) -> Option<Placement<H>> {
        let found = self.allocations.get(allocation)?;
        let partition = found.memberships.as_slice().iter().map(|membership| membership.partition).max();
        Some(Placement {
            host: self.host_name(found.host)?,
            partition: partition.filter(|partition| *partition > 0),
            existing: true,
        })
    }

    /// The best host, and the partition where the placement group has such.
    fn choose(&mut self, request: &Request<H>, rules: &mut Rules) -> Option<(u32, Option<u32>)> {
        let Some(group) = &request.placement_group else { return self.engine.choose(rules).map(|slot| (slot, None)) };
        let GroupStrategy::Partition { count, number } = group.strategy else {
            return self.engine.choose(rules).map(|slot| (slot, None));
        };
        let count = count.min(MAX_PARTITIONS);
        let (first, last) = number.map_or((1, count), |number| (number, number));
        if first == 0 || last > count || count == 0 {
            rules.placement = PlacementRule::Nowhere;
            return None;
        }
        let found = self.engine.groups.find(GroupKind::Placement, &group.name);
        let allow = |first, last| match found {
            Some(group) => PlacementRule::Partition { group, first, last },
            None => PlacementRule::Any,
        };
        let mut numbers: Vec<u32> = (first..=last).collect();
        if let Some(group) = found.and_then(|group| self.engine.groups.get(group)) {
            numbers.sort_by_key(|number| group.members_in_partition(*number));
        }
        for number in numbers {
            rules.placement = allow(number, number);
            if let Some(slot) = self.engine.choose(rules) {
                return Some((slot, Some(number)));
            }
        }
        // What the refusal shall explain: no partition found a place.
        rules.placement = allow(first, last);
        None
    }

    fn commit(
        &mut self,
        allocation: A,
        request: &Request<H>,
        wanted: &Amounts,
        slot: u32,
        partition: Option<u32>,
    ) -> Option<Placement<H>> {
        let host = self.host_name(slot)?;
        self.memberships.clear();
        if let Some(group) = &request.placement_group {
            self.add_membership(GroupKind::Placement, &group.name, partition.unwrap_or(0));
        }
        for name in &request.groups {
            self.add_membership(GroupKind::Plain, name, 0);
        }
        self.attach(allocation, slot, *wanted, None);
        Some(Placement { host, partition, existing: false })
    }

    /// Turns the names in a request into numbers.
    fn resolve(&self, request: &Request<H>, rules: &mut Rules) {
        rules.clear();
        rules.wanted = Amounts::from(&request.resources);
        rules.target = Target::of(&rules.wanted);
        rules.descending = request.strategy == Strategy::Spread;
        if let Some(host) = &request.host {
            rules.only_host = self.slots.get(host).copied();
            if rules.only_host.is_none() {
                rules.unmet(Exclusion::OtherHost);
            }
        }
        if let Some(zone) = &request.zone {
            rules.zone = self.zones.get(zone.as_ref());
            if rules.zone.is_none() {
                rules.unmet(Exclusion::OtherZone);
            }
        }
        rules.excluded.extend(request.exclude_hosts.iter().filter_map(|host| self.slots.get(host)));
        for label in &request.labels {
            match self.labels.get(label) {
                Some(number) if self.config.index_labels.contains(&label.0) => rules.index_labels.push(number),
                Some(number) => rules.labels.push(number),
                None => rules.unmet(Exclusion::Labels),
            }
        }
        self.resolve_placement(request, rules);
        let plain = |name: &str| self.engine.groups.find(GroupKind::Plain, name);
        for name in &request.affinity {
            match plain(name) {
                Some(group) => rules.affinity.push(group),
                None if request.groups.contains(name) => {}
                None => rules.unmet(Exclusion::Affinity),
            }
        }
        rules.anti_affinity.extend(request.anti_affinity.iter().filter_map(|name| plain(name)));
        rules.avoid.extend(request.avoid_groups.iter().filter_map(|name| plain(name)));
        rules.image = request.prefer_image.as_ref().and_then(|image| self.images.get(image.as_ref()));
    }

    fn resolve_placement(&self, request: &Request<H>, rules: &mut Rules) {
        let Some(wanted) = &request.placement_group else { return };
        let found = self.engine.groups.find(GroupKind::Placement, &wanted.name);
        match (wanted.strategy, found) {
            (GroupStrategy::Cluster, Some(group)) => {
                let racks = self.engine.groups.get(group).is_some_and(|group| group.in_racks());
                rules.placement = PlacementRule::Near { group, racks };
            }
            // The first member goes where most room is left for the others.
            (GroupStrategy::Cluster, None) => rules.descending = true,
            (GroupStrategy::Spread { max_per_zone: Some(0), .. }, _) => rules.placement = PlacementRule::Nowhere,
            (GroupStrategy::Spread { level, max_per_zone }, Some(group)) => {
                rules.zone_limit = max_per_zone.map(|limit| (group, limit));
                rules.placement = match level {
                    SpreadLevel::Host => PlacementRule::OtherHosts(group),
                    SpreadLevel::Rack => PlacementRule::OtherRacks(group),
                };
            }
            (GroupStrategy::Spread { .. } | GroupStrategy::Partition { .. }, _) => {}
        }
    }
}
