//! What a store holds, by kind.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use object_store::ObjectStore;

use crate::epoch::Epoch;
use crate::objects::{ObjectKind, StorageError, classify};

/// Number and bytes of some objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageOf {
    /// How many.
    pub objects: u64,
    /// Their bytes as stored.
    pub bytes: u64,
}

impl UsageOf {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// What a store holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Content of volumes.
    pub chunks: UsageOf,
    /// Pages of manifests.
    pub pages: UsageOf,
    /// Roots of manifests.
    pub roots: UsageOf,
    /// Prefetch lists.
    pub prefetch: UsageOf,
    /// What is not of this crate, e.g. bundles.
    pub other: UsageOf,
    /// Chunks and pages by key domain.
    pub by_domain: BTreeMap<String, UsageOf>,
    /// Chunks and pages by epoch.
    pub by_epoch: BTreeMap<Epoch, UsageOf>,
}

/// Lists everything in `objects`. Takes about a second per 10,000 objects on S3.
pub async fn usage(objects: &dyn ObjectStore) -> Result<Usage, StorageError> {
    let mut usage = Usage::default();
    let mut listing = objects.list(None);
    let top = object_store::path::Path::default();
    while let Some(meta) = listing.try_next().await.map_err(StorageError::objects("list", &top))? {
        let place = match classify(&meta.location) {
            ObjectKind::Chunk(domain, chunk) => Some((domain, chunk.epoch, &mut usage.chunks)),
            ObjectKind::Page(domain, page) => Some((domain, page.epoch, &mut usage.pages)),
            ObjectKind::Root(_) => {
                usage.roots.add(meta.size);
                None
            }
            ObjectKind::Prefetch(_) => {
                usage.prefetch.add(meta.size);
                None
            }
            ObjectKind::Other => {
                usage.other.add(meta.size);
                None
            }
        };
        if let Some((domain, epoch, kind)) = place {
            kind.add(meta.size);
            usage.by_domain.entry(domain.to_string()).or_default().add(meta.size);
            usage.by_epoch.entry(epoch).or_default().add(meta.size);
        }
    }
    Ok(usage)
}
