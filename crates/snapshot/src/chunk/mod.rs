//! Chunks: 512 KiB of a volume as one object, named by its content.

mod codec;
mod domain;
mod hash;
mod store;

pub use domain::{KeyDomain, KeyDomainId};
pub use hash::ChunkHash;
pub use store::{ChunkStore, PutOutcome};

use crate::epoch::Epoch;

/// Bytes of a volume that one chunk holds: the block size of the EBS direct APIs.
pub const CHUNK_BYTES: usize = 512 << 10;

/// Where a chunk's content stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkRef {
    /// Name: keyed BLAKE3 of the content.
    pub hash: ChunkHash,
    /// Epoch that it was written in.
    pub epoch: Epoch,
}

/// How many chunks a volume of `size_bytes` has; the last one may be only partly inside.
pub fn chunk_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(CHUNK_BYTES as u64)
}
