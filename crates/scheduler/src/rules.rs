//! A request with its names resolved to numbers, and the rules that decide which hosts may take it.

use crate::amounts::Amounts;
use crate::engine::{Hot, Meta};
use crate::grid::Target;
use crate::groups::{Groups, Place};
use crate::host_set::HostSet;
use crate::no_capacity::Exclusion;

/// How a placement group binds a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PlacementRule {
    #[default]
    Any,
    /// Nowhere: the wanted partition does not exist.
    Nowhere,
    /// Not on a host that holds a member.
    OtherHosts(u32),
    /// Not in a rack that holds a member.
    OtherRacks(u32),
    /// Not in a rack that holds another partition's member: one partition is allowed, or any of several.
    Partition { group: u32, first: u32, last: u32 },
    /// In the zone and, if members stand in any, the racks of the members.
    Near { group: u32, racks: bool },
    /// Only in this zone and rack (trying where a whole cluster group can start).
    Only(Place),
}

/// A request, resolved. Kept between decisions for the memory of its lists.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    pub(crate) wanted: Amounts,
    pub(crate) target: Target,
    pub(crate) descending: bool,
    pub(crate) zone: Option<u32>,
    pub(crate) only_host: Option<u32>,
    /// The request names something that no host has; this excludes those that nothing before it excludes.
    pub(crate) unmet: Option<Exclusion>,
    pub(crate) excluded: Vec<u32>,
    /// Wanted labels by which partitions are told apart, and all others.
    pub(crate) index_labels: Vec<u32>,
    pub(crate) labels: Vec<u32>,
    pub(crate) placement: PlacementRule,
    /// Placement group and its most members per zone.
    pub(crate) zone_limit: Option<(u32, u32)>,
    pub(crate) affinity: Vec<u32>,
    pub(crate) anti_affinity: Vec<u32>,
    pub(crate) avoid: Vec<u32>,
    pub(crate) image: Option<u32>,
}

/// What rules look at.
pub(crate) struct Facts<'a> {
    pub(crate) hot: &'a [Hot],
    pub(crate) meta: &'a [Meta],
    pub(crate) groups: &'a Groups,
    pub(crate) images: &'a [HostSet],
}

impl Rules {
    /// Forgets the last request but keeps the lists' memory.
    pub(crate) fn clear(&mut self) {
        let Self { excluded, index_labels, labels, affinity, anti_affinity, avoid, .. } = self;
        for list in [excluded, index_labels, labels, affinity, anti_affinity, avoid] {
            list.clear();
        }
        self.zone = None;
        self.only_host = None;
        self.unmet = None;
        self.placement = PlacementRule::Any;
        self.zone_limit = None;
        self.image = None;
    }

    /// Notes an exclusion of all hosts, unless one that comes before it is noted.
    pub(crate) fn unmet(&mut self, exclusion: Exclusion) {
        self.unmet = Some(self.unmet.map_or(exclusion, |earlier| earlier.min(exclusion)));
    }

    pub(crate) fn has_wishes(&self) -> bool {
        !self.avoid.is_empty() || self.image.is_some()
    }

    /// Whether an active host in the right partition may take the instance and has room for it.
    #[inline]
    pub(crate) fn admit(&self, facts: &Facts<'_>, slot: u32) -> bool {
        // The order is for speed: the groups of a request stay in the processor's cache, hosts do not.
        !self.excluded.contains(&slot)
            && self.near_affinity(facts, slot)
            && self.far_from_anti_affinity(facts, slot)
            && facts.hot.get(slot as usize).is_some_and(|hot| hot.free.fits(&self.wanted))
            && (self.labels.is_empty() || self.labels_match(facts, slot))
            && self.placement_allows(facts, slot)
    }

    /// The first rule that excludes a host, not looking at room.
    pub(crate) fn exclusion(&self, facts: &Facts<'_>, slot: u32) -> Option<Exclusion> {
        let meta = facts.meta.get(slot as usize)?;
        let own = if self.only_host.is_some_and(|host| host != slot) {
            Some(Exclusion::OtherHost)
        } else if self.zone.is_some_and(|zone| zone != meta.place.zone) {
            Some(Exclusion::OtherZone)
        } else if let Some(state) = meta.out {
            Some(state)
        } else if self.excluded.contains(&slot) {
            Some(Exclusion::ExcludedHost)
        } else if !self.labels_match(facts, slot) {
            Some(Exclusion::Labels)
        } else if !self.placement_allows(facts, slot) {
            Some(Exclusion::PlacementGroup)
        } else if !self.near_affinity(facts, slot) {
            Some(Exclusion::Affinity)
        } else if !self.far_from_anti_affinity(facts, slot) {
            Some(Exclusion::AntiAffinity)
        } else {
            None
        };
        match (own, self.unmet) {
            (Some(own), Some(unmet)) => Some(own.min(unmet)),
            (own, unmet) => own.or(unmet),
        }
    }

    /// Unmet wishes, the weightier in the higher bit; 0 = all met.
    #[inline]
    pub(crate) fn unmet_wishes(&self, facts: &Facts<'_>, slot: u32) -> u8 {
        let near_avoided = self.avoid.iter().any(|group| holds_member(facts, *group, slot));
        let without_image = self
            .image
            .is_some_and(|image| facts.images.get(image as usize).is_none_or(|holders| !holders.contains(slot)));
        u8::from(near_avoided) << 1 | u8::from(without_image)
    }

    fn labels_match(&self, facts: &Facts<'_>, slot: u32) -> bool {
        let Some(meta) = facts.meta.get(slot as usize) else { return false };
        self.index_labels.iter().chain(&self.labels).all(|label| meta.labels.contains(label))
    }

    #[inline]
    fn placement_allows(&self, facts: &Facts<'_>, slot: u32) -> bool {
        if let (PlacementRule::Any, None) = (self.placement, self.zone_limit) {
            return true;
        }
        let Some(place) = facts.meta.get(slot as usize).map(|meta| meta.place) else { return false };
        if let Some((group, limit)) = self.zone_limit
            && facts.groups.get(group).is_some_and(|group| group.members_in_zone(place.zone) >= limit)
        {
            return false;
        }
        match self.placement {
            PlacementRule::Any => true,
            PlacementRule::Nowhere => false,
            PlacementRule::OtherHosts(group) => !holds_member(facts, group, slot),
            PlacementRule::OtherRacks(group) => {
                facts.groups.get(group).is_none_or(|group| !group.uses_domain(place.domain))
            }
            PlacementRule::Partition { group, first, last } => {
                facts.groups.get(group).is_none_or(|group| group.domain_is_for(place.domain, first..=last))
            }
            PlacementRule::Near { group, racks } => facts.groups.get(group).is_some_and(|group| {
                group.members_in_zone(place.zone) > 0 && (!racks || group.uses_domain(place.domain))
            }),
            PlacementRule::Only(wanted) => place.zone == wanted.zone && place.rack() == wanted.rack(),
        }
    }

    #[inline]
    fn near_affinity(&self, facts: &Facts<'_>, slot: u32) -> bool {
        self.affinity.iter().all(|group| holds_member(facts, *group, slot))
    }

    #[inline]
    fn far_from_anti_affinity(&self, facts: &Facts<'_>, slot: u32) -> bool {
        !self.anti_affinity.iter().any(|group| holds_member(facts, *group, slot))
    }
}

#[inline]
fn holds_member(facts: &Facts<'_>, group: u32, slot: u32) -> bool {
    facts.groups.get(group).is_some_and(|group| group.hosts().contains(slot))
}
