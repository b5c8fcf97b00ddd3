//! Archives: a whole AMI, all its disks and attributes, as one object in a bucket (StoreImage, RestoreImage). The content is
//! compressed, not encrypted: an archive can be restored in any key domain and any cloud.
//!
//! | bytes | what (little-endian) |
//! |---|---|
//! | 8 | `HEARTHAR` |
//! | 4 | version, 1 |
//! | 4 | length of the JSON that follows |
//! | n | JSON: [`ArchiveHeader`] |
//! | 4 | CRC-32C of all of this |
//! | records | 20 bytes each and the payload, see [`Record`](record::Record) |
//! | 20 | end record: kind 2, disk 0, codec 0, chunk = how many records were before, length 32, its CRC |
//! | 32 | BLAKE3 of everything before the end record |

mod read;
mod record;
mod write;

pub use read::{OpenedArchive, RestoreDisk, open_archive};
pub use write::{ArchiveDisk, Archived, write_archive};

use std::sync::Arc;

use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"HEARTHAR";
const VERSION: u32 = 1;
const FIXED_BYTES: usize = 16;
/// Longest JSON taken.
const MAX_HEADER_BYTES: u32 = 16 << 20;
/// Most disks in one archive: as many as an instance can have.
const MAX_DISKS: usize = 256;

/// What an archive holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveHeader {
    /// Attributes of the AMI, as whoever stores and restores it understands them.
    pub attributes: serde_json::Map<String, serde_json::Value>,
    /// Its disks.
    pub disks: Vec<ArchivedDisk>,
}

/// A disk in an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchivedDisk {
    /// What it is called, e.g. the device name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// How many chunks of it the archive holds; all others are zeros.
    pub present_chunks: u64,
}

/// Called with (chunks done, chunks in all); must return quickly.
pub type OnArchiveProgress = Arc<dyn Fn(u64, u64) + Send + Sync>;

#[cfg(test)]
#[path = "../archive_test.rs"]
mod tests;
