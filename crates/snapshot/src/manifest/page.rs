//! One page: 1,024 entries.
//!
//! | offset | bytes | what (little-endian) |
//! |---|---|---|
//! | 0 | 4 | `HPAG` |
//! | 4 | 4 | version, 1 |
//! | 8 | 4 | how many entries are present |
//! | 12 | 4 | CRC-32C of everything else |
//! | 16 | 1,024 x 40 | entries: hash (32), epoch (4), flags (4; bit 0 = present; an absent entry is all zeros) |

use super::PageRef;
use crate::chunk::{ChunkHash, ChunkRef};
use crate::epoch::Epoch;
use crate::fields::field;
use crate::objects::Damage;

/// Entries of one page.
pub const PAGE_ENTRIES: usize = 1024;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 40;
pub(crate) const MAX_PAGE_BYTES: usize = HEADER_BYTES + PAGE_ENTRIES * ENTRY_BYTES;
const MAGIC: &[u8; 4] = b"HPAG";
const VERSION: u32 = 1;
const PRESENT: u32 = 1;

/// The entries of one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    entries: Vec<Option<ChunkRef>>,
}

impl Default for Page {
    fn default() -> Self {
        Self { entries: vec![None; PAGE_ENTRIES] }
    }
}

fn crc(object: &[u8]) -> u32 {
    let head = crc32c::crc32c(object.get(..12).unwrap_or_default());
    crc32c::crc32c_append(head, object.get(HEADER_BYTES..).unwrap_or_default())
}

impl Page {
    pub fn get(&self, slot: usize) -> Option<ChunkRef> {
        self.entries.get(slot).copied().flatten()
    }

    pub fn set(&mut self, slot: usize, chunk: Option<ChunkRef>) {
        if let Some(entry) = self.entries.get_mut(slot) {
            *entry = chunk;
        }
    }

    /// Forgets the entries from `slot` on.
    pub fn truncate(&mut self, slot: usize) {
        if let Some(rest) = self.entries.get_mut(slot..) {
            rest.fill(None);
        }
    }

    pub fn present(&self) -> usize {
        self.entries.iter().flatten().count()
    }

    /// (slot, chunk) of all present entries.
    pub fn iter(&self) -> impl Iterator<Item = (usize, ChunkRef)> + '_ {
        self.entries.iter().enumerate().filter_map(|(slot, entry)| entry.map(|chunk| (slot, chunk)))
    }

    /// The object and its name.
    pub fn encode(&self) -> (ChunkHash, Vec<u8>) {
        let mut object = Vec::with_capacity(MAX_PAGE_BYTES);
        object.extend_from_slice(MAGIC);
        object.extend_from_slice(&VERSION.to_le_bytes());
        object.extend_from_slice(&(self.present() as u32).to_le_bytes());
        object.extend_from_slice(&[0; 4]);
        for entry in &self.entries {
            match entry {
                Some(chunk) => {
                    object.extend_from_slice(chunk.hash.as_bytes());
                    object.extend_from_slice(&chunk.epoch.0.to_le_bytes());
                    object.extend_from_slice(&PRESENT.to_le_bytes());
                }
                None => object.extend_from_slice(&[0; ENTRY_BYTES]),
            }
        }
        let crc = crc(&object).to_le_bytes();
        if let Some(place) = object.get_mut(12..HEADER_BYTES) {
            place.copy_from_slice(&crc);
        }
        (ChunkHash(*blake3::hash(&object).as_bytes()), object)
    }

    /// The page called `name`.
    pub fn decode(name: &PageRef, object: &[u8]) -> Result<Self, Damage> {
        let page = Self::decode_unnamed(object)?;
        let found = ChunkHash(*blake3::hash(object).as_bytes());
        if found != name.hash {
            return Err(Damage::Content(format!("it is that of {found}")));
        }
        Ok(page)
    }

    fn decode_unnamed(object: &[u8]) -> Result<Self, Damage> {
        if object.len() != MAX_PAGE_BYTES {
            return Err(Damage::Size { expected: MAX_PAGE_BYTES as u64, found: object.len() as u64 });
        }
        if !object.starts_with(MAGIC) {
            return Err(Damage::Signature("a manifest page"));
        }
        let version = u32::from_le_bytes(field(object, 4));
        if version != VERSION {
            return Err(Damage::Version(version));
        }
        let (expected, found) = (u32::from_le_bytes(field(object, 12)), crc(object));
        if expected != found {
            return Err(Damage::Checksum { expected, found });
        }
        let mut entries = Vec::with_capacity(PAGE_ENTRIES);
        let (words, _) = object.get(HEADER_BYTES..).unwrap_or_default().as_chunks::<ENTRY_BYTES>();
        for entry in words {
            let flags = u32::from_le_bytes(field(entry, 36));
            let chunk =
                ChunkRef { hash: ChunkHash(field(entry, 0)), epoch: Epoch(u32::from_le_bytes(field(entry, 32))) };
            match flags {
                PRESENT => entries.push(Some(chunk)),
                0 if entry.iter().all(|byte| *byte == 0) => entries.push(None),
                0 => return Err(Damage::Field("an absent entry is not empty".to_owned())),
                _ => return Err(Damage::Flags(flags)),
            }
        }
        let page = Self { entries };
        let present = u32::from_le_bytes(field(object, 8));
        if page.present() != present as usize {
            return Err(Damage::Field(format!("{} entries are present, {present} are said to be", page.present())));
        }
        Ok(page)
    }
}

#[cfg(test)]
#[path = "page_test.rs"]
mod tests;
