//! LOCAL and DIRTY bits in memory. Pure.

use std::fmt;
use std::ops::Range;

use super::Extent;
use super::format::{
    BLOCK_BYTES, BLOCKS_PER_CHUNK, BLOCKS_PER_PAGE, CHUNK_BYTES, CHUNKS_PER_PAGE, CHUNKS_PER_SECTOR, PAGE, SECTOR,
    SECTORS_PER_PAGE, Sector, WORDS_PER_CHUNK, WORDS_PER_PAGE, WORDS_PER_SECTOR, blank, pages_for, sector_tag,
};

/// A stretch of blocks that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) local: bool,
    /// First block after it.
    pub(crate) end: u64,
}

type Words = [u64; WORDS_PER_PAGE];

/// LOCAL bits of a page.
#[derive(Clone, Debug)]
enum Local {
    /// Every block, which is all of a blank volume.
    All,
    /// What the volume began with: every block of chunks that the base does not have.
    AsMade,
    Words(Box<Words>),
}

#[derive(Clone, Debug)]
pub(crate) struct Page {
    local: Local,
    dirty: [u32; SECTORS_PER_PAGE],
    /// Sequence of each sector, as far as it is durable: after a crash they may differ.
    seqs: [u32; SECTORS_PER_PAGE],
    /// Slot that holds what is durable; the next write goes to the other.
    slot: u8,
    /// LOCAL bits differ from what was last written.
    changed: bool,
    /// DIRTY bits differ from what was last written.
    dirty_changed: bool,
}

impl Page {
    /// One that was never written: its first write goes to slot A.
    fn new(local: Local) -> Self {
        let (dirty, seqs) = ([0; SECTORS_PER_PAGE], [0; SECTORS_PER_PAGE]);
        Self { local, dirty, seqs, slot: 1, changed: false, dirty_changed: false }
    }

    pub(super) fn from_sectors(sectors: &[Sector; SECTORS_PER_PAGE], slot: u8) -> Self {
        let mut page = Self::new(Local::All);
        page.slot = slot;
        page.seqs = sectors.map(|sector| sector.seq);
        page.dirty = sectors.map(|sector| sector.dirty);
        if sectors.iter().any(|sector| sector.local != blank().local) {
            let mut words = Box::new([0; WORDS_PER_PAGE]);
            for (words, sector) in words.chunks_exact_mut(WORDS_PER_SECTOR).zip(sectors) {
                words.copy_from_slice(&sector.local);
            }
            page.local = Local::Words(words);
        }
        page
    }

    fn seq(&self) -> u32 {
        self.seqs.iter().copied().max().unwrap_or(0)
    }
}

