//! Restoring an AMI.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::task::spawn_blocking;

use super::record::{RECORD_BYTES, Record, decode, payload_bytes, unpack};
use super::{ArchiveHeader, FIXED_BYTES, MAGIC, MAX_DISKS, MAX_HEADER_BYTES, OnArchiveProgress, VERSION};
use crate::chunk::{CHUNK_BYTES, ChunkRef, ChunkStore, chunk_count};
use crate::fields::field;
use crate::manifest::{Committed, MAX_VOLUME_BYTES, ManifestSpec, ManifestWriter};
use crate::objects::{Damage, StorageError};
use crate::upload::DEFAULT_PARALLEL;
use crate::writer::is_zero;

/// Bytes asked for at a time, and how many times ahead.
const WINDOW: u64 = 4 << 20;
const WINDOWS_AHEAD: usize = 4;

/// An archive whose header was read and checked.
#[derive(Debug)]
pub struct OpenedArchive {
    objects: Arc<dyn ObjectStore>,
    path: Path,
    bytes: u64,
    header: ArchiveHeader,
    /// Header and its checksum, hashed again when restoring.
    head: Bytes,
}

/// Where a disk is to be restored to.
#[derive(Clone, Debug)]
pub struct RestoreDisk {
    /// Store and key domain.
    pub store: ChunkStore,
    /// Id and epoch of the snapshot it becomes; the size must be the disk's.
    pub spec: ManifestSpec,
}

/// Reads the header of the archive `path`.
pub async fn open_archive(objects: Arc<dyn ObjectStore>, path: &str) -> Result<OpenedArchive, StorageError> {
    let path = Path::parse(path).map_err(|error| StorageError::Usage(error.to_string()))?;
    let bytes = objects.head(&path).await.map_err(StorageError::reading(&path))?.size;
    let read = async |range: Range<u64>| {
        let range = range.start..range.end.min(bytes);
        objects.get_range(&path, range).await.map_err(StorageError::reading(&path))
    };
    let damaged = StorageError::damaged;
    if bytes < FIXED_BYTES as u64 {
        return Err(damaged(&path)(Damage::Size { expected: FIXED_BYTES as u64, found: bytes }));
    }
    let fixed = read(0..FIXED_BYTES as u64).await?;
    if !fixed.starts_with(MAGIC) {
        return Err(damaged(&path)(Damage::Signature("an archive")));
    }
    let version = u32::from_le_bytes(field(&fixed, 8));
    if version != VERSION {
        return Err(damaged(&path)(Damage::Version(version)));
    }
    let json_bytes = u32::from_le_bytes(field(&fixed, 12));
    if json_bytes > MAX_HEADER_BYTES {
        return Err(damaged(&path)(Damage::Field(format!("a header of {json_bytes} bytes"))));
    }
    let end = FIXED_BYTES as u64 + u64::from(json_bytes) + 4;
    if bytes < end {
        return Err(damaged(&path)(Damage::Size { expected: end, found: bytes }));
    }
    let head = read(0..end).await?;
    let header = parse_head(&head).map_err(damaged(&path))?;
    Ok(OpenedArchive { objects, path, bytes, header, head })
}

/// The header, from all bytes before the first record.
pub(super) fn parse_head(head: &[u8]) -> Result<ArchiveHeader, Damage> {
    let covered = head.len().saturating_sub(4);
    let (expected, found) =
        (u32::from_le_bytes(field(head, covered)), crc32c::crc32c(head.get(..covered).unwrap_or_default()));
    if expected != found {
        return Err(Damage::Checksum { expected, found });
    }
    let json = head.get(FIXED_BYTES..covered).unwrap_or_default();
    let header: ArchiveHeader = serde_json::from_slice(json).map_err(|error| Damage::Field(error.to_string()))?;
    if header.disks.is_empty() || header.disks.len() > MAX_DISKS {
        return Err(Damage::Field(format!("{} disks", header.disks.len())));
    }
    for disk in &header.disks {
        let fits =
            (1..=MAX_VOLUME_BYTES).contains(&disk.size_bytes) && disk.present_chunks <= chunk_count(disk.size_bytes);
        if !fits {
            let (name, size, chunks) = (&disk.name, disk.size_bytes, disk.present_chunks);
            return Err(Damage::Field(format!("disk {name} of {size} bytes with {chunks} chunks")));
        }
    }
    Ok(header)
}

impl OpenedArchive {
    /// What it holds.
    pub fn header(&self) -> &ArchiveHeader {
        &self.header
    }

