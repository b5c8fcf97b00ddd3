//! Export: a snapshot becomes a disk image file.

mod qcow2;

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::task::spawn_blocking;

use crate::chunk::{CHUNK_BYTES, ChunkStore};
use crate::format::UnknownFormat;
use crate::manifest::Manifest;
use crate::objects::StorageError;
use crate::upload::DEFAULT_PARALLEL;
use crate::writer::{TemporaryFile, is_zero};

/// Formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExportFormat {
    /// The bytes of the disk; zeros are holes.
    Raw,
    /// QEMU copy-on-write 3, clusters of 64 KiB, not compressed.
    Qcow2,
}

impl fmt::Display for ExportFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for ExportFormat {
    type Err = UnknownFormat;
    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

/// Called with (chunks done, chunks in all); must return quickly.
pub type OnExportProgress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// An exported disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Size of the disk in bytes.
    pub virtual_bytes: u64,
    /// Bytes of content that were written.
    pub data_bytes: u64,
}

/// Writes the disk that `manifest` describes to `path`. The file appears (or is replaced) in one step when it is complete and
/// on disk; after an error nothing is left.
pub async fn export(
    store: &ChunkStore,
    manifest: &Manifest,
    path: &Path,
    format: ExportFormat,
    progress: OnExportProgress,
) -> Result<Exported, StorageError> {
    manifest.check_domain(store)?;
    let target = path.to_owned();
    let output = spawn_blocking(move || TemporaryFile::beside(&target)).await??;
    let file = Arc::new(output.file.try_clone().map_err(StorageError::io("open", path))?);
    let data_bytes = match format {
        ExportFormat::Raw => raw(store, manifest, file, path, &progress).await?,
        ExportFormat::Qcow2 => qcow2::write(store, manifest, file, path, &progress).await?,
    };
    spawn_blocking(move || output.persist()).await??;
    Ok(Exported { virtual_bytes: manifest.size_bytes(), data_bytes })
}

async fn raw(
    store: &ChunkStore,
    manifest: &Manifest,
    file: Arc<File>,
    path: &Path,
    progress: &OnExportProgress,
) -> Result<u64, StorageError> {
    let size = manifest.size_bytes();
    file.set_len(size).map_err(StorageError::io("set the size of", path))?;
    let reads = manifest.entries().map(|(index, chunk)| {
        let file = file.clone();
        async move {
            let content = store.get_chunk(&chunk).await?;
            let offset = index * CHUNK_BYTES as u64;
            let inside = (size - offset).min(CHUNK_BYTES as u64) as usize;
            spawn_blocking(move || write_blocks(&file, &content.slice(..inside), offset))
                .await?
                .map_err(StorageError::io("write", path))
        }
    });
    let mut reads = futures::stream::iter(reads).buffer_unordered(DEFAULT_PARALLEL);
    let (mut done, mut data_bytes) = (0, 0);
    while let Some(written) = reads.try_next().await? {
        done += 1;
        data_bytes += written;
        progress(done, manifest.present_chunks());
    }
    Ok(data_bytes)
}

/// Writes what is not zero, in blocks of 4 KiB.
fn write_blocks(file: &File, content: &Bytes, offset: u64) -> std::io::Result<u64> {
    const BLOCK: usize = 4096;
    let mut written = 0;
    let mut at = 0;
    while at < content.len() {
        let run = |from: usize, zero: bool| {
            let blocks = content.get(from..).unwrap_or_default().chunks(BLOCK);
            blocks.take_while(|block| is_zero(block) == zero).map(<[u8]>::len).sum::<usize>()
        };
        at += run(at, true);
        let length = run(at, false);
        file.write_all_at(content.get(at..at + length).unwrap_or_default(), offset + at as u64)?;
        at += length;
        written += length as u64;
    }
    Ok(written)
}

#[cfg(test)]
#[path = "../export_test.rs"]
mod tests;
