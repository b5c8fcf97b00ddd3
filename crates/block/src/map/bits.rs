//! LOCAL and DIRTY bits in memory. Pure.

use std::fmt;
use std::ops::Range;

use super::create::blank;
use super::format::{
    BLOCK_BYTES, BLOCKS_PER_CHUNK, BLOCKS_PER_PAGE, CHUNK_BYTES, CHUNKS_PER_PAGE, CHUNKS_PER_SECTOR, PAGE, SECTOR,
    SECTORS_PER_PAGE, Sector, WORDS_PER_PAGE, WORDS_PER_SECTOR, pages_for, sector_tag,
};

/// A stretch of blocks that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) local: bool,
    /// First block after it.
    pub(crate) end: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Page {
    /// `None` = every block LOCAL, which is all of a blank volume.
    local: Option<Box<[u64; WORDS_PER_PAGE]>>,
    dirty: [u32; SECTORS_PER_PAGE],
    seq: u32,
    /// Slot that holds what is durable; the next write goes to the other.
    slot: u8,
    /// LOCAL bits differ from what was last written.
    changed: bool,
    /// DIRTY bits differ from what was last written.
    dirty_changed: bool,
}

impl Page {
    fn blank() -> Self {
        Self { local: None, dirty: [0; SECTORS_PER_PAGE], seq: 1, slot: 0, changed: false, dirty_changed: false }
    }

    pub(super) fn from_sectors(sectors: &[Sector; SECTORS_PER_PAGE], slot: u8) -> Self {
        let mut page = Self::blank();
        page.slot = slot;
        page.seq = sectors.iter().map(|sector| sector.seq).max().unwrap_or(0);
        for (dirty, sector) in page.dirty.iter_mut().zip(sectors) {
            *dirty = sector.dirty;
        }
        if sectors.iter().any(|sector| sector.local != blank().local) {
            let mut words = Box::new([0; WORDS_PER_PAGE]);
            for (words, sector) in words.chunks_exact_mut(WORDS_PER_SECTOR).zip(sectors) {
                words.copy_from_slice(&sector.local);
            }
            page.local = Some(words);
        }
        page
    }

    fn sectors(&self) -> [Sector; SECTORS_PER_PAGE] {
        let mut sectors = [blank(); SECTORS_PER_PAGE];
        for (sector, dirty) in sectors.iter_mut().zip(self.dirty) {
            sector.dirty = dirty;
        }
        if let Some(words) = &self.local {
            for (sector, words) in sectors.iter_mut().zip(words.chunks_exact(WORDS_PER_SECTOR)) {
                sector.local.copy_from_slice(words);
            }
        }
        sectors
    }
}

/// A page on its way to disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageWrite {
    pub(crate) page: u64,
    pub(crate) slot: u8,
    pub(crate) seq: u32,
}

/// All pages of a map.
pub(crate) struct Bits {
    volume_id: [u8; 32],
    size_bytes: u64,
    pages: Vec<Page>,
    /// Pages with `changed` set.
    changed: Vec<u64>,
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bits")
            .field("size_bytes", &self.size_bytes)
            .field("changed", &self.changed)
            .finish_non_exhaustive()
    }
}

impl Bits {
    pub(super) fn new(volume_id: [u8; 32], size_bytes: u64) -> Self {
        Self { volume_id, size_bytes, pages: Vec::new(), changed: Vec::new() }
    }

    pub(super) fn push(&mut self, page: Page) {
        self.pages.push(page);
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.size_bytes.div_ceil(CHUNK_BYTES)
    }

    /// New pages are blank, and so is the tail of what was the last one.
    pub(crate) fn grow(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
        self.pages.resize(pages_for(size_bytes) as usize, Page::blank());
    }

    fn page(&self, block: u64) -> Option<&Page> {
        self.pages.get((block / BLOCKS_PER_PAGE) as usize)
    }

    /// Whether `block` is LOCAL, and how far blocks are like it, up to `limit`.
    pub(crate) fn run(&self, block: u64, limit: u64) -> Run {
        let local = self.is_local(block);
        let mut end = block;
        while end < limit {
            let page_end = (end / BLOCKS_PER_PAGE + 1) * BLOCKS_PER_PAGE;
            let Some(words) = self.page(end).and_then(|page| page.local.as_deref()) else {
                if !local {
                    break;
                }
                end = page_end;
                continue;
            };
            let inside = end % BLOCKS_PER_PAGE;
            let word = words.get((inside / 64) as usize).copied().unwrap_or(u64::MAX) >> (inside % 64);
            let alike = if local { word.trailing_ones() } else { word.trailing_zeros() };
            let left = 64 - inside % 64;
            end += u64::from(alike).min(left);
            if u64::from(alike) < left {
                break;
            }
        }
        Run { local, end: end.min(limit) }
    }

    pub(crate) fn is_local(&self, block: u64) -> bool {
        let inside = block % BLOCKS_PER_PAGE;
        let words = self.page(block).and_then(|page| page.local.as_deref());
        words.and_then(|words| words.get((inside / 64) as usize)).is_none_or(|word| word >> (inside % 64) & 1 == 1)
    }

