//! Object stores: where they are, what stands in them under which name, and what can go wrong with it.

mod error;
mod io;
mod open;
mod path;

pub use error::{Damage, StorageError};
pub(crate) use io::{get_whole, info, peek, put_if_absent, put_over};
pub use open::{S3Options, StoreOptions, local_path, open_store};
pub(crate) use path::is_plain_name;
pub(crate) use path::{
    ARCHIVES, BUNDLES, CHUNKS, PAGES, SNAPSHOTS, chunk_path, page_path, prefetch_path, root_path, snapshot_path,
};
pub use path::{ObjectKind, SnapshotKey, classify};
