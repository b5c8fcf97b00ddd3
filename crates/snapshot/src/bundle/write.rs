//! Making bundles.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::path::Path;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex as AsyncMutex, mpsc};
use tokio::task::spawn_blocking;

use super::OnBundleProgress;
use super::manifest::{BundleManifest, BundlePart, CODEC, FORMAT, PART_BYTES, VERSION};
use crate::chunk::CHUNK_BYTES;
use crate::objects::{StorageError, put_over};
use crate::upload::{ChunkSource, SourceChunk, all_of};
use crate::writer::is_zero;

/// Parts made at a time.
const PARALLEL_PARTS: usize = 3;
/// Chunks read at a time.
const PARALLEL_READS: usize = 16;
const BLOCK: usize = 4096;
const ZSTD_LEVEL: i32 = 3;
/// A part is closed when another chunk, not compressing at all, might not fit any more.
const CLOSE_AT: u64 = PART_BYTES - (CHUNK_BYTES as u64 + CHUNK_BYTES as u64 / 64);

/// What a bundle is to be called.
#[derive(Clone, Debug)]
pub struct BundleSpec {
    /// Folder in the bucket, may be empty.
    pub prefix: String,
    /// Name: the manifest is `NAME.manifest.json`, the parts are `NAME.part.0000` and so on. 1 to 128 letters, digits, '-', '_'.
    pub name: String,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Attributes of the AMI.
    pub attributes: serde_json::Map<String, serde_json::Value>,
}

/// A bundle that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundled {
    /// The manifest's name in the bucket: what the AMI is registered with.
    pub location: String,
    /// SHA-256 of the manifest, 64 hex digits.
    pub manifest_sha256: String,
    /// The manifest.
    pub manifest: BundleManifest,
}

/// Packs what `source` hands out (chunks of [`CHUNK_BYTES`], in any order) and writes it to `objects`, the manifest last: a bundle
/// whose manifest is there is complete. An earlier bundle of that name is replaced.
pub async fn write_bundle(
    objects: &dyn ObjectStore,
    spec: BundleSpec,
    source: &dyn ChunkSource,
    progress: OnBundleProgress,
) -> Result<Bundled, StorageError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if !(1..=128).contains(&spec.name.len()) || !spec.name.bytes().all(plain) {
        return Err(StorageError::Usage(format!("'{}' is no name for a bundle: letters, digits, '-', '_'", spec.name)));
    }
    let folder = Path::parse(&spec.prefix).map_err(|error| StorageError::Usage(error.to_string()))?;
    let shared = Shared {
        objects,
        folder: &folder,
        name: &spec.name,
        disk_bytes: spec.disk_bytes,
        source,
        next_part: AtomicU64::new(0),
        done: AtomicU64::new(0),
        parts: Mutex::new(Vec::new()),
        progress,
    };
    // Readers hide the source's latency, packers use the processors.
    let (sender, receiver) = mpsc::channel(PARALLEL_READS);
    let receiver = AsyncMutex::new(receiver);
    let reads = (0..PARALLEL_READS).map(|_| read(source, sender.clone())).collect::<Vec<_>>();
    drop(sender);
    let packs = all_of((0..PARALLEL_PARTS).map(|_| shared.pack(&receiver)));
    futures::future::try_join(all_of(reads.into_iter()), packs).await?;
    let mut parts = shared.parts.into_inner();
    parts.sort_by(|a: &BundlePart, b| a.object.cmp(&b.object));
    let manifest = BundleManifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        data_bytes: parts.iter().map(BundlePart::data_bytes).sum(),
        name: spec.name.clone(),
        disk_bytes: spec.disk_bytes,
        codec: CODEC.to_owned(),
        attributes: spec.attributes,
        parts,
    };
    let location = folder.join(format!("{}.manifest.json", spec.name));
    manifest.check().map_err(StorageError::damaged(&location))?;
    let object = manifest.encode().map_err(StorageError::damaged(&location))?;
    let manifest_sha256 = hex::encode(Sha256::digest(&object));
    put_over(objects, &location, object.into()).await?;
    Ok(Bundled { location: location.to_string(), manifest_sha256, manifest })
}

