//! The collector's rules, walked through exhaustively: every interleaving of uploads (three at a time, any number after each other,
//! with crashes, and with writers that go on after they were given up), deletions by users, epochs and a collector that may stop or
//! pause anywhere.
//!
//! One content is enough: whether an object is deleted depends on its own epoch and references alone. The rules are the product's
//! own functions; each of them is also replaced by a wrong one to show that the model sees the loss.

use std::collections::VecDeque;

use hashbrown::HashSet;

use crate::epoch::Epoch;

const EPOCHS: u8 = 5;
const SLOTS: usize = 3;
const NOBODY: u8 = u8::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Phase {
    /// No snapshot: the slot stands for an id that was not given out yet.
    Free,
    /// Being uploaded.
    Open,
    /// Complete and needed.
    Live,
    /// Deleted by the user; needed as long as an open upload has it as its parent.
    Hidden,
    /// Failed, or deleted. Its process may not have noticed and still write, also its root.
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Slot {
    phase: Phase,
    epoch: u8,
    parent: u8,
    /// Epochs whose copy of the content the manifest refers to, one bit each.
    refs: u8,
    /// The root object is in the store.
    root: bool,
}

const FREE: Slot = Slot { phase: Phase::Free, epoch: 0, parent: NOBODY, refs: 0, root: false };

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Collector {
    Idle,
    /// Has read the current epoch.
    Epoch {
        epoch: u8,
    },
    /// Has listed the roots in the store.
    Seen {
        epoch: u8,
        seen: u8,
    },
    /// Has read the ledger and marked.
    Sweeping {
        epoch: u8,
        marked: u8,
        dead: u8,
    },
    /// Only with the wrong order: has read the ledger first.
    MarkedFirst {
        marked: u8,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    current: u8,
    /// Copies of the content that are in the store, by epoch.
    objects: u8,
    slots: [Slot; SLOTS],
    collector: Collector,
}

#[derive(Clone, Copy)]
struct Rules {
    may_sweep: fn(Epoch, Epoch) -> bool,
    may_reuse: fn(Epoch, Epoch) -> bool,
    parent_is_pinned: bool,
    advance_waits: bool,
    epoch_before_ledger: bool,
    list_before_ledger: bool,
}

const PRODUCT: Rules = Rules {
    may_sweep: Epoch::may_sweep,
    may_reuse: Epoch::may_reuse,
    parent_is_pinned: true,
    advance_waits: true,
    epoch_before_ledger: true,
    list_before_ledger: true,
};

fn e(epoch: u8) -> Epoch {
    Epoch(epoch.into())
}

impl State {
    fn pinned(&self, slot: usize) -> bool {
        self.slots.iter().any(|other| other.phase == Phase::Open && usize::from(other.parent) == slot)
    }

    /// What the ledger tells as live.
    fn needed(&self, slot: usize, rules: &Rules) -> bool {
        match self.slots[slot].phase {
            Phase::Live => true,
            Phase::Hidden => rules.parent_is_pinned && self.pinned(slot),
            _ => false,
        }
    }

    fn marked(&self, rules: &Rules) -> u8 {
        (0..SLOTS).filter(|slot| self.needed(*slot, rules)).fold(0, |marked, slot| marked | self.slots[slot].refs)
    }

    fn known(&self, rules: &Rules) -> u8 {
        (0..SLOTS)
            .filter(|slot| self.needed(*slot, rules) || self.slots[*slot].phase == Phase::Open)
            .fold(0, |known, slot| known | 1 << slot)
    }

    fn roots(&self) -> u8 {
        (0..SLOTS).filter(|slot| self.slots[*slot].root).fold(0, |roots, slot| roots | 1 << slot)
    }

    /// What must hold in every state.
    fn broken(&self) -> Option<&'static str> {
        for slot in &self.slots {
            let lost = slot.refs & !self.objects != 0;
            match slot.phase {
                Phase::Live if lost => return Some("a complete snapshot lost a chunk"),
                Phase::Live if !slot.root => return Some("a complete snapshot lost its root"),
                Phase::Open if lost => return Some("an upload lost a chunk"),
                _ => {}
            }
        }
        None
    }

    fn with(&self, slot: usize, change: impl FnOnce(&mut Slot)) -> Self {
        let mut next = *self;
        change(&mut next.slots[slot]);
        next
    }

    fn uploads(&self, rules: &Rules, next: &mut Vec<Self>) {
        for (number, slot) in self.slots.iter().enumerate() {
            match slot.phase {
                Phase::Free => {
                    let live = (0..SLOTS).filter(|other| self.slots[*other].phase == Phase::Live);
                    for parent in live.map(|parent| parent as u8).chain([NOBODY]) {
                        let refs = self.slots.get(usize::from(parent)).map_or(0, |parent| parent.refs);
                        let slot = Slot { phase: Phase::Open, epoch: self.current, parent, refs, root: false };
                        next.push(self.with(number, |free| *free = slot));
                    }
                }
                Phase::Open => {
                    if slot.root {
                        next.push(self.with(number, |slot| slot.phase = Phase::Live));
                    } else {
                        let mut written = self.with(number, |slot| slot.refs |= 1 << slot.epoch);
                        written.objects |= 1 << slot.epoch;
                        next.push(written);
                        for object in (0..EPOCHS).filter(|object| self.objects & 1 << object != 0) {
                            if (rules.may_reuse)(e(slot.epoch), e(object)) {
                                next.push(self.with(number, |slot| slot.refs |= 1 << object));
                            }
                        }
                        next.push(self.with(number, |slot| slot.root = true));
                    }
                    next.push(self.with(number, |slot| slot.phase = Phase::Gone));
                }
                Phase::Live => next.push(self.with(number, |slot| slot.phase = Phase::Hidden)),
                Phase::Gone if slot.root => {}
                Phase::Gone => {
                    next.push(self.with(number, |slot| slot.root = true));
                    // From now on the slot stands for another id, which the collector has not seen.
                    let mut fresh = self.with(number, |slot| *slot = FREE);
                    match &mut fresh.collector {
                        Collector::Seen { seen: slots, .. } | Collector::Sweeping { dead: slots, .. } => {
                            *slots &= !(1 << number);
                        }
                        _ => {}
                    }
                    next.push(fresh);
                }
                Phase::Hidden => {}
            }
        }
    }

    fn collector(&self, rules: &Rules, next: &mut Vec<Self>) {
        let mut to = |collector| next.push(Self { collector, ..*self });
        match self.collector {
            Collector::Idle if rules.epoch_before_ledger => to(Collector::Epoch { epoch: self.current }),
            Collector::Idle => to(Collector::MarkedFirst { marked: self.marked(rules) }),
            Collector::MarkedFirst { marked } => to(Collector::Sweeping { epoch: self.current, marked, dead: 0 }),
            Collector::Epoch { epoch } if rules.list_before_ledger => to(Collector::Seen { epoch, seen: self.roots() }),
            Collector::Epoch { epoch } => {
                // The wrong order, in two steps: what is known now, against what is listed later.
                to(Collector::Seen { epoch, seen: self.known(rules) });
            }
            Collector::Seen { epoch, seen } => {
                let dead = if rules.list_before_ledger { seen & !self.known(rules) } else { self.roots() & !seen };
                to(Collector::Sweeping { epoch, marked: self.marked(rules), dead });
            }
            Collector::Sweeping { epoch, marked, dead } => {
                for object in (0..EPOCHS).filter(|object| self.objects & !marked & 1 << object != 0) {
                    if (rules.may_sweep)(e(epoch), e(object)) {
                        next.push(Self { objects: self.objects & !(1 << object), ..*self });
                    }
                }
                for slot in (0..SLOTS).filter(|slot| dead & 1 << slot != 0 && self.slots[*slot].root) {
                    next.push(self.with(slot, |slot| slot.root = false));
                }
            }
        }
        // Killed, or done.
        next.push(Self { collector: Collector::Idle, ..*self });
    }

    /// Forgets what cannot matter any more, and which slot is which.
    fn normalize(&mut self) {
        for number in 0..SLOTS {
            let needed = self.pinned(number);
            let slot = &mut self.slots[number];
            if slot.phase == Phase::Hidden && !needed {
                slot.phase = Phase::Gone;
            }
            match slot.phase {
                Phase::Gone => (slot.refs, slot.parent, slot.epoch) = (0, NOBODY, 0),
                Phase::Live | Phase::Hidden => (slot.parent, slot.epoch) = (NOBODY, 0),
                Phase::Free | Phase::Open => {}
            }
        }
        let slots_of_collector = match self.collector {
            Collector::Seen { seen: slots, .. } | Collector::Sweeping { dead: slots, .. } => slots,
            _ => 0,
        };
        let mut order: [usize; SLOTS] = std::array::from_fn(|number| number);
        order.sort_by_key(|number| (self.slots[*number], slots_of_collector & 1 << number));
        let place = |old: usize| order.iter().position(|number| *number == old).unwrap() as u8;
        let slots = order.map(|number| self.slots[number]);
        self.slots = slots.map(|slot| match slot.parent {
            NOBODY => slot,
            parent => Slot { parent: place(parent.into()), ..slot },
        });
        let moved =
            (0..SLOTS).filter(|old| slots_of_collector & 1 << old != 0).fold(0, |new, old| new | 1 << place(old));
        match &mut self.collector {
            Collector::Seen { seen: slots, .. } | Collector::Sweeping { dead: slots, .. } => *slots = moved,
            _ => {}
        }
    }

    fn next(&self, rules: &Rules) -> Vec<Self> {
        let mut next = Vec::new();
        self.uploads(rules, &mut next);
        self.collector(rules, &mut next);
        // A writer that was given up long ago.
        for epoch in (0..=self.current).filter(|epoch| self.objects & 1 << epoch == 0) {
            next.push(Self { objects: self.objects | 1 << epoch, ..*self });
        }
        let waits = self.slots.iter().any(|slot| slot.phase == Phase::Open && slot.epoch < self.current);
        if self.current + 1 < EPOCHS && !(rules.advance_waits && waits) {
            next.push(Self { current: self.current + 1, ..*self });
        }
        next
    }
}

/// Walks everything reachable: how many states there are, or what broke.
fn explore(rules: &Rules) -> Result<usize, &'static str> {
    let start = State { current: 0, objects: 0, slots: [FREE; SLOTS], collector: Collector::Idle };
    let mut seen: HashSet<State> = HashSet::new();
    seen.insert(start);
    let mut open = VecDeque::from([start]);
    while let Some(state) = open.pop_front() {
        for mut next in state.next(rules) {
            if let Some(what) = next.broken() {
                return Err(what);
            }
            next.normalize();
            if seen.insert(next) {
                open.push_back(next);
            }
        }
    }
    Ok(seen.len())
}

