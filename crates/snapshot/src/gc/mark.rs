//! Which objects are needed.

use std::collections::{HashMap, HashSet};

use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;

use super::ledger::LiveRoot;
use crate::chunk::{ChunkRef, KeyDomainId};
use crate::epoch::Epoch;
use crate::manifest::{MAX_PAGE_BYTES, Page, PageRef, load_root};
use crate::objects::{StorageError, get_whole, page_path};

/// Roots and pages read at a time.
const PARALLEL: usize = 16;

/// The needed objects of one key domain.
#[derive(Debug, Default)]
pub(crate) struct Needed {
    pub pages: HashSet<PageRef>,
    pub chunks: HashSet<ChunkRef>,
}

/// What is needed, by key domain.
#[derive(Debug, Default)]
pub(crate) struct Marked {
    pub domains: HashMap<KeyDomainId, Needed>,
}

impl Marked {
    pub fn page(&self, domain: &KeyDomainId, page: &PageRef) -> bool {
        self.domains.get(domain).is_some_and(|needed| needed.pages.contains(page))
    }

    pub fn chunk(&self, domain: &KeyDomainId, chunk: &ChunkRef) -> bool {
        self.domains.get(domain).is_some_and(|needed| needed.chunks.contains(chunk))
    }
}

/// Walks all roots. Only chunks of epochs for which `wanted` says yes are kept: the others are not going to be looked at, and memory is 40
/// bytes for each.
///
/// # Errors
/// Any root or page that cannot be read: what it refers to is then not known, so nothing may be deleted.
pub(crate) async fn mark(
    objects: &dyn ObjectStore,
    roots: &[LiveRoot],
    wanted: impl Fn(Epoch) -> bool,
) -> Result<Marked, StorageError> {
    let mut marked = Marked::default();
    let mut fresh = Vec::new();
    let reads =
        roots.iter().cloned().map(|root| async move { load_root(objects, &root.id, root.root_hash.as_ref()).await });
    let mut reads = futures::stream::iter(reads).buffer_unordered(PARALLEL);
    while let Some((root, _)) = reads.try_next().await? {
        let needed = marked.domains.entry(root.domain.clone()).or_default();
        fresh
            .extend(root.page_refs().filter(|page| needed.pages.insert(*page)).map(|page| (root.domain.clone(), page)));
    }
    let reads = fresh.into_iter().map(|(domain, page)| async move {
        let path = page_path(&domain, &page);
        let object = get_whole(objects, &path, MAX_PAGE_BYTES as u64).await?;
        let page = Page::decode(&page, &object).map_err(StorageError::damaged(&path))?;
        Ok::<_, StorageError>((domain, page))
    });
    let mut reads = futures::stream::iter(reads).buffer_unordered(PARALLEL);
    while let Some((domain, page)) = reads.try_next().await? {
        let needed = marked.domains.entry(domain).or_default();
        needed.chunks.extend(page.iter().map(|(_, chunk)| chunk).filter(|chunk| wanted(chunk.epoch)));
    }
    Ok(marked)
}
