//! Deleting what is not needed.

use std::collections::HashSet;
use std::path::Path as FilePath;
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore};

use super::collect::Collected;
use super::ledger::Roots;
use super::mark::Marked;
use crate::epoch::Epoch;
use crate::objects::{
    ARCHIVES, BUNDLES, CHUNKS, ObjectKind, PAGES, SNAPSHOTS, SnapshotKey, StorageError, classify, snapshot_path,
};

/// A write of a bundle or an archive that nothing was added to for this long is not going on: parts come within minutes.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);
/// Folders that bundles may stand in, one inside the other.
const MAX_DEPTH: u32 = 64;

pub(super) mod dead_snapshots {
    use super::*;

    /// Ids of all snapshots of which something stands in the store.
    pub async fn list(objects: &dyn ObjectStore) -> Result<Vec<SnapshotKey>, StorageError> {
        Ok(folders(objects, &Path::from(SNAPSHOTS)).await?.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

/// Names of the folders in `prefix`.
async fn folders(objects: &dyn ObjectStore, prefix: &Path) -> Result<Vec<String>, StorageError> {
    let found = match objects.list_with_delimiter(Some(prefix)).await {
        Err(object_store::Error::NotFound { .. }) => return Ok(Vec::new()),
        found => found.map_err(StorageError::objects("list", prefix))?,
    };
    Ok(found.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)).collect())
}

pub(super) struct Sweep<'a> {
    pub objects: &'a dyn ObjectStore,
    pub epoch: Epoch,
    pub marked: &'a Marked,
    pub dry_run: bool,
}

