//! Reads and writes: planning them in pieces, setting up their calls, and what their ends mean.

use super::buffer::{gather, scatter};
use super::core::{BOUNCE_BYTES, Core, PIECES_MAX};
use super::op::{FileId, Kind, Purpose, Transfer};
use super::shared::{Coord, Source};
use crate::map::{BLOCK_BYTES, CHUNK_BYTES};
use crate::volume::SECTOR_BYTES;
use crate::{Operation, Request};

impl Core {
    pub(super) fn pump_read(&mut self, index: usize, coord: &mut Coord) {
        loop {
            let Some(op) = self.ops.get(index) else { return };
            let (next, end, in_flight) = (op.next, op.end, op.in_flight);
            if op.error.is_some() || next >= end {
                return self.settle(index);
            }
            if in_flight >= PIECES_MAX {
                return;
            }
            let (source, mut to) = self.shared.source(coord, next, end);
            let file = match source {
                Source::Data => FileId::Data,
                Source::Base => FileId::Base,
                Source::Missing => return self.park(index, next, end, coord),
            };
            if self.bounces(index, file, next, to) {
                to = to.min(next + BOUNCE_BYTES);
            }
            self.start(index, Purpose::Read, file, next, to);
        }
    }

    /// A transfer between this request's buffers and this file needs a buffer between.
    fn bounces(&mut self, index: usize, file: FileId, from: u64, to: u64) -> bool {
        let shared = &self.shared;
        let aligned = self.ops.get(index).is_some_and(|op| op.aligned);
        match file {
            FileId::Base => shared.base_key.is_some(),
            _ => {
                let coarse = shared.alignment.offset > SECTOR_BYTES && !(from | to).is_multiple_of(BLOCK_BYTES);
                shared.data_key.is_some() || !aligned || coarse
            }
        }
    }

    pub(super) fn pump_write(&mut self, index: usize, operation: Operation, coord: &mut Coord) {
        loop {
            let Some(op) = self.ops.get(index) else { return };
            let (next, end, in_flight) = (op.next, op.end, op.in_flight);
            if op.error.is_none() && coord.failed.is_some() {
                op.error = Some(libc::EIO);
            }
            if op.error.is_some() || next >= end {
                return self.settle(index);
            }
            if in_flight >= PIECES_MAX {
                return;
            }
            if coord.freeze.gate.is_some() {
                return self.block(index, coord);
            }
            let stop = coord.freeze.free_until(next, end);
            if stop == next {
                self.want_copy(next / CHUNK_BYTES, coord);
                return self.block(index, coord);
            }
            let block = next / BLOCK_BYTES;
            let block_end = (block + 1) * BLOCK_BYTES;
            let progress = if !next.is_multiple_of(BLOCK_BYTES) || stop < block_end {
                self.write_part(index, operation, next, stop.min(block_end), coord)
            } else {
                self.write_blocks(index, operation, next, stop / BLOCK_BYTES * BLOCK_BYTES, coord)
            };
            if !progress {
                return;
            }
        }
    }

    /// Less than a block. False when the request has to wait.
    fn write_part(&mut self, index: usize, operation: Operation, from: u64, to: u64, coord: &mut Coord) -> bool {
        if operation == Operation::Discard {
            // A hint; what is not a whole block keeps its content.
            if let Some(op) = self.ops.get(index) {
                op.next = to;
            }
            return true;
        }
        let block = from / BLOCK_BYTES;
        if coord.exclusive.contains(&block) {
            self.block(index, coord);
            return false;
        }
        let local = coord.bits.is_local(block);
        if local && self.shared.alignment.offset <= SECTOR_BYTES {
            self.start_write(index, from, to, false, coord);
            return true;
        }
        if coord.is_active(block) {
            self.block(index, coord);
            return false;
        }
        let file = match self.shared.source(coord, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES).0 {
            Source::Data => FileId::Data,
            Source::Base => FileId::Base,
            Source::Missing => {
                self.park(index, from, to, coord);
                return false;
            }
        };
        coord.exclusive.push(block);
        coord.bits.set_dirty(from / CHUNK_BYTES);
        self.start(index, Purpose::FillRead { block }, file, from, to);
        true
    }

