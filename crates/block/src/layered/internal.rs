//! The volume's own work: flush runs, chunk copies and the preparation of a freeze.

use std::time::Instant;

use super::core::{COPIES_MAX, Core, DEMANDS_MAX};
use super::freeze::{BROKEN_AT, FreezeState, staged_at};
use super::op::{FileId, Kind, PrepareStep, Purpose};
use super::shared::{Cause, Coord, Effect, FlushRun, Kept, Source};
use crate::Operation;
use crate::map::format::{LOG_OFFSET, PAGE, slot_offset};
use crate::map::log::Entry;
use crate::map::{self, CHUNK_BYTES};

/// Written where a byte must become 1 and where a word must become non-zero.
static ONE: [u8; 4] = [1, 0, 0, 0];

impl Core {
    pub(super) fn pump_flush(&mut self, index: usize, coord: &mut Coord) {
        match self.join_flush(index, coord) {
            None => {}
            Some(result) => {
                if let Some(op) = self.ops.get(index) {
                    op.error = op.error.or(result.err());
                }
                self.settle(index);
            }
        }
    }

    /// `None`: waits for a flush run, and has begun one if none was under way.
    fn join_flush(&mut self, index: usize, coord: &mut Coord) -> Option<Result<(), i32>> {
        if coord.failed.is_some() {
            return Some(Err(libc::EIO));
        }
        let op = self.ops.get(index)?;
        if op.error.is_some() {
            return Some(Ok(()));
        }
        let flush = &coord.flush;
        if op.ticket == 0 {
            if !flush.running && !flush.is_needed() {
                return Some(Ok(()));
            }
            op.ticket = flush.started + 1;
        }
        if flush.completed >= op.ticket {
            return Some(Ok(()));
        }
        self.await_flush(index, coord);
        if !coord.flush.running {
            self.start_flush(coord);
        }
        None
    }

    /// Begins a run.
    fn start_flush(&mut self, coord: &mut Coord) {
        let run = coord.flush.next_run();
        coord.flush.started += 1;
        coord.flush.running = true;
        coord.flush.unsynced = false;
        let kept = std::mem::take(&mut coord.flush.kept);
        let index = self.ops.take();
        let birth = coord.birth();
        if let Some(op) = self.ops.get(index) {
            op.begin(Kind::FlushRun(run), birth, 0, 0);
        }
        if run == FlushRun::Log {
            return self.start_log(index, kept, coord);
        }
        kept.into_iter().for_each(|kept| self.buffers.give(kept.buffer));
        // Pages are encoded before the data is synced: a bit set later belongs to data that this sync may miss.
        if run == FlushRun::All {
            self.take_pages(index, coord);
        }
        self.start_internal(index, Purpose::FlushData, FileId::Data, 0, 0);
    }

    /// Encodes the pages that changed.
    fn take_pages(&mut self, index: usize, coord: &mut Coord) {
        loop {
            let mut buffer = self.buffers.take(PAGE);
            let write = buffer.bytes().first_chunk_mut::<PAGE>().and_then(|page| coord.bits.take_changed(page));
            match (write, self.ops.get(index)) {
                (Some(write), Some(op)) => op.pages.push((write, buffer)),
                _ => {
                    self.buffers.give(buffer);
                    break;
                }
            }
        }
    }

    fn start_log(&mut self, index: usize, kept: Vec<Kept>, coord: &mut Coord) {
        let blocks = kept.iter().flat_map(|kept| kept.blocks.clone());
        let entries: Vec<Entry> = blocks.map(|block| Entry { block, page_seq: coord.bits.page_seq(block) }).collect();
        let log = &coord.flush.log;
        let length = if log.prepared { 1 + entries.len() } else { log.blocks as usize } * PAGE;
        let (at, seq) = (log.at, log.seq);
        if let Some(op) = self.ops.get(index) {
            (op.kept, op.entries, op.record) = (kept, entries, (at, seq));
        }
        self.start_internal(index, Purpose::FlushLog, FileId::Map, LOG_OFFSET + at * PAGE as u64, length);
    }

    fn start_internal(&mut self, index: usize, purpose: Purpose, file: FileId, offset: u64, length: usize) {
        let number = self.transfers.take();
        let (Some(transfer), Some(op)) = (self.transfers.get(number), self.ops.get(index)) else { return };
        transfer.op = index;
        transfer.purpose = purpose;
        transfer.file = file;
        transfer.offset = offset;
        (transfer.from, transfer.to) = (offset, offset + length as u64);
        transfer.guest.clear();
        transfer.prepared = false;
        op.in_flight += 1;
        self.ready.push_back(number);
    }

