//! The processes of a [`World`]: how they open the volume, with a guest and without, make it larger and let go of it, and what there is
//! when any call of that is the last one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::disk::Died;
use super::schedule::Marks;
use super::world::{BASE, World, open};
use crate::layered::freeze::{BROKEN_AT, FrozenSet};
use crate::layered::op::FileId;
use crate::layered::{clear_dirty, close, grow, mark_in_use, open_map};
use crate::map::{BLOCK_BYTES, CHUNK_BYTES, Extent};
use crate::{BlockError, Operation};

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The host loses power.
    Power,
    /// The process is killed; the host goes on.
    Kill,
    /// In order.
    Clean,
}

/// What a process did when the power failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum During {
    Traffic,
    Growth,
    Closing,
    /// Reading the map, making durable what a killed process left, changing the header.
    Opening,
    /// Putting what the log has into `data`.
    Replay,
    /// Clearing DIRTY without a guest.
    Clearing,
}

/// Ends that nobody wanted.
#[derive(Clone, Debug, Default)]
pub(super) struct Crashes {
    pub(super) kills: u64,
    pub(super) power_cuts: BTreeMap<During, u64>,
}

impl World {
    /// Ends the process, opens the volume again and checks what it holds.
    pub(super) fn end(&mut self, mut end: End) {
        if end == End::Clean && self.disk.died().is_none() {
            self.quiesce();
            self.during = During::Closing;
            self.close();
        }
        for which in 0..self.queues.len() {
            for at in 0..self.queues[which].outstanding.len() {
                if self.queues[which].outstanding[at].applied.is_none() && self.rng.chance(2) {
                    let _ = self.effect(which, at);
                }
            }
        }
        if self.disk.died().is_some() {
            self.fail(&mut end);
        } else {
            self.lose(end);
        }
        if self.eventful && self.rng.chance(4) {
            self.use_offline(&mut end);
        }
        self.open(true, &mut end);
        self.cleared = false;
        self.during = During::Traffic;
        self.add_queues();
    }

    /// The fuse burnt out: mostly that is a power cut, and else only this process dies at that call.
    fn fail(&mut self, end: &mut End) {
        let cut = if self.rng.chance(8) { End::Kill } else { End::Power };
        if *end != End::Power {
            *end = cut;
        }
        self.lose(cut);
    }

    /// What a process leaves when it ends.
    fn lose(&mut self, end: End) {
        self.queues.clear();
        self.disk.complete_all();
        match end {
            End::Clean => self.instant = None,
            End::Kill => {
                self.crashes.kills += 1;
                self.cleared = false;
                self.disk.revive();
            }
            End::Power => {
                let during = match (self.during, self.disk.died()) {
                    (During::Opening, Some(Died { file: FileId::Data, writing: true })) => During::Replay,
                    (during, _) => during,
                };
                *self.crashes.power_cuts.entry(during).or_default() += 1;
                self.cleared = false;
                self.disk.power_cut(&mut self.rng);
                // The stage does not outlive the host's boot.
                self.instant = None;
                // The base does not either, as far as anybody knows.
                self.agent.present.lock().unwrap().clear();
            }
        }
    }

    /// Every second time, the power fails soon.
    fn light_fuse(&mut self, calls: u64) {
        let calls = (self.eventful && self.rng.chance(2)).then(|| self.rng.below(calls));
        self.disk.set_fuse(calls);
    }

    /// What the fuse was lit for is over; false when it burnt out meanwhile.
    ///
    /// # Panics
    /// When it failed although the power is on, or succeeded although it is not.
    fn survived(&mut self, result: Result<(), BlockError>) -> bool {
        let on = self.disk.died().is_none();
        assert_eq!(result.is_ok(), on, "{result:?}");
        self.disk.set_fuse(None);
        on
    }

    /// Opens the volume, again and again until the power stays on, and checks what it holds.
    fn open(&mut self, for_guest: bool, end: &mut End) {
        let mut broken = [0; 4];
        self.disk.read(FileId::Staged, BROKEN_AT, &mut broken);
        self.agent.asked.lock().unwrap().clear();
        self.agent.impaired.store(false, Ordering::Relaxed);
        loop {
            self.during = During::Opening;
            self.generation += self.rng.below(2);
            self.light_fuse(14);
            let opened = open(&self.disk, &self.agent, self.alignment, self.keys, self.generation);
            let result = opened.and_then(|(mut header, shared)| {
                if for_guest {
                    mark_in_use(&self.disk.storage(FileId::Map), &mut header)?;
                }
                (self.header, self.shared) = (header, shared);
                Ok(())
            });
            if self.survived(result) {
                break;
            }
            self.fail(end);
        }
        self.reading.clear();
        let size = self.header.size_bytes;
        assert!(
            size == self.size || Some(size) == self.growing,
            "{size} bytes are neither the old size nor the new one"
        );
        assert!(self.shared.size() == size && self.disk.length(FileId::Data) >= size);
        (self.size, self.growing) = (size, None);
        if self.cleared {
            assert_eq!(self.dirty(), [], "DIRTY had been cleared");
        }
        self.check_fence();
        if self.instant.is_some() {
            if broken == [0; 4] {
                self.finish_snapshot(Marks::Told);
            } else {
                self.instant = None;
            }
        }
        self.check_content(*end);
    }

