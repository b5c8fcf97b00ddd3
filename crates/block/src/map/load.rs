//! Reading a map back, after a clean close or a crash.

use super::bits::{Bits, Page};
use super::format::{
    BLOCKS_PER_PAGE, PAGE, PAGES_OFFSET, SECTOR, SECTORS_PER_PAGE, Sector, pages_for, sector_tag, slot_offset,
};
use super::{Extent, Header, MapError, Storage};

/// Pages read with one call.
const BATCH_PAGES: u64 = 128;

/// Reads all pages that were ever written. Of each sector the newer of the two slots counts: sectors are written whole or not
/// at all, and LOCAL bits only ever get set, so a page of mixed sectors after a crash is right. A sector of zeros was never
/// written: in its place stands what the volume began with, by the base's `extent`. A sector that fails its checksum is
/// never explained by a crash and is refused.
pub(crate) fn load(file: &dyn Storage, header: &Header, extent: Extent) -> Result<Bits, MapError> {
    let pages = pages_for(header.size_bytes);
    let length = file.length().map_err(MapError::io("learn the length of"))?;
    if length < slot_offset(pages, 0) {
        return Err(MapError::Header("the file ends before its last page"));
    }
    let extent = extent.cut(header.extent_chunks);
    if header.extent_checksum != extent.checksum() {
        return Err(MapError::Extent);
    }
    let mut bits = Bits::new(header.volume_id, header.size_bytes, extent);
    let mut buffer = vec![0u8; BATCH_PAGES as usize * 2 * PAGE];
    let mut page = 0;
    while page < pages {
        let written = file.next_data(slot_offset(page, 0)).map_err(MapError::io("look for pages of"))?;
        let Some(written) = written else { break };
        page = page.max(written.saturating_sub(PAGES_OFFSET) / (2 * PAGE as u64));
        let count = BATCH_PAGES.min(pages.saturating_sub(page));
        let batch = buffer.get_mut(..count as usize * 2 * PAGE).unwrap_or_default();
        file.read_at(batch, slot_offset(page, 0)).map_err(MapError::io("read"))?;
        for (number, slots) in (page..).zip(batch.chunks_exact(2 * PAGE)) {
            if slots.iter().any(|byte| *byte != 0) {
                let started = bits.never_written(number);
                let (page, torn) = decode_page(header, number, slots, started)?;
                bits.put(number, page);
                if torn {
                    bits.touch(number * BLOCKS_PER_PAGE);
                }
            }
        }
        page += count.max(1);
    }
    Ok(bits)
}

/// `slots` are both slots of one page, and `started` is the page before it was ever written. Also tells whether a write of it
/// was cut off.
fn decode_page(
    header: &Header,
    page: u64,
    slots: &[u8],
    started: [Sector; SECTORS_PER_PAGE],
) -> Result<(Page, bool), MapError> {
    let mut sectors = started;
    let mut oldest = [u32::MAX; 2];
    let mut never = [0; 2];
    for (slot, bytes) in [0u8, 1].into_iter().zip(slots.chunks_exact(PAGE)) {
        for (sector, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
            let damaged = |problem| MapError::Page { page, slot, sector, problem };
            let bytes = bytes.first_chunk::<SECTOR>().ok_or_else(|| damaged("it is cut off"))?;
            let found = if bytes.iter().all(|byte| *byte == 0) {
                if let Some(never) = never.get_mut(usize::from(slot)) {
                    *never += 1;
                }
                None
            } else {
                Some(Sector::decode(sector_tag(&header.volume_id, page, sector), bytes).map_err(damaged)?)
            };
            let seq = found.map_or(0, |found| found.seq);
            if let Some(oldest) = oldest.get_mut(usize::from(slot)) {
                *oldest = seq.min(*oldest);
            }
            if let (Some(best), Some(found)) = (sectors.get_mut(sector), found)
                && found.seq > best.seq
            {
                *best = found;
            }
        }
    }
    // Slot A is always the first to be written. A crash may cut a write off, but before the map is clean again the page was
    // written whole.
    let newest = sectors.iter().map(|sector| sector.seq).max().unwrap_or(0);
    let behind = sectors.iter().position(|sector| sector.seq != newest);
    if never[0] == SECTORS_PER_PAGE || behind.is_some() && header.clean {
        let sector = behind.unwrap_or(0);
        return Err(MapError::Page { page, slot: 0, sector, problem: "its newest content is gone" });
    }
    // The next write goes to the slot with the oldest sector: everything in it is in the other one too, or newer.
    let [a, b] = oldest;
    Ok((Page::from_sectors(&sectors, u8::from(b > a)), behind.is_some()))
}