    /// Sets up an internal transfer's call, without the volume's lock.
    pub(super) fn prepare_internal(&mut self, number: usize) {
        let Some(transfer) = self.transfers.get(number) else { return };
        let Some(op) = self.ops.get(transfer.op) else { return };
        let length = (transfer.to - transfer.from) as usize;
        let (operation, iovec) = match transfer.purpose {
            Purpose::FlushPage => {
                let page = op.pages.iter_mut().find(|(w, _)| slot_offset(w.page, w.slot) == transfer.offset);
                (Operation::Write, page.map(|(_, buffer)| buffer.iovec(0, PAGE)))
            }
            Purpose::FlushLog => {
                let mut record = self.buffers.take(length);
                let mut to = record.bytes().chunks_exact_mut(PAGE).skip(1);
                for kept in &op.kept {
                    let count = (kept.blocks.end - kept.blocks.start) as usize;
                    for (from, to) in kept.buffer.content().chunks_exact(PAGE).take(count).zip(&mut to) {
                        to.copy_from_slice(from);
                    }
                }
                let (at, seq) = op.record;
                map::log::encode(&self.shared.volume_id, at, seq, &op.entries, record.bytes());
                let iovec = record.iovec(0, length);
                op.buffer = Some(record);
                (Operation::Write, Some(iovec))
            }
            Purpose::CopyRead => {
                let at = (transfer.offset - op.start) as usize;
                (Operation::Read, op.buffer.as_mut().map(|buffer| buffer.iovec(at, length)))
            }
            Purpose::CopyWrite => {
                if let (Some(key), Some(buffer)) = (&self.shared.data_key, &mut op.buffer) {
                    key.encrypt(buffer.bytes().get_mut(..length).unwrap_or_default(), op.start);
                }
                (Operation::Write, op.buffer.as_mut().map(|buffer| buffer.iovec(0, length)))
            }
            Purpose::CopyMark => {
                let one = ONE.as_ptr().cast_mut().cast();
                (Operation::Write, Some(libc::iovec { iov_base: one, iov_len: length }))
            }
            _ => (Operation::Flush, None),
        };
        transfer.start(operation, iovec.as_slice());
    }

    pub(super) fn complete_internal(&mut self, number: usize, result: Result<(), i32>) {
        let Some(transfer) = self.transfers.get(number) else { return };
        let (purpose, file, offset) = (transfer.purpose, transfer.file, transfer.offset);
        let length = (transfer.to - transfer.from) as usize;
        let index = self.end_transfer(number, result);
        if purpose == Purpose::CopyRead && result.is_ok() {
            let key = if file == FileId::Base { &self.shared.base_key } else { &self.shared.data_key };
            if let (Some(key), Some(op)) = (key, self.ops.get(index)) {
                let at = (offset - op.start) as usize;
                let bytes = op.buffer.as_mut().and_then(|buffer| buffer.bytes().get_mut(at..at + length));
                key.decrypt(bytes.unwrap_or_default(), offset);
            }
        }
        match purpose {
            Purpose::FlushData | Purpose::FlushPage | Purpose::FlushMap | Purpose::FlushLog => {
                self.advance_flush(index, purpose);
            }
            Purpose::CopyRead => {
                let Some(op) = self.ops.get(index) else { return };
                if op.error.is_none() && (op.waiting || op.next < op.end) {
                    if !op.waiting {
                        self.with(|core, coord| core.pump_copy(index, coord));
                    }
                    return;
                }
                self.advance_copy(index, purpose);
            }
            _ => self.advance_copy(index, purpose),
        }
    }

    fn advance_flush(&mut self, index: usize, ended: Purpose) {
        let Some(op) = self.ops.get(index) else { return };
        if op.in_flight > 0 {
            return;
        }
        let (error, pages) = (op.error, op.pages.len());
        match ended {
            Purpose::FlushData if error.is_none() && pages > 0 => {
                for at in 0..pages {
                    let write = self.ops.get(index).and_then(|op| op.pages.get(at).map(|(write, _)| *write));
                    let Some(write) = write else { continue };
                    let offset = slot_offset(write.page, write.slot);
                    self.start_internal(index, Purpose::FlushPage, FileId::Map, offset, PAGE);
                }
            }
            // Not one write with RWF_DSYNC: asynchronous direct I/O ends that in a worker of the kernel which waits for its turn on
            // a busy CPU.
            Purpose::FlushPage | Purpose::FlushLog if error.is_none() => {
                self.start_internal(index, Purpose::FlushMap, FileId::Map, 0, 0);
            }
            _ => self.with(|core, coord| core.end_flush(index, error, coord)),
        }
    }

