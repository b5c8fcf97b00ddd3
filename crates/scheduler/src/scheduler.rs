//! The scheduler: names to numbers, accounts of what is allocated where.

use std::fmt::Display;
use std::hash::Hash;
use std::sync::Arc;

use hashbrown::{Equivalent, HashMap};

use crate::allocations::{Allocation, Allocations};
use crate::amounts::Amounts;
use crate::engine::{Engine, Meta};
use crate::groups::{GroupKind, Membership, Memberships, Place};
use crate::host::{HostSpec, HostState, HostView};
use crate::no_capacity::{Exclusion, ReserveError};
use crate::request::Reservation;
use crate::rules::Rules;

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

/// Numbers for names, never taken back: zones, racks, labels and images are few.
#[derive(Debug)]
pub(crate) struct Numbers<K>(HashMap<K, u32>);

impl<K: Hash + Eq> Numbers<K> {
    fn number(&mut self, name: &K) -> u32
    where
        K: Clone,
    {
        let next = self.0.len() as u32;
        *self.0.entry(name.clone()).or_insert(next)
    }

    pub(crate) fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, name: &Q) -> Option<u32> {
        self.0.get(name).copied()
    }
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

/// A label's name and value.
pub(crate) type Label = (Arc<str>, Arc<str>);

#[derive(Debug)]
pub(crate) struct Known<H> {
    pub(crate) spec: HostSpec<H>,
    pub(crate) allocatable: Amounts,
}

/// Chooses hosts for instances and keeps account of what is promised where.
///
/// `H` names hosts, `A` names allocations (usually an instance's id).
#[derive(Debug)]
pub struct Scheduler<H, A> {
    pub(crate) config: Config,
    pub(crate) engine: Engine,
    /// Hosts' names by slot; `None` = vacant. Apart from `known`, so that answers touch little memory.
    ids: Vec<Option<H>>,
    /// What the caller told, by slot; `None` = vacant.
    pub(crate) known: Vec<Option<Known<H>>>,
    pub(crate) slots: HashMap<H, u32>,
    vacant: Vec<u32>,
    pub(crate) zones: Numbers<Arc<str>>,
    racks: Numbers<(u32, Arc<str>)>,
    pub(crate) labels: Numbers<Label>,
    pub(crate) images: Numbers<Arc<str>>,
    pub(crate) allocations: Allocations<A>,
    next_sequence: u64,
    /// The last request's rules, kept for their memory.
    pub(crate) rules: Option<Box<Rules>>,
    pub(crate) memberships: Vec<Membership>,
}

fn out_of(state: HostState) -> Option<Exclusion> {
    match state {
        HostState::Active => None,
        HostState::Draining => Some(Exclusion::Draining),
        HostState::Down => Some(Exclusion::Down),
    }
}

impl<H: Key, A: Key> Scheduler<H, A> {
    /// A scheduler without hosts.
    pub fn new(config: Config) -> Self {
        Self {
            engine: Engine::new(config.seed),
            config,
            ids: Vec::new(),
            known: Vec::new(),
            slots: HashMap::new(),
            vacant: Vec::new(),
            zones: Numbers::default(),
            racks: Numbers::default(),
            labels: Numbers::default(),
            images: Numbers::default(),
            allocations: Allocations::default(),
            next_sequence: 0,
            rules: None,
            memberships: Vec::new(),
        }
    }

    /// Adds a host, or changes one (capacity, state, labels, ...); what is allocated on it stays allocated.
    pub fn upsert_host(&mut self, spec: HostSpec<H>) {
        let slot = match self.slots.get(&spec.id) {
            Some(slot) => *slot,
            None => self.new_slot(&spec.id),
        };
        let zone = self.zones.number(&spec.zone);
        let rack = spec.rack.as_ref().map(|rack| self.racks.number(&(zone, rack.clone())));
        let place = Place::new(zone, rack, slot);
        let mut labels = Vec::with_capacity(spec.labels.len());
        let mut index_labels = Vec::new();
        for (name, value) in &spec.labels {
            let number = self.labels.number(&(name.clone(), value.clone()));
            labels.push(number);
            if self.config.index_labels.contains(name) {
                index_labels.push(number);
            }
        }
        index_labels.sort_unstable();
        let meta = Meta { place, out: out_of(spec.state), labels: labels.into(), index_labels: index_labels.into() };

        let allocatable = Amounts::from(&spec.overcommit.apply(&spec.capacity));
        let (mut free, mut moved_from) = (allocatable, None);
        if let (Some(Some(old)), Some(hot), Some(old_meta)) =
            (self.known.get(slot as usize), self.engine.hot(slot), self.engine.meta(slot))
        {
            free.sub(&old.allocatable.minus(&hot.free));
            moved_from = Some(old_meta.place).filter(|old| *old != place);
        }
        self.engine.set_host(slot, free, meta);
        if let Some(old_place) = moved_from {
            self.move_memberships(slot, old_place, place);
        }
        self.set_images(slot, &spec);
        if let Some(known) = self.known.get_mut(slot as usize) {
            *known = Some(Known { spec, allocatable });
        }
    }

