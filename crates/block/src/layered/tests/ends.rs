//! The schedule of a [`World`]: who does something next, snapshots, and the ends of processes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::disk::SECTOR;
use super::world::{CHUNK_SECTORS, CHUNKS, SIZE, Value, World, base_value, key, open, value_of};
use crate::Operation;
use crate::layered::freeze::{BROKEN_AT, FreezeState, FrozenSet, encode_staged, staged_at};
use crate::layered::mark_clean;
use crate::layered::op::FileId;
use crate::layered::shared::Mail;
use crate::xts::Xts;

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
                let set = FrozenSet::of(CHUNKS, &coord.bits.dirty_chunks());
                self.disk.write(FileId::Staged, 0, &encode_staged(SIZE, &set), true);
                let possible = self.histories.iter().map(|(sector, history)| (*sector, history.possible())).collect();
                coord.begin_freeze(set.clone());
                // Chunks that no request ever meets: copying them again and again shows nothing.
                for chunk in set.iter().filter(|chunk| (4..247).contains(chunk)) {
                    coord.freeze.staged.insert(chunk);
                    self.disk.write(FileId::Staged, staged_at(CHUNKS, chunk), &[1], true);
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
                    self.finish_snapshot(true);
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
    fn finish_snapshot(&mut self, all_staged: bool) {
        let (set, possible) = self.instant.take().unwrap();
        for chunk in set.iter() {
            let mut mark = [0];
            self.disk.read(FileId::Staged, staged_at(CHUNKS, chunk), &mut mark);
            assert!(mark == [1] || !all_staged);
            let first = chunk * CHUNK_SECTORS;
            // Sectors that were never written, too.
            let extra = (0..4).map(|_| first + self.rng.below(CHUNK_SECTORS)).collect::<Vec<_>>();
            let known = self.histories.keys().copied().filter(|sector| sector / CHUNK_SECTORS == chunk);
            for sector in known.chain(extra).collect::<Vec<_>>() {
                let value = if mark == [1] { self.stored(FileId::Stage, sector) } else { self.content(sector) };
                self.backup.insert(sector, value);
            }
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
        while self.queues.iter().any(|queue| !queue.pending.is_empty()) {
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
                while !self.queues[which].outstanding.is_empty() {
                    self.apply(which);
                    self.answer(which);
                    self.issue(which, usize::MAX);
                }
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

    /// A gate that is closed stays so until the agent freezes or gives up.
    fn leave_ready(&mut self) {
        let mut coord = self.shared.coord();
        if coord.freeze.state == FreezeState::Ready {
            coord.freeze.abandon(libc::ECANCELED);
            coord.wake_blocked(None);
        }
    }

    /// Ends the process, opens the volume again and checks what it holds.
    pub(super) fn end(&mut self, end: End) {
        if end == End::Clean {
            self.quiesce();
        }
        let shared = Arc::clone(&self.shared);
        for which in 0..self.queues.len() {
            for at in 0..self.queues[which].outstanding.len() {
                if self.queues[which].outstanding[at].applied.is_none() && self.rng.chance(2) {
                    let _ = self.effect(which, at);
                }
            }
        }
        if end == End::Clean {
            self.close_clean();
        }
        self.queues.clear();
        self.disk.complete_all();
        if end == End::Power {
            self.disk.power_cut(&mut self.rng);
            // The stage does not outlive the host's boot.
            self.instant = None;
            // The base does not either, as far as anybody knows.
            self.agent.present.lock().unwrap().clear();
        }
        let mut broken = [0; 4];
        self.disk.read(FileId::Staged, BROKEN_AT, &mut broken);
        drop(shared);
        self.agent.asked.lock().unwrap().clear();
        self.agent.impaired.store(false, Ordering::Relaxed);
        let (header, shared) = open(&self.disk, &self.agent, self.alignment, self.keys);
        (self.header, self.shared) = (header, shared);
        self.reading.clear();
        if self.instant.is_some() {
            if broken != [0; 4] || end == End::Clean {
                self.instant = None;
            } else {
                self.finish_snapshot(false);
            }
        }
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
            history.observe(found, end != End::Kill);
        }
        self.add_queues();
    }

    /// As `LayeredVolume::close_clean`.
    fn close_clean(&mut self) {
        {
            let mut coord = self.shared.coord();
            coord.end_freeze(true);
            coord.flush_everything();
            coord.wake_blocked(None);
        }
        self.instant = None;
        // What a freeze's preparation left behind ends, too.
        for which in 0..self.queues.len() {
            self.queues[which].core.turn();
            self.start(which, Operation::Flush, 0, 0);
        }
        self.quiesce();
        mark_clean(&self.disk.storage(FileId::Map), &mut self.header).unwrap();
    }

    /// Chunks that hold something a guest wrote since they were last backed up (at least).
    pub(super) fn dirty(&self) -> Vec<u64> {
        self.shared.coord().bits.dirty_chunks()
    }
}