    /// Whole blocks. False when the request has to wait.
    fn write_blocks(&mut self, index: usize, operation: Operation, from: u64, to: u64, coord: &mut Coord) -> bool {
        let mut to = to;
        if operation == Operation::Write && self.bounces(index, FileId::Data, from, to) {
            to = to.min(from + BOUNCE_BYTES);
        }
        if !coord.exclusive.is_empty()
            && let Some(block) = coord.first_exclusive(from / BLOCK_BYTES..to / BLOCK_BYTES)
        {
            to = block * BLOCK_BYTES;
            if to == from {
                self.block(index, coord);
                return false;
            }
        }
        let keep = operation == Operation::Write && coord.flush.has_room((to - from) / BLOCK_BYTES);
        self.start_write(index, from, to, keep, coord);
        true
    }

    fn start_write(&mut self, index: usize, from: u64, to: u64, keep: bool, coord: &mut Coord) {
        for chunk in from / CHUNK_BYTES..to.div_ceil(CHUNK_BYTES) {
            coord.bits.set_dirty(chunk);
        }
        let active = coord.begin_active(from / BLOCK_BYTES..to.div_ceil(BLOCK_BYTES), keep);
        self.start(index, Purpose::Write { active, keep }, FileId::Data, from, to);
    }

    /// Makes a transfer for the request's bytes `from..to` ready.
    fn start(&mut self, index: usize, purpose: Purpose, file: FileId, from: u64, to: u64) {
        let number = self.transfers.take();
        let (Some(transfer), Some(op)) = (self.transfers.get(number), self.ops.get(index)) else { return };
        transfer.op = index;
        transfer.purpose = purpose;
        transfer.file = file;
        (transfer.from, transfer.to) = (from, to);
        transfer.offset = from;
        transfer.skip = 0;
        transfer.prepared = false;
        transfer.guest.clear();
        op.take_iovecs((to - from) as usize, &mut transfer.guest);
        op.next = to;
        op.in_flight += 1;
        self.ready.push_back(number);
    }

    /// Sets up a transfer's call. Copies and enciphers, so it runs without the volume's lock.
    pub(super) fn prepare(&mut self, number: usize) {
        let Some(transfer) = self.transfers.get(number) else { return };
        if std::mem::replace(&mut transfer.prepared, true) {
            return;
        }
        let (purpose, op, file, from, to) = (transfer.purpose, transfer.op, transfer.file, transfer.from, transfer.to);
        match purpose {
            Purpose::Read => self.prepare_read(number, op, file, from, to),
            Purpose::Write { keep, .. } => self.prepare_write(number, op, from, to, keep),
            Purpose::FillRead { block } => {
                let bounce = self.buffers.take(BLOCK_BYTES as usize);
                if let Some(transfer) = self.transfers.get(number) {
                    transfer.skip = (from % BLOCK_BYTES) as usize;
                    transfer.offset = block * BLOCK_BYTES;
                    transfer.bounce = Some(bounce);
                    transfer.set(Operation::Read, BLOCK_BYTES as usize);
                }
            }
            _ => self.prepare_internal(number),
        }
    }

    fn prepare_read(&mut self, number: usize, op: usize, file: FileId, from: u64, to: u64) {
        let bounce = self.bounces(op, file, from, to);
        let coarse = self.shared.alignment.offset > SECTOR_BYTES && file == FileId::Data;
        let unit = if coarse { BLOCK_BYTES } else { SECTOR_BYTES };
        let start = from / unit * unit;
        let length = (to.next_multiple_of(unit) - start) as usize;
        let bounce = bounce.then(|| self.buffers.take(length));
        let Some(transfer) = self.transfers.get(number) else { return };
        match bounce {
            Some(bounce) => {
                transfer.bounce = Some(bounce);
                transfer.offset = start;
                transfer.skip = (from - start) as usize;
                transfer.set(Operation::Read, length);
            }
            None => transfer.set_direct(Operation::Read),
        }
    }

