//! The schedule of a [`World`]: who does something next, and snapshots.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::disk::SECTOR;
use super::world::{CHUNK_SECTORS, Value, World, base_value, is_met, key, value_of};
use crate::layered::freeze::{FreezeState, FrozenSet, encode_staged, staged_at};
use crate::layered::op::FileId;
use crate::layered::shared::Mail;
use crate::xts::Xts;

/// Chunks of a frozen set that are in the stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marks {
    All,
    /// Those that `staged` says.
    Told,
    /// There is no stage: nobody writes meanwhile.
    None,
}

impl World {
    /// One random step of anybody.
    pub(super) fn step(&mut self) {
        let which = self.rng.below(self.queues.len() as u64) as usize;
        match self.rng.below(100) {
            0..26 => self.submit(),
            26..48 => {
                let most = 1 + self.rng.below(4) as usize;
                self.issue(which, most);
            }
            48..65 => self.apply(which),
            65..82 => self.answer(which),
            82..88 => {
                self.wake(which);
            }
            88..92 => self.fetch(),
            92..99 => self.snapshot_step(),
            _ if self.rng.chance(4) => self.grow(),
            _ => {
                self.clock.fetch_add(self.rng.below(1_500_000_000), Ordering::Relaxed);
            }
        }
    }

    /// The agent brings a chunk that was asked for.
    fn fetch(&mut self) {
        let asked = self.agent.asked.lock().unwrap().pop_first();
        if let Some(chunk) = asked {
            self.agent.present.lock().unwrap().insert(chunk);
            self.shared.presence_changed();
        }
    }

    fn snapshot_step(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut coord = shared.coord();
        match coord.freeze.state {
            FreezeState::Idle if self.rng.chance(3) => {
                let mail = coord.begin_prepare();
                let queue = coord.any_queue().unwrap();
                coord.post(queue, mail, None);
            }
            FreezeState::Preparing if self.rng.chance(100) => {
                coord.freeze.abandon(libc::ECANCELED);
                coord.wake_blocked(None);
                coord.wake_flushes(None);
            }
            FreezeState::Ready => {
                assert!(coord.is_quiet());
                let set = FrozenSet::of(coord.bits.chunks(), &coord.bits.dirty_chunks());
                self.disk.write(FileId::Staged, 0, &encode_staged(self.size, &set), true);
                let possible = self.possible();
                coord.begin_freeze(set.clone());
                // Chunks that no request ever meets: copying them again and again shows nothing.
                for chunk in set.iter().filter(|chunk| !is_met(*chunk)) {
                    coord.freeze.staged.insert(chunk);
                    self.disk.write(FileId::Staged, staged_at(set.chunks, chunk), &[1], true);
                }
                coord.wake_blocked(None);
                self.instant = Some((set, possible));
            }
            FreezeState::Frozen => {
                let set = self.instant.as_ref().unwrap().0.clone();
                let left: Vec<u64> = set.iter().filter(|chunk| coord.freeze.needs_copy(*chunk)).collect();
                if coord.freeze.broken || (!left.is_empty() && self.rng.chance(150)) {
                    coord.end_freeze(true);
                    coord.wake_blocked(None);
                    self.instant = None;
                } else if left.is_empty() {
                    coord.end_freeze(false);
                    coord.wake_blocked(None);
                    drop(coord);
                    self.finish_snapshot(Marks::All);
                } else {
                    let chunk = left[self.rng.below(left.len() as u64) as usize];
                    let queue = coord.any_queue().unwrap();
                    coord.post(queue, Mail::Stage { chunk }, None);
                }
            }
            _ => {}
        }
    }

