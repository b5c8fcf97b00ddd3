//! One watch: a cursor over the ring of recent commits and, behind it, the log.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use tokio::sync::watch;
use tokio_stream::Stream;

use super::Shared;
use super::hub::Recent;
use super::read::Reader;
use crate::error::{Error, Result};
use crate::model::{Revision, WatchBatch};

/// Bytes of events that are read from the log at once.
const READ_BYTES: usize = 1024 * 1024;

/// A watcher's place in the history.
pub(super) struct Watcher {
    shared: Weak<Shared>,
    head: watch::Receiver<Revision>,
    prefix: Arc<str>,
    /// First revision that has not been looked at.
    next: Revision,
    /// Batches below `next` that are yet to be delivered.
    pending: VecDeque<WatchBatch>,
}

impl Watcher {
    pub(super) fn new(shared: &Arc<Shared>, prefix: &str, next: Revision) -> Self {
        Self {
            shared: Arc::downgrade(shared),
            head: shared.hub.head(),
            prefix: prefix.into(),
            next,
            pending: VecDeque::new(),
        }
    }

    /// The batches as a stream.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<WatchBatch>> + Send + 'static {
        futures::stream::unfold(self, |mut watcher| async move {
            let batch = watcher.batch().await;
            Some((batch, watcher))
        })
    }

    async fn batch(&mut self) -> Result<WatchBatch> {
        loop {
            if let Some(batch) = self.pending.pop_front() {
                return Ok(batch);
            }
            if self.next > *self.head.borrow_and_update() {
                self.head.changed().await.map_err(|_| Error::Closed)?;
                continue;
            }
            let shared = self.shared.upgrade().ok_or(Error::Closed)?;
            match shared.hub.recent(self.next) {
                Recent::Commits(commits) if !commits.is_empty() => {
                    self.next += i64::try_from(commits.len()).unwrap_or(i64::MAX);
                    self.pending.extend(commits.iter().filter_map(|commit| commit.seen_under(&self.prefix)));
                }
                Recent::Commits(_) | Recent::Forgotten => self.read_log(&shared).await?,
            }
        }
    }

    async fn read_log(&mut self, shared: &Arc<Shared>) -> Result<()> {
        let (prefix, from) = (Arc::clone(&self.prefix), self.next);
        let (batches, next) =
            shared.snapshot(move |reader: &Reader<'_>| reader.history(&prefix, from, READ_BYTES)).await?;
        self.pending = batches.into();
        self.next = next;
        Ok(())
    }
}
