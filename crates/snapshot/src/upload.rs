//! Uploads: the chunks of a volume at one instant become a snapshot.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;

use crate::chunk::{ChunkRef, ChunkStore, PutOutcome};
use crate::manifest::{Committed, Manifest, ManifestSpec, ManifestWriter};
use crate::objects::StorageError;

/// Whatever a source of chunks fails with.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Chunks worked on at a time when nothing else is said: enough to hide 20 ms of a store's latency behind each other.
pub const DEFAULT_PARALLEL: usize = 32;

/// A chunk of the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceChunk {
    /// Which one.
    pub index: u64,
    /// [`crate::CHUNK_BYTES`] of content, behind the end of the volume zeros; `None` = all zeros.
    pub content: Option<Bytes>,
}

/// Where the chunks of an upload come from.
#[async_trait]
pub trait ChunkSource: Send + Sync {
    /// Hands out the next chunk, each one once, in whatever order suits the source; `None` when all were. Several workers call
    /// this at the same time.
    async fn next(&self) -> Result<Option<SourceChunk>, SourceError>;

    /// How many chunks there are in all, for the progress.
    fn total(&self) -> u64;

    /// The chunk at `index` is in the store: whatever keeps it (a stage file) may let it go.
    fn stored(&self, index: u64) {
        let _ = index;
    }
}

/// Reads one chunk by its index.
pub type ReadChunk = Box<dyn Fn(u64) -> BoxFuture<'static, Result<Option<Bytes>, SourceError>> + Send + Sync>;

/// A source that reads listed chunks in their order.
pub struct IndexedSource {
    /// Chunks, and which reader each is for.
    left: Mutex<VecDeque<(u64, usize)>>,
    total: u64,
    readers: Vec<ReadChunk>,
}

impl IndexedSource {
    /// The chunks `indexes`, read by `read` (`None` = zeros).
    pub fn new(indexes: impl IntoIterator<Item = u64>, read: ReadChunk) -> Self {
        Self { left: Mutex::default(), total: 0, readers: Vec::new() }.then(indexes, read)
    }

    /// After those, the chunks `indexes`, read by another `read`.
    pub fn then(mut self, indexes: impl IntoIterator<Item = u64>, read: ReadChunk) -> Self {
        let reader = self.readers.len();
        self.readers.push(read);
        let left = self.left.get_mut();
        left.extend(indexes.into_iter().map(|index| (index, reader)));
        self.total = left.len() as u64;
        self
    }
}

impl fmt::Debug for IndexedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IndexedSource").field("left", &self.left.lock().len()).finish_non_exhaustive()
    }
}

#[async_trait]
impl ChunkSource for IndexedSource {
    async fn next(&self) -> Result<Option<SourceChunk>, SourceError> {
        let next = self.left.lock().pop_front();
        let Some((index, read)) = next.and_then(|(index, reader)| Some((index, self.readers.get(reader)?))) else {
            return Ok(None);
        };
        Ok(Some(SourceChunk { index, content: read(index).await? }))
    }

    fn total(&self) -> u64 {
        self.total
    }
}

/// How far an upload is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UploadProgress {
    /// Chunks to look at, as the source says.
    pub chunks_total: u64,
    /// Chunks done, in whatever way.
    pub chunks_done: u64,
    /// Of these: all zeros, nothing stored.
    pub chunks_zero: u64,
    /// Of these: as in the parent.
    pub chunks_unchanged: u64,
    /// Of these: found in the store.
    pub chunks_found: u64,
    /// Of these: written.
    pub chunks_written: u64,
    /// Bytes written to the store, as stored.
    pub stored_bytes: u64,
}

impl UploadProgress {
    /// 0..=100, as EC2 shows it.
    pub fn percent(&self) -> u8 {
        if self.chunks_total == 0 {
            return 100;
        }
        (u128::from(self.chunks_done.min(self.chunks_total)) * 100 / u128::from(self.chunks_total)) as u8
    }
}

/// Called after every chunk, from any thread; must return quickly.
pub type OnProgress = Arc<dyn Fn(UploadProgress) + Send + Sync>;

/// A finished upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// The manifest.
    pub manifest: Committed,
    /// What became of the chunks.
    pub chunks: UploadProgress,
}

