//! Ready-made sources of chunks: a raw disk file, and another snapshot.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::task::spawn_blocking;

use crate::chunk::{CHUNK_BYTES, ChunkStore, chunk_count};
use crate::manifest::Manifest;
use crate::objects::StorageError;
use crate::raw::next_data;
use crate::upload::{ChunkSource, SourceChunk, SourceError};

/// The chunks of a raw disk file that are not holes. Nobody may write to the file meanwhile.
#[derive(Debug)]
pub struct FileSource {
    file: Arc<File>,
    path: PathBuf,
    size_bytes: u64,
    left: Mutex<VecDeque<u64>>,
    total: u64,
}

impl FileSource {
    /// Looks for data in the file. Blocks for as long as that takes, milliseconds on usual file systems.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        let file = File::open(path).map_err(StorageError::io("open", path))?;
        let size_bytes = file.metadata().map_err(StorageError::io("look at", path))?.len();
        let mut left: VecDeque<u64> = VecDeque::new();
        let mut at = 0;
        while let Some((start, end)) = next_data(&file, at, size_bytes).map_err(StorageError::io("read", path))? {
            let first = (start / CHUNK_BYTES as u64).max(left.back().map_or(0, |last| last + 1));
            left.extend(first..chunk_count(end));
            at = end;
        }
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
            size_bytes,
            total: left.len() as u64,
            left: Mutex::new(left),
        })
    }

    /// Size of the file in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

#[async_trait]
impl ChunkSource for FileSource {
    async fn next(&self) -> Result<Option<SourceChunk>, SourceError> {
        let next = self.left.lock().pop_front();
        let Some(index) = next else {
            return Ok(None);
        };
        let file = self.file.clone();
        let offset = index * CHUNK_BYTES as u64;
        let inside = self.size_bytes.saturating_sub(offset).min(CHUNK_BYTES as u64) as usize;
        let content = spawn_blocking(move || {
            let mut content = vec![0; CHUNK_BYTES];
            file.read_exact_at(content.get_mut(..inside).unwrap_or_default(), offset).map(|()| Bytes::from(content))
        });
        let content = content.await?.map_err(StorageError::io("read", &self.path))?;
        Ok(Some(SourceChunk { index, content: Some(content) }))
    }

    fn total(&self) -> u64 {
        self.total
    }
}

/// The present chunks of a snapshot, for copies into another store or key domain.
pub struct ManifestSource {
    store: ChunkStore,
    manifest: Arc<Manifest>,
    left: Mutex<VecDeque<u64>>,
}

impl fmt::Debug for ManifestSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManifestSource").field("id", self.manifest.id()).finish_non_exhaustive()
    }
}

impl ManifestSource {
    /// All chunks of `manifest`, read through `store`.
    pub fn new(store: ChunkStore, manifest: Arc<Manifest>) -> Result<Self, StorageError> {
        manifest.check_domain(&store)?;
        let left = Mutex::new(manifest.chunks().collect());
        Ok(Self { store, manifest, left })
    }
}

#[async_trait]
impl ChunkSource for ManifestSource {
    async fn next(&self) -> Result<Option<SourceChunk>, SourceError> {
        let next = self.left.lock().pop_front();
        let Some(index) = next else {
            return Ok(None);
        };
        let content = self.manifest.read_chunk(&self.store, index).await?;
        Ok(Some(SourceChunk { index, content }))
    }

    fn total(&self) -> u64 {
        self.manifest.present_chunks()
    }
}