    fn new_slot(&mut self, host: &H) -> u32 {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.known.push(None);
            self.ids.push(None);
            self.known.len() as u32 - 1
        });
        if let Some(id) = self.ids.get_mut(slot as usize) {
            *id = Some(host.clone());
        }
        self.slots.insert(host.clone(), slot);
        slot
    }

    fn move_memberships(&mut self, slot: u32, from: Place, to: Place) {
        let on_host =
            self.allocations.iter().map(|(_, allocation)| allocation).filter(|allocation| allocation.host == slot);
        let memberships: Vec<Membership> =
            on_host.flat_map(|allocation| allocation.memberships.as_slice()).copied().collect();
        for membership in &memberships {
            self.engine.groups.relocate(*membership, from, to);
        }
    }

    fn set_images(&mut self, slot: u32, spec: &HostSpec<H>) {
        if let Some(Some(old)) = self.known.get(slot as usize) {
            for image in old.spec.images.difference(&spec.images) {
                if let Some(number) = self.images.get(image.as_ref()) {
                    self.engine.set_image(slot, number, false);
                }
            }
        }
        for image in &spec.images {
            let number = self.images.number(image);
            self.engine.set_image(slot, number, true);
        }
    }

    /// Forgets a host and all that is allocated on it; returns those allocations, the oldest first.
    pub fn remove_host(&mut self, host: &H) -> Vec<A> {
        let Some(&slot) = self.slots.get(host) else { return Vec::new() };
        let orphans = self.allocations_on(host);
        for allocation in &orphans {
            self.release(allocation);
        }
        self.engine.remove_host(slot);
        self.slots.remove(host);
        if let (Some(known), Some(id)) = (self.known.get_mut(slot as usize), self.ids.get_mut(slot as usize)) {
            (*known, *id) = (None, None);
        }
        self.vacant.push(slot);
        orphans
    }

    /// Changes whether a host takes new instances; `false` if the host is unknown.
    pub fn set_host_state(&mut self, host: &H, state: HostState) -> bool {
        let Some(&slot) = self.slots.get(host) else { return false };
        if let Some(Some(known)) = self.known.get_mut(slot as usize) {
            known.spec.state = state;
        }
        self.engine.set_out(slot, out_of(state));
        true
    }

    /// Notes that a host now holds an image, or no longer does; `false` if the host is unknown.
    pub fn set_host_image(&mut self, host: &H, image: &str, held: bool) -> bool {
        let Some(&slot) = self.slots.get(host) else { return false };
        let image: Arc<str> = image.into();
        let number = self.images.number(&image);
        self.engine.set_image(slot, number, held);
        if let Some(Some(known)) = self.known.get_mut(slot as usize) {
            if held {
                known.spec.images.insert(image);
            } else {
                known.spec.images.remove(&image);
            }
        }
        true
    }

    /// Records that an allocation stands on this host, with exactly these resources and groups: for rebuilding from the
    /// caller's records, for resizing, and for moves that were decided elsewhere. No rule or capacity is checked: what
    /// runs, runs.
    pub fn reserve(&mut self, host: &H, allocation: A, reservation: &Reservation) -> Result<(), ReserveError> {
        let slot = *self.slots.get(host).ok_or_else(|| ReserveError::UnknownHost(host.to_string()))?;
        let sequence = self.detach(&allocation).map(|old| old.sequence);
        self.record(slot, allocation, reservation, sequence);
        Ok(())
    }

    /// Enters an allocation that does not exist.
    pub(crate) fn record(&mut self, slot: u32, allocation: A, reservation: &Reservation, sequence: Option<u64>) {
        self.memberships.clear();
        if let Some((name, partition)) = &reservation.placement_group {
            self.add_membership(GroupKind::Placement, name, partition.unwrap_or(0));
        }
        for name in &reservation.groups {
            self.add_membership(GroupKind::Plain, name, 0);
        }
        self.attach(allocation, slot, Amounts::from(&reservation.resources), sequence);
    }

    pub(crate) fn add_membership(&mut self, kind: GroupKind, name: &Arc<str>, partition: u32) {
        let group = self.engine.groups.find_or_make(kind, name);
        self.memberships.push(Membership { group, partition });
    }

    /// Records that an allocation now stands on another host; like `reserve`, unchecked.
    pub fn move_allocation(&mut self, allocation: &A, host: &H) -> Result<(), ReserveError> {
        let slot = *self.slots.get(host).ok_or_else(|| ReserveError::UnknownHost(host.to_string()))?;
        let Some((_, reservation)) = self.allocation(allocation) else {
            return Err(ReserveError::UnknownAllocation(allocation.to_string()));
        };
        let sequence = self.detach(allocation).map(|old| old.sequence);
        self.record(slot, allocation.clone(), &reservation, sequence);
        Ok(())
    }

    /// Frees an allocation; `false` if there is none of this name (any more).
    pub fn release(&mut self, allocation: &A) -> bool {
        self.detach(allocation).is_some()
    }

    /// Where an allocation stands and what it takes.
    pub fn allocation(&self, allocation: &A) -> Option<(&H, Reservation)> {
        let found = self.allocations.get(allocation)?;
        let host = &self.known.get(found.host as usize)?.as_ref()?.spec.id;
        let mut reservation = Reservation { resources: found.amounts.to_vector(), ..Reservation::default() };
        for membership in found.memberships.as_slice() {
            let group = self.engine.groups.get(membership.group)?;
            let name = group.name()?.clone();
            match group.kind() {
                GroupKind::Plain => reservation.groups.push(name),
                GroupKind::Placement => {
                    let partition = Some(membership.partition).filter(|partition| *partition > 0);
                    reservation.placement_group = Some((name, partition));
                }
            }
        }
        Some((host, reservation))
    }

    /// Everything allocated on a host, the oldest first. Looks through all allocations.
    pub fn allocations_on(&self, host: &H) -> Vec<A> {
        let Some(&slot) = self.slots.get(host) else { return Vec::new() };
        let on_host = self.allocations.iter().filter(|(_, allocation)| allocation.host == slot);
        let mut found: Vec<(u64, A)> = on_host.map(|(name, allocation)| (allocation.sequence, name.clone())).collect();
        found.sort_unstable_by_key(|(sequence, _)| *sequence);
        found.into_iter().map(|(_, name)| name).collect()
    }

    /// One host.
    pub fn host(&self, host: &H) -> Option<HostView<'_, H>> {
        self.view(*self.slots.get(host)?)
    }

    /// All hosts, in no particular order.
    pub fn hosts(&self) -> impl Iterator<Item = HostView<'_, H>> {
        (0..self.known.len() as u32).filter_map(|slot| self.view(slot))
    }

    fn view(&self, slot: u32) -> Option<HostView<'_, H>> {
        let known = self.known.get(slot as usize)?.as_ref()?;
        let hot = self.engine.hot(slot)?;
        Some(HostView {
            spec: &known.spec,
            allocatable: known.allocatable.to_vector(),
            allocated: known.allocatable.minus(&hot.free).to_vector(),
            free: hot.free.to_vector(),
            allocations: hot.allocations,
        })
    }

    pub(crate) fn host_name(&self, slot: u32) -> Option<H> {
        self.ids.get(slot as usize)?.clone()
    }

    /// Enters an allocation that does not exist, with the memberships that stand ready in `self.memberships`.
    pub(crate) fn attach(&mut self, allocation: A, slot: u32, amounts: Amounts, sequence: Option<u64>) {
        for membership in &self.memberships {
            self.engine.join(*membership, slot);
        }
        self.engine.take(slot, &amounts);
        let sequence = sequence.unwrap_or_else(|| {
            self.next_sequence += 1;
            self.next_sequence
        });
        let memberships = Memberships::from_slice(&self.memberships);
        self.allocations.insert(allocation, Allocation { host: slot, sequence, amounts, memberships });
    }

    pub(crate) fn detach(&mut self, allocation: &A) -> Option<Allocation> {
        let found = self.allocations.remove(allocation)?;
        for membership in found.memberships.as_slice() {
            self.engine.leave(*membership, found.host);
        }
        self.engine.give_back(found.host, &found.amounts);
        Some(found)
    }
}
