//! What callers ask for and what they get.

use std::sync::Arc;

use crate::resources::ResourceVector;

/// Which of the hosts that can take an instance is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Best fit: fill hosts that are already in use, the fullest first, so that empty hosts stay empty (and can sleep).
    #[default]
    Pack,
    /// Worst fit: empty hosts first, then the one with most room.
    Spread,
}

/// Where the instances of a placement group count as "in the same place".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SpreadLevel {
    /// Each host is a place of its own.
    #[default]
    Host,
    /// Hosts in one rack share a place; a host without a rack is a place of its own.
    Rack,
}

/// EC2's placement group strategies.
/// Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/placement-strategies.html>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupStrategy {
    /// Close together: all members in the zone and the rack of the first one (in its zone only, where hosts have no rack).
    Cluster,
    /// At most one member per host or rack.
    Spread {
        /// What "distinct" means.
        level: SpreadLevel,
        /// Most members in one availability zone (EC2 allows 7 with racks), `None` = no limit.
        max_per_zone: Option<u32>,
    },
    /// Members are divided into partitions that never share a rack (or a host, where it has no rack).
    Partition {
        /// How many partitions the group has (EC2: 1..=7).
        count: u32,
        /// The wanted partition, counted from 1 as EC2 does; `None` = the least filled one with room.
        number: Option<u32>,
    },
}

/// Membership in a placement group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PlacementGroup {
    /// The group's name or id. All requests for one group must carry the same kind of strategy.
    pub name: Arc<str>,
    /// The group's strategy.
    pub strategy: GroupStrategy,
}

/// A wish for one place for one instance (or, with `place_many`, for several alike).
///
/// Hard rules: resources, zone, host, labels, placement group, `affinity`, `anti_affinity`, `exclude_hosts`; a host that
/// breaks any of them is never chosen. Wishes, in order of weight: `avoid_groups`, `prefer_image`, then the strategy. In
/// a large cloud wishes are sought among the 256 hosts that suit the strategy best, and among all holders of an
/// image that few hosts hold.
#[derive(Clone, Debug)]
pub struct Request<H> {
    /// What the instance takes.
    pub resources: ResourceVector,
    /// How to choose among hosts that can take it.
    pub strategy: Strategy,
    /// Only this availability zone.
    pub zone: Option<Arc<str>>,
    /// Only this host (EC2: placement host id). It must be active and have room like any other.
    pub host: Option<H>,
    /// Not these hosts, for instance because their agent has just refused.
    pub exclude_hosts: Vec<H>,
    /// Only hosts that carry all of these labels.
    pub labels: Vec<(Arc<str>, Arc<str>)>,
    /// The placement group that the instance joins.
    pub placement_group: Option<PlacementGroup>,
    /// Plain groups that the instance joins, for others' (and its own) `affinity`, `anti_affinity`, `avoid_groups`.
    pub groups: Vec<Arc<str>>,
    /// Only hosts that hold a member of each of these groups. A group without any members, which the instance itself
    /// joins, does not bind: its first member may go anywhere.
    pub affinity: Vec<Arc<str>>,
    /// Only hosts that hold no member of any of these groups.
    pub anti_affinity: Vec<Arc<str>>,
    /// Rather hosts that hold no member of any of these groups.
    pub avoid_groups: Vec<Arc<str>>,
    /// Rather hosts that already hold this image.
    pub prefer_image: Option<Arc<str>>,
}

impl<H> Request<H> {
    /// A request for these resources, packed, without any rule.
    pub fn new(resources: ResourceVector) -> Self {
        Self {
            resources,
            strategy: Strategy::Pack,
            zone: None,
            host: None,
            exclude_hosts: Vec::new(),
            labels: Vec::new(),
            placement_group: None,
            groups: Vec::new(),
            affinity: Vec::new(),
            anti_affinity: Vec::new(),
            avoid_groups: Vec::new(),
            prefer_image: None,
        }
    }
}

/// Where an instance goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement<H> {
    /// The chosen host; the resources are reserved there.
    pub host: H,
    /// The partition of a partition placement group, counted from 1.
    pub partition: Option<u32>,
    /// The allocation had been made before this call; nothing was changed.
    pub existing: bool,
}

/// An allocation as the caller's own records know it, for `reserve`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reservation {
    /// What it takes.
    pub resources: ResourceVector,
    /// Its placement group's name, and its partition number in a partition placement group.
    pub placement_group: Option<(Arc<str>, Option<u32>)>,
    /// The plain groups it is a member of.
    pub groups: Vec<Arc<str>>,
}
