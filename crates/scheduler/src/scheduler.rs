//! The scheduler's interface.

use std::fmt::Display;
use std::hash::Hash;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::host::{HostSpec, HostState, HostView};
use crate::no_capacity::{NoCapacity, ReserveError};
use crate::request::{Placement, Request, Reservation};

/// What can name a host or an allocation.
pub trait Key: Clone + Eq + Hash + Display {}
impl<T: Clone + Eq + Hash + Display> Key for T {}

/// Settings of a [`Scheduler`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Seed of the choice among equally good hosts. Schedulers that work on the same hosts at the same time should have
    /// different seeds, so that they seldom choose the same host.
    pub seed: u64,
    /// Labels by which hosts are indexed apart. Requests may ask for any label; those named here are found without
    /// looking at hosts that lack them. They should have few values each: `arch` fits, a host's name does not.
    pub index_labels: Vec<Arc<str>>,
}

impl Default for Config {
    fn default() -> Self {
        Self { seed: 0, index_labels: vec!["arch".into(), "cpu-generation".into(), "tenancy".into()] }
    }
}

/// Chooses hosts for instances and keeps account of what is promised where.
///
/// `H` names hosts, `A` names allocations (usually an instance's id).
pub struct Scheduler<H, A> {
    _keys: PhantomData<(H, A)>,
}

impl<H: Key, A: Key> Scheduler<H, A> {
    /// A scheduler without hosts.
    pub fn new(_config: Config) -> Self {
        todo!()
    }

    /// Adds a host, or changes one (capacity, state, labels, ...); what is allocated on it stays allocated.
    pub fn upsert_host(&mut self, _spec: HostSpec<H>) {
        todo!()
    }

    /// Forgets a host and all that is allocated on it; returns those allocations.
    pub fn remove_host(&mut self, _host: &H) -> Vec<A> {
        todo!()
    }

    /// Changes whether a host takes new instances; `false` if the host is unknown.
    pub fn set_host_state(&mut self, _host: &H, _state: HostState) -> bool {
        todo!()
    }

    /// Notes that a host now holds an image, or no longer does; `false` if the host is unknown.
    pub fn set_host_image(&mut self, _host: &H, _image: &str, _held: bool) -> bool {
        todo!()
    }

    /// Chooses a host and reserves the resources there. Asked again with the same allocation it answers the same
    /// (`existing`), whatever the request.
    pub fn place(&mut self, _allocation: A, _request: &Request<H>) -> Result<Placement<H>, NoCapacity> {
        todo!()
    }

    /// Places one instance for each of `allocations` (EC2's MaxCount), at least `min` of them (MinCount) or none at all.
    /// The answer has one placement for each of the first allocations, in their order.
    pub fn place_many(
        &mut self,
        _allocations: &[A],
        _min: usize,
        _request: &Request<H>,
    ) -> Result<Vec<Placement<H>>, NoCapacity> {
        todo!()
    }

    /// Records that an allocation stands on this host, with exactly these resources and groups: for rebuilding from the
    /// caller's records, for resizing, and for moves that were decided elsewhere. No rule or capacity is checked: what
    /// runs, runs.
    pub fn reserve(&mut self, _host: &H, _allocation: A, _reservation: &Reservation) -> Result<(), ReserveError> {
        todo!()
    }

    /// Records that an allocation now stands on another host; like `reserve`, unchecked.
    pub fn move_allocation(&mut self, _allocation: &A, _host: &H) -> Result<(), ReserveError> {
        todo!()
    }

    /// Chooses a new host for an existing allocation (to drain its host, or because that died) and moves it there: its
    /// present host is out, and it does not count as its own neighbour. Without capacity it stays where it is.
    pub fn relocate(&mut self, _allocation: &A, _request: &Request<H>) -> Result<Placement<H>, NoCapacity> {
        todo!()
    }

    /// Frees an allocation; `false` if there is none of this name (any more).
    pub fn release(&mut self, _allocation: &A) -> bool {
        todo!()
    }

    /// Where an allocation stands and what it takes.
    pub fn allocation(&self, _allocation: &A) -> Option<(&H, Reservation)> {
        todo!()
    }

    /// Everything allocated on a host, the oldest first. Looks through all allocations.
    pub fn allocations_on(&self, _host: &H) -> Vec<A> {
        todo!()
    }

    /// One host.
    pub fn host(&self, _host: &H) -> Option<HostView<'_, H>> {
        todo!()
    }

    /// All hosts, in no particular order.
    pub fn hosts(&self) -> impl Iterator<Item = HostView<'_, H>> {
        std::iter::empty()
    }
}
