//! Import: a disk image of any known format becomes a snapshot.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio::sync::{Mutex, mpsc};
use tokio::task::spawn_blocking;

use crate::chunk::{CHUNK_BYTES, ChunkStore};
use crate::convert::{Limits, OpenedImage};
use crate::epoch::Epoch;
use crate::error::ImageError;
use crate::format::Format;
use crate::manifest::{Committed, ManifestSpec};
use crate::objects::{SnapshotKey, StorageError};
use crate::upload::{ChunkSource, SnapshotUpload, SourceChunk, SourceError, UploadProgress};
use crate::writer::DiskSink;

/// Chunks between the reader and the workers.
const QUEUE: usize = 16;

/// A disk image to import.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// The file.
    pub path: PathBuf,
    /// Its format; `None` tells it by content.
    pub format: Option<Format>,
    /// What it may use.
    pub limits: Limits,
    /// Id of the snapshot to be made.
    pub id: SnapshotKey,
    /// Epoch that the upload was opened in.
    pub epoch: Epoch,
}

/// How far an import is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportProgress {
    /// Bytes of the disk that were read (holes count).
    pub bytes_done: u64,
    /// Size of the disk in bytes.
    pub bytes_total: u64,
    /// What became of the chunks that are not holes.
    pub chunks: UploadProgress,
}

/// Called as an import goes on, from any thread; must return quickly.
pub type OnImportProgress = Arc<dyn Fn(ImportProgress) + Send + Sync>;

/// An imported disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Format that was read.
    pub format: Format,
    /// Size of the disk in bytes, a multiple of 512.
    pub virtual_bytes: u64,
    /// The snapshot.
    pub manifest: Committed,
    /// What became of its chunks.
    pub chunks: UploadProgress,
}

/// Reads the image into chunks and publishes them as snapshot `request.id`. After an error or a crash nothing of it is visible,
/// and the same call (same id and epoch) uploads only what is still missing. The image is never trusted.
///
/// # Errors
/// [`StorageError::Image`] when the image is to blame.
pub async fn import(
    store: &ChunkStore,
    request: ImportRequest,
    progress: OnImportProgress,
) -> Result<Imported, StorageError> {
    let ImportRequest { path, format, limits, id, epoch } = request;
    let opened = spawn_blocking({
        let path = path.clone();
        move || OpenedImage::open(&path, format, limits)
    });
    let opened = opened.await??;
    let (format, virtual_bytes) = (opened.format(), opened.virtual_bytes());
    let (sender, receiver) = mpsc::channel(QUEUE);
    let handed = Arc::new(AtomicU64::new(0));
    let read = Arc::new(AtomicU64::new(0));
    let reader = spawn_blocking({
        let (handed, read) = (handed.clone(), read.clone());
        move || {
            let mut sink = ChunkSink { sender, handed, position: 0, chunk: BytesMut::new(), path };
            let copied =
                opened.copy(&mut sink, &|done, _| read.store(done, Ordering::Relaxed)).and_then(|()| sink.flush());
            let last = match copied {
                Ok(()) => Item::End,
                Err(error) => Item::Failed(error),
            };
            // Nobody listens any more when the upload failed first.
            let _ = sink.sender.blocking_send(last);
        }
    });
    let source = ImportSource { receiver: Mutex::new(Some(receiver)), handed };
    let spec = ManifestSpec { id, size_bytes: virtual_bytes, epoch };
    let upload = SnapshotUpload::new(store.clone(), spec, None).with_progress({
        let read = read.clone();
        Arc::new(move |chunks| {
            let bytes_done = read.load(Ordering::Relaxed).min(virtual_bytes);
            progress(ImportProgress { bytes_done, bytes_total: virtual_bytes, chunks });
        })
    });
    let uploaded = upload.run(&source).await;
    // Closes the channel, so that a reader whose chunks nobody wants ends.
    source.receiver.lock().await.take();
    reader.await?;
    let uploaded = uploaded.map_err(|error| match error {
        StorageError::Source { source } => match source.downcast::<ImageError>() {
            Ok(error) => StorageError::Image(*error),
            Err(source) => StorageError::Source { source },
        },
        error => error,
    })?;
    Ok(Imported { format, virtual_bytes, manifest: uploaded.manifest, chunks: uploaded.chunks })
}

enum Item {
    Chunk(SourceChunk),
    End,
    Failed(ImageError),
}

/// Cuts the disk into chunks; holes are not handed on.
struct ChunkSink {
    sender: mpsc::Sender<Item>,
    handed: Arc<AtomicU64>,
    position: u64,
    /// What is known of the chunk at `position`, from its start; empty = only zeros so far.
    chunk: BytesMut,
    path: PathBuf,
}

impl ChunkSink {
    /// Sends the chunk that ends (or is cut) here.
    fn flush(&mut self) -> Result<(), ImageError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let mut content = std::mem::take(&mut self.chunk);
        let index = (self.position - 1) / CHUNK_BYTES as u64;
        content.resize(CHUNK_BYTES, 0);
        self.handed.fetch_add(1, Ordering::Relaxed);
        let item = Item::Chunk(SourceChunk { index, content: Some(Bytes::from(content)) });
        self.sender.blocking_send(item).map_err(|_| {
            ImageError::io("store the content of", &self.path)(std::io::Error::other("the upload has ended"))
        })
    }

    fn in_chunk(&self) -> usize {
        (self.position % CHUNK_BYTES as u64) as usize
    }
}

impl DiskSink for ChunkSink {
    fn position(&self) -> u64 {
        self.position
    }

    fn data(&mut self, mut data: &[u8]) -> Result<(), ImageError> {
        while !data.is_empty() {
            let at = self.in_chunk();
            let (piece, rest) = data.split_at(data.len().min(CHUNK_BYTES - at));
            if self.chunk.is_empty() {
                self.chunk.reserve(CHUNK_BYTES);
            }
            self.chunk.resize(at, 0);
            self.chunk.extend_from_slice(piece);
            self.position += piece.len() as u64;
            if self.in_chunk() == 0 {
                self.flush()?;
            }
            data = rest;
        }
        Ok(())
    }

    fn zeros(&mut self, length: u64, step: &mut dyn FnMut(u64)) -> Result<(), ImageError> {
        let end = self.position + length;
        if !self.chunk.is_empty() {
            let chunk_end = self.position.next_multiple_of(CHUNK_BYTES as u64);
            self.position = end.min(chunk_end);
            if self.position == chunk_end {
                self.flush()?;
            }
        }
        self.position = end;
        step(end);
        Ok(())
    }
}

struct ImportSource {
    receiver: Mutex<Option<mpsc::Receiver<Item>>>,
    handed: Arc<AtomicU64>,
}

#[async_trait]
impl ChunkSource for ImportSource {
    async fn next(&self) -> Result<Option<SourceChunk>, SourceError> {
        let mut receiver = self.receiver.lock().await;
        let Some(open) = receiver.as_mut() else {
            return Ok(None);
        };
        match open.recv().await {
            Some(Item::Chunk(chunk)) => Ok(Some(chunk)),
            Some(Item::End) => {
                *receiver = None;
                Ok(None)
            }
            Some(Item::Failed(error)) => {
                *receiver = None;
                Err(Box::new(error))
            }
            // Only the end marker says that the disk was read to its end.
            None => {
                *receiver = None;
                Err("the image's reader died".into())
            }
        }
    }

    fn total(&self) -> u64 {
        self.handed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[path = "import_test.rs"]
mod tests;
