//! The prefetch list of a snapshot: the chunks that a launch reads, in the order of their first touch.
//!
//! | offset | bytes | what (little-endian) |
//! |---|---|---|
//! | 0 | 4 | `HPRE` |
//! | 4 | 4 | version, 1 |
//! | 8 | 4 | how many indexes follow |
//! | 12 | 4 | CRC-32C of everything else |
//! | 16 | 4 each | chunk indexes |

use object_store::ObjectStore;

use crate::fields::field;
use crate::objects::{Damage, SnapshotKey, StorageError, get_whole, prefetch_path, put_over};

const MAGIC: &[u8; 4] = b"HPRE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
/// No more than this many are kept: 32 GiB of chunks.
const MAX_ENTRIES: usize = 1 << 16;

fn crc(object: &[u8]) -> u32 {
    let head = crc32c::crc32c(object.get(..12).unwrap_or_default());
    crc32c::crc32c_append(head, object.get(HEADER_BYTES..).unwrap_or_default())
}

pub(crate) fn encode(chunks: &[u32]) -> Vec<u8> {
    let chunks = chunks.get(..MAX_ENTRIES).unwrap_or(chunks);
    let mut object = Vec::with_capacity(HEADER_BYTES + 4 * chunks.len());
    object.extend_from_slice(MAGIC);
    object.extend_from_slice(&VERSION.to_le_bytes());
    object.extend_from_slice(&(chunks.len() as u32).to_le_bytes());
    object.extend_from_slice(&[0; 4]);
    for chunk in chunks {
        object.extend_from_slice(&chunk.to_le_bytes());
    }
    let crc = crc(&object).to_le_bytes();
    if let Some(place) = object.get_mut(12..HEADER_BYTES) {
        place.copy_from_slice(&crc);
    }
    object
}

pub(crate) fn decode(object: &[u8]) -> Result<Vec<u32>, Damage> {
    if !object.starts_with(MAGIC) {
        return Err(Damage::Signature("a prefetch list"));
    }
    let version = u32::from_le_bytes(field(object, 4));
    if version != VERSION {
        return Err(Damage::Version(version));
    }
    let expected = HEADER_BYTES as u64 + 4 * u64::from(u32::from_le_bytes(field(object, 8)));
    if object.len() as u64 != expected {
        return Err(Damage::Size { expected, found: object.len() as u64 });
    }
    let (expected, found) = (u32::from_le_bytes(field(object, 12)), crc(object));
    if expected != found {
        return Err(Damage::Checksum { expected, found });
    }
    let (chunks, _) = object.get(HEADER_BYTES..).unwrap_or_default().as_chunks::<4>();
    Ok(chunks.iter().map(|chunk| u32::from_le_bytes(*chunk)).collect())
}

/// Stores the list beside the snapshot's root, replacing one that is there. Only the first 65,536 are kept.
pub async fn store_prefetch(objects: &dyn ObjectStore, id: &SnapshotKey, chunks: &[u32]) -> Result<(), StorageError> {
    put_over(objects, &prefetch_path(id), encode(chunks).into()).await
}

/// The list of a snapshot; `None` when there is none. A damaged one is an error that a launch may ignore.
pub async fn load_prefetch(objects: &dyn ObjectStore, id: &SnapshotKey) -> Result<Option<Vec<u32>>, StorageError> {
    let path = prefetch_path(id);
    let object = match get_whole(objects, &path, (HEADER_BYTES + 4 * MAX_ENTRIES) as u64).await {
        Err(StorageError::Missing { .. }) => return Ok(None),
        found => found?,
    };
    decode(&object).map(Some).map_err(StorageError::damaged(&path))
}

#[cfg(test)]
#[path = "prefetch_test.rs"]
mod tests;
