//! Bundles: S3-backed AMIs. A disk as a manifest (JSON) and parts of at most 10 MiB in a bucket, all of which are fetched and
//! written to the root device before an instance boots.

mod manifest;
mod read;
mod write;

pub use manifest::{BundleManifest, BundlePart, MAX_BUNDLE_DISK_BYTES, PART_BYTES};
pub use read::{load_bundle, restore_bundle};
pub use write::{BundleSpec, Bundled, write_bundle};

use std::sync::Arc;

/// Called with (bytes done, bytes in all), counting parts as stored when restoring and the disk's content when bundling.
pub type OnBundleProgress = Arc<dyn Fn(u64, u64) + Send + Sync>;
