//! Creation of map files.

use super::format::{
    BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNKS_PER_PAGE, CHUNKS_PER_SECTOR, PAGE, SECTOR, SECTORS_PER_PAGE, Sector,
    WORDS_PER_CHUNK, WORDS_PER_SECTOR, pages_for, sector_tag, slot_offset,
};
use super::header::check_size;
use super::{Header, MapError, Storage, write_header};

/// Pages encoded before they are written with one call.
const BATCH_PAGES: u64 = 64;

/// What a new volume is to be.
#[derive(Debug)]
pub struct MapSpec<I> {
    /// Id of the volume, at most 32 bytes.
    pub volume_id: String,
    /// Size, a multiple of 4096.
    pub size_bytes: u64,
    /// Root hash of the snapshot it is made from, if any.
    pub base_root: Option<[u8; 32]>,
    /// First attachment generation that may open it.
    pub generation: u64,
    /// Chunks present in the base's manifest, in ascending order. Every other range is LOCAL from the start, so it reads
    /// as zeros and never touches the map again.
    pub base_chunks: I,
    /// `data` has its content already, and all of it counts as DIRTY. Otherwise it must be a hole.
    pub filled: bool,
}

/// Creates the map of a new volume in an empty file and makes it durable. Its `data` file must be `size_bytes` long. The header comes last: a map whose creation was cut off is refused.
pub fn create<I: IntoIterator<Item = u64>>(file: &dyn Storage, spec: MapSpec<I>) -> Result<(), MapError> {
    check_size(spec.size_bytes)?;
    let mut volume_id = [0u8; 32];
    match volume_id.get_mut(..spec.volume_id.len()) {
        Some(to) if !to.is_empty() => to.copy_from_slice(spec.volume_id.as_bytes()),
        _ => return Err(MapError::VolumeId(spec.volume_id)),
    }
    let chunks = spec.size_bytes.div_ceil(BLOCK_BYTES * BLOCKS_PER_CHUNK);
    let mut base = spec.base_chunks.into_iter().peekable();
    let mut previous = None;
    let mut next_in = |end: u64| -> Result<Option<u64>, MapError> {
        let Some(chunk) = base.next_if(|chunk| *chunk < end) else {
            return Ok(None);
        };
        let ascending = previous.replace(chunk).is_none_or(|before| before < chunk);
        if !ascending || chunk >= chunks || spec.base_root.is_none() {
            return Err(MapError::BaseChunk(chunk));
        }
        Ok(Some(chunk))
    };
    let pages = pages_for(spec.size_bytes);
    let mut page = 0;
    while page < pages {
        let count = BATCH_PAGES.min(pages - page);
        let mut bytes = Vec::with_capacity(count as usize * 2 * PAGE);
        for number in page..page + count {
            let first = number * CHUNKS_PER_PAGE as u64;
            let mut sectors = [blank(); SECTORS_PER_PAGE];
            while let Some(chunk) = next_in(first + CHUNKS_PER_PAGE as u64)? {
                let inside = (chunk - first) as usize;
                let at = inside % CHUNKS_PER_SECTOR * WORDS_PER_CHUNK;
                let words = sectors.get_mut(inside / CHUNKS_PER_SECTOR).and_then(|s| s.local.get_mut(at..at + 2));
                words.unwrap_or_default().fill(0);
            }
            for seq in [1, 0] {
                encode_page(&volume_id, number, seq, &sectors, &mut bytes);
            }
        }
        file.write_at(&bytes, slot_offset(page, 0)).map_err(MapError::io("write"))?;
        page += count;
    }
    if let Some(chunk) = next_in(u64::MAX)? {
        return Err(MapError::BaseChunk(chunk));
    }
    file.sync().map_err(MapError::io("make durable"))?;
    let mut header = Header {
        sequence: 0,
        // As after a crash: every chunk that the volume itself holds counts as DIRTY.
        clean: !spec.filled,
        volume_id,
        size_bytes: spec.size_bytes,
        generation: spec.generation,
        base_root: spec.base_root,
    };
    write_header(file, &mut header)
}

/// A sector whose blocks are all LOCAL.
pub(super) fn blank() -> Sector {
    Sector { seq: 0, dirty: 0, local: [u64::MAX; WORDS_PER_SECTOR] }
}

pub(super) fn encode_page(
    volume_id: &[u8; 32],
    page: u64,
    seq: u32,
    sectors: &[Sector; SECTORS_PER_PAGE],
    to: &mut Vec<u8>,
) {
    for (index, sector) in sectors.iter().enumerate() {
        let mut bytes = [0u8; SECTOR];
        Sector { seq, ..*sector }.encode(sector_tag(volume_id, page, index), &mut bytes);
        to.extend_from_slice(&bytes);
    }
}
