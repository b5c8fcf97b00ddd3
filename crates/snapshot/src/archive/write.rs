//! Storing an AMI.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart};
use tokio::task::spawn_blocking;

use super::record::{encode_chunk, encode_end};
use super::{ArchiveHeader, ArchivedDisk, FIXED_BYTES, MAGIC, MAX_DISKS, MAX_HEADER_BYTES, OnArchiveProgress, VERSION};
use crate::chunk::{CHUNK_BYTES, ChunkStore};
use crate::manifest::Manifest;
use crate::objects::StorageError;
use crate::upload::DEFAULT_PARALLEL;

/// Parts in flight.
const PARALLEL_PARTS: usize = 4;
/// S3 takes at most 10,000 parts per object.
const MAX_PARTS: u64 = 9000;
const MIN_PART_BYTES: u64 = 10 << 20;

/// A disk to be stored.
#[derive(Clone, Debug)]
pub struct ArchiveDisk {
    /// What to call it.
    pub name: String,
    /// Where its chunks are.
    pub store: ChunkStore,
    /// Its content.
    pub manifest: Arc<Manifest>,
}

/// A stored archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Archived {
    /// Size of the object in bytes.
    pub bytes: u64,
    /// Chunks in it.
    pub chunks: u64,
}

/// Writes `disks` and `attributes` as one object `path` (multipart). It appears when it is complete; a failed one leaves nothing.
pub async fn write_archive(
    objects: &dyn ObjectStore,
    path: &str,
    attributes: serde_json::Map<String, serde_json::Value>,
    disks: &[ArchiveDisk],
    progress: OnArchiveProgress,
) -> Result<Archived, StorageError> {
    let path = Path::parse(path).map_err(|error| StorageError::Usage(error.to_string()))?;
    if disks.is_empty() || disks.len() > MAX_DISKS {
        return Err(StorageError::Usage(format!("an archive of {} disks", disks.len())));
    }
    for disk in disks {
        disk.manifest.check_domain(&disk.store)?;
    }
    let header = ArchiveHeader {
        attributes,
        disks: disks
            .iter()
            .map(|disk| ArchivedDisk {
                name: disk.name.clone(),
                size_bytes: disk.manifest.size_bytes(),
                present_chunks: disk.manifest.present_chunks(),
            })
            .collect(),
    };
    let chunks: u64 = header.disks.iter().map(|disk| disk.present_chunks).sum();
    let part_bytes = (chunks * (CHUNK_BYTES as u64 + 64) / MAX_PARTS).max(MIN_PART_BYTES) as usize;
    let upload = objects.put_multipart(&path).await.map_err(StorageError::objects("write", &path))?;
    let mut output = Output {
        upload: WriteMultipart::new_with_chunk_size(upload, part_bytes),
        hash: blake3::Hasher::new(),
        bytes: 0,
        path: &path,
    };
    match output.write_all(&header, disks, chunks, &progress).await {
        Ok(()) => {
            let bytes = output.bytes;
            output.upload.finish().await.map_err(StorageError::objects("write", &path))?;
            Ok(Archived { bytes, chunks })
        }
        Err(error) => {
            // The first error is the one to tell; a service's own rules end multipart uploads that were not aborted.
            let _ = output.upload.abort().await;
            Err(error)
        }
    }
}

struct Output<'a> {
    upload: WriteMultipart,
    hash: blake3::Hasher,
    bytes: u64,
    path: &'a Path,
}

impl Output<'_> {
    async fn write_all(
        &mut self,
        header: &ArchiveHeader,
        disks: &[ArchiveDisk],
        total: u64,
        progress: &OnArchiveProgress,
    ) -> Result<(), StorageError> {
        let json = serde_json::to_vec(header).map_err(|error| StorageError::Usage(error.to_string()))?;
        if json.len() > MAX_HEADER_BYTES as usize {
            return Err(StorageError::Usage(format!("attributes of {} bytes", json.len())));
        }
        let mut head = Vec::with_capacity(FIXED_BYTES + json.len() + 4);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&(json.len() as u32).to_le_bytes());
        head.extend_from_slice(&json);
        let crc = crc32c::crc32c(&head);
        head.extend_from_slice(&crc.to_le_bytes());
        self.put(&head).await?;
        let mut done = 0;
        for (number, disk) in disks.iter().enumerate() {
            let store = disk.store.clone();
            let records = disk.manifest.entries().map(|(index, chunk)| {
                let store = store.clone();
                async move {
                    let content = store.get_chunk(&chunk).await?;
                    Ok::<_, StorageError>(spawn_blocking(move || encode_chunk(number as u16, index, &content)).await?)
                }
            });
            let mut records = futures::stream::iter(records).buffered(DEFAULT_PARALLEL);
            while let Some(record) = records.try_next().await? {
                self.put(&record).await?;
                done += 1;
                progress(done, total);
            }
        }
        let end = encode_end(done, self.hash.finalize().as_bytes());
        self.put(&end).await
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.upload.wait_for_capacity(PARALLEL_PARTS).await.map_err(StorageError::objects("write", self.path))?;
        self.hash.update(bytes);
        self.upload.write(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}
