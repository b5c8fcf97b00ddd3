//! Manifests: which chunk stands where on a volume, at one instant.
//!
//! A manifest is one small *root* object and *pages* of 1,024 entries (512 MiB of the volume) that the root names by their hash.
//! Pages are shared between manifests; the root's own hash therefore stands for the whole content of the volume.

mod diff;
mod load;
mod page;
mod prefetch;
mod root;
mod writer;

pub use diff::{ChangedChunk, changed};
pub use load::Manifest;
pub(crate) use load::load_root;
pub use page::PAGE_ENTRIES;
pub(crate) use page::{MAX_PAGE_BYTES, Page};
pub use prefetch::{load_prefetch, store_prefetch};
pub(crate) use root::MAX_VOLUME_BYTES;
pub use root::{Root, RootHash};
pub use writer::{Committed, ManifestSpec, ManifestWriter};

use crate::chunk::ChunkHash;
use crate::epoch::Epoch;

/// Where a page stands: its name is the plain BLAKE3 hash of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRef {
    /// BLAKE3 of the object.
    pub hash: ChunkHash,
    /// Epoch that it was written in.
    pub epoch: Epoch,
}
