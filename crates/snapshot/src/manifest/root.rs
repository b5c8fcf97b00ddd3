//! The root of a manifest.
//!
//! | offset | bytes | what (little-endian) |
//! |---|---|---|
//! | 0 | 8 | `HEARTHMF` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | bytes per chunk, 524,288 |
//! | 16 | 8 | size of the volume in bytes |
//! | 24 | 8 | how many chunks are present |
//! | 32 | 4 | epoch of the upload |
//! | 36 | 4 | how many pages follow: size in chunks / 1,024, rounded up |
//! | 40 | 2 + n | key domain: length and text |
//! | | 2 + n | snapshot id: length and text |
//! | | 2 + n | id of the parent snapshot (length 0: none); for information only, nothing of it is needed |
//! | | 40 each | pages: hash (32), epoch (4), present entries (4); all zeros = no entry of the page is present |
//! | end - 4 | 4 | CRC-32C of everything before |

use std::fmt;
use std::str::FromStr;

use super::{PAGE_ENTRIES, PageRef};
use crate::chunk::{CHUNK_BYTES, ChunkHash, KeyDomainId, chunk_count};
use crate::epoch::Epoch;
use crate::fields::field;
use crate::objects::{Damage, SnapshotKey};

const MAGIC: &[u8; 8] = b"HEARTHMF";
const VERSION: u32 = 1;
const FIXED_BYTES: usize = 40;
const PAGE_BYTES: usize = 40;
const CRC_BYTES: usize = 4;
/// Largest volume: 64 TiB, as EBS (2025).
pub(crate) const MAX_VOLUME_BYTES: u64 = 64 << 40;
/// Largest root object.
pub(crate) const MAX_ROOT_BYTES: u64 =
    (FIXED_BYTES + 3 * 66 + CRC_BYTES) as u64 + MAX_VOLUME_BYTES / (CHUNK_BYTES * PAGE_ENTRIES) as u64 * 40;

/// BLAKE3 of a root object: stands for the whole content of the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootHash(pub [u8; 32]);

impl RootHash {
    pub(crate) fn of(object: &[u8]) -> Self {
        Self(*blake3::hash(object).as_bytes())
    }
}

/// 64 lower-case hex digits.
impl fmt::Display for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ChunkHash(self.0).fmt(f)
    }
}

impl FromStr for RootHash {
    type Err = <ChunkHash as FromStr>::Err;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<ChunkHash>().map(|hash| Self(hash.0))
    }
}

/// What a root says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The id that it is published under.
    pub id: SnapshotKey,
    /// Size of the volume in bytes.
    pub size_bytes: u64,
    /// Whose keys open the chunks.
    pub domain: KeyDomainId,
    /// Epoch of the upload.
    pub epoch: Epoch,
    /// The snapshot it continues, for information.
    pub parent: Option<SnapshotKey>,
    /// How many chunks are present.
    pub present_chunks: u64,
    /// Page by page: where it stands and how many entries are present; `None` for an empty one.
    pub(crate) pages: Vec<Option<(PageRef, u32)>>,
}

/// How many pages a volume of this size has.
pub(crate) fn page_count(size_bytes: u64) -> usize {
    chunk_count(size_bytes).div_ceil(PAGE_ENTRIES as u64) as usize
}