    /// Restores all disks, `targets` in the header's order. Nothing is published before the whole archive was read and its hash found
    /// right. Calling it again with the same targets after an error is harmless and uploads only what is missing.
    pub async fn restore(
        &self,
        targets: &[RestoreDisk],
        progress: OnArchiveProgress,
    ) -> Result<Vec<Committed>, StorageError> {
        if targets.len() != self.header.disks.len() {
            let (disks, targets) = (self.header.disks.len(), targets.len());
            return Err(StorageError::Usage(format!("{targets} targets for an archive of {disks} disks")));
        }
        let mut chunks: Vec<BTreeMap<u64, Option<ChunkRef>>> = Vec::new();
        for (disk, target) in self.header.disks.iter().zip(targets) {
            if disk.size_bytes != target.spec.size_bytes {
                let (size, wanted) = (disk.size_bytes, target.spec.size_bytes);
                return Err(StorageError::Usage(format!("disk {} has {size} bytes, not {wanted}", disk.name)));
            }
            chunks.push(BTreeMap::new());
        }
        let total = self.header.disks.iter().map(|disk| disk.present_chunks).sum();
        let puts = self.records().map_ok(|(disk, index, codec, payload)| async move {
            let target = targets.get(usize::from(disk)).filter(|target| index < chunk_count(target.spec.size_bytes));
            let Some(target) = target else {
                return Err(self.damaged(Damage::Field(format!("chunk {index} of disk {disk}"))));
            };
            let inside = target.spec.size_bytes - index * CHUNK_BYTES as u64;
            let content = spawn_blocking(move || {
                let content = unpack(codec, &payload)?;
                let beyond = content.get(inside.min(CHUNK_BYTES as u64) as usize..).unwrap_or_default();
                // It would turn up in volumes that are made larger.
                if is_zero(beyond) { Ok(content) } else { Err(Damage::Field("content behind a disk's end".to_owned())) }
            });
            let content = content.await?.map_err(|damage| self.damaged(damage))?;
            let chunk = target.store.put_chunk(target.spec.epoch, content.into()).await?;
            Ok((disk, index, chunk))
        });
        let mut puts = puts.try_buffer_unordered(DEFAULT_PARALLEL).boxed();
        let mut done = 0;
        while let Some((disk, index, chunk)) = puts.try_next().await? {
            if chunks.get_mut(usize::from(disk)).is_some_and(|chunks| chunks.insert(index, chunk).is_some()) {
                return Err(self.damaged(Damage::Field(format!("chunk {index} of disk {disk} stands there twice"))));
            }
            done += 1;
            progress(done, total);
        }
        drop(puts);
        for (disk, chunks) in self.header.disks.iter().zip(&chunks) {
            if chunks.len() as u64 != disk.present_chunks {
                let what = format!("{} chunks of disk {} instead of {}", chunks.len(), disk.name, disk.present_chunks);
                return Err(self.damaged(Damage::Field(what)));
            }
        }
        let mut committed = Vec::new();
        for (target, chunks) in targets.iter().zip(chunks) {
            let mut manifest = ManifestWriter::new(target.spec.clone(), None)?;
            for (index, chunk) in chunks {
                manifest.set(index, chunk)?;
            }
            committed.push(manifest.commit(&target.store).await?);
        }
        Ok(committed)
    }

    fn damaged(&self, damage: Damage) -> StorageError {
        StorageError::damaged(&self.path)(damage)
    }

    /// The records in order; ends in an error unless the end record is right.
    fn records(&self) -> BoxStream<'_, Result<(u16, u64, u8, Bytes), StorageError>> {
        let mut hash = blake3::Hasher::new();
        hash.update(&self.head);
        let reader = Reader { archive: self, windows: self.windows(self.head.len() as u64), ready: BytesMut::new() };
        let start = Some((reader, hash, 0u64));
        futures::stream::try_unfold(start, move |state| async move {
            let Some((mut reader, mut hash, count)) = state else {
                return Ok(None);
            };
            let head = reader.take(RECORD_BYTES).await?;
            let head: [u8; RECORD_BYTES] = field(&head, 0);
            let length = payload_bytes(&head).map_err(|damage| self.damaged(damage))?;
            let payload = reader.take(length).await?;
            match decode(&head, &payload).map_err(|damage| self.damaged(damage))? {
                Record::Chunk { disk, chunk, codec } => {
                    hash.update(&head);
                    hash.update(&payload);
                    Ok(Some(((disk, chunk, codec, payload), Some((reader, hash, count + 1)))))
                }
                Record::End { records } => {
                    if records != count || payload[..] != hash.finalize().as_bytes()[..] {
                        return Err(self.damaged(Damage::Content("its end does not fit what is before".to_owned())));
                    }
                    reader.end().await?;
                    Ok(None)
                }
            }
        })
        .boxed()
    }

    fn windows(&self, from: u64) -> BoxStream<'_, Result<Bytes, StorageError>> {
        let starts = (from..self.bytes).step_by(WINDOW as usize);
        let reads = starts.map(move |start| async move {
            let range = start..(start + WINDOW).min(self.bytes);
            let expected = range.end - range.start;
            let window = self.objects.get_range(&self.path, range).await;
            let window = window.map_err(StorageError::reading(&self.path))?;
            if window.len() as u64 != expected {
                return Err(self.damaged(Damage::Size { expected, found: window.len() as u64 }));
            }
            Ok(window)
        });
        futures::stream::iter(reads).buffered(WINDOWS_AHEAD).boxed()
    }
}

struct Reader<'a> {
    archive: &'a OpenedArchive,
    windows: BoxStream<'a, Result<Bytes, StorageError>>,
    ready: BytesMut,
}

impl Reader<'_> {
    async fn take(&mut self, length: usize) -> Result<Bytes, StorageError> {
        while self.ready.len() < length {
            let Some(window) = self.windows.try_next().await? else {
                let bytes = self.archive.bytes;
                let expected = bytes + (length - self.ready.len()) as u64;
                return Err(self.archive.damaged(Damage::Size { expected, found: bytes }));
            };
            self.ready.extend_from_slice(&window);
        }
        Ok(self.ready.split_to(length).freeze())
    }

    /// Nothing may follow.
    async fn end(&mut self) -> Result<(), StorageError> {
        if self.ready.is_empty() && self.windows.try_next().await?.is_none() {
            return Ok(());
        }
        Err(self.archive.damaged(Damage::Field("something follows its end".to_owned())))
    }
}
