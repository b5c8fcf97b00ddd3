//! Disk images and snapshots.
//!
//! **Images.** [`convert`] turns a disk image of any known [`Format`] into a sparse raw file; [`import`] turns it into a snapshot,
//! [`export`] turns a snapshot into a file.
//!
//! **Snapshots.** A volume's content at one instant is a [`Manifest`] over content-addressed chunks of 512 KiB in an object store
//! ([`open_store`]). [`SnapshotUpload`] makes one, [`Gc`] deletes what no manifest needs, [`verify`] reads everything again.
//! Every object is described byte by byte in docs/storage-objects.md.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod archive;
mod bundle;
mod chunk;
mod convert;
mod epoch;
mod error;
mod export;
mod fields;
mod format;
mod gc;
mod import;
mod manifest;
mod objects;
mod prefix;
mod qcow2;
mod raw;
#[cfg(test)]
mod send_test;
mod source;
mod sources;
#[cfg(test)]
mod testing;
mod upload;
mod usage;
mod verify;
mod vmdk;
mod writer;

pub use archive::{
    ArchiveDisk, ArchiveHeader, Archived, ArchivedDisk, OnArchiveProgress, OpenedArchive, RestoreDisk, open_archive,
    write_archive,
};
pub use bundle::{
    BundleManifest, BundlePart, BundleSpec, Bundled, MAX_BUNDLE_DISK_BYTES, OnBundleProgress, PART_BYTES, load_bundle,
    restore_bundle, write_bundle,
};
pub use chunk::{CHUNK_BYTES, ChunkHash, ChunkRef, ChunkStore, KeyDomain, KeyDomainId, PutOutcome, chunk_count};
pub use convert::{Converted, DEFAULT_MAX_VIRTUAL_BYTES, Limits, convert, convert_with_limits};
pub use epoch::{Epoch, GRACE, LOOKBACK};
pub use error::ImageError;
pub use export::{ExportFormat, Exported, OnExportProgress, export};
pub use format::{Format, UnknownFormat, detect};
pub use gc::{CollectOptions, Collected, Gc, Ledger, LedgerError, LiveRoot, MemoryLedger, Roots};
pub use import::{ImportProgress, ImportRequest, Imported, OnImportProgress, import};
pub use manifest::{
    ChangedChunk, Committed, Manifest, ManifestSpec, ManifestWriter, PAGE_ENTRIES, PageRef, Root, RootHash, changed,
    load_prefetch, store_prefetch,
};
pub use object_store::ObjectStore;
pub use objects::{
    Damage, ObjectKind, S3Options, SnapshotKey, StorageError, StoreOptions, classify, local_path, open_store,
};
pub use prefix::{PIECE_BYTES, PrefixDigest, PrefixHasher, next_piece};
pub use raw::next_data;
pub use sources::{FileSource, ManifestSource};
pub use upload::{
    ChunkSource, DEFAULT_PARALLEL, IndexedSource, OnProgress, ReadChunk, SnapshotUpload, SourceChunk, SourceError,
    UploadProgress, Uploaded,
};
pub use usage::{Usage, UsageOf, usage};
pub use verify::{Finding, KeySource, Verified, VerifyProgress, verify};

/// Called with (bytes done, bytes in all) as work goes on; both count the virtual disk.
pub type ProgressFn<'a> = &'a dyn Fn(u64, u64);

/// Disk sizes are multiples of this: virtio-blk counts in sectors of 512 bytes (virtio 1.2, section 5.2.4).
pub const SECTOR: u64 = 512;
