//! Acknowledged writes that the server may still lose, kept to be repeated on the next connection.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// What an entry costs beside its data.
const ENTRY_BYTES: usize = 96;
/// Most entries, so that tiny writes cannot make the log slow.
const MAX_ENTRIES: usize = 64 * 1024;

/// What a range of the volume was told to hold.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// These bytes.
    Data(Arc<[u8]>),
    /// Zeros.
    Zeros { no_hole: bool },
    /// Something that is durable already: older entries do not count there.
    Durable,
}

#[derive(Debug)]
struct Entry {
    sequence: u64,
    offset: u64,
    length: u64,
    content: Content,
}

/// One write to be repeated. Repeats of one log do not overlap, so their order does not matter.
#[derive(Clone, Debug)]
pub(super) struct Repeat {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) content: Content,
    /// Where in `Content::Data` the range begins.
    pub(super) start: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Log {
    entries: VecDeque<Entry>,
    sequence: u64,
    bytes: usize,
    reserved_entries: usize,
    limit: usize,
}

impl Log {
    /// Holds about `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: VecDeque::new(), sequence: 0, bytes: 0, reserved_entries: 0, limit }
    }

    /// Nothing would be lost with the server.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Room for one more entry of whatever kind.
    pub(super) fn has_entry(&self) -> bool {
        self.entries.len() + self.reserved_entries < MAX_ENTRIES
    }

    /// Sets room aside for `data` bytes; `false` when there is not enough.
    pub(super) fn reserve(&mut self, data: usize) -> bool {
        let total = self.bytes.saturating_add(data).saturating_add(ENTRY_BYTES);
        if !self.has_entry() || total > self.limit {
            return false;
        }
        self.bytes = total;
        self.reserved_entries += 1;
        true
    }

    /// Gives back what `reserve` set aside.
    pub(super) fn release(&mut self, data: usize) {
        self.bytes = self.bytes.saturating_sub(data.saturating_add(ENTRY_BYTES));
        self.reserved_entries = self.reserved_entries.saturating_sub(1);
    }

    /// Takes an entry for which `data` bytes were reserved (none for [`Content::Durable`]).
    pub(super) fn push(&mut self, offset: u64, length: u64, content: Content) {
        match content {
            Content::Durable if self.entries.is_empty() => return,
            Content::Durable => self.bytes = self.bytes.saturating_add(ENTRY_BYTES),
            _ => self.reserved_entries = self.reserved_entries.saturating_sub(1),
        }
        self.sequence += 1;
        self.entries.push_back(Entry { sequence: self.sequence, offset, length, content });
    }

    /// A flush sent now makes entries up to this mark durable.
    pub(super) fn mark(&self) -> u64 {
        self.sequence
    }

    /// A flush succeeded.
    pub(super) fn retire(&mut self, mark: u64) {
        while let Some(entry) = self.entries.front() {
            if entry.sequence > mark {
                break;
            }
            let data = if let Content::Data(data) = &entry.content { data.len() } else { 0 };
            self.bytes = self.bytes.saturating_sub(data.saturating_add(ENTRY_BYTES));
            self.entries.pop_front();
        }
    }

    /// Full enough that a flush should make room.
    pub(super) fn pressing(&self) -> bool {
        !self.entries.is_empty() && (self.bytes > self.limit / 2 || self.entries.len() > MAX_ENTRIES / 2)
    }

    /// The newest content of every range, without overlaps.
    pub(super) fn repeats(&self) -> Vec<Repeat> {
        // Ranges that newer entries took, start to end.
        let mut taken: BTreeMap<u64, u64> = BTreeMap::new();
        let mut repeats = Vec::new();
        for entry in self.entries.iter().rev() {
            let end = entry.offset.saturating_add(entry.length);
            let mut position = entry.offset;
            let mut joined = (entry.offset, end);
            // What overlaps the range, in order: perhaps one that begins before it, then those that begin inside.
            let before = taken.range(..entry.offset).next_back().filter(|(_, to)| **to > entry.offset);
            let mut covered: Vec<(u64, u64)> = before.map(|(from, to)| (*from, *to)).into_iter().collect();
            covered.extend(taken.range(entry.offset..end).map(|(from, to)| (*from, *to)));
            for (from, to) in &covered {
                if *from > position {
                    repeats.push(entry.part(position, *from));
                }
                position = position.max(*to);
                joined = (joined.0.min(*from), joined.1.max(*to));
                taken.remove(from);
            }
            if position < end {
                repeats.push(entry.part(position, end));
            }
            taken.insert(joined.0, joined.1);
        }
        repeats.retain(|repeat| !matches!(repeat.content, Content::Durable));
        repeats
    }
}

impl Entry {
    fn part(&self, from: u64, to: u64) -> Repeat {
        let start = (from - self.offset) as usize;
        Repeat { offset: from, length: to - from, content: self.content.clone(), start }
    }
}
