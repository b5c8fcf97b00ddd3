//! What the collector needs to know of the control plane's records.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::epoch::Epoch;
use crate::manifest::RootHash;
use crate::objects::{SnapshotKey, StorageError};

/// Whatever the keeper of the records fails with.
pub type LedgerError = Box<dyn std::error::Error + Send + Sync>;

/// A manifest that must stay readable.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LiveRoot {
    /// Its id.
    pub id: SnapshotKey,
    /// Its hash, when the records have it: the collector then refuses to go by a root that was exchanged.
    pub root_hash: Option<RootHash>,
}

/// One consistent view (one revision of the records).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots {
    /// Manifests that are complete and needed: snapshots that were not deleted, bases of volumes and of hosts' base files, parents of
    /// open uploads. A deleted snapshot stays here as long as any of these needs it.
    pub live: Vec<LiveRoot>,
    /// Ids of open uploads: their root may or may not be there yet.
    pub open: Vec<SnapshotKey>,
}

/// The control plane's records of epochs, uploads and snapshots. Its side of the rules in [`Epoch`]'s module:
///
/// - opening an upload reads the current epoch and pins the parent (which must be live) in one transaction;
/// - an upload ends in one transaction: completed, its root becomes live, or failed; an id is never given out again;
/// - the root of a completed upload stays live until nothing needs it.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// The current epoch.
    async fn epoch(&self) -> Result<Epoch, LedgerError>;

    /// Advances the current epoch by one if no upload of an epoch before it is open; in one transaction. Tells the current
    /// epoch, advanced or not.
    async fn advance(&self) -> Result<Epoch, LedgerError>;

    /// Live roots and open uploads, as they are now or later, never as they were before the call.
    async fn roots(&self) -> Result<Roots, LedgerError>;
}

/// The records in memory: the reference of the rules, for tests and tools.
#[derive(Debug, Default)]
pub struct MemoryLedger {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    epoch: Epoch,
    open: BTreeMap<SnapshotKey, (Epoch, Option<SnapshotKey>)>,
    completed: BTreeMap<SnapshotKey, RootHash>,
    deleted: BTreeSet<SnapshotKey>,
}

impl MemoryLedger {
    /// Opens an upload; its epoch.
    pub fn open(&self, id: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<Epoch, StorageError> {
        let mut state = self.state.lock();
        if state.open.contains_key(id) || state.completed.contains_key(id) {
            return Err(StorageError::Usage(format!("snapshot id {id} was given out before")));
        }
        if let Some(parent) =
            parent.filter(|parent| !state.completed.contains_key(*parent) || state.deleted.contains(*parent))
        {
            return Err(StorageError::Usage(format!("parent {parent} is not live")));
        }
        let epoch = state.epoch;
        state.open.insert(id.clone(), (epoch, parent.cloned()));
        Ok(epoch)
    }

    /// Ends an upload: `Some` = completed with that root, `None` = failed.
    pub fn close(&self, id: &SnapshotKey, root_hash: Option<RootHash>) {
        let mut state = self.state.lock();
        if state.open.remove(id).is_some()
            && let Some(root_hash) = root_hash
        {
            state.completed.insert(id.clone(), root_hash);
        }
    }

    /// Deletes a snapshot; its content stays while an open upload needs it.
    pub fn delete(&self, id: &SnapshotKey) {
        self.state.lock().deleted.insert(id.clone());
    }
}

#[async_trait]
impl Ledger for MemoryLedger {
    async fn epoch(&self) -> Result<Epoch, LedgerError> {
        Ok(self.state.lock().epoch)
    }

    async fn advance(&self) -> Result<Epoch, LedgerError> {
        let mut state = self.state.lock();
        if state.open.values().all(|(epoch, _)| *epoch >= state.epoch) {
            state.epoch = state.epoch.next().ok_or("all epochs are used up")?;
        }
        Ok(state.epoch)
    }

    async fn roots(&self) -> Result<Roots, LedgerError> {
        let state = self.state.lock();
        let pinned: BTreeSet<&SnapshotKey> = state.open.values().filter_map(|(_, parent)| parent.as_ref()).collect();
        let live = state
            .completed
            .iter()
            .filter(|(id, _)| !state.deleted.contains(*id) || pinned.contains(id))
            .map(|(id, hash)| LiveRoot { id: id.clone(), root_hash: Some(*hash) })
            .collect();
        Ok(Roots { live, open: state.open.keys().cloned().collect() })
    }
}
