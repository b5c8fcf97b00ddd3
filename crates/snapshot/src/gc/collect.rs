//! One run of the collector.

use std::path::PathBuf;
use std::sync::Arc;

use object_store::ObjectStore;

use super::ledger::{Ledger, LedgerError};
use super::mark::mark;
use super::sweep::{Sweep, dead_snapshots};
use crate::epoch::{Epoch, GRACE};
use crate::objects::StorageError;

/// How a run is to be done.
#[derive(Clone, Debug, Default)]
pub struct CollectOptions {
    /// Tell what would be deleted, delete nothing. The epoch does not advance either.
    pub dry_run: bool,
    /// Advance the epoch as often as makes everything unreferenced deletable in this run, where open uploads allow it. Otherwise it
    /// advances once, and an object is deleted three runs after it became garbage.
    pub now: bool,
    /// Folder of a `file://` store: files of interrupted writes are removed, too, which the store itself does not list.
    pub local_root: Option<PathBuf>,
}

/// What a run did (or would do).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// The epoch it went by.
    pub epoch: Epoch,
    /// Roots that are live.
    pub live_roots: u64,
    /// Objects looked at in epochs that were swept.
    pub looked_at: u64,
    /// Chunks deleted.
    pub chunks: u64,
    /// Pages deleted.
    pub pages: u64,
    /// Roots and prefetch lists of dead snapshots deleted.
    pub roots: u64,
    /// Files of interrupted writes deleted.
    pub leftovers: u64,
    /// Bytes of all these.
    pub bytes: u64,
}

/// The collector. Any number of them may run at the same time, or be killed at any moment.
#[derive(Clone)]
pub struct Gc {
    objects: Arc<dyn ObjectStore>,
    ledger: Arc<dyn Ledger>,
}

impl std::fmt::Debug for Gc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gc").field("objects", &self.objects).finish_non_exhaustive()
    }
}

impl Gc {
    /// A collector of the objects in `objects` that `ledger` does not need.
    pub fn new(objects: Arc<dyn ObjectStore>, ledger: Arc<dyn Ledger>) -> Self {
        Self { objects, ledger }
    }

    /// Deletes what is garbage. Needs no keys.
    ///
    /// # Errors
    /// When a live root or page is missing or damaged nothing is deleted: what it refers to is not known. `verify` tells which
    /// snapshot is to blame; deleting that snapshot lets the collector go on.
    pub async fn run(&self, options: &CollectOptions) -> Result<Collected, StorageError> {
        let epoch = self.advance(options).await?;
        // Seen before the ledger is read: an id that the ledger does not know then was closed, and cannot be one that is
        // opened later.
        let seen = dead_snapshots::list(&*self.objects).await?;
        let roots = self.ledger.roots().await.map_err(StorageError::Ledger)?;
        let marked = mark(&*self.objects, &roots.live, |object| epoch.may_sweep(object)).await?;
        let sweep = Sweep { objects: &*self.objects, epoch, marked: &marked, dry_run: options.dry_run };
        let mut collected = Collected { epoch, live_roots: roots.live.len() as u64, ..Collected::default() };
        sweep.dead_snapshots(&seen, &roots, &mut collected).await?;
        sweep.old_epochs(&mut collected).await?;
        if let Some(folder) = &options.local_root {
            sweep.leftovers(folder, &seen, &roots, &mut collected).await?;
        }
        Ok(collected)
    }

    async fn advance(&self, options: &CollectOptions) -> Result<Epoch, StorageError> {
        let failed = |error: LedgerError| StorageError::Ledger(error);
        let mut epoch = self.ledger.epoch().await.map_err(failed)?;
        if options.dry_run {
            return Ok(epoch);
        }
        let steps = if options.now { GRACE } else { 1 };
        for _ in 0..steps {
            let advanced = self.ledger.advance().await.map_err(failed)?;
            if advanced == epoch {
                break;
            }
            epoch = advanced;
        }
        Ok(epoch)
    }
}

#[cfg(test)]
#[path = "collect_test.rs"]
mod tests;
