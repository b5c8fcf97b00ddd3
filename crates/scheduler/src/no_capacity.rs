//! The answer when no host can take an instance: what is missing, and why hosts were out.

use std::fmt;

use thiserror::Error;

use crate::resources::Resource;

/// Why a host was not even looked at for room. A host is counted under the first that applies, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Exclusion {
    /// Another host was asked for.
    OtherHost,
    /// It is in another availability zone than the one asked for.
    OtherZone,
    /// It is down.
    Down,
    /// It is draining.
    Draining,
    /// The request rules it out by name.
    ExcludedHost,
    /// It lacks a label that the request asks for.
    Labels,
    /// The placement group's strategy forbids it.
    PlacementGroup,
    /// It holds no member of a group that the request wants to be with.
    Affinity,
    /// It holds a member of a group that the request must not be with.
    AntiAffinity,
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Exclusion::OtherHost => "not the requested host",
            Exclusion::OtherZone => "in another availability zone",
            Exclusion::Down => "down",
            Exclusion::Draining => "draining",
            Exclusion::ExcludedHost => "ruled out by the request",
            Exclusion::Labels => "without the requested labels",
            Exclusion::PlacementGroup => "against the placement group's strategy",
            Exclusion::Affinity => "without the group to be near to",
            Exclusion::AntiAffinity => "with a group to keep away from",
        })
    }
}

/// One resource that is short on the nearest host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// Which resource.
    pub resource: Resource,
    /// What the request needs (units as in [`crate::ResourceVector`]).
    pub needed: u64,
    /// What that host has free.
    pub free: u64,
    /// What that host could promise if it were empty.
    pub allocatable: u64,
}

/// No host can take the instance. Its text is meant for people.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct NoCapacity {
    /// The nearest host: the one, of those that no rule excludes, which lacks least in proportion.
    pub nearest_host: Option<String>,
    /// What is short there, the scarcest first. Empty when rules exclude every host.
    pub shortfalls: Vec<Shortfall>,
    /// How many hosts there are.
    pub hosts: usize,
    /// How many of them no rule excludes.
    pub eligible: usize,
    /// How many were excluded by which rule, in the order of [`Exclusion`]; only rules that excluded any.
    pub excluded: Vec<(Exclusion, usize)>,
    /// Whether some host that no rule excludes would have room if it were empty: freeing capacity helps.
    pub fits_when_empty: bool,
    /// With `place_many`: how many instances could have been placed. 0 otherwise.
    pub placeable: usize,
    /// With `place_many`: how many had to be placed. 1 otherwise.
    pub wanted: usize,
}

impl fmt::Display for NoCapacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no capacity: ")?;
        if self.wanted > 1 {
            write!(f, "room for {} of {} instances: ", self.placeable, self.wanted)?;
        }
        match (self.hosts, self.eligible) {
            (0, _) => f.write_str("there are no hosts")?,
            (1, 0) => f.write_str("the only host may not take it")?,
            (hosts, 0) => write!(f, "none of {hosts} hosts may take it")?,
            _ => self.write_shortfalls(f)?,
        }
        for (position, (exclusion, count)) in self.excluded.iter().enumerate() {
            match (position, self.eligible) {
                (0, 0) => f.write_str(": ")?,
                (0, _) => write!(f, "; {} of {} hosts excluded: ", self.hosts - self.eligible, self.hosts)?,
                _ => f.write_str(", ")?,
            }
            write!(f, "{count} {exclusion}")?;
        }
        Ok(())
    }
}

impl NoCapacity {
    fn write_shortfalls(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let which = if self.fits_when_empty { "best" } else { "largest" };
        for (position, short) in self.shortfalls.iter().enumerate() {
            let resource = short.resource;
            let needed = resource.display(short.needed);
            let has = resource.display(short.free);
            match position {
                0 => write!(f, "{resource} is short: needs {needed}, the {which} host has {has} free")?,
                _ => write!(f, "; {resource} too: needs {needed}, it has {has} free")?,
            }
        }
        if !self.fits_when_empty {
            f.write_str("; no host is large enough even when empty")?;
        }
        Ok(())
    }
}

/// Why an allocation could not be recorded.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ReserveError {
    /// The host was never added, or has been removed.
    #[error("host {0} is unknown to the scheduler")]
    UnknownHost(String),
    /// The allocation to be moved does not exist.
    #[error("allocation {0} is unknown to the scheduler")]
    UnknownAllocation(String),
}
