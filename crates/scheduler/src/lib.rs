//! Pure placement: hosts in, decision out. No I/O, no clock of its own.
//!
//! The caller adds hosts ([`Scheduler::upsert_host`]), replays what its records say is placed
//! ([`Scheduler::reserve`]) and then asks for places ([`Scheduler::place`], [`Scheduler::place_many`]). A decision
//! depends on nothing but the calls made so far and the seed in [`Config`].
//!
//! Ids of hosts and allocations are the caller's own types. All other names (zones, racks, labels, groups, images) are
//! texts.

mod allocations;
mod amounts;
mod engine;
mod explain;
mod grid;
mod groups;
mod hash;
mod host;
mod host_set;
mod no_capacity;
mod place;
mod request;
mod resources;
mod rules;
mod scheduler;

pub use host::{HostSpec, HostState, HostView};
pub use no_capacity::{Exclusion, NoCapacity, ReserveError, Shortfall};
pub use place::MAX_PARTITIONS;
pub use request::{GroupStrategy, Placement, PlacementGroup, Request, Reservation, SpreadLevel, Strategy};
pub use resources::{Overcommit, Resource, ResourceVector};
pub use scheduler::{Config, Key, Scheduler};
