//! Writing manifests.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};

use super::PageRef;
use super::load::{Manifest, load_root};
use super::page::{PAGE_ENTRIES, Page};
use super::root::{MAX_VOLUME_BYTES, Root, RootHash, page_count};
use crate::chunk::{ChunkRef, ChunkStore, chunk_count};
use crate::epoch::Epoch;
use crate::objects::{SnapshotKey, StorageError, info, page_path, put_if_absent, put_over, root_path};

/// Pages written at a time.
const PARALLEL_PAGES: usize = 16;

/// What a new manifest is about.
#[derive(Clone, Debug)]
pub struct ManifestSpec {
    /// The id it gets; given out by the control plane, once.
    pub id: SnapshotKey,
    /// Size of the volume in bytes.
    pub size_bytes: u64,
    /// Epoch that the upload was opened in.
    pub epoch: Epoch,
}

/// A published manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Hash of the root: to be kept in the control plane's records.
    pub root_hash: RootHash,
    /// How many chunks are present.
    pub present_chunks: u64,
    /// Pages that had to be written.
    pub pages_written: u64,
}

/// Collects the entries of a new manifest. What is not set is as in the parent, or zeros without one.
#[derive(Debug)]
pub struct ManifestWriter<'a> {
    spec: ManifestSpec,
    parent: Option<&'a Manifest>,
    changes: BTreeMap<u64, Option<ChunkRef>>,
}

impl<'a> ManifestWriter<'a> {
    /// A manifest that is the parent's until something is set; a larger volume than the parent's is zeros behind it, a smaller
    /// one is cut.
    pub fn new(spec: ManifestSpec, parent: Option<&'a Manifest>) -> Result<Self, StorageError> {
        if spec.size_bytes == 0 || spec.size_bytes > MAX_VOLUME_BYTES {
            return Err(StorageError::Usage(format!("a volume of {} bytes", spec.size_bytes)));
        }
        Ok(Self { spec, parent, changes: BTreeMap::new() })
    }

    /// Sets the chunk at `index`, `None` = zeros.
    pub fn set(&mut self, index: u64, chunk: Option<ChunkRef>) -> Result<(), StorageError> {
        let count = chunk_count(self.spec.size_bytes);
        if index >= count {
            return Err(StorageError::Usage(format!("chunk {index} of a volume of {count} chunks")));
        }
        self.changes.insert(index, chunk);
        Ok(())
    }

    /// Writes the pages that no manifest before had, then publishes the root under the id. When it returns, the snapshot is
    /// complete and durable. After an error or a crash the same upload may be done again: the same content is the same root, and
    /// a root that is there already is then a success.
    ///
    /// # Errors
    /// [`StorageError::RootExists`] when another content was published under this id.
    pub async fn commit(self, store: &ChunkStore) -> Result<Committed, StorageError> {
        if let Some(parent) = self.parent {
            parent.check_domain(store)?;
        }
        let Self { spec, parent, changes } = self;
        let domain = store.domain().id();
        let count = page_count(spec.size_bytes);
        let mut pages: Vec<Option<(PageRef, u32)>> = vec![None; count];
        let mut new_pages = Vec::new();
        let cut = chunk_count(spec.size_bytes);
        for (number, slot) in pages.iter_mut().enumerate() {
            let first = (number * PAGE_ENTRIES) as u64;
            let mut changes = changes.range(first..first + PAGE_ENTRIES as u64).peekable();
            let inherited = parent.and_then(|parent| parent.pages.get(number)?.as_ref());
            let is_cut = parent.is_some_and(|parent| parent.chunk_count() > cut) && number + 1 == count;
            if changes.peek().is_none() && !is_cut {
                *slot = parent.and_then(|parent| parent.root.pages.get(number).copied().flatten());
                continue;
            }
            let mut page = inherited.cloned().unwrap_or_default();
            page.truncate((cut - first).min(PAGE_ENTRIES as u64) as usize);
            for (index, chunk) in changes {
                page.set((index - first) as usize, *chunk);
            }
            if inherited == Some(&page) {
                *slot = parent.and_then(|parent| parent.root.pages.get(number).copied().flatten());
            } else if page.present() > 0 {
                new_pages.push((number, page));
            }
        }
        let writes = new_pages.into_iter().map(|(number, page)| write_page(store, spec.epoch, number, page));
        let mut pages_written = 0;
        let mut written = futures::stream::iter(writes).buffer_unordered(PARALLEL_PAGES);
        while let Some((number, page, present, new)) = written.try_next().await? {
            if let Some(slot) = pages.get_mut(number) {
                *slot = Some((page, present));
            }
            pages_written += u64::from(new);
        }
        let present_chunks = pages.iter().flatten().map(|(_, present)| u64::from(*present)).sum();
        let root = Root {
            id: spec.id,
            size_bytes: spec.size_bytes,
            domain: domain.clone(),
            epoch: spec.epoch,
            parent: parent.map(|parent| parent.id().clone()),
            present_chunks,
            pages,
        };
        let object = root.encode();
        let root_hash = RootHash::of(&object);
        if !put_if_absent(&**store.objects(), &root_path(&root.id), object.into()).await? {
            let (_, found) = load_root(&**store.objects(), &root.id, None).await?;
            if found != root_hash {
                return Err(StorageError::RootExists { id: root.id.to_string() });
            }
        }
        Ok(Committed { root_hash, present_chunks, pages_written })
    }
}

/// Finds or writes one page: (number, where, present entries, whether it was written).
async fn write_page(
    store: &ChunkStore,
    epoch: Epoch,
    number: usize,
    page: Page,
) -> Result<(usize, PageRef, u32, bool), StorageError> {
    let objects = &**store.objects();
    let domain = store.domain().id();
    let (hash, object) = page.encode();
    let present = page.present() as u32;
    for epoch in epoch.reusable() {
        let place = PageRef { hash, epoch };
        let found = info(objects, &page_path(domain, &place)).await?;
        if found.is_some_and(|found| found.bytes == object.len() as u64) {
            return Ok((number, place, present, false));
        }
    }
    let place = PageRef { hash, epoch };
    put_over(objects, &page_path(domain, &place), object.into()).await?;
    Ok((number, place, present, true))
}
