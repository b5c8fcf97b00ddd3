//! Groups of allocations: who stands where, so that each rule is one look-up per host.

use std::ops::RangeInclusive;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::hash::NumberMap;
use crate::host_set::HostSet;

/// Where a host stands, as placement groups see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Zone number.
    pub(crate) zone: u32,
    /// Rack number, or a number of its own for a host without a rack.
    pub(crate) domain: u32,
}

/// Domain numbers from here on are hosts without a rack.
const NO_RACK: u32 = 1 << 31;

impl Place {
    pub(crate) fn new(zone: u32, rack: Option<u32>, slot: u32) -> Self {
        Self { zone, domain: rack.unwrap_or(NO_RACK | slot) }
    }

    pub(crate) fn rack(&self) -> Option<u32> {
        (self.domain < NO_RACK).then_some(self.domain)
    }
}

/// One allocation's membership in one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Membership {
    pub(crate) group: u32,
    /// Partition number in a partition placement group, else 0.
    pub(crate) partition: u32,
}

/// The memberships of one allocation; most have none or one, which need no memory of their own.
#[derive(Clone, Debug, Default)]
pub(crate) enum Memberships {
    #[default]
    None,
    One(Membership),
    Many(Box<[Membership]>),
}

impl Memberships {
    pub(crate) fn from_slice(memberships: &[Membership]) -> Self {
        match memberships {
            [] => Self::None,
            [one] => Self::One(*one),
            many => Self::Many(many.into()),
        }
    }

    pub(crate) fn as_slice(&self) -> &[Membership] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct DomainUse {
    members: u32,
    partition: u32,
}

/// One group with at least one member (or a vacant place in the table).
#[derive(Debug, Default)]
pub(crate) struct Group {
    name: Option<Arc<str>>,
    kind: GroupKind,
    members: u32,
    hosts: HostSet,
    /// What only some groups need. A vacant place keeps it for the next group.
    details: Option<Box<Details>>,
}

#[derive(Debug, Default)]
struct Details {
    /// Members on hosts that hold more than one: how many more.
    more: NumberMap<u32>,
    /// Placement groups only: use by rack, members by zone and by partition.
    domains: NumberMap<DomainUse>,
    zones: Vec<(u32, u32)>,
    partitions: Vec<(u32, u32)>,
    /// Members (domain, partition, how many) that stand in a rack of another partition, which only `reserve` and
    /// `move_allocation` can bring about.
    strays: Vec<(u32, u32, u32)>,
}

/// Placement groups and plain groups have names of their own each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum GroupKind {
    #[default]
    Plain,
    Placement,
}

impl Group {
    pub(crate) fn name(&self) -> Option<&Arc<str>> {
        self.name.as_ref()
    }

    pub(crate) fn kind(&self) -> GroupKind {
        self.kind
    }

    /// Hosts that hold a member.
    #[inline]
    pub(crate) fn hosts(&self) -> &HostSet {
        &self.hosts
    }

    /// Whether a member stands in this rack (or on this host without a rack).
    pub(crate) fn uses_domain(&self, domain: u32) -> bool {
        self.details.as_ref().is_some_and(|details| details.domains.contains_key(&domain))
    }

    /// Whether a rack holds no members of any but the `allowed` partitions, and of one partition at most.
    pub(crate) fn domain_is_for(&self, domain: u32, allowed: RangeInclusive<u32>) -> bool {
        self.details.as_ref().is_none_or(|details| {
            details.domains.get(&domain).is_none_or(|used| allowed.contains(&used.partition))
                && !details.strays.iter().any(|stray| stray.0 == domain)
        })
    }

    pub(crate) fn members_in_zone(&self, zone: u32) -> u32 {
        self.details.as_ref().map_or(0, |details| count_of(&details.zones, zone))
    }

    pub(crate) fn members_in_partition(&self, partition: u32) -> u32 {
        self.details.as_ref().map_or(0, |details| count_of(&details.partitions, partition))
    }

    /// The rack of all members, if they stand in one.
    pub(crate) fn rack_of_all(&self) -> Option<u32> {
        let mut domains = self.details.as_ref()?.domains.keys();
        domains.next().copied().filter(|domain| *domain < NO_RACK && domains.next().is_none())
    }

