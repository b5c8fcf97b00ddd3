//! Pure placement: hosts in, decision out. No I/O, no clock of its own.
//!
//! The caller adds hosts ([`Scheduler::upsert_host`]), replays what its records say is placed
//! ([`Scheduler::reserve`]) and then asks for places ([`Scheduler::place`], [`Scheduler::place_many`]). A decision
//! depends on nothing but the calls made so far and the seed in [`Config`].
//!
//! Ids of hosts and allocations are the caller's own types. All other names (zones, racks, labels, groups, images) are
//! texts.
//!
//! **How it decides.** Active hosts stand in grids of free memory by free vCPUs, one grid for each zone and set of indexed
//! labels. Best fit takes the first host, in this order, that breaks no rule and has room in every dimension: hosts in
//! use before empty ones, then least free memory, then fewest free vCPUs. Memory counts exactly up to 8 GiB and to a
//! sixteenth above, vCPUs exactly up to 16 and to an eighth above; hosts alike in that are drawn from at random. Worst
//! fit goes the other way. Groups know their hosts, so that each rule is one look-up per host. A refusal looks at every
//! host once more to say what is short.
//!
//! ```
//! use hearth_scheduler::{Config, HostSpec, Request, ResourceVector, Scheduler};
//!
//! let mut scheduler: Scheduler<&str, &str> = Scheduler::new(Config::default());
//! let capacity = ResourceVector { vcpus: 8, memory_mib: 6144, ..Default::default() };
//! scheduler.upsert_host(HostSpec::new("h-1", "home-a", capacity));
//!
//! let wanted = ResourceVector { vcpus: 2, memory_mib: 4096, ..Default::default() };
//! assert_eq!(scheduler.place("i-1", &Request::new(wanted)).unwrap().host, "h-1");
//! assert_eq!(
//!     scheduler.place("i-2", &Request::new(wanted)).unwrap_err().to_string(),
//!     "no capacity: memory is short: needs 4096 MiB, the best host has 2048 MiB free"
//! );
//! ```

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
