//! Reading manifests.

use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;

use super::page::{MAX_PAGE_BYTES, PAGE_ENTRIES, Page};
use super::root::{MAX_ROOT_BYTES, Root, RootHash};
use crate::chunk::{ChunkRef, ChunkStore, KeyDomainId, chunk_count};
use crate::objects::{Damage, SnapshotKey, StorageError, get_whole, page_path, root_path};

/// Pages read at a time.
const PARALLEL_PAGES: usize = 16;

/// A whole manifest in memory: 40 bytes per chunk in pages that are not empty.
#[derive(Clone, Debug)]
pub struct Manifest {
    pub(super) root: Root,
    pub(super) hash: RootHash,
    pub(super) pages: Vec<Option<Page>>,
}

impl Manifest {
    /// Reads the manifest `id`. `expected` = the hash in the control plane's records: with it, nobody who can write to the
    /// store can put another volume in its place.
    ///
    /// # Errors
    /// [`StorageError::Missing`], [`StorageError::Damaged`] (also: another hash than expected), or the store's own.
    pub async fn load(
        objects: &dyn ObjectStore,
        id: &SnapshotKey,
        expected: Option<&RootHash>,
    ) -> Result<Self, StorageError> {
        let (root, hash) = load_root(objects, id, expected).await?;
        let reads = root.pages.clone().into_iter().enumerate().map(|(index, page)| {
            let domain = root.domain.clone();
            let slots = chunk_count(root.size_bytes) - (index * PAGE_ENTRIES) as u64;
            async move {
                let Some((reference, present)) = page else {
                    return Ok(None);
                };
                let path = page_path(&domain, &reference);
                let object = get_whole(objects, &path, MAX_PAGE_BYTES as u64).await?;
                let page = Page::decode(&reference, &object).map_err(StorageError::damaged(&path))?;
                let inside = page.iter().all(|(slot, _)| (slot as u64) < slots);
                if page.present() != present as usize || !inside {
                    let damage = Damage::Field(format!("it does not fit page {index} of snapshot {id}"));
                    return Err(StorageError::damaged(&path)(damage));
                }
                Ok(Some(page))
            }
        });
        let pages = futures::stream::iter(reads).buffered(PARALLEL_PAGES).try_collect().await?;
        Ok(Self { root, hash, pages })
    }

    /// What the root says.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Its id.
    pub fn id(&self) -> &SnapshotKey {
        &self.root.id
    }

    /// The hash of its root.
    pub fn root_hash(&self) -> RootHash {
        self.hash
    }

    /// Size of the volume in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.root.size_bytes
    }

    /// Whose keys open the chunks.
    pub fn domain(&self) -> &KeyDomainId {
        &self.root.domain
    }

    /// How many chunks the volume has, present or not.
    pub fn chunk_count(&self) -> u64 {
        chunk_count(self.root.size_bytes)
    }

    /// How many chunks are present; all others read as zeros.
    pub fn present_chunks(&self) -> u64 {
        self.root.present_chunks
    }

    /// The chunk at `index` (byte `index` x 512 KiB); `None` reads as zeros.
    pub fn entry(&self, index: u64) -> Option<ChunkRef> {
        let page = usize::try_from(index / PAGE_ENTRIES as u64).ok()?;
        self.pages.get(page)?.as_ref()?.get((index % PAGE_ENTRIES as u64) as usize)
    }

    /// Indexes of the present chunks, ascending.
    pub fn chunks(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries().map(|(index, _)| index)
    }

    /// Present chunks with their indexes, ascending.
    pub fn entries(&self) -> impl Iterator<Item = (u64, ChunkRef)> + '_ {
        self.pages.iter().enumerate().filter_map(|(number, page)| Some((number, page.as_ref()?))).flat_map(
            |(number, page)| page.iter().map(move |(slot, chunk)| ((number * PAGE_ENTRIES + slot) as u64, chunk)),
        )
    }

    /// The content of the chunk at `index`, checked; `None` = zeros.
    ///
    /// # Errors
    /// [`StorageError::KeyDomain`] when `store` is of another domain, [`StorageError::Usage`] behind the end.
    pub async fn read_chunk(&self, store: &ChunkStore, index: u64) -> Result<Option<bytes::Bytes>, StorageError> {
        self.check_domain(store)?;
        if index >= self.chunk_count() {
            return Err(StorageError::Usage(format!(
                "snapshot {} has {} chunks, there is no chunk {index}",
                self.root.id,
                self.chunk_count()
            )));
        }
        match self.entry(index) {
            Some(chunk) => Ok(Some(store.get_chunk(&chunk).await?)),
            None => Ok(None),
        }
    }

    pub(crate) fn check_domain(&self, store: &ChunkStore) -> Result<(), StorageError> {
        if self.root.domain == *store.domain().id() {
            return Ok(());
        }
        Err(StorageError::KeyDomain { expected: store.domain().id().to_string(), found: self.root.domain.to_string() })
    }
}

/// Reads and checks a root alone.
pub(crate) async fn load_root(
    objects: &dyn ObjectStore,
    id: &SnapshotKey,
    expected: Option<&RootHash>,
) -> Result<(Root, RootHash), StorageError> {
    let path = root_path(id);
    let object = get_whole(objects, &path, MAX_ROOT_BYTES).await?;
    let root = Root::decode(&object).map_err(StorageError::damaged(&path))?;
    let hash = RootHash::of(&object);
    if let Some(expected) = expected.filter(|expected| **expected != hash) {
        let damage = Damage::Content(format!("it is root {hash} instead of {expected}"));
        return Err(StorageError::damaged(&path)(damage));
    }
    if root.id != *id {
        return Err(StorageError::damaged(&path)(Damage::Content(format!("it is the root of {}", root.id))));
    }
    Ok((root, hash))
}
