//! The engine: hosts as dense numbers, the grids they are indexed in, and the choice among them.

use hashbrown::HashMap;

use crate::amounts::{Amounts, Levels};
use crate::grid::{Grid, Spot, Visit};
use crate::groups::{Groups, Membership, Place};
use crate::hash::{NumberMap, Random};
use crate::host_set::HostSet;
use crate::no_capacity::Exclusion;
use crate::rules::{Facts, PlacementRule, Rules};

/// How many hosts with room are looked at to fulfil a request's wishes before the best of them is taken.
pub(crate) const WISH_BUDGET: usize = 256;

/// Sets of at most so many hosts are gone through one by one rather than sought in the grids.
const LIST_MAX: usize = 1024;

const NOT_INDEXED: u32 = u32::MAX;

/// What every decision reads of a host: one cache line.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(crate) struct Hot {
    pub(crate) free: Amounts,
    pub(crate) allocations: u32,
    /// Its partition, `NOT_INDEXED` unless it is active.
    partition: u32,
    spot: Spot,
}

/// What only some decisions read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meta {
    pub(crate) place: Place,
    /// Why it takes nothing at all, if so.
    pub(crate) out: Option<Exclusion>,
    /// All its labels, and those by which partitions are told apart; ascending.
    pub(crate) labels: Box<[u32]>,
    pub(crate) index_labels: Box<[u32]>,
}

/// Active hosts that are alike for the index.
#[derive(Debug)]
struct Partition {
    zone: u32,
    labels: Box<[u32]>,
    grid: Grid,
}

#[derive(Debug)]
pub(crate) struct Engine {
    hot: Vec<Hot>,
    meta: Vec<Meta>,
    /// Each host's position within its grid cell.
    positions: Vec<u32>,
    partitions: Vec<Partition>,
    partition_numbers: HashMap<(u32, Box<[u32]>), u32>,
    /// Hosts by rack.
    racks: NumberMap<HostSet>,
    /// Hosts by the images they hold.
    images: Vec<HostSet>,
    pub(crate) groups: Groups,
    random: Random,
}

/// The best host found so far.
#[derive(Debug, Default)]
struct Best {
    found: Option<(u8, Spot, u32)>,
    ties: usize,
}

impl Best {
    /// Takes a candidate if it is better; among equals each has the same chance.
    #[inline]
    fn offer(&mut self, wishes: u8, spot: Spot, slot: u32, descending: bool, random: &mut Random) {
        let order = self.found.map_or(std::cmp::Ordering::Less, |(best_wishes, best_spot, _)| {
            let by_spot = if descending { best_spot.cmp(&spot) } else { spot.cmp(&best_spot) };
            wishes.cmp(&best_wishes).then(by_spot)
        });
        match order {
            std::cmp::Ordering::Less => {
                self.found = Some((wishes, spot, slot));
                self.ties = 1;
            }
            std::cmp::Ordering::Equal => {
                self.ties += 1;
                if random.below(self.ties) == 0 {
                    self.found = Some((wishes, spot, slot));
                }
            }
            std::cmp::Ordering::Greater => {}
        }
    }

    /// Whether nothing at this spot or behind it can be better.
    #[inline]
    fn beats(&self, spot: Spot, descending: bool) -> bool {
        self.found.is_some_and(|(wishes, best, _)| wishes == 0 && if descending { spot < best } else { spot > best })
    }
}

