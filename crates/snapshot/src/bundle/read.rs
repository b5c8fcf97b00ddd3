//! Restoring bundles.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;
use object_store::path::Path;
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;

use super::OnBundleProgress;
use super::manifest::{BundleManifest, BundlePart, MAX_MANIFEST_BYTES};
use crate::objects::{Damage, StorageError, get_whole};

/// Parts fetched at a time.
const PARALLEL_PARTS: usize = 6;
const BUFFER: usize = 1 << 20;
/// Longest window of a part's zstd frame, as a power of two: what every decoder should take (RFC 8878, section 3.1.1.1.2), and no
/// more memory than that for each part.
const WINDOW_LOG: u32 = 23;

/// Reads and checks the manifest at `location`. `sha256` = what it must hash to, as kept when the AMI was registered; the hash
/// that it has is returned for the first time.
pub async fn load_bundle(
    objects: &dyn ObjectStore,
    location: &str,
    sha256: Option<&str>,
) -> Result<(BundleManifest, String), StorageError> {
    let path = Path::parse(location).map_err(|error| StorageError::Usage(error.to_string()))?;
    let object = get_whole(objects, &path, MAX_MANIFEST_BYTES).await?;
    let found = hex::encode(Sha256::digest(&object));
    if let Some(expected) = sha256.filter(|expected| *expected != found) {
        let damage = Damage::Content(format!("its SHA-256 is {found} instead of {expected}"));
        return Err(StorageError::damaged(&path)(damage));
    }
    let manifest = BundleManifest::decode(&object).map_err(StorageError::damaged(&path))?;
    Ok((manifest, found))
}

/// Fetches all parts of the bundle, checks every one and writes the disk to `file`, which must be empty and gets the disk's size. When it
/// returns, the content is on disk. After an error the file holds nothing usable.
pub async fn restore_bundle(
    objects: &dyn ObjectStore,
    location: &str,
    manifest: &BundleManifest,
    file: Arc<File>,
    progress: OnBundleProgress,
) -> Result<(), StorageError> {
    let path = Path::parse(location).map_err(|error| StorageError::Usage(error.to_string()))?;
    manifest.check().map_err(StorageError::damaged(&path))?;
    let mut folder: Vec<_> = path.parts().collect();
    folder.pop();
    let folder = Path::from_iter(folder);
    let name = std::path::Path::new("the root device");
    let disk_bytes = manifest.disk_bytes;
    let length = file.metadata().map_err(StorageError::io("look at", name))?.len();
    if length != 0 && length != disk_bytes {
        return Err(StorageError::Usage(format!("a bundle of {disk_bytes} bytes for a file of {length} bytes")));
    }
    file.set_len(disk_bytes).map_err(StorageError::io("set the size of", name))?;
    let total: u64 = manifest.parts.iter().map(|part| part.bytes).sum();
    let parts = manifest.parts.clone().into_iter().map(|part| {
        let (file, path) = (file.clone(), folder.clone().join(part.object.as_str()));
        async move {
            let content = get_whole(objects, &path, part.bytes).await?;
            let bytes = part.bytes;
            spawn_blocking(move || write_part(&file, &part, &content)).await?.map_err(|error| error.of_part(&path))?;
            Ok::<u64, StorageError>(bytes)
        }
    });
    let mut parts = futures::stream::iter(parts).buffer_unordered(PARALLEL_PARTS);
    let mut done = 0;
    while let Some(bytes) = parts.try_next().await? {
        done += bytes;
        progress(done, total);
    }
    drop(parts);
    spawn_blocking(move || file.sync_data()).await?.map_err(StorageError::io("sync", name))
}

enum PartError {
    Damage(Damage),
    Write(std::io::Error),
}

impl PartError {
    fn of_part(self, path: &Path) -> StorageError {
        match self {
            Self::Damage(damage) => StorageError::damaged(path)(damage),
            Self::Write(error) => StorageError::io("write", std::path::Path::new("the root device"))(error),
        }
    }
}

fn write_part(file: &File, part: &BundlePart, content: &Bytes) -> Result<(), PartError> {
    if content.len() as u64 != part.bytes {
        return Err(PartError::Damage(Damage::Size { expected: part.bytes, found: content.len() as u64 }));
    }
    let blake3 = blake3::hash(content).to_hex();
    let sha256 = hex::encode(Sha256::digest(content));
    if blake3.as_str() != part.blake3.to_ascii_lowercase() || sha256 != part.sha256.to_ascii_lowercase() {
        let what = format!("its SHA-256 is {sha256} instead of {}", part.sha256);
        return Err(PartError::Damage(Damage::Content(what)));
    }
    let damaged = |_| PartError::Damage(Damage::Decompression(part.data_bytes()));
    let mut decoder = zstd::stream::read::Decoder::with_buffer(&content[..]).map_err(damaged)?;
    decoder.window_log_max(WINDOW_LOG).map_err(damaged)?;
    let mut buffer = vec![0; BUFFER];
    for (offset, length) in &part.extents {
        let (mut at, mut left) = (*offset, *length);
        while left > 0 {
            let count = left.min(BUFFER as u64) as usize;
            let piece = buffer.get_mut(..count).unwrap_or_default();
            decoder.read_exact(piece).map_err(damaged)?;
            file.write_all_at(piece, at).map_err(PartError::Write)?;
            at += count as u64;
            left -= count as u64;
        }
    }
    match decoder.read(&mut buffer) {
        Ok(0) => Ok(()),
        _ => Err(PartError::Damage(Damage::Decompression(part.data_bytes()))),
    }
}

#[cfg(test)]
#[path = "../bundle_test.rs"]
mod tests;