#[test]
fn invariant_4_no_interleaving_loses_a_chunk() {
    let states = explore(&PRODUCT).unwrap();
    eprintln!("{states} states");
    assert!(states > 100_000, "the model has become trivial: {states} states");
}

fn wrong(rules: Rules) -> &'static str {
    explore(&rules).expect_err("the model does not see what is wrong with these rules")
}

#[test]
fn one_epoch_less_of_grace_is_one_too_few() {
    wrong(Rules { may_sweep: |current, object| object.0 + crate::epoch::GRACE - 1 <= current.0, ..PRODUCT });
}

#[test]
fn looking_one_epoch_further_back_is_one_too_far() {
    let may_reuse = |own: Epoch, object: Epoch| object <= own && own.0 - object.0 <= crate::epoch::LOOKBACK + 1;
    wrong(Rules { may_reuse, ..PRODUCT });
}

#[test]
fn a_parent_that_is_not_pinned_takes_chunks_along() {
    wrong(Rules { parent_is_pinned: false, ..PRODUCT });
}

#[test]
fn an_epoch_that_does_not_wait_for_uploads_overtakes_them() {
    wrong(Rules { advance_waits: false, ..PRODUCT });
}

#[test]
fn the_ledger_must_be_read_after_the_epoch() {
    wrong(Rules { epoch_before_ledger: false, ..PRODUCT });
}

#[test]
fn roots_must_be_listed_before_the_ledger_is_read() {
    wrong(Rules { list_before_ledger: false, ..PRODUCT });
}
