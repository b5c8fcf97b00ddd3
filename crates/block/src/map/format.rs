//! Sizes and the encoding of one page. Pure.

/// Unit of LOCAL bits and of everything the engine locks: 4 KiB.
pub const BLOCK_BYTES: u64 = 4096;
/// Unit of bases, snapshots and DIRTY bits: 512 KiB.
pub const CHUNK_BYTES: u64 = 512 << 10;
pub(crate) const BLOCKS_PER_CHUNK: u64 = CHUNK_BYTES / BLOCK_BYTES;
/// LOCAL words (64 blocks each) of one chunk.
pub(crate) const WORDS_PER_CHUNK: usize = 2;

pub(crate) const SECTOR: usize = 512;
pub(crate) const PAGE: usize = 4096;
pub(crate) const SECTORS_PER_PAGE: usize = 8;
pub(crate) const CHUNKS_PER_SECTOR: usize = 31;
pub(crate) const CHUNKS_PER_PAGE: usize = CHUNKS_PER_SECTOR * SECTORS_PER_PAGE;
pub(crate) const WORDS_PER_SECTOR: usize = CHUNKS_PER_SECTOR * WORDS_PER_CHUNK;
pub(crate) const WORDS_PER_PAGE: usize = WORDS_PER_SECTOR * SECTORS_PER_PAGE;
pub(crate) const BLOCKS_PER_PAGE: u64 = CHUNKS_PER_PAGE as u64 * BLOCKS_PER_CHUNK;

/// Where the log begins: after the two copies of the header.
pub(crate) const LOG_OFFSET: u64 = 2 * PAGE as u64;
/// Room for the log.
pub(crate) const LOG_BYTES: u64 = 1 << 20;
/// Where pages begin: after the log.
pub(crate) const PAGES_OFFSET: u64 = LOG_OFFSET + LOG_BYTES;
/// Highest sequence of a sector: a page is written some hundred thousand times in its life, and what counts from higher up would wrap.
pub(crate) const SEQ_MAX: u32 = 1 << 31;
/// Bytes of a sector before its LOCAL words: crc32c, seq, tag, dirty.
const SECTOR_HEADER: usize = 16;

/// Pages a volume of this many bytes needs.
pub(crate) fn pages_for(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES).div_ceil(BLOCKS_PER_PAGE)
}

/// Where a page's slot (0 or 1) begins in the file.
pub(crate) fn slot_offset(page: u64, slot: u8) -> u64 {
    PAGES_OFFSET + (page * 2 + u64::from(slot)) * PAGE as u64
}

/// Binds a sector to its volume and place: crc32c over volume id, page number and sector number.
pub(crate) fn sector_tag(volume_id: &[u8; 32], page: u64, sector: usize) -> u32 {
    let tag = crc32c::crc32c(volume_id);
    let tag = crc32c::crc32c_append(tag, &page.to_le_bytes());
    crc32c::crc32c_append(tag, &(sector as u64).to_le_bytes())
}

/// A sector whose blocks are all LOCAL.
pub(super) fn blank() -> Sector {
    Sector { seq: 0, dirty: 0, local: [u64::MAX; WORDS_PER_SECTOR] }
}

/// One decoded sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sector {
    pub(crate) seq: u32,
    /// One bit per chunk, the lowest for the first; bit 31 is zero.
    pub(crate) dirty: u32,
    pub(crate) local: [u64; WORDS_PER_SECTOR],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

impl Sector {
    pub(crate) fn encode(&self, tag: u32, into: &mut [u8; SECTOR]) {
        let (head, words) = into.split_at_mut(SECTOR_HEADER);
        for (to, word) in words.chunks_exact_mut(8).zip(&self.local) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let fields = [0, self.seq, tag, self.dirty];
        for (to, field) in head.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        let (crc, rest) = into.split_at_mut(4);
        crc.copy_from_slice(&crc32c::crc32c(rest).to_le_bytes());
    }

    /// Checks and decodes; the error says what is wrong.
    pub(crate) fn decode(tag: u32, from: &[u8; SECTOR]) -> Result<Self, &'static str> {
        let (crc, rest) = from.split_at(4);
        if u32_at(crc, 0) != crc32c::crc32c(rest) {
            return Err("its checksum does not match");
        }
        if u32_at(from, 8) != tag {
            return Err("it belongs to another volume or place");
        }
        let seq = u32_at(from, 4);
        if !(1..=SEQ_MAX).contains(&seq) {
            return Err("its sequence is none that was ever written");
        }
        let dirty = u32_at(from, 12);
        if dirty >> CHUNKS_PER_SECTOR != 0 {
            return Err("a reserved bit is set");
        }
        let mut local = [0; WORDS_PER_SECTOR];
        let (_, words) = from.split_at(SECTOR_HEADER);
        for (word, bytes) in local.iter_mut().zip(words.chunks_exact(8)) {
            *word = bytes.try_into().map_or(0, u64::from_le_bytes);
        }
        Ok(Self { seq, dirty, local })
    }
}