    /// Whether members stand in racks at all.
    pub(crate) fn in_racks(&self) -> bool {
        self.details.as_ref().is_some_and(|details| details.domains.keys().any(|domain| *domain < NO_RACK))
    }
}

impl Details {
    fn join(&mut self, place: Place, partition: u32) {
        self.join_domain(place.domain, partition);
        raise(&mut self.zones, place.zone);
        raise(&mut self.partitions, partition);
    }

    fn leave(&mut self, place: Place, partition: u32) {
        self.leave_domain(place.domain, partition);
        lower(&mut self.zones, place.zone);
        lower(&mut self.partitions, partition);
    }

    fn join_domain(&mut self, domain: u32, partition: u32) {
        let used = self.domains.entry(domain).or_insert(DomainUse { members: 0, partition });
        if used.partition == partition {
            used.members += 1;
            return;
        }
        match self.strays.iter_mut().find(|stray| (stray.0, stray.1) == (domain, partition)) {
            Some(stray) => stray.2 += 1,
            None => self.strays.push((domain, partition, 1)),
        }
    }

    fn leave_domain(&mut self, domain: u32, partition: u32) {
        let Some(used) = self.domains.get_mut(&domain) else { return };
        if used.partition == partition {
            used.members -= 1;
            if used.members > 0 {
                return;
            }
            // The rack now belongs to the strays in it, if there are any.
            match self.strays.iter().position(|stray| stray.0 == domain) {
                Some(index) => {
                    let (_, partition, members) = self.strays.swap_remove(index);
                    *used = DomainUse { members, partition };
                }
                None => {
                    self.domains.remove(&domain);
                }
            }
        } else if let Some(index) = self.strays.iter().position(|stray| (stray.0, stray.1) == (domain, partition))
            && let Some(stray) = self.strays.get_mut(index)
        {
            stray.2 -= 1;
            if stray.2 == 0 {
                self.strays.swap_remove(index);
            }
        }
    }
}

fn count_of(counts: &[(u32, u32)], key: u32) -> u32 {
    counts.iter().find(|(this, _)| *this == key).map_or(0, |(_, count)| *count)
}

fn raise(counts: &mut Vec<(u32, u32)>, key: u32) {
    match counts.iter_mut().find(|(this, _)| *this == key) {
        Some((_, count)) => *count += 1,
        None => counts.push((key, 1)),
    }
}

fn lower(counts: &mut Vec<(u32, u32)>, key: u32) {
    if let Some(index) = counts.iter().position(|(this, _)| *this == key)
        && let Some((_, count)) = counts.get_mut(index)
    {
        *count -= 1;
        if *count == 0 {
            counts.swap_remove(index);
        }
    }
}

/// All groups. A group exists as long as it has members.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    plain: HashMap<Arc<str>, u32>,
    placement: HashMap<Arc<str>, u32>,
    groups: Vec<Group>,
    /// Vacant numbers. Their groups keep their memory for the next one.
    vacant: Vec<u32>,
}

impl Groups {
    fn names(&mut self, kind: GroupKind) -> &mut HashMap<Arc<str>, u32> {
        match kind {
            GroupKind::Plain => &mut self.plain,
            GroupKind::Placement => &mut self.placement,
        }
    }

    /// The number of a group that has members.
    pub(crate) fn find(&self, kind: GroupKind, name: &str) -> Option<u32> {
        match kind {
            GroupKind::Plain => self.plain.get(name).copied(),
            GroupKind::Placement => self.placement.get(name).copied(),
        }
    }

    #[inline]
    pub(crate) fn get(&self, group: u32) -> Option<&Group> {
        self.groups.get(group as usize)
    }

    /// The number of a group, which is made if it does not exist; the caller must then `join` it.
    pub(crate) fn find_or_make(&mut self, kind: GroupKind, name: &Arc<str>) -> u32 {
        if let Some(number) = self.find(kind, name) {
            return number;
        }
        let number = self.vacant.pop().unwrap_or_else(|| {
            self.groups.push(Group::default());
            self.groups.len() as u32 - 1
        });
        if let Some(group) = self.groups.get_mut(number as usize) {
            group.name = Some(name.clone());
            group.kind = kind;
        }
        self.names(kind).insert(name.clone(), number);
        number
    }