/// One upload: chunks in, a published manifest out.
///
/// Nothing of an upload that was not finished is visible: what it leaves in the store is either found and used by the next
/// attempt of the same upload (same id, same epoch) or collected as garbage when the upload is closed. So resuming after a crash
/// is doing it again; chunks that are in the store already are only read and hashed. Dropping the future ends the upload.
#[derive(Clone)]
pub struct SnapshotUpload {
    store: ChunkStore,
    spec: ManifestSpec,
    parent: Option<Arc<Manifest>>,
    parallel: usize,
    progress: Option<OnProgress>,
}

impl fmt::Debug for SnapshotUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotUpload")
            .field("spec", &self.spec)
            .field("parallel", &self.parallel)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Counters {
    done: AtomicU64,
    zero: AtomicU64,
    unchanged: AtomicU64,
    found: AtomicU64,
    written: AtomicU64,
    stored_bytes: AtomicU64,
}

impl Counters {
    fn count(&self, outcome: &PutOutcome) {
        let kind = match outcome {
            PutOutcome::Zero => &self.zero,
            PutOutcome::Unchanged(_) => &self.unchanged,
            PutOutcome::Found(_) => &self.found,
            PutOutcome::Written { stored_bytes, .. } => {
                self.stored_bytes.fetch_add(*stored_bytes, Ordering::Relaxed);
                &self.written
            }
        };
        kind.fetch_add(1, Ordering::Relaxed);
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    fn progress(&self, chunks_total: u64) -> UploadProgress {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        UploadProgress {
            chunks_total,
            chunks_done: read(&self.done),
            chunks_zero: read(&self.zero),
            chunks_unchanged: read(&self.unchanged),
            chunks_found: read(&self.found),
            chunks_written: read(&self.written),
            stored_bytes: read(&self.stored_bytes),
        }
    }
}

impl SnapshotUpload {
    /// An upload of `spec`. What the source does not hand out is as in `parent`, or zeros without one. The parent must be pinned
    /// in the control plane's records as long as the upload is open.
    pub fn new(store: ChunkStore, spec: ManifestSpec, parent: Option<Arc<Manifest>>) -> Self {
        Self { store, spec, parent, parallel: DEFAULT_PARALLEL, progress: None }
    }

    /// Works on this many chunks at a time (each up to 1.5 MiB of memory).
    pub fn with_parallel(mut self, parallel: usize) -> Self {
        self.parallel = parallel.max(1);
        self
    }

    /// Tells how far it is.
    pub fn with_progress(mut self, progress: OnProgress) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Uploads what `source` hands out, then publishes the manifest.
    pub async fn run(&self, source: &dyn ChunkSource) -> Result<Uploaded, StorageError> {
        let parent = self.parent.as_deref();
        let manifest = Mutex::new(ManifestWriter::new(self.spec.clone(), parent)?);
        if let Some(parent) = parent {
            parent.check_domain(&self.store)?;
        }
        let counters = Counters::default();
        all_of((0..self.parallel).map(|_| self.work(source, &manifest, &counters))).await?;
        let manifest = manifest.into_inner().commit(&self.store).await?;
        Ok(Uploaded { manifest, chunks: counters.progress(source.total()) })
    }

    async fn work(
        &self,
        source: &dyn ChunkSource,
        manifest: &Mutex<ManifestWriter<'_>>,
        counters: &Counters,
    ) -> Result<(), StorageError> {
        let failed = |source| StorageError::Source { source };
        while let Some(SourceChunk { index, content }) = source.next().await.map_err(failed)? {
            let before: Option<ChunkRef> = self.parent.as_ref().and_then(|parent| parent.entry(index));
            let outcome = match content {
                Some(content) => self.store.put(self.spec.epoch, content, before).await?,
                None => PutOutcome::Zero,
            };
            manifest.lock().set(index, outcome.chunk())?;
            source.stored(index);
            counters.count(&outcome);
            if let Some(progress) = &self.progress {
                progress(counters.progress(source.total()));
            }
        }
        Ok(())
    }
}

/// Runs all `workers` at the same time and ends with the first error of any, whichever worker it is.
pub(crate) async fn all_of(
    workers: impl Iterator<Item = impl Future<Output = Result<(), StorageError>>>,
) -> Result<(), StorageError> {
    let mut workers: FuturesUnordered<_> = workers.collect();
    while workers.try_next().await?.is_some() {}
    Ok(())
}

#[cfg(test)]
#[path = "upload_test.rs"]
mod tests;