    fn prepare_write(&mut self, number: usize, op: usize, from: u64, to: u64, keep: bool) {
        let Some(Kind::Guest(operation)) = self.ops.get(op).map(|op| op.kind) else { return };
        let length = (to - from) as usize;
        let whole = (from | to).is_multiple_of(BLOCK_BYTES);
        let bounce = match operation {
            Operation::Write => keep || self.bounces(op, FileId::Data, from, to),
            _ => !whole,
        };
        let buffer = bounce.then(|| self.buffers.take(length));
        let Some(transfer) = self.transfers.get(number) else { return };
        let Some(mut buffer) = buffer else {
            let operation = if operation == Operation::Discard {
                // Not the hint that a discard is: blocks that become LOCAL must read as zeros.
                Operation::WriteZeroes { may_unmap: true }
            } else {
                operation
            };
            return transfer.set_direct(operation);
        };
        let bytes = buffer.bytes().get_mut(..length).unwrap_or_default();
        if operation == Operation::Write {
            // SAFETY: the submitter keeps its buffers readable until completion (`VolumeQueue::submit`).
            unsafe { gather(&transfer.guest, bytes) };
            if let Some(key) = &self.shared.data_key {
                key.encrypt(bytes, from);
            }
        } else {
            // Zeros read as zeros under any key.
            bytes.fill(0);
        }
        transfer.bounce = Some(buffer);
        transfer.set(Operation::Write, length);
    }