    /// The agent takes the frozen chunks, from the stage where they are there and else from the volume, and the snapshot with
    /// what earlier ones had is the volume at its instant.
    pub(super) fn finish_snapshot(&mut self, marks: Marks) {
        let (set, possible) = self.instant.take().unwrap();
        let mut sectors: Vec<u64> =
            self.histories.keys().copied().filter(|sector| set.contains(sector / CHUNK_SECTORS)).collect();
        for chunk in set.iter() {
            // Sectors that were never written, too.
            let extra = if is_met(chunk) { 4 } else { u64::from(self.rng.chance(20)) };
            sectors.extend((0..extra).map(|_| chunk * CHUNK_SECTORS + self.rng.below(CHUNK_SECTORS)));
        }
        for sector in sectors {
            let mut mark = [0];
            if marks != Marks::None {
                self.disk.read(FileId::Staged, staged_at(set.chunks, sector / CHUNK_SECTORS), &mut mark);
            }
            assert!(mark == [1] || marks != Marks::All);
            let value = if mark == [1] { self.stored(FileId::Stage, sector) } else { self.content(sector) };
            self.backup.insert(sector, value);
        }
        for sector in self.histories.keys().chain(self.backup.keys()) {
            let found = self.backup.get(sector).copied().unwrap_or_else(|| base_value(*sector));
            match possible.get(sector) {
                Some(possible) => {
                    assert!(possible.contains(&found), "snapshot of sector {sector}: {found:#x} not in {possible:x?}")
                }
                None => assert_eq!(found, base_value(*sector), "snapshot of untouched sector {sector}"),
            }
        }
        self.snapshots += 1;
    }

    /// What a read of each sector may return now.
    pub(super) fn possible(&self) -> HashMap<u64, Vec<Value>> {
        self.histories.iter().map(|(sector, history)| (*sector, history.possible())).collect()
    }

    fn stored(&self, file: FileId, sector: u64) -> Value {
        let mut bytes = [0u8; SECTOR];
        self.disk.read(file, sector * 512, &mut bytes);
        if self.keys {
            Xts::new(&key(1)).decrypt(&mut bytes, sector * 512);
        }
        value_of(sector, &bytes)
    }

    /// What the volume holds, by its bits, without the engine.
    pub(super) fn content(&self, sector: u64) -> Value {
        let local = self.shared.coord().bits.is_local(sector / 8);
        if local { self.stored(FileId::Data, sector) } else { base_value(sector) }
    }

    /// Lets everything in flight end, without faults.
    ///
    /// # Panics
    /// When something waits for ever.
    pub(super) fn quiesce(&mut self) {
        let faults = std::mem::take(&mut self.faults);
        self.run_dry();
        self.faults = faults;
    }

    /// As [`quiesce`](Self::quiesce), with what faults there are.
    pub(super) fn run_dry(&mut self) {
        let mut idle = 0;
        while self.queues.iter().any(|queue| !queue.pending.is_empty()) && self.disk.died().is_none() {
            let before = self.completed + self.failures;
            let mut progress = false;
            while self.agent.asked.lock().unwrap().first().is_some() {
                self.fetch();
                progress = true;
            }
            self.leave_ready();
            for which in 0..self.queues.len() {
                self.issue(which, usize::MAX);
                progress |= !self.queues[which].outstanding.is_empty();
                self.work_off(which);
                progress |= self.wake(which);
                self.drain(which);
            }
            progress |= self.completed + self.failures > before;
            if progress {
                idle = 0;
                continue;
            }
            idle += 1;
            let waits_for_time = self.shared.coord().stalls > 0;
            assert!(waits_for_time && idle < 10, "requests hang: {:?}", *self.shared.coord());
            self.clock.fetch_add(1_100_000_000, Ordering::Relaxed);
        }
    }

    /// Everything that a queue has in the kernel, or takes there meanwhile, ends; unless the power fails.
    pub(super) fn work_off(&mut self, which: usize) {
        while !self.queues[which].outstanding.is_empty() && self.disk.died().is_none() {
            self.apply(which);
            self.answer(which);
            self.issue(which, usize::MAX);
        }
    }

    /// A gate that is closed stays so until the agent freezes or gives up.
    fn leave_ready(&mut self) {
        let mut coord = self.shared.coord();
        if coord.freeze.state == FreezeState::Ready {
            coord.freeze.abandon(libc::ECANCELED);
            coord.wake_blocked(None);
        }
    }

    /// Chunks that hold something a guest wrote since they were last backed up (at least).
    pub(super) fn dirty(&self) -> Vec<u64> {
        self.shared.coord().bits.dirty_chunks()
    }
}