    /// Sets LOCAL for the blocks of `range`.
    pub(crate) fn set_local(&mut self, range: Range<u64>) {
        let mut block = range.start;
        while block < range.end {
            let number = block / BLOCKS_PER_PAGE;
            let stop = range.end.min((number + 1) * BLOCKS_PER_PAGE);
            let Some(page) = self.pages.get_mut(number as usize) else { return };
            let mut new = false;
            if let Some(words) = &mut page.local {
                while block < stop {
                    let inside = block % BLOCKS_PER_PAGE;
                    let count = (64 - inside % 64).min(stop - block);
                    let mask = (u64::MAX >> (64 - count)) << (inside % 64);
                    if let Some(word) = words.get_mut((inside / 64) as usize) {
                        new |= *word & mask != mask;
                        *word |= mask;
                    }
                    block += count;
                }
            }
            block = stop;
            if new && !page.changed {
                page.changed = true;
                self.changed.push(number);
            }
        }
    }

    pub(crate) fn is_dirty(&self, chunk: u64) -> bool {
        let inside = chunk as usize % CHUNKS_PER_PAGE;
        let dirty =
            self.pages.get(chunk as usize / CHUNKS_PER_PAGE).and_then(|p| p.dirty.get(inside / CHUNKS_PER_SECTOR));
        dirty.is_some_and(|dirty| dirty >> (inside % CHUNKS_PER_SECTOR) & 1 == 1)
    }

    pub(crate) fn set_dirty(&mut self, chunk: u64) {
        let inside = chunk as usize % CHUNKS_PER_PAGE;
        let Some(page) = self.pages.get_mut(chunk as usize / CHUNKS_PER_PAGE) else { return };
        if let Some(dirty) = page.dirty.get_mut(inside / CHUNKS_PER_SECTOR) {
            let bit = 1 << (inside % CHUNKS_PER_SECTOR);
            page.dirty_changed |= *dirty & bit == 0;
            *dirty |= bit;
        }
    }

    pub(crate) fn clear_dirty(&mut self, chunk: u64) {
        let inside = chunk as usize % CHUNKS_PER_PAGE;
        let Some(page) = self.pages.get_mut(chunk as usize / CHUNKS_PER_PAGE) else { return };
        if let Some(dirty) = page.dirty.get_mut(inside / CHUNKS_PER_SECTOR) {
            let bit = 1 << (inside % CHUNKS_PER_SECTOR);
            page.dirty_changed |= *dirty & bit != 0;
            *dirty &= !bit;
        }
    }

    /// Chunks with DIRTY set, ascending.
    pub(crate) fn dirty_chunks(&self) -> Vec<u64> {
        let mut chunks = Vec::new();
        for (number, page) in self.pages.iter().enumerate() {
            if page.dirty == [0; SECTORS_PER_PAGE] {
                continue;
            }
            let first = (number * CHUNKS_PER_PAGE) as u64;
            let inside = first..first + CHUNKS_PER_PAGE as u64;
            chunks.extend(inside.filter(|chunk| *chunk < self.chunks() && self.is_dirty(*chunk)));
        }
        chunks
    }

    /// After a crash nobody knows which chunks were written: every chunk that could have been counts as DIRTY.
    pub(crate) fn distrust_dirty(&mut self) {
        for chunk in 0..self.chunks() {
            let blocks = chunk * BLOCKS_PER_CHUNK..((chunk + 1) * BLOCKS_PER_CHUNK).min(self.size_bytes / BLOCK_BYTES);
            let run = self.run(blocks.start, blocks.end);
            if run.local || run.end < blocks.end {
                self.set_dirty(chunk);
            }
        }
    }

    /// LOCAL bits were set since the last [`take_changed`](Self::take_changed).
    pub(crate) fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Takes one page whose LOCAL bits changed and encodes it for its non-current slot.
    pub(crate) fn take_changed(&mut self, to: &mut [u8; PAGE]) -> Option<PageWrite> {
        let number = self.changed.pop()?;
        Some(self.encode(number, to))
    }

    /// Marks pages whose DIRTY bits changed for writing too.
    pub(crate) fn include_dirty(&mut self) {
        for (number, page) in self.pages.iter_mut().enumerate() {
            if page.dirty_changed && !page.changed {
                page.changed = true;
                self.changed.push(number as u64);
            }
        }
    }

    fn encode(&mut self, number: u64, to: &mut [u8; PAGE]) -> PageWrite {
        let Some(page) = self.pages.get_mut(number as usize) else {
            return PageWrite { page: number, slot: 0, seq: 0 };
        };
        page.changed = false;
        page.dirty_changed = false;
        let write = PageWrite { page: number, slot: 1 - page.slot, seq: page.seq.wrapping_add(1) };
        for (index, (sector, to)) in page.sectors().iter().zip(to.chunks_exact_mut(SECTOR)).enumerate() {
            if let Some(to) = to.first_chunk_mut::<SECTOR>() {
                Sector { seq: write.seq, ..*sector }.encode(sector_tag(&self.volume_id, number, index), to);
            }
        }
        write
    }

    /// A page that was taken was not written after all.
    pub(crate) fn not_written(&mut self, write: PageWrite) {
        if let Some(page) = self.pages.get_mut(write.page as usize)
            && !page.changed
        {
            page.changed = true;
            self.changed.push(write.page);
        }
    }

    /// The page is durable where `write` says.
    pub(crate) fn written(&mut self, write: PageWrite) {
        if let Some(page) = self.pages.get_mut(write.page as usize) {
            page.slot = write.slot;
            page.seq = write.seq;
        }
    }
}