    /// A transfer ended for good.
    pub(super) fn complete(&mut self, number: usize, result: Result<(), i32>) {
        let Some(transfer) = self.transfers.get(number) else { return };
        match transfer.purpose {
            Purpose::Read => self.complete_read(number, result),
            Purpose::Write { active, .. } => {
                let (from, to) = (transfer.from, transfer.to);
                self.with(|core, coord| {
                    let keep = coord.end_active(active);
                    core.stored(number, from, to, keep, result, coord);
                });
            }
            Purpose::FillRead { block } => self.complete_fill_read(number, block, result),
            Purpose::FillWrite { block } => {
                let (from, to) = (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
                self.with(|core, coord| {
                    coord.exclusive.retain(|each| *each != block);
                    core.stored(number, from, to, true, result, coord);
                });
            }
            _ => self.complete_internal(number, result),
        }
    }

    fn complete_read(&mut self, number: usize, result: Result<(), i32>) {
        let Some(transfer) = self.transfers.get(number) else { return };
        if let (Some(buffer), Ok(())) = (&mut transfer.bounce, result) {
            let key = if transfer.file == FileId::Base { &self.shared.base_key } else { &self.shared.data_key };
            let end = transfer.skip + (transfer.to - transfer.from) as usize;
            let end = end.next_multiple_of(SECTOR_BYTES as usize);
            let bytes = buffer.bytes().get_mut(..end).unwrap_or_default();
            if let Some(key) = key {
                key.decrypt(bytes, transfer.offset);
            }
            // SAFETY: the submitter keeps its buffers writable until completion (`VolumeQueue::submit`).
            unsafe { scatter(bytes.get(transfer.skip..).unwrap_or_default(), &transfer.guest) };
        }
        let index = self.end_transfer(number, result);
        let Some(op) = self.ops.get(index) else { return };
        if op.next < op.end {
            self.with(|core, coord| core.resume(index, coord));
        } else {
            self.settle(index);
        }
    }

    /// The old block is there: puts the guest's part into it and stores it.
    fn complete_fill_read(&mut self, number: usize, block: u64, result: Result<(), i32>) {
        if result.is_err() || self.closing {
            self.with(|core, coord| {
                coord.exclusive.retain(|each| *each != block);
                coord.wake_blocked(Some(core.id));
                let index = core.end_transfer(number, result);
                core.resume(index, coord);
            });
            return;
        }
        let Some(transfer) = self.transfers.get(number) else { return };
        let key = if transfer.file == FileId::Base { &self.shared.base_key } else { &self.shared.data_key };
        if let Some(buffer) = &mut transfer.bounce {
            let bytes = buffer.bytes();
            if let Some(key) = key {
                key.decrypt(bytes, transfer.offset);
            }
            let to = transfer.skip + (transfer.to - transfer.from) as usize;
            let part = bytes.get_mut(transfer.skip..to).unwrap_or_default();
            if transfer.guest.is_empty() {
                part.fill(0);
            } else {
                // SAFETY: the submitter keeps its buffers readable until completion (`VolumeQueue::submit`).
                unsafe { gather(&transfer.guest, part) };
            }
            if let Some(key) = &self.shared.data_key {
                key.encrypt(bytes, transfer.offset);
            }
        }
        transfer.purpose = Purpose::FillWrite { block };
        transfer.file = FileId::Data;
        transfer.set(Operation::Write, BLOCK_BYTES as usize);
        self.ready.push_back(number);
    }

    /// Bytes `from..to` were stored, discarded or zeroed, or not: LOCAL comes only now.
    fn stored(&mut self, number: usize, from: u64, to: u64, keep: bool, result: Result<(), i32>, coord: &mut Coord) {
        // A part of a block was only written in place because the block was LOCAL already.
        let blocks = from.div_ceil(BLOCK_BYTES)..to / BLOCK_BYTES;
        if result.is_ok() && !blocks.is_empty() {
            let content = self.transfers.get(number).filter(|_| keep).and_then(|transfer| transfer.bounce.take());
            if let Some(unused) = coord.stored(blocks, content) {
                self.buffers.give(unused);
            }
        } else {
            coord.flush.unsynced = true;
        }
        coord.wake_blocked(Some(self.id));
        let index = self.end_transfer(number, result);
        self.resume(index, coord);
    }

    /// Frees a transfer and books its result with its request, whose number it returns.
    pub(super) fn end_transfer(&mut self, number: usize, result: Result<(), i32>) -> usize {
        let Some(transfer) = self.transfers.get(number) else { return usize::MAX };
        let index = transfer.op;
        if let Some(buffer) = transfer.bounce.take() {
            self.buffers.give(buffer);
        }
        self.transfers.give(number);
        if let Some(op) = self.ops.get(index) {
            op.in_flight = op.in_flight.saturating_sub(1);
            if let Err(errno) = result {
                op.error = op.error.or(Some(errno));
            }
        }
        index
    }

    /// Goes on with a request after one of its transfers, unless it waits for something.
    pub(super) fn resume(&mut self, index: usize, coord: &mut Coord) {
        let Some(op) = self.ops.get(index) else { return };
        if op.waiting && op.error.is_some() {
            // Nothing more is begun; whoever wakes it later finds the slot reborn.
            op.waiting = false;
            if std::mem::take(&mut op.parked) {
                self.parked -= 1;
            }
        }
        if !self.ops.get(index).is_some_and(|op| op.waiting) {
            self.pump(index, coord);
        }
    }
}

impl Transfer {
    /// The call moves the bounce buffer's first `length` bytes.
    pub(super) fn set(&mut self, operation: Operation, length: usize) {
        let Some(buffer) = &mut self.bounce else { return };
        let iovec = [buffer.iovec(0, length)];
        self.start(operation, &iovec);
    }

    /// The call moves the guest's buffers, or zeroes or discards the range.
    fn set_direct(&mut self, operation: Operation) {
        let guest = std::mem::take(&mut self.guest);
        self.start(operation, &guest);
        self.guest = guest;
    }

    pub(super) fn start(&mut self, operation: Operation, buffers: &[libc::iovec]) {
        let length = self.to - self.from;
        let request = Request { operation, offset: self.offset, length, buffers, token: 0 };
        // Bounds were checked when the request was taken.
        let _ = self.task.start(&request, u64::MAX);
    }
}