    /// An attachment before this one is refused.
    fn check_fence(&self) {
        assert_eq!(self.header.generation, self.generation);
        if let Some(older) = self.generation.checked_sub(1) {
            let (map, data) = (self.disk.storage(FileId::Map), self.disk.storage(FileId::Data));
            let refused = open_map(&map, &data, older, Some(Extent::of(BASE)));
            assert!(matches!(refused, Err(BlockError::Fenced { .. })), "generation {older}");
        }
    }

    fn check_content(&mut self, end: End) {
        for sector in self.histories.keys().copied().collect::<Vec<_>>() {
            let found = self.content(sector);
            let history = self.histories.get_mut(&sector).unwrap();
            if end == End::Clean {
                let possible = history.possible();
                assert!(
                    possible.contains(&found),
                    "sector {sector} after a clean close: {found:#x} not in {possible:x?}"
                );
            }
            assert!(history.values.contains(&found), "sector {sector} after {end:?}: {found:#x} not in {history:x?}");
            // Whoever opens makes durable what was left: what was seen once cannot be lost any more.
            history.observe(found);
        }
    }

    /// Lets go of the volume in order, unless the power fails.
    fn close(&mut self) {
        self.light_fuse(16);
        self.close_queues();
        let (map, shared, mut header) = (self.disk.storage(FileId::Map), Arc::clone(&self.shared), self.header.clone());
        let closed = close(&map, &mut header, &shared, || self.flush());
        self.header = header;
        self.survived(closed);
    }

    /// As a queue's executor when it is dropped.
    fn close_queues(&mut self) {
        for which in 0..self.queues.len() {
            self.queues[which].core.begin_close();
            self.issue(which, usize::MAX);
            self.work_off(which);
            if self.disk.died().is_some() {
                return;
            }
            self.queues[which].core.close();
        }
        self.queues.clear();
    }

    /// One flush by a queue that is there for nothing else.
    fn flush(&mut self) -> Result<(), BlockError> {
        if self.disk.died().is_some() {
            return Err(BlockError::Closed);
        }
        self.add_queue();
        self.start(0, Operation::Flush, 0, 0);
        self.quiesce();
        if self.disk.died().is_some() {
            return Err(BlockError::Closed);
        }
        self.close_queues();
        Ok(())
    }

    /// The agent opens the volume without a guest: takes a snapshot, clears DIRTY and makes the volume larger, as it comes.
    fn use_offline(&mut self, end: &mut End) {
        self.open(false, end);
        let clears = self.rng.chance(2);
        if clears {
            let chunks = self.shared.coord().bits.chunks();
            self.instant = Some((FrozenSet::of(chunks, &self.dirty()), self.possible()));
            self.finish_snapshot(Marks::None);
            self.during = During::Clearing;
            self.light_fuse(12);
            let (map, shared, mut header) =
                (self.disk.storage(FileId::Map), Arc::clone(&self.shared), self.header.clone());
            let cleared = clear_dirty(&map, &mut header, &shared, || self.flush());
            self.header = header;
            self.cleared = self.survived(cleared);
        }
        if self.disk.died().is_none() && self.rng.chance(3) {
            self.grow();
        }
        if self.disk.died().is_some() {
            self.fail(end);
        } else {
            self.disk.complete_all();
        }
    }

    /// Makes the volume larger, by little: within a chunk, into the next one, and once over the end of a page of the map.
    pub(super) fn grow(&mut self) {
        const STEP: u64 = 253 * CHUNK_BYTES;
        const PAGE_END: u64 = 496 * CHUNK_BYTES;
        let blocks = [1, 1 + self.rng.below(8), 128 - self.size / BLOCK_BYTES % 128, 128 + self.rng.below(5)];
        let mut size = self.size + blocks[self.rng.below(4) as usize] * BLOCK_BYTES;
        if size > STEP && self.size < PAGE_END - CHUNK_BYTES {
            size = PAGE_END - self.rng.below(4) * 5 * BLOCK_BYTES;
        }
        if size > PAGE_END + CHUNK_BYTES {
            return;
        }
        let during = std::mem::replace(&mut self.during, During::Growth);
        self.growing = Some(size);
        self.light_fuse(8);
        let (map, data) = (self.disk.storage(FileId::Map), self.disk.storage(FileId::Data));
        let grown = grow(&map, &data, &mut self.header, &self.shared, size);
        if self.survived(grown) {
            (self.size, self.growing, self.during) = (size, None, during);
        }
    }
}
