//! Images on this host: fetched once, checked, kept.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use hearth_types::ImageId;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::state::{Layout, sync_dir};

/// A piece of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes.
    Data(Bytes),
    /// So many zeros.
    Zeros(u64),
}

/// A piece and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte on the disk.
    pub offset: u64,
    /// What is there.
    pub content: Content,
}

/// Why an image cannot be had now.
#[derive(Debug, Error)]
pub enum FetchError {
    /// No control plane; it may come back.
    #[error("the control plane cannot be reached: {0}")]
    Unreachable(String),
    /// The control plane refused.
    #[error("the control plane does not give the image: {0}")]
    Refused(String),
}

/// Where images come from.
#[async_trait]
pub trait ImageSource: Send + Sync {
    /// The raw disk of an image from byte `offset` on, in order.
    async fn fetch(
        &self,
        image: &ImageId,
        offset: u64,
    ) -> Result<BoxStream<'static, Result<Piece, FetchError>>, FetchError>;
}

/// Which image an instance wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its id.
    pub id: ImageId,
    /// SHA-256 of the raw disk, hex.
    pub sha256: String,
    /// Size of the raw disk.
    pub bytes: u64,
}

/// Why there is no image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The source.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The host.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source sent something else than the image.
    #[error("image {id}: {reason}")]
    Damaged {
        /// Which image.
        id: ImageId,
        /// What is wrong.
        reason: String,
    },
}

impl ImageError {
    /// Whether trying again later may help.
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::Fetch(FetchError::Refused(_)))
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { action, path, source }
}

/// The images of one host.
pub struct Images {
    layout: Layout,
    local: Option<PathBuf>,
    source: Arc<dyn ImageSource>,
    /// One fetch of an image at a time, however many instances wait for it.
    fetching: Mutex<HashMap<ImageId, Arc<tokio::sync::Mutex<()>>>>,
}

/// Told (done, total) bytes.
pub type ImageProgress<'a> = &'a (dyn Fn(u64, u64) + Sync);

impl Images {
    /// Images below the layout's folder, got from `source`; those in the folder `local` are used in place.
    pub fn new(layout: Layout, local: Option<PathBuf>, source: Arc<dyn ImageSource>) -> Self {
        Self { layout, local, source, fetching: Mutex::new(HashMap::new()) }
    }

    /// The raw disk of an image, after fetching it if need be. Dropping the future ends the fetching; the next one goes on where
    /// it stopped.
    pub async fn ensure(&self, wanted: &Wanted, progress: ImageProgress<'_>) -> Result<PathBuf, ImageError> {
        let local = self.local.as_ref().map(|folder| folder.join(format!("{}.raw", wanted.id)));
        let whole = |path: &PathBuf| path.metadata().is_ok_and(|metadata| metadata.len() == wanted.bytes);
        if let Some(path) = local.filter(whole) {
            return Ok(path);
        }
        let complete = self.layout.image(&wanted.id).join("disk.raw");
        if complete.exists() {
            // When an image was last asked for, for `prune`; no harm if it cannot be set.
            let _ = File::open(self.layout.image(&wanted.id)).and_then(|folder| folder.set_modified(SystemTime::now()));
            return Ok(complete);
        }
        let turn = self.fetching.lock().entry(wanted.id.clone()).or_default().clone();
        let result = {
            let _turn = turn.lock().await;
            if complete.exists() { Ok(()) } else { self.fetch(wanted, &complete, progress).await }
        };
        self.fetching.lock().retain(|_, turn| Arc::strong_count(turn) > 2);
        result.map(|()| complete)
    }

    async fn fetch(&self, wanted: &Wanted, complete: &Path, progress: ImageProgress<'_>) -> Result<(), ImageError> {
        let folder = self.layout.image(&wanted.id);
        std::fs::create_dir_all(&folder).map_err(io_error("creating", &folder))?;
        let path = folder.join("disk.part");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = Arc::new(options.open(&path).map_err(io_error("opening", &path))?);
        let damaged = |reason: String| ImageError::Damaged { id: wanted.id.clone(), reason };
        // What is there was written in order; whether it survived whole is for the checksum to tell.
        let mut offset = file.metadata().map_err(io_error("reading", &path))?.len();
        if offset > wanted.bytes {
            file.set_len(0).map_err(io_error("emptying", &path))?;
            offset = 0;
        }
        progress(offset, wanted.bytes);
        if offset < wanted.bytes {
            let mut pieces = self.source.fetch(&wanted.id, offset).await?;
            while let Some(piece) = pieces.next().await {
                let piece = piece?;
                let length = match &piece.content {
                    Content::Data(data) => data.len() as u64,
                    Content::Zeros(count) => *count,
                };
                let end = offset.checked_add(length).filter(|end| *end <= wanted.bytes);
                let (Some(end), true) = (end, piece.offset == offset) else {
                    return Err(damaged(format!("a piece at byte {} instead of {offset}", piece.offset)));
                };
                let (target, at) = (file.clone(), offset);
                let write = move || match piece.content {
                    Content::Data(data) => target.write_all_at(&data, at),
                    Content::Zeros(_) => target.set_len(end),
                };
                let written = tokio::task::spawn_blocking(write).await.map_err(io::Error::other);
                written.and_then(|written| written).map_err(io_error("writing", &path))?;
                offset = end;
                progress(offset, wanted.bytes);
            }
            if offset != wanted.bytes {
                let reason = format!("ended after {offset} of {} bytes", wanted.bytes);
                return Err(FetchError::Unreachable(reason).into());
            }
        }
        let checked = file.clone();
        let check = move || {
            checked.sync_all()?;
            digest(&checked)
        };
        let digest = tokio::task::spawn_blocking(check).await;
        let digest = digest.map_err(io::Error::other).and_then(|digest| digest).map_err(io_error("reading", &path))?;
        if !digest.eq_ignore_ascii_case(&wanted.sha256) {
            std::fs::remove_file(&path).map_err(io_error("removing", &path))?;
            return Err(damaged(format!("its SHA-256 is {digest} instead of {}", wanted.sha256)));
        }
        std::fs::rename(&path, complete).map_err(io_error("renaming", &path))?;
        sync_dir(&folder).map_err(io_error("syncing", &folder))
    }

    /// Deletes images that no instance in `used` was made from and that were not asked for within `keep`.
    pub fn prune(&self, used: &[ImageId], keep: Duration) -> io::Result<()> {
        let entries = match std::fs::read_dir(self.layout.images()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries.flatten() {
            let id: Option<ImageId> = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let recent = || entry.metadata()?.modified()?.elapsed().map_err(io::Error::other);
            let old = recent().is_ok_and(|age| age >= keep);
            if old && id.is_some_and(|id| !used.contains(&id)) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

fn digest(file: &File) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut reader = file;
    io::Seek::rewind(&mut reader)?;
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            count => hasher.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
#[path = "images_test.rs"]
mod tests;
