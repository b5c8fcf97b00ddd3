//! Reading a map back, after a clean close or a crash, and adding pages to it.

use super::bits::{Bits, Page};
use super::create::{blank, encode_page};
use super::format::{PAGE, SECTOR, SECTORS_PER_PAGE, Sector, pages_for, sector_tag, slot_offset};
use super::{Header, MapError, Storage};

/// Pages read with one call.
const BATCH_PAGES: u64 = 128;

/// Reads all pages. Of each sector the newer of the two slots counts: sectors are written whole or not at all, and LOCAL
/// bits only ever get set, so a page of mixed sectors after a crash is right. A sector that fails its checksum is never
/// explained by a crash and is refused.
pub(crate) fn load(file: &dyn Storage, header: &Header) -> Result<Bits, MapError> {
    let pages = pages_for(header.size_bytes);
    let length = file.length().map_err(MapError::io("learn the length of"))?;
    if length < slot_offset(pages, 0) {
        return Err(MapError::Header("the file ends before its last page"));
    }
    let mut bits = Bits::new(header.volume_id, header.size_bytes);
    let mut buffer = vec![0u8; BATCH_PAGES as usize * 2 * PAGE];
    let mut page = 0;
    while page < pages {
        let count = BATCH_PAGES.min(pages - page);
        let batch = buffer.get_mut(..count as usize * 2 * PAGE).unwrap_or_default();
        file.read_at(batch, slot_offset(page, 0)).map_err(MapError::io("read"))?;
        for (number, slots) in (page..).zip(batch.chunks_exact(2 * PAGE)) {
            bits.push(decode_page(&header.volume_id, number, slots)?);
        }
        page += count;
    }
    Ok(bits)
}

/// `slots` are both slots of one page.
fn decode_page(volume_id: &[u8; 32], page: u64, slots: &[u8]) -> Result<Page, MapError> {
    let mut sectors = [blank(); SECTORS_PER_PAGE];
    let mut oldest = [u32::MAX; 2];
    for (slot, bytes) in [0u8, 1].into_iter().zip(slots.chunks_exact(PAGE)) {
        for (sector, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
            let damaged = |problem| MapError::Page { page, slot, sector, problem };
            let bytes = bytes.first_chunk::<SECTOR>().ok_or_else(|| damaged("it is cut off"))?;
            let found = Sector::decode(sector_tag(volume_id, page, sector), bytes).map_err(damaged)?;
            if let Some(oldest) = oldest.get_mut(usize::from(slot)) {
                *oldest = found.seq.min(*oldest);
            }
            match sectors.get_mut(sector) {
                Some(best) if slot == 0 || found.seq > best.seq => *best = found,
                _ => {}
            }
        }
    }
    // The next write goes to the slot with the oldest sector: everything in it is in the other one too, or newer.
    let [a, b] = oldest;
    Ok(Page::from_sectors(&sectors, u8::from(b > a)))
}

/// Appends pages (all LOCAL) up to what a volume of `size_bytes` needs, and makes them durable. Nothing refers to them
/// until the header does.
pub(crate) fn append_pages(file: &dyn Storage, header: &Header, size_bytes: u64) -> Result<(), MapError> {
    let sectors = [blank(); SECTORS_PER_PAGE];
    let mut bytes = Vec::new();
    for page in pages_for(header.size_bytes)..pages_for(size_bytes) {
        bytes.clear();
        for seq in [1, 0] {
            encode_page(&header.volume_id, page, seq, &sectors, &mut bytes);
        }
        file.write_at(&bytes, slot_offset(page, 0)).map_err(MapError::io("extend"))?;
    }
    file.sync().map_err(MapError::io("make durable"))
}
