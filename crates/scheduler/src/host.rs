//! Hosts as callers describe and see them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::resources::{Overcommit, ResourceVector};

/// Whether a host takes new instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HostState {
    /// Takes instances.
    #[default]
    Active,
    /// Keeps what it has and takes nothing new.
    Draining,
    /// Not heard of, or known dead: takes nothing; what it holds stays allocated until released or moved.
    Down,
}

/// Everything the scheduler needs to know about a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSpec<H> {
    /// The host's id.
    pub id: H,
    /// Availability zone.
    pub zone: Arc<str>,
    /// Rack or other failure domain within the zone, if known.
    pub rack: Option<Arc<str>>,
    /// What the host has for instances (its own needs already taken off), before overcommit.
    pub capacity: ResourceVector,
    /// How much of that may be promised.
    pub overcommit: Overcommit,
    /// Attributes that requests can ask for, e.g. `arch` = `x86_64`.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether it takes new instances.
    pub state: HostState,
    /// Images it already holds.
    pub images: BTreeSet<Arc<str>>,
}

impl<H> HostSpec<H> {
    /// An active host without overcommit, rack, labels and images.
    pub fn new(id: H, zone: impl Into<Arc<str>>, capacity: ResourceVector) -> Self {
        Self {
            id,
            zone: zone.into(),
            rack: None,
            capacity,
            overcommit: Overcommit::default(),
            labels: BTreeMap::new(),
            state: HostState::Active,
            images: BTreeSet::new(),
        }
    }
}

/// A host as the scheduler sees it at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostView<'a, H> {
    /// What the caller told about it.
    pub spec: &'a HostSpec<H>,
    /// What may be promised: capacity times overcommit.
    pub allocatable: ResourceVector,
    /// What is promised. Above `allocatable` only if `reserve` or a smaller capacity said so.
    pub allocated: ResourceVector,
    /// What is left, 0 where more than everything is promised.
    pub free: ResourceVector,
    /// How many allocations it holds.
    pub allocations: u32,
}