    fn end_flush(&mut self, index: usize, error: Option<i32>, coord: &mut Coord) {
        coord.flush.running = false;
        match error {
            None => {
                coord.flush.completed = coord.flush.started;
                self.note_run(index, coord);
            }
            Some(errno) => {
                // The kernel drops pages it could not write: syncing again might succeed without them.
                coord.failed = coord.failed.or(Some(errno));
                coord.effects.push(Effect::Impaired(Cause::SyncFailed { errno }));
            }
        }
        while let Some((write, buffer)) = self.ops.get(index).and_then(|op| op.pages.pop()) {
            if error.is_none() {
                coord.bits.written(write);
            }
            self.buffers.give(buffer);
        }
        self.release(index);
        coord.wake_flushes(Some(self.id));
        if error.is_some() {
            coord.wake_blocked(Some(self.id));
        }
    }

    /// A run ended well: what that means for the log.
    fn note_run(&mut self, index: usize, coord: &mut Coord) {
        let Some(op) = self.ops.get(index) else { return };
        let log = &mut coord.flush.log;
        match op.kind {
            Kind::FlushRun(FlushRun::All) => {
                log.at = 0;
                log.holds.clear();
            }
            Kind::FlushRun(FlushRun::Log) => {
                log.at += 1 + op.entries.len() as u64;
                log.seq = log.seq.wrapping_add(1);
                log.prepared = true;
                for entry in op.entries.drain(..) {
                    log.holds.insert(entry.block);
                    // The page is written by the next run of all, which supersedes the entry.
                    coord.bits.touch(entry.block);
                }
            }
            _ => {}
        }
        op.kept.drain(..).for_each(|kept| self.buffers.give(kept.buffer));
    }

    /// Starts what the agent asked for, as far as copies may run at once.
    pub(super) fn run_demands(&mut self, coord: &mut Coord) {
        while coord.freeze.copies.len() < DEMANDS_MAX
            && let Some(chunk) = self.demands.pop_front()
        {
            if coord.freeze.needs_copy(chunk) {
                self.want_copy(chunk, coord);
            }
        }
        if !self.demands.is_empty() && !coord.freeze.hindered.contains(&self.id) {
            coord.freeze.hindered.push(self.id);
        }
    }

    /// Has a chunk copied to the stage unless that is under way, or too many are: then whoever needs it asks again when
    /// one of those ends.
    pub(super) fn want_copy(&mut self, chunk: u64, coord: &mut Coord) {
        if coord.freeze.copies.contains(&chunk) || coord.freeze.copies.len() >= COPIES_MAX {
            return;
        }
        coord.freeze.copies.push(chunk);
        let index = self.ops.take();
        let birth = coord.birth();
        let buffer = self.buffers.take(CHUNK_BYTES as usize);
        let start = chunk * CHUNK_BYTES;
        let end = (start + CHUNK_BYTES).min(coord.bits.size_bytes());
        if let Some(op) = self.ops.get(index) {
            op.begin(Kind::Copy { chunk }, birth, start, end);
            op.buffer = Some(buffer);
            op.token = coord.freeze.attempt;
            op.mark = staged_at(coord.freeze.frozen.chunks, chunk);
        }
        self.pump_copy(index, coord);
    }

    pub(super) fn pump_copy(&mut self, index: usize, coord: &mut Coord) {
        loop {
            let Some(op) = self.ops.get(index) else { return };
            let (next, end, attempt) = (op.next, op.end, op.token);
            if next >= end || op.error.is_some() {
                return;
            }
            if !coord.freeze.is_frozen(attempt) {
                // Thawed while it waited for the base.
                op.error = Some(libc::ECANCELED);
                if op.in_flight == 0
                    && let Kind::Copy { chunk } = op.kind
                {
                    self.end_copy(index, chunk, coord);
                }
                return;
            }
            let (source, to) = self.shared.source(coord, next, end);
            let file = match source {
                Source::Data => FileId::Data,
                Source::Base => FileId::Base,
                Source::Missing if self.closing => return,
                Source::Missing => return self.park(index, next, end, coord),
            };
            self.start_internal(index, Purpose::CopyRead, file, next, (to - next) as usize);
            if let Some(op) = self.ops.get(index) {
                op.next = to;
            }
        }
    }

