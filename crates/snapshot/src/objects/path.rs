//! Names of objects. The layout is described byte by byte in docs/storage-objects.md.

use std::fmt;
use std::str::FromStr;

use object_store::path::Path;

use super::error::StorageError;
use crate::chunk::{ChunkHash, ChunkRef, KeyDomainId};
use crate::epoch::Epoch;
use crate::manifest::PageRef;

pub(crate) const CHUNKS: &str = "chunk";
pub(crate) const PAGES: &str = "page";
pub(crate) const SNAPSHOTS: &str = "snap";
pub(crate) const BUNDLES: &str = "bundle";
pub(crate) const ARCHIVES: &str = "archive";
const ROOT: &str = "root";
const PREFETCH: &str = "prefetch";

/// 1 to 64 of a-z, 0-9 and '-': what may be a part of an object's name.
pub(crate) fn is_plain_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

/// The id under which a manifest is published, e.g. `snap-0123456789abcdef0`. Ids are never used again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotKey(String);

impl SnapshotKey {
    /// # Errors
    /// [`StorageError::Name`] unless it is 1 to 64 of a-z, 0-9 and '-'.
    pub fn new(id: impl AsRef<str>) -> Result<Self, StorageError> {
        let id = id.as_ref();
        if is_plain_name(id) {
            Ok(Self(id.to_owned()))
        } else {
            Err(StorageError::Name { what: "snapshot id", name: id.to_owned() })
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotKey {
    type Err = StorageError;
    fn from_str(text: &str) -> Result<Self, StorageError> {
        Self::new(text)
    }
}

impl fmt::Display for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) fn chunk_path(domain: &KeyDomainId, chunk: &ChunkRef) -> Path {
    hashed_path(CHUNKS, domain, chunk.epoch, &chunk.hash)
}

pub(crate) fn page_path(domain: &KeyDomainId, page: &PageRef) -> Path {
    hashed_path(PAGES, domain, page.epoch, &page.hash)
}

fn hashed_path(kind: &str, domain: &KeyDomainId, epoch: Epoch, hash: &ChunkHash) -> Path {
    let name = hash.to_string();
    let shard = name.get(..2).unwrap_or_default();
    Path::from_iter([kind, domain.as_str(), &epoch.to_string(), shard, &name])
}

pub(crate) fn snapshot_path(id: &SnapshotKey) -> Path {
    Path::from_iter([SNAPSHOTS, id.as_str()])
}

pub(crate) fn root_path(id: &SnapshotKey) -> Path {
    Path::from_iter([SNAPSHOTS, id.as_str(), ROOT])
}

pub(crate) fn prefetch_path(id: &SnapshotKey) -> Path {
    Path::from_iter([SNAPSHOTS, id.as_str(), PREFETCH])
}

/// What an object is, told by its name alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// Content of a volume.
    Chunk(KeyDomainId, ChunkRef),
    /// A page of a manifest.
    Page(KeyDomainId, PageRef),
    /// The root of a manifest.
    Root(SnapshotKey),
    /// The chunks that a launch reads first.
    Prefetch(SnapshotKey),
    /// Not one of this crate's objects; left alone.
    Other,
}

/// Tells the kind of the object at `path`.
pub fn classify(path: &Path) -> ObjectKind {
    let parts: Vec<_> = path.parts().collect();
    let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
    let hashed = |domain: &str, epoch: &str, shard: &str, name: &str| {
        let hash: ChunkHash = name.parse().ok()?;
        if name.get(..2) != Some(shard) {
            return None;
        }
        Some((KeyDomainId::new(domain).ok()?, epoch.parse::<Epoch>().ok()?, hash))
    };
    match parts.as_slice() {
        [CHUNKS, domain, epoch, shard, name] => match hashed(domain, epoch, shard, name) {
            Some((domain, epoch, hash)) => ObjectKind::Chunk(domain, ChunkRef { hash, epoch }),
            None => ObjectKind::Other,
        },
        [PAGES, domain, epoch, shard, name] => match hashed(domain, epoch, shard, name) {
            Some((domain, epoch, hash)) => ObjectKind::Page(domain, PageRef { hash, epoch }),
            None => ObjectKind::Other,
        },
        [SNAPSHOTS, id, ROOT] => SnapshotKey::new(id).map_or(ObjectKind::Other, ObjectKind::Root),
        [SNAPSHOTS, id, PREFETCH] => SnapshotKey::new(id).map_or(ObjectKind::Other, ObjectKind::Prefetch),
        _ => ObjectKind::Other,
    }
}

#[cfg(test)]
#[path = "path_test.rs"]
mod tests;
