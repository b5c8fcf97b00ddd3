//! Recent commits in memory, from which watchers read without touching the disk.
//!
//! Watchers pull: each keeps the revision it wants next and takes what is there from it on. The ring
//! forgets its oldest commits when it is full; a watcher that fell behind it reads the log instead.
//! So neither side waits for the other, and there is nothing to lose or to deliver twice.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::read::event_size;
use crate::model::{Event, Revision, WatchBatch};

/// Commits that a watcher takes at once.
const TAKE: usize = 256;

/// One committed revision.
#[derive(Debug)]
pub(super) struct Commit {
    revision: Revision,
    events: Vec<Event>,
    bytes: usize,
}

impl Commit {
    pub(super) fn new(revision: Revision, events: Vec<Event>) -> Self {
        let bytes = events.iter().map(event_size).sum();
        Self { revision, events, bytes }
    }

    /// What a watcher of `prefix` sees of it.
    pub(super) fn seen_under(&self, prefix: &str) -> Option<WatchBatch> {
        let events: Vec<Event> = self.events.iter().filter(|event| event.key().starts_with(prefix)).cloned().collect();
        (!events.is_empty()).then_some(WatchBatch { revision: self.revision, events })
    }
}

/// The ring of recent commits and the newest revision.
#[derive(Debug)]
pub(super) struct Hub {
    ring: Mutex<Ring>,
    head: watch::Sender<Revision>,
}

#[derive(Debug)]
struct Ring {
    /// Consecutive revisions.
    commits: VecDeque<Arc<Commit>>,
    bytes: usize,
    max_commits: usize,
    max_bytes: usize,
}

/// What the ring has for a watcher.
#[derive(Debug)]
pub(super) enum Recent {
    /// These commits, from the wanted revision on; empty when it does not exist yet.
    Commits(Vec<Arc<Commit>>),
    /// Nothing: the wanted revision is older.
    Forgotten,
}

impl Hub {
    /// A hub that starts after `head` and keeps up to `max_commits` commits and `max_bytes` bytes.
    pub(super) fn new(head: Revision, max_commits: usize, max_bytes: usize) -> Self {
        let ring = Ring { commits: VecDeque::new(), bytes: 0, max_commits, max_bytes };
        Self { ring: Mutex::new(ring), head: watch::Sender::new(head) }
    }

    /// Shows committed revisions to all watchers.
    pub(super) fn publish(&self, commits: Vec<Commit>) {
        let Some(newest) = commits.last().map(|commit| commit.revision) else { return };
        {
            let mut ring = self.ring.lock();
            for commit in commits {
                ring.bytes += commit.bytes;
                ring.commits.push_back(Arc::new(commit));
            }
            while ring.commits.len() > ring.max_commits || ring.bytes > ring.max_bytes {
                let Some(oldest) = ring.commits.pop_front() else { break };
                ring.bytes -= oldest.bytes;
            }
        }
        self.head.send_replace(newest);
    }

    /// Tells of every new head. Its sender goes with the hub.
    pub(super) fn head(&self) -> watch::Receiver<Revision> {
        self.head.subscribe()
    }

    /// Commits from revision `next` on, a bounded number of them.
    pub(super) fn recent(&self, next: Revision) -> Recent {
        let ring = self.ring.lock();
        let oldest = ring.commits.front().map_or_else(|| *self.head.borrow() + 1, |commit| commit.revision);
        match usize::try_from(next - oldest) {
            Ok(skip) => Recent::Commits(ring.commits.iter().skip(skip).take(TAKE).cloned().collect()),
            Err(_) => Recent::Forgotten,
        }
    }
}

#[cfg(test)]
#[path = "hub_test.rs"]
mod tests;