impl Engine {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            hot: Vec::new(),
            meta: Vec::new(),
            positions: Vec::new(),
            partitions: Vec::new(),
            partition_numbers: HashMap::new(),
            racks: NumberMap::default(),
            images: Vec::new(),
            groups: Groups::default(),
            random: Random(seed),
        }
    }

    pub(crate) fn facts(&self) -> Facts<'_> {
        Facts { hot: &self.hot, meta: &self.meta, groups: &self.groups, images: &self.images }
    }

    pub(crate) fn hot(&self, slot: u32) -> Option<&Hot> {
        self.hot.get(slot as usize)
    }

    pub(crate) fn meta(&self, slot: u32) -> Option<&Meta> {
        self.meta.get(slot as usize)
    }

    /// Sets a host's properties. A new slot must be the next number or one that was removed.
    pub(crate) fn set_host(&mut self, slot: u32, free: Amounts, meta: Meta) {
        self.unlink(slot);
        if slot as usize >= self.hot.len() {
            let vacant = Hot { free, allocations: 0, partition: NOT_INDEXED, spot: Spot::of(&free, false) };
            self.hot.push(vacant);
            self.meta.push(Meta::default());
            self.positions.push(0);
        }
        self.leave_rack(slot);
        if let Some(rack) = meta.place.rack() {
            self.racks.entry(rack).or_default().insert(slot);
        }
        if let (Some(hot), Some(old)) = (self.hot.get_mut(slot as usize), self.meta.get_mut(slot as usize)) {
            hot.free = free;
            *old = meta;
        }
        self.link(slot);
    }

    /// Takes a host out. Its allocations must be gone.
    pub(crate) fn remove_host(&mut self, slot: u32) {
        self.unlink(slot);
        self.leave_rack(slot);
        for holders in &mut self.images {
            holders.remove(slot);
        }
        if let Some(meta) = self.meta.get_mut(slot as usize) {
            *meta = Meta { out: Some(Exclusion::Down), ..Meta::default() };
        }
    }

    /// Changes whether a host takes anything.
    pub(crate) fn set_out(&mut self, slot: u32, out: Option<Exclusion>) {
        self.unlink(slot);
        if let Some(meta) = self.meta.get_mut(slot as usize) {
            meta.out = out;
        }
        self.link(slot);
    }

    /// Notes whether a host holds an image.
    pub(crate) fn set_image(&mut self, slot: u32, image: u32, held: bool) {
        if image as usize >= self.images.len() {
            self.images.resize_with(image as usize + 1, HostSet::default);
        }
        let Some(holders) = self.images.get_mut(image as usize) else { return };
        if held {
            holders.insert(slot);
        } else {
            holders.remove(slot);
        }
    }

    fn leave_rack(&mut self, slot: u32) {
        if let Some(rack) = self.meta.get(slot as usize).and_then(|meta| meta.place.rack())
            && let Some(hosts) = self.racks.get_mut(&rack)
        {
            hosts.remove(slot);
            if hosts.is_empty() {
                self.racks.remove(&rack);
            }
        }
    }

    fn link(&mut self, slot: u32) {
        let Some(meta) = self.meta.get(slot as usize) else { return };
        if meta.out.is_some() {
            return;
        }
        let (zone, labels) = (meta.place.zone, meta.index_labels.clone());
        let number = *self.partition_numbers.entry((zone, labels)).or_insert_with_key(|(zone, labels)| {
            self.partitions.push(Partition { zone: *zone, labels: labels.clone(), grid: Grid::new() });
            self.partitions.len() as u32 - 1
        });
        let Some(hot) = self.hot.get_mut(slot as usize) else { return };
        let Some(partition) = self.partitions.get_mut(number as usize) else { return };
        hot.partition = number;
        hot.spot = Spot::of(&hot.free, hot.allocations > 0);
        partition.grid.insert(slot, hot.spot, Levels::of(&hot.free), &mut self.positions);
    }

    fn unlink(&mut self, slot: u32) {
        let Some(hot) = self.hot.get_mut(slot as usize) else { return };
        if let Some(partition) = self.partitions.get_mut(hot.partition as usize) {
            partition.grid.remove(slot, hot.spot, &mut self.positions);
        }
        hot.partition = NOT_INDEXED;
    }

    /// Counts one more member of a group on a host.
    pub(crate) fn join(&mut self, membership: Membership, slot: u32) {
        self.groups.join(membership, slot, || place_of(&self.meta, slot));
    }

    /// Counts one member of a group less on a host.
    pub(crate) fn leave(&mut self, membership: Membership, slot: u32) {
        self.groups.leave(membership, slot, || place_of(&self.meta, slot));
    }

    /// Promises amounts on a host. Unchecked.
    #[inline]
    pub(crate) fn take(&mut self, slot: u32, amounts: &Amounts) {
        let Some(hot) = self.hot.get_mut(slot as usize) else { return };
        hot.free.sub(amounts);
        hot.allocations += 1;
        self.reindex(slot);
    }

    /// Frees amounts that were promised on a host.
    #[inline]
    pub(crate) fn give_back(&mut self, slot: u32, amounts: &Amounts) {
        let Some(hot) = self.hot.get_mut(slot as usize) else { return };
        hot.free.add(amounts);
        hot.allocations = hot.allocations.saturating_sub(1);
        self.reindex(slot);
    }

    #[inline]
    fn reindex(&mut self, slot: u32) {
        let Some(hot) = self.hot.get_mut(slot as usize) else { return };
        let Some(partition) = self.partitions.get_mut(hot.partition as usize) else { return };
        let spot = Spot::of(&hot.free, hot.allocations > 0);
        let levels = Levels::of(&hot.free);
        if spot == hot.spot {
            partition.grid.update(slot, spot, levels, &self.positions);
        } else {
            partition.grid.remove(slot, hot.spot, &mut self.positions);
            partition.grid.insert(slot, spot, levels, &mut self.positions);
            hot.spot = spot;
        }
    }

    /// The best host for a request, if any can take it.
    pub(crate) fn choose(&mut self, rules: &Rules) -> Option<u32> {
        if rules.unmet.is_some() || rules.placement == PlacementRule::Nowhere {
            return None;
        }
        let mut best = Best::default();
        let Self { hot, meta, groups, images, partitions, racks, random, .. } = self;
        let facts = Facts { hot, meta, groups, images };
        let mut offer = |best: &mut Best, slot: u32| {
            if rules.admit(&facts, slot)
                && let Some(hot) = facts.hot.get(slot as usize)
                && partitions.get(hot.partition as usize).is_some_and(|partition| partition.matches(rules))
            {
                best.offer(rules.unmet_wishes(&facts, slot), hot.spot, slot, rules.descending, random);
            }
        };
        if let Some(slot) = rules.only_host {
            offer(&mut best, slot);
        } else if let Some(hosts) = confined_to(rules, &facts, racks) {
            hosts.iter().for_each(|slot| offer(&mut best, slot));
        } else {
            if let Some(holders) = rules.image.and_then(|image| facts.images.get(image as usize))
                && holders.len() <= WISH_BUDGET
            {
                holders.iter().for_each(|slot| offer(&mut best, slot));
            }
            search_grids(rules, &facts, partitions, &mut best, random);
        }
        best.found.map(|(_, _, slot)| slot)
    }

    /// Every host that is not out: its slot, where it stands, what it has free.
    pub(crate) fn active(&self) -> impl Iterator<Item = (u32, Place, &Amounts)> {
        let hosts = (0u32..).zip(self.meta.iter().zip(&self.hot));
        hosts.filter(|(_, (meta, _))| meta.out.is_none()).map(|(slot, (meta, hot))| (slot, meta.place, &hot.free))
    }
}

