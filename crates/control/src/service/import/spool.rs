//! The file that an upload is collected in, and what of it is durable.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_proto::v1;
use hearth_snapshot::{PrefixDigest, PrefixHasher};
use parking_lot::Mutex;
use tokio::task::{JoinHandle, spawn_blocking};

use super::{Pending, note_position};
use crate::api_error::{ApiError, ApiResult};
use crate::core::Core;

/// Bytes after which what has come is made durable, and the longest time until then.
const CHECKPOINT_BYTES: u64 = 16 << 20;
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(1);
/// Most bytes that come while the checkpoint before is still being written.
const MAX_AHEAD: u64 = 256 << 20;

/// File of an unfinished upload.
pub(crate) fn path(core: &Core, image: &str) -> PathBuf {
    core.config.spool_dir().join(name(image))
}

/// Its name in the spool folder.
pub(crate) fn name(image: &str) -> String {
    format!("{image}.upload")
}

/// Removes it, if it is there.
pub(crate) async fn remove(core: &Core, image: &str) {
    let path = path(core, image);
    match tokio::fs::remove_file(&path).await {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "a spool file stays until the next start"),
    }
}

struct Content {
    file: Arc<File>,
    hasher: PrefixHasher,
}

/// See the module.
pub(super) struct Spool {
    core: Arc<Core>,
    image: String,
    path: PathBuf,
    content: Arc<Mutex<Content>>,
    /// Up to where the last checkpoint goes, and when it was begun.
    checkpoint: (u64, Instant),
    running: Option<JoinHandle<ApiResult<()>>>,
    /// The file has failed: what a later sync says of it means nothing.
    has_failed: bool,
}

fn failed(path: &Path, error: &io::Error) -> ApiError {
    let message = format!("write the upload to {}: {error}", path.display());
    match error.kind() {
        ErrorKind::StorageFull => ApiError::exhausted("InsufficientStorage", message),
        _ => ApiError::internal(message),
    }
}

/// Opens the file, cut to what is known of it; `false` when less than that is there, so that it begins anew.
fn open(path: &Path, file_bytes: u64, offset: u64, digest: PrefixDigest) -> io::Result<(Content, bool)> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    let is_there = file.metadata()?.len() >= offset;
    let (offset, digest) = if is_there { (offset, digest) } else { (0, PrefixDigest::default()) };
    file.set_len(offset)?;
    if offset == 0 {
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok((Content { file: Arc::new(file), hasher: PrefixHasher::new(file_bytes, offset, digest) }, is_there))
}

impl Spool {
    /// Goes on with the upload where the records say that it is.
    pub async fn open(core: &Arc<Core>, pending: &Pending) -> ApiResult<Self> {
        let image = pending.spec.image_id.clone();
        let path = path(core, &image);
        let digest = PrefixDigest::from_bytes(&pending.status.uploaded_digest);
        let digest =
            digest.ok_or_else(|| ApiError::internal(format!("the digest of the upload of {image} is damaged")))?;
        let (file_bytes, offset) = (pending.job.file_bytes, pending.status.uploaded_bytes);
        let place = path.clone();
        let opened = blocking(move || open(&place, file_bytes, offset, digest)).await?;
        let (content, is_there) = opened.map_err(|error| failed(&path, &error))?;
        if !is_there {
            tracing::warn!(image, path = %path.display(), "what was uploaded is not there any more; it begins anew");
            // Whatever comes must not be taken for what was there.
            note_position(core, &image, 0, PrefixDigest::default()).await?;
        }
        let checkpoint = (content.hasher.position(), Instant::now());
        let content = Arc::new(Mutex::new(content));
        Ok(Self { core: core.clone(), image, path, content, checkpoint, running: None, has_failed: false })
    }

    /// How much has come.
    pub fn position(&self) -> u64 {
        self.content.lock().hasher.position()
    }

    /// What a client is told before it goes on: all of it is durable as long as nothing has been written since the opening.
    pub fn begin(&self) -> v1::UploadPosition {
        let (offset, digest) = self.content.lock().hasher.whole();
        v1::UploadPosition { image_id: self.image.clone(), offset, digest: digest.as_bytes().to_vec().into() }
    }

    /// Appends content.
    pub async fn data(&mut self, data: bytes::Bytes) -> ApiResult<()> {
        self.append(move |content| {
            content.file.write_all_at(&data, content.hasher.position())?;
            content.hasher.data(&data);
            Ok(())
        })
        .await
    }

    /// Appends zeros, as a hole.
    pub async fn zeros(&mut self, count: u64) -> ApiResult<()> {
        self.append(move |content| {
            content.file.set_len(content.hasher.position().saturating_add(count))?;
            content.hasher.zeros(count);
            Ok(())
        })
        .await
    }

    async fn append(&mut self, work: impl FnOnce(&mut Content) -> io::Result<()> + Send + 'static) -> ApiResult<()> {
        let content = self.content.clone();
        let written = match blocking(move || work(&mut content.lock())).await? {
            Ok(()) => self.look_at_checkpoint().await,
            Err(error) => Err(failed(&self.path, &error)),
        };
        self.has_failed |= written.is_err();
        written
    }

    /// Has what has come made durable while more comes, when it is time.
    async fn look_at_checkpoint(&mut self) -> ApiResult<()> {
        let (offset, digest) = self.content.lock().hasher.whole();
        let (last, begun) = self.checkpoint;
        let ahead = offset.saturating_sub(last);
        if ahead == 0 || (ahead < CHECKPOINT_BYTES && begun.elapsed() < CHECKPOINT_INTERVAL) {
            return Ok(());
        }
        if self.running.as_ref().is_some_and(|running| !running.is_finished()) && ahead < MAX_AHEAD {
            return Ok(());
        }
        self.await_checkpoint().await?;
        self.checkpoint = (offset, Instant::now());
        let (core, image, file, path) =
            (self.core.clone(), self.image.clone(), self.content.lock().file.clone(), self.path.clone());
        self.running = Some(self.core.tasks.spawn(async move {
            blocking(move || file.sync_data()).await?.map_err(|error| failed(&path, &error))?;
            note_position(&core, &image, offset, digest).await
        }));
        Ok(())
    }

    async fn await_checkpoint(&mut self) -> ApiResult<()> {
        match self.running.take() {
            Some(running) => running.await.map_err(|error| ApiError::internal(error.to_string()))?,
            None => Ok(()),
        }
    }

    /// Makes everything durable that has come; answers up to where the upload can be gone on from, and the digest. `None`: that is
    /// where the last checkpoint says.
    pub async fn sync(&mut self) -> ApiResult<Option<(u64, PrefixDigest)>> {
        if self.has_failed {
            return Ok(None);
        }
        self.await_checkpoint().await?;
        let (file, whole) = {
            let content = self.content.lock();
            (content.file.clone(), content.hasher.whole())
        };
        blocking(move || file.sync_data()).await?.map_err(|error| failed(&self.path, &error))?;
        Ok(Some(whole))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> ApiResult<T> {
    spawn_blocking(work).await.map_err(|error| ApiError::internal(error.to_string()))
}