impl Sweep<'_> {
    /// Roots and prefetch lists whose snapshot is neither live nor being uploaded.
    pub async fn dead_snapshots(
        &self,
        seen: &[SnapshotKey],
        roots: &Roots,
        collected: &mut Collected,
    ) -> Result<(), StorageError> {
        let live = roots.live.iter().map(|root| &root.id);
        let known: HashSet<&SnapshotKey> = roots.open.iter().chain(live).collect();
        for id in seen.iter().filter(|id| !known.contains(id)) {
            let prefix = snapshot_path(id);
            let dead = self.objects.list(Some(&prefix)).try_collect::<Vec<_>>().await;
            let dead: Vec<ObjectMeta> = dead
                .map_err(StorageError::objects("list", &prefix))?
                .into_iter()
                .filter(|meta| matches!(classify(&meta.location), ObjectKind::Root(_) | ObjectKind::Prefetch(_)))
                .collect();
            collected.roots += dead.len() as u64;
            self.delete(dead, collected).await?;
        }
        Ok(())
    }

    /// Chunks and pages of old epochs that nothing live refers to.
    pub async fn old_epochs(&self, collected: &mut Collected) -> Result<(), StorageError> {
        for kind in [CHUNKS, PAGES] {
            for domain in folders(self.objects, &Path::from(kind)).await? {
                let domain_path = Path::from_iter([kind, &domain]);
                for epoch in folders(self.objects, &domain_path).await? {
                    let Ok(number) = epoch.parse::<Epoch>() else {
                        continue;
                    };
                    if self.epoch.may_sweep(number) {
                        self.one_epoch(&Path::from_iter([kind, &domain, &epoch]), collected).await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn one_epoch(&self, prefix: &Path, collected: &mut Collected) -> Result<(), StorageError> {
        let mut listing = self.objects.list(Some(prefix)).try_chunks(1000);
        while let Some(batch) = listing.next().await {
            let batch = batch.map_err(|error| StorageError::objects("list", prefix)(error.1))?;
            collected.looked_at += batch.len() as u64;
            let mut dead = Vec::new();
            for meta in batch {
                match classify(&meta.location) {
                    // The epoch is asked again of each object: a wrong prefix must not be enough to lose one.
                    ObjectKind::Chunk(domain, chunk)
                        if self.epoch.may_sweep(chunk.epoch) && !self.marked.chunk(&domain, &chunk) =>
                    {
                        collected.chunks += 1;
                    }
                    ObjectKind::Page(domain, page)
                        if self.epoch.may_sweep(page.epoch) && !self.marked.page(&domain, &page) =>
                    {
                        collected.pages += 1;
                    }
                    _ => continue,
                }
                dead.push(meta);
            }
            self.delete(dead, collected).await?;
        }
        Ok(())
    }

    async fn delete(&self, dead: Vec<ObjectMeta>, collected: &mut Collected) -> Result<(), StorageError> {
        collected.bytes += dead.iter().map(|meta| meta.size).sum::<u64>();
        if self.dry_run || dead.is_empty() {
            return Ok(());
        }
        let first = dead.first().map(|meta| meta.location.clone()).unwrap_or_default();
        let locations = futures::stream::iter(dead.into_iter().map(|meta| Ok(meta.location))).boxed();
        let mut answers = self.objects.delete_stream(locations);
        while let Some(answer) = answers.next().await {
            match answer {
                // Gone already: another collector.
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(StorageError::objects("delete", &first)(error)),
            }
        }
        Ok(())
    }

    /// Files of writes that a crash interrupted (`name#number`), where nobody can still be writing them: in old epochs, beside roots of
    /// snapshots that are not being uploaded, and among bundles and archives those that nobody has written to for a day.
    pub async fn leftovers(
        &self,
        folder: &FilePath,
        seen: &[SnapshotKey],
        roots: &Roots,
        collected: &mut Collected,
    ) -> Result<(), StorageError> {
        let open: HashSet<&SnapshotKey> = roots.open.iter().collect();
        let mut places: Vec<_> =
            seen.iter().filter(|id| !open.contains(id)).map(|id| folder.join(SNAPSHOTS).join(id.as_str())).collect();
        for kind in [CHUNKS, PAGES] {
            for domain in folders(self.objects, &Path::from(kind)).await? {
                for epoch in folders(self.objects, &Path::from_iter([kind, &domain])).await? {
                    if epoch.parse::<Epoch>().is_ok_and(|epoch| self.epoch.may_sweep(epoch)) {
                        places.push(folder.join(kind).join(&domain).join(&epoch));
                    }
                }
            }
        }
        let (dry_run, folder) = (self.dry_run, folder.to_owned());
        let found = tokio::task::spawn_blocking(move || {
            let mut found = (0u64, 0u64);
            for place in places {
                remove_leftovers(&place, 2, None, dry_run, &mut found)?;
            }
            // Only time tells here: no ledger knows who writes. A writer that was away for longer finds its file gone when it renames
            // it: it fails, and nothing is published.
            let old = SystemTime::now().checked_sub(ABANDONED);
            for kind in [BUNDLES, ARCHIVES].into_iter().filter(|_| old.is_some()) {
                remove_leftovers(&folder.join(kind), MAX_DEPTH, old, dry_run, &mut found)?;
            }
            Ok::<_, StorageError>(found)
        });
        let (files, bytes) = found.await??;
        collected.leftovers += files;
        collected.bytes += bytes;
        Ok(())
    }
}

fn is_leftover(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Those last changed before `old`, or all.
fn remove_leftovers(
    folder: &FilePath,
    depth: u32,
    old: Option<SystemTime>,
    dry_run: bool,
    found: &mut (u64, u64),
) -> Result<(), StorageError> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(StorageError::io("list", folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(StorageError::io("list", folder))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(StorageError::io("look at", &path))?;
        if kind.is_dir() && depth > 1 {
            remove_leftovers(&path, depth - 1, old, dry_run, found)?;
        } else if kind.is_file() && entry.file_name().to_str().is_some_and(is_leftover) {
            // Whoever wrote it may end, or another collector come first, at any moment.
            let Ok(metadata) = entry.metadata() else { continue };
            let changed = metadata.modified().map_err(StorageError::io("look at", &path))?;
            if old.is_some_and(|old| changed >= old) {
                continue;
            }
            match if dry_run { Ok(()) } else { std::fs::remove_file(&path) } {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                removed => removed.map_err(StorageError::io("remove", &path))?,
            }
            found.0 += 1;
            found.1 += metadata.len();
        }
    }
    Ok(())
}