/// Hands on what the source hands out.
async fn read(source: &dyn ChunkSource, sender: mpsc::Sender<SourceChunk>) -> Result<(), StorageError> {
    while let Some(chunk) = source.next().await.map_err(|source| StorageError::Source { source })? {
        // Nobody listens when a packer failed, and then that is the error to tell.
        if sender.send(chunk).await.is_err() {
            break;
        }
    }
    Ok(())
}

struct Shared<'a> {
    objects: &'a dyn ObjectStore,
    folder: &'a Path,
    name: &'a str,
    disk_bytes: u64,
    source: &'a dyn ChunkSource,
    next_part: AtomicU64,
    done: AtomicU64,
    parts: Mutex<Vec<BundlePart>>,
    progress: OnBundleProgress,
}

impl Shared<'_> {
    async fn pack(&self, chunks: &AsyncMutex<mpsc::Receiver<SourceChunk>>) -> Result<(), StorageError> {
        let mut packer: Option<Packer> = None;
        loop {
            let next = chunks.lock().await.recv().await;
            let Some(SourceChunk { index, content }) = next else {
                break;
            };
            let Some(content) = content else {
                continue;
            };
            let offset = index * CHUNK_BYTES as u64;
            let inside = self.disk_bytes.saturating_sub(offset).min(content.len() as u64) as usize;
            let current = packer.take();
            let packed = spawn_blocking(move || {
                let mut packer = current.map_or_else(Packer::new, Ok)?;
                packer.take(offset, &content.slice(..inside))?;
                Ok::<_, std::io::Error>(packer)
            });
            let current = packed.await?.map_err(|error| StorageError::Worker(error.to_string()))?;
            self.source.stored(index);
            let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
            (self.progress)(done * CHUNK_BYTES as u64, self.source.total() * CHUNK_BYTES as u64);
            if current.packed_bytes() >= CLOSE_AT {
                self.close(current).await?;
            } else {
                packer = Some(current);
            }
        }
        match packer {
            Some(packer) => self.close(packer).await,
            None => Ok(()),
        }
    }

    async fn close(&self, packer: Packer) -> Result<(), StorageError> {
        if packer.extents.is_empty() {
            return Ok(());
        }
        let number = self.next_part.fetch_add(1, Ordering::Relaxed);
        let object = format!("{}.part.{number:04}", self.name);
        let finished = spawn_blocking(move || {
            let extents = packer.extents;
            let content = packer.encoder.finish()?;
            let digests = (blake3::hash(&content).to_hex().to_string(), hex::encode(Sha256::digest(&content)));
            Ok::<_, std::io::Error>((extents, content, digests))
        });
        let (extents, content, (blake3, sha256)) =
            finished.await?.map_err(|error| StorageError::Worker(error.to_string()))?;
        let part = BundlePart { bytes: content.len() as u64, blake3, sha256, extents, object };
        put_over(self.objects, &self.folder.clone().join(part.object.as_str()), content.into()).await?;
        self.parts.lock().push(part);
        Ok(())
    }
}

struct Packer {
    encoder: zstd::stream::write::Encoder<'static, Vec<u8>>,
    extents: Vec<(u64, u64)>,
}

impl Packer {
    fn new() -> std::io::Result<Self> {
        Ok(Self { encoder: zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL)?, extents: Vec::new() })
    }

    fn packed_bytes(&self) -> u64 {
        self.encoder.get_ref().len() as u64
    }

    /// Takes the blocks that are not zero.
    fn take(&mut self, offset: u64, content: &Bytes) -> std::io::Result<()> {
        for (number, block) in content.chunks(BLOCK).enumerate() {
            if is_zero(block) {
                continue;
            }
            let at = offset + (number * BLOCK) as u64;
            match self.extents.last_mut().filter(|(start, length)| start + length == at) {
                Some((_, length)) => *length += block.len() as u64,
                None => self.extents.push((at, block.len() as u64)),
            }
            self.encoder.write_all(block)?;
        }
        // So that the size of what is packed is known.
        self.encoder.flush()
    }
}