fn place_of(meta: &[Meta], slot: u32) -> Place {
    meta.get(slot as usize).map(|meta| meta.place).unwrap_or_default()
}

/// The smallest set of hosts to which the rules confine the choice, if it is small enough to look at each.
fn confined_to<'a>(rules: &Rules, facts: &Facts<'a>, racks: &'a NumberMap<HostSet>) -> Option<&'a HostSet> {
    let rack = match rules.placement {
        PlacementRule::Near { group, racks: true } => facts.groups.get(group).and_then(|group| group.rack_of_all()),
        PlacementRule::Only(place) => place.rack(),
        _ => None,
    };
    let groups = rules.affinity.iter().filter_map(|group| facts.groups.get(*group)).map(|group| group.hosts());
    let smallest = groups.chain(rack.and_then(|rack| racks.get(&rack))).min_by_key(|hosts| hosts.len())?;
    (smallest.len() <= LIST_MAX).then_some(smallest)
}

fn search_grids(rules: &Rules, facts: &Facts<'_>, partitions: &mut [Partition], best: &mut Best, random: &mut Random) {
    let wishes = rules.has_wishes();
    let mut starts = Random(random.next());
    for partition in partitions.iter_mut().filter(|partition| partition.matches(rules)) {
        let (mut seen, mut found) = (0, None);
        partition.grid.search(
            rules.target,
            rules.descending,
            |len| starts.below(len),
            |spot, slot| {
                if best.beats(spot, rules.descending) {
                    return Visit::Stop;
                }
                seen += 1;
                let unmet = if wishes { rules.unmet_wishes(facts, slot) } else { 0 };
                // Cheap first: a host that cannot be better than one found here is not looked at.
                let useful = found.is_none_or(|least| unmet < least);
                if useful && rules.admit(facts, slot) {
                    best.offer(unmet, spot, slot, rules.descending, random);
                    found = Some(unmet);
                }
                match found {
                    Some(0) => Visit::Stop,
                    Some(_) if seen >= WISH_BUDGET => Visit::Stop,
                    _ => Visit::Continue,
                }
            },
        );
    }
}

impl Partition {
    #[inline]
    fn matches(&self, rules: &Rules) -> bool {
        self.grid.len() > 0
            && rules.zone.is_none_or(|zone| zone == self.zone)
            && rules.index_labels.iter().all(|label| self.labels.contains(label))
    }
}