    /// Counts one more member on a host. `place` is asked only for placement groups, to spare others the look-up.
    pub(crate) fn join(&mut self, membership: Membership, slot: u32, place: impl FnOnce() -> Place) {
        let Some(group) = self.groups.get_mut(membership.group as usize) else { return };
        group.members += 1;
        if !group.hosts.insert(slot) {
            *group.details.get_or_insert_default().more.entry(slot).or_insert(0) += 1;
        }
        if group.kind == GroupKind::Placement {
            group.details.get_or_insert_default().join(place(), membership.partition);
        }
    }

    /// Counts a member elsewhere because its host has changed its zone or rack.
    pub(crate) fn relocate(&mut self, membership: Membership, from: Place, to: Place) {
        let Some(group) = self.groups.get_mut(membership.group as usize) else { return };
        if group.kind == GroupKind::Placement {
            let details = group.details.get_or_insert_default();
            details.leave(from, membership.partition);
            details.join(to, membership.partition);
        }
    }

    /// Counts one member less on a host; the group ends with its last member.
    pub(crate) fn leave(&mut self, membership: Membership, slot: u32, place: impl FnOnce() -> Place) {
        let Some(group) = self.groups.get_mut(membership.group as usize) else { return };
        group.members -= 1;
        let more = group.details.as_deref_mut().map(|details| &mut details.more);
        if !more.is_some_and(|more| take_one(more, slot)) {
            group.hosts.remove(slot);
        }
        if group.kind == GroupKind::Placement {
            group.details.get_or_insert_default().leave(place(), membership.partition);
        }
        if group.members == 0
            && let Some(name) = group.name.take()
        {
            let kind = group.kind;
            self.names(kind).remove(&name);
            self.vacant.push(membership.group);
        }
    }
}

/// Lowers a count; `false` if there is none.
fn take_one(counts: &mut NumberMap<u32>, key: u32) -> bool {
    match counts.get_mut(&key) {
        None => return false,
        Some(1) => {
            counts.remove(&key);
        }
        Some(count) => *count -= 1,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_ends_with_its_last_member_and_its_number_is_used_again() {
        let mut groups = Groups::default();
        let place = Place::new(0, Some(3), 7);
        for round in 0..100 {
            let name: Arc<str> = format!("group-{round}").into();
            let group = groups.find_or_make(GroupKind::Placement, &name);
            let membership = Membership { group, partition: 1 };
            groups.join(membership, 7, || place);
            groups.join(membership, 7, || place);
            groups.leave(membership, 7, || place);
            assert!(groups.get(group).unwrap().hosts().contains(7), "one member is left");
            assert_eq!(groups.find(GroupKind::Placement, &name), Some(group));
            assert_eq!(groups.find(GroupKind::Plain, &name), None, "the kinds have names of their own");
            groups.leave(membership, 7, || place);
            assert_eq!(groups.find(GroupKind::Placement, &name), None);
            let vacant = groups.get(group).unwrap();
            assert!(vacant.hosts().is_empty() && !vacant.uses_domain(3));
            assert_eq!((vacant.members_in_zone(0), vacant.members_in_partition(1)), (0, 0));
        }
        assert_eq!(groups.groups.len(), 1);
    }

    #[test]
    fn a_rack_belongs_to_those_who_are_still_in_it() {
        let mut groups = Groups::default();
        let place = Place::new(0, Some(3), 7);
        let group = groups.find_or_make(GroupKind::Placement, &"db".into());
        let (first, stray) = (Membership { group, partition: 1 }, Membership { group, partition: 2 });
        groups.join(first, 7, || place);
        groups.join(stray, 8, || place);
        assert!(!groups.get(group).unwrap().domain_is_for(3, 1..=1));
        assert!(!groups.get(group).unwrap().domain_is_for(3, 2..=2));
        groups.leave(first, 7, || place);
        assert!(groups.get(group).unwrap().domain_is_for(3, 2..=2));
        assert!(!groups.get(group).unwrap().domain_is_for(3, 1..=1));
    }
}
