//! Groups of allocations: who stands where, so that each rule is one look-up per host.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

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
    /// Members on hosts that hold more than one: how many more.
    more: NumberMap<u32>,
    /// Placement groups only: use by rack, members by zone and by partition.
    domains: NumberMap<DomainUse>,
    /// Members (domain, partition, how many) that stand in a rack of another partition, which only `reserve` and
    /// `move_allocation` can bring about.
    strays: Vec<(u32, u32, u32)>,
    zones: Vec<(u32, u32)>,
    partitions: Vec<(u32, u32)>,
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
        self.domains.contains_key(&domain)
    }

    /// Whether a rack holds no members of any but the `allowed` partitions, and of one partition at most.
    pub(crate) fn domain_is_for(&self, domain: u32, allowed: RangeInclusive<u32>) -> bool {
        self.domains.get(&domain).is_none_or(|used| allowed.contains(&used.partition))
            && !self.strays.iter().any(|stray| stray.0 == domain)
    }

    pub(crate) fn members_in_zone(&self, zone: u32) -> u32 {
        count_of(&self.zones, zone)
    }

    pub(crate) fn members_in_partition(&self, partition: u32) -> u32 {
        count_of(&self.partitions, partition)
    }

    /// The rack of all members, if they stand in one.
    pub(crate) fn rack_of_all(&self) -> Option<u32> {
        let mut domains = self.domains.keys();
        domains.next().copied().filter(|domain| *domain < NO_RACK && domains.next().is_none())
    }

    /// Whether members stand in racks at all.
    pub(crate) fn in_racks(&self) -> bool {
        self.domains.keys().any(|domain| *domain < NO_RACK)
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

    /// Counts one more member on a host.
    pub(crate) fn join(&mut self, membership: Membership, slot: u32, place: Place) {
        let Some(group) = self.groups.get_mut(membership.group as usize) else { return };
        group.members += 1;
        if !group.hosts.insert(slot) {
            *group.more.entry(slot).or_insert(0) += 1;
        }
        if group.kind == GroupKind::Placement {
            group.join_domain(place.domain, membership.partition);
            raise(&mut group.zones, place.zone);
            raise(&mut group.partitions, membership.partition);
        }
    }

    /// Counts a member elsewhere because its host has changed its zone or rack.
    pub(crate) fn relocate(&mut self, membership: Membership, from: Place, to: Place) {
        let Some(group) = self.groups.get_mut(membership.group as usize) else { return };
        if group.kind == GroupKind::Placement {
            group.leave_domain(from.domain, membership.partition);
            group.join_domain(to.domain, membership.partition);
            lower(&mut group.zones, from.zone);
            raise(&mut group.zones, to.zone);
        }
    }

    /// Counts one member less on a host; the group ends with its last member.
    pub(crate) fn leave(&mut self, membership: Membership, slot: u32, place: Place) {
        let Some(group) = self.groups.get_mut(membership.group as usize) else { return };
        group.members -= 1;
        match group.more.get_mut(&slot) {
            Some(1) => {
                group.more.remove(&slot);
            }
            Some(more) => *more -= 1,
            None => {
                group.hosts.remove(slot);
            }
        }
        if group.kind == GroupKind::Placement {
            group.leave_domain(place.domain, membership.partition);
            lower(&mut group.zones, place.zone);
            lower(&mut group.partitions, membership.partition);
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