    fn advance_copy(&mut self, index: usize, ended: Purpose) {
        let Some(op) = self.ops.get(index) else { return };
        let Kind::Copy { chunk } = op.kind else { return };
        if op.in_flight > 0 {
            return;
        }
        if std::mem::take(&mut op.waiting) {
            // A part of it failed while another waited for the base.
            op.birth = u64::MAX;
            if std::mem::take(&mut op.parked) {
                self.parked -= 1;
            }
        }
        let (start, length, mark, error) = (op.start, (op.end - op.start) as usize, op.mark, op.error);
        match ended {
            Purpose::CopyRead if error.is_none() => {
                self.start_internal(index, Purpose::CopyWrite, FileId::Stage, start, length);
            }
            // The mark comes after the chunk, and either mark before any write that waited for it.
            Purpose::CopyRead | Purpose::CopyWrite if error.is_some_and(|errno| errno != libc::ECANCELED) => {
                self.start_internal(index, Purpose::CopyMark, FileId::Staged, BROKEN_AT, ONE.len());
            }
            Purpose::CopyWrite if error.is_none() => {
                self.start_internal(index, Purpose::CopyMark, FileId::Staged, mark, 1);
            }
            _ => self.with(|core, coord| core.end_copy(index, chunk, coord)),
        }
    }

    fn end_copy(&mut self, index: usize, chunk: u64, coord: &mut Coord) {
        let Some((error, attempt)) = self.ops.get(index).map(|op| (op.error, op.token)) else { return };
        let freeze = &mut coord.freeze;
        freeze.copies.retain(|each| *each != chunk);
        match error {
            _ if !freeze.is_frozen(attempt) => {}
            Some(errno) if !std::mem::replace(&mut freeze.broken, true) => {
                coord.effects.push(Effect::Impaired(Cause::StageFailed { errno }));
            }
            Some(_) => {}
            None => {
                freeze.staged.insert(chunk);
                coord.effects.push(Effect::Staged(chunk));
            }
        }
        self.release(index);
        coord.wake_blocked(Some(self.id));
        coord.wake_hindered(Some(self.id));
    }

    pub(super) fn begin_prepare(&mut self, attempt: u64, coord: &mut Coord) {
        let index = self.ops.take();
        let birth = coord.birth();
        if let Some(op) = self.ops.get(index) {
            op.begin(Kind::Prepare(PrepareStep::Flush), birth, 0, 0);
            op.token = attempt;
        }
        self.pump_prepare(index, PrepareStep::Flush, coord);
    }

    pub(super) fn pump_prepare(&mut self, index: usize, step: PrepareStep, coord: &mut Coord) {
        let attempt = self.ops.get(index).map_or(0, |op| op.token);
        if coord.freeze.state != FreezeState::Preparing || coord.freeze.attempt != attempt {
            // Called off.
            return self.release(index);
        }
        if step == PrepareStep::Drain {
            if !coord.is_quiet() {
                return self.block(index, coord);
            }
            return self.prepare_step(index, PrepareStep::FlushRest, coord);
        }
        match (self.join_flush(index, coord), step) {
            (None, _) => {}
            (Some(Err(errno)), _) => {
                coord.freeze.abandon(errno);
                self.release(index);
                coord.wake_blocked(Some(self.id));
                self.shared.prepared.notify();
            }
            (Some(Ok(())), PrepareStep::Flush) => {
                coord.freeze.gate = Some(Instant::now());
                self.prepare_step(index, PrepareStep::Drain, coord);
            }
            (Some(Ok(())), _) => {
                coord.freeze.state = FreezeState::Ready;
                self.release(index);
                self.shared.prepared.notify();
            }
        }
    }

    fn prepare_step(&mut self, index: usize, step: PrepareStep, coord: &mut Coord) {
        if let Some(op) = self.ops.get(index) {
            op.kind = Kind::Prepare(step);
            op.ticket = 0;
        }
        self.pump_prepare(index, step, coord);
    }
}