impl Root {
    /// The pages that are not empty.
    pub(crate) fn page_refs(&self) -> impl Iterator<Item = PageRef> + '_ {
        self.pages.iter().flatten().map(|(page, _)| *page)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut object = Vec::with_capacity(FIXED_BYTES + 256 + self.pages.len() * PAGE_BYTES);
        object.extend_from_slice(MAGIC);
        object.extend_from_slice(&VERSION.to_le_bytes());
        object.extend_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
        object.extend_from_slice(&self.size_bytes.to_le_bytes());
        object.extend_from_slice(&self.present_chunks.to_le_bytes());
        object.extend_from_slice(&self.epoch.0.to_le_bytes());
        object.extend_from_slice(&(self.pages.len() as u32).to_le_bytes());
        let parent = self.parent.as_ref().map_or("", SnapshotKey::as_str);
        for text in [self.domain.as_str(), self.id.as_str(), parent] {
            object.extend_from_slice(&(text.len() as u16).to_le_bytes());
            object.extend_from_slice(text.as_bytes());
        }
        for page in &self.pages {
            match page {
                Some((page, present)) => {
                    object.extend_from_slice(page.hash.as_bytes());
                    object.extend_from_slice(&page.epoch.0.to_le_bytes());
                    object.extend_from_slice(&present.to_le_bytes());
                }
                None => object.extend_from_slice(&[0; PAGE_BYTES]),
            }
        }
        let crc = crc32c::crc32c(&object);
        object.extend_from_slice(&crc.to_le_bytes());
        object
    }

    pub(crate) fn decode(object: &[u8]) -> Result<Self, Damage> {
        let too_short = || Damage::Size { expected: (FIXED_BYTES + CRC_BYTES) as u64, found: object.len() as u64 };
        if !object.starts_with(MAGIC) {
            return Err(Damage::Signature("a snapshot's root"));
        }
        let version = u32::from_le_bytes(field(object, 8));
        if version != VERSION {
            return Err(Damage::Version(version));
        }
        let covered = object.len().checked_sub(CRC_BYTES).filter(|end| *end >= FIXED_BYTES).ok_or_else(too_short)?;
        let body = object.get(..covered).unwrap_or_default();
        let (expected, found) = (u32::from_le_bytes(field(object, covered)), crc32c::crc32c(body));
        if expected != found {
            return Err(Damage::Checksum { expected, found });
        }
        let chunk_bytes = u32::from_le_bytes(field(body, 12));
        if chunk_bytes as usize != CHUNK_BYTES {
            return Err(Damage::Field(format!("chunks of {chunk_bytes} bytes")));
        }
        let size_bytes = u64::from_le_bytes(field(body, 16));
        if size_bytes == 0 || size_bytes > MAX_VOLUME_BYTES {
            return Err(Damage::Field(format!("a volume of {size_bytes} bytes")));
        }
        let mut rest = body.get(FIXED_BYTES..).unwrap_or_default();
        let domain = KeyDomainId::new(text(&mut rest)?).map_err(|error| Damage::Field(error.to_string()))?;
        let id = SnapshotKey::new(text(&mut rest)?).map_err(|error| Damage::Field(error.to_string()))?;
        let parent = match text(&mut rest)? {
            "" => None,
            parent => Some(SnapshotKey::new(parent).map_err(|error| Damage::Field(error.to_string()))?),
        };
        let pages = pages(rest, u32::from_le_bytes(field(body, 36)), size_bytes)?;
        let present_chunks = u64::from_le_bytes(field(body, 24));
        let counted: u64 = pages.iter().flatten().map(|(_, present)| u64::from(*present)).sum();
        if counted != present_chunks {
            return Err(Damage::Field(format!("its pages have {counted} chunks, it says {present_chunks}")));
        }
        let epoch = Epoch(u32::from_le_bytes(field(body, 32)));
        Ok(Self { id, size_bytes, domain, epoch, parent, present_chunks, pages })
    }
}

/// Takes a length and that many bytes of text.
fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, Damage> {
    let (length, behind) = rest.split_at_checked(2).ok_or_else(|| Damage::Field("it ends in a name".to_owned()))?;
    let length = usize::from(u16::from_le_bytes(field(length, 0)));
    let (text, behind) =
        behind.split_at_checked(length).ok_or_else(|| Damage::Field("it ends in a name".to_owned()))?;
    *rest = behind;
    std::str::from_utf8(text).map_err(|_| Damage::Field("a name is no text".to_owned()))
}

fn pages(bytes: &[u8], count: u32, size_bytes: u64) -> Result<Vec<Option<(PageRef, u32)>>, Damage> {
    let expected = page_count(size_bytes);
    let (entries, over) = bytes.as_chunks::<PAGE_BYTES>();
    if count as usize != expected || entries.len() != expected || !over.is_empty() {
        let what = format!("{count} pages in {} bytes, {expected} are needed", bytes.len());
        return Err(Damage::Field(what));
    }
    let last_entries = chunk_count(size_bytes) as usize - (expected - 1) * PAGE_ENTRIES;
    let mut pages = Vec::with_capacity(expected);
    for (index, entry) in entries.iter().enumerate() {
        let page = PageRef { hash: ChunkHash(field(entry, 0)), epoch: Epoch(u32::from_le_bytes(field(entry, 32))) };
        let present = u32::from_le_bytes(field(entry, 36));
        let most = if index + 1 == expected { last_entries } else { PAGE_ENTRIES };
        if present as usize > most {
            return Err(Damage::Field(format!("page {index} is said to have {present} chunks")));
        }
        if present == 0 && entry.iter().any(|byte| *byte != 0) {
            return Err(Damage::Field(format!("page {index} is empty but has a name")));
        }
        pages.push((present > 0).then_some((page, present)));
    }
    Ok(pages)
}

#[cfg(test)]
#[path = "root_test.rs"]
mod tests;