/// LOCAL bits that page `number` began with.
fn as_made(extent: &Extent, number: u64) -> Box<Words> {
    let mut words = Box::new([u64::MAX; WORDS_PER_PAGE]);
    for (chunk, words) in (number * CHUNKS_PER_PAGE as u64..).zip(words.chunks_exact_mut(WORDS_PER_CHUNK)) {
        if extent.has(chunk) {
            words.fill(0);
        }
    }
    words
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
    extent: Extent,
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
    /// Bits of a volume whose map was never written.
    pub(super) fn new(volume_id: [u8; 32], size_bytes: u64, extent: Extent) -> Self {
        let chunks = |number: u64| number * CHUNKS_PER_PAGE as u64..(number + 1) * CHUNKS_PER_PAGE as u64;
        let local = |number| if extent.has_any(chunks(number)) { Local::AsMade } else { Local::All };
        let pages = (0..pages_for(size_bytes)).map(|number| Page::new(local(number))).collect();
        Self { volume_id, size_bytes, extent, pages, changed: Vec::new() }
    }

    /// Sectors of a page as the volume began.
    pub(super) fn never_written(&self, number: u64) -> [Sector; SECTORS_PER_PAGE] {
        let mut sectors = [blank(); SECTORS_PER_PAGE];
        let words = as_made(&self.extent, number);
        for (sector, words) in sectors.iter_mut().zip(words.chunks_exact(WORDS_PER_SECTOR)) {
            sector.local.copy_from_slice(words);
        }
        sectors
    }

    pub(super) fn put(&mut self, number: u64, page: Page) {
        if let Some(slot) = self.pages.get_mut(number as usize) {
            *slot = page;
        }
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
        self.pages.resize(pages_for(size_bytes) as usize, Page::new(Local::All));
    }

    fn page(&self, block: u64) -> Option<&Page> {
        self.pages.get((block / BLOCKS_PER_PAGE) as usize)
    }

    /// Whether `block` is LOCAL, and how far blocks are like it, up to `limit`.
    pub(crate) fn run(&self, block: u64, limit: u64) -> Run {
        let local = self.is_local(block);
        let mut end = block;
        while end < limit {
            let stop = match self.page(end).map_or(&Local::All, |page| &page.local) {
                Local::All if local => (end / BLOCKS_PER_PAGE + 1) * BLOCKS_PER_PAGE,
                Local::AsMade if local != self.extent.has(end / BLOCKS_PER_CHUNK) => {
                    (end / BLOCKS_PER_CHUNK + 1) * BLOCKS_PER_CHUNK
                }
                Local::All | Local::AsMade => break,
                Local::Words(words) => {
                    let inside = end % BLOCKS_PER_PAGE;
                    let word = words.get((inside / 64) as usize).copied().unwrap_or(u64::MAX) >> (inside % 64);
                    let alike = u64::from(if local { word.trailing_ones() } else { word.trailing_zeros() });
                    let left = 64 - inside % 64;
                    if alike < left {
                        end += alike;
                        break;
                    }
                    end + left
                }
            };
            end = stop;
        }
        Run { local, end: end.min(limit) }
    }

    pub(crate) fn is_local(&self, block: u64) -> bool {
        match self.page(block).map_or(&Local::All, |page| &page.local) {
            Local::All => true,
            Local::AsMade => !self.extent.has(block / BLOCKS_PER_CHUNK),
            Local::Words(words) => {
                let inside = block % BLOCKS_PER_PAGE;
                words.get((inside / 64) as usize).is_none_or(|word| word >> (inside % 64) & 1 == 1)
            }
        }
    }

    /// Sequence of the page with this block, as it was last durable.
    pub(crate) fn page_seq(&self, block: u64) -> u32 {
        self.page(block).map_or(0, Page::seq)
    }

    /// Sequence of the sector with this block's bit, as it was last durable.
    pub(crate) fn sector_seq(&self, block: u64) -> u32 {
        let sector = block / BLOCKS_PER_CHUNK % CHUNKS_PER_PAGE as u64 / CHUNKS_PER_SECTOR as u64;
        self.page(block).and_then(|page| page.seqs.get(sector as usize)).copied().unwrap_or(0)
    }

    /// Has the block's page written by the next run that writes pages, even if its bit is set already.
    pub(crate) fn touch(&mut self, block: u64) {
        let number = block / BLOCKS_PER_PAGE;
        if let Some(page) = self.pages.get_mut(number as usize)
            && !page.changed
        {
            page.changed = true;
            self.changed.push(number);
        }
    }

    /// Sets LOCAL for the blocks of `range`.
    pub(crate) fn set_local(&mut self, range: Range<u64>) {
        let mut block = range.start;
        while block < range.end {
            let number = block / BLOCKS_PER_PAGE;
            let stop = range.end.min((number + 1) * BLOCKS_PER_PAGE);
            let left = Run { local: true, end: stop } != self.run(block, stop);
            let Some(page) = self.pages.get_mut(number as usize) else { return };
            if left && matches!(page.local, Local::AsMade) {
                page.local = Local::Words(as_made(&self.extent, number));
            }
            let mut new = false;
            if let Local::Words(words) = &mut page.local {
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
        let made = matches!(page.local, Local::AsMade).then(|| as_made(&self.extent, number));
        let words = match &page.local {
            Local::Words(words) => Some(words),
            _ => made.as_ref(),
        };
        let write = PageWrite { page: number, slot: 1 - page.slot, seq: page.seq().wrapping_add(1) };
        for (index, to) in to.chunks_exact_mut(SECTOR).enumerate() {
            let mut local = blank().local;
            if let Some(words) = words.and_then(|words| words.chunks_exact(WORDS_PER_SECTOR).nth(index)) {
                local.copy_from_slice(words);
            }
            let dirty = page.dirty.get(index).copied().unwrap_or(0);
            if let Some(to) = to.first_chunk_mut::<SECTOR>() {
                Sector { seq: write.seq, dirty, local }.encode(sector_tag(&self.volume_id, number, index), to);
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
            page.seqs = [write.seq; SECTORS_PER_PAGE];
        }
    }
}
