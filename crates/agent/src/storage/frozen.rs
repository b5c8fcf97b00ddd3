//! Disks whose content is fixed at a point in time while their guests go on.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use hearth_block::{FrozenSet, StagedView, XtsKey, staged_bytes};
use hearth_snapshot::{CHUNK_BYTES, IndexedSource, SourceError};
use tokio::time::sleep;

use crate::launch::{DiskControl, FreezeDisk};
use crate::state::Layout;

/// How often a stage is looked at for a chunk that was asked for.
const LOOK: Duration = Duration::from_millis(20);
/// Longest wait for one chunk to be staged.
const STAGE_TIMEOUT: Duration = Duration::from_secs(120);

/// Files of one stage; removed with it.
struct StageFiles {
    stage_path: PathBuf,
    staged_path: PathBuf,
    stage: Arc<File>,
    staged: Arc<File>,
}

impl Drop for StageFiles {
    fn drop(&mut self) {
        // A VMM may hold the file until its next freeze: its space is given back now.
        let _ = self.stage.set_len(0);
        let _ = std::fs::remove_file(&self.stage_path);
        let _ = std::fs::remove_file(&self.staged_path);
    }
}

/// A disk whose point in time is fixed, or is about to be. Dropping it ends that.
pub struct Frozen {
    serial: String,
    size_bytes: u64,
    /// Key of the stage, when it is not in clear.
    key: Option<XtsKey>,
    files: StageFiles,
    /// The VMM that has it; `None` = everything is in the stage.
    live: Option<Arc<dyn DiskControl>>,
    chunks: FrozenSet,
    ended: AtomicBool,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Called off: the VMM must not go on copying.
        if let Some(disks) = self.live.take().filter(|_| !self.ended.load(Ordering::Relaxed)) {
            let serial = self.serial.clone();
            tokio::spawn(async move {
                if let Err(error) = disks.thaw(&serial, true).await {
                    tracing::warn!(serial, %error, "ending a freeze");
                }
            });
        }
    }
}

impl Frozen {
    /// A stage of that name for a disk, encrypted with the disk's own key if it has one; nothing is fixed yet.
    pub fn prepare(
        layout: &Layout,
        name: &str,
        serial: String,
        size_bytes: u64,
        key: Option<XtsKey>,
    ) -> Result<Self, String> {
        let create = |path: &PathBuf| {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(true).mode(0o600);
            options.open(path).map_err(|error| format!("creating {}: {error}", path.display()))
        };
        let (stage_path, staged_path) = (layout.stages().join(name), layout.staged().join(name));
        let (stage, staged) = (create(&stage_path)?, create(&staged_path)?);
        let files = StageFiles { stage_path, staged_path, stage: Arc::new(stage), staged: Arc::new(staged) };
        let failed = |error: std::io::Error| format!("making {}: {error}", files.staged_path.display());
        files.staged.set_len(staged_bytes(size_bytes)).map_err(failed)?;
        let (live, chunks, ended) = (None, FrozenSet::default(), AtomicBool::new(false));
        Ok(Self { serial, size_bytes, key, files, live, chunks, ended })
    }

    /// Keeps a chunk as it is, for whoever fixes a disk that no VMM has. Blocks no thread of the runtime.
    pub async fn put(&self, chunk: u64, content: Bytes) -> Result<(), String> {
        let (stage, key) = (self.files.stage.clone(), self.key.clone());
        let written = tokio::task::spawn_blocking(move || {
            let at = chunk * CHUNK_BYTES as u64;
            let mut content = Vec::from(content);
            if let Some(key) = &key {
                key.encrypt(&mut content, at);
            }
            stage.write_all_at(&content, at)
        });
        let written = written.await.map_err(|error| error.to_string())?;
        written.map_err(|error| format!("writing the stage: {error}"))
    }

    /// The chunks that are fixed.
    pub fn chunks(&self) -> &FrozenSet {
        &self.chunks
    }

    /// The stage holds these chunks.
    pub fn fixed_offline(&mut self, chunks: FrozenSet) {
        self.chunks = chunks;
    }

    /// Ends it; `restore_dirty` = the frozen chunks belong to the next snapshot too.
    pub async fn thaw(&self, restore_dirty: bool) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(disks) = &self.live
            && let Err(error) = disks.thaw(&self.serial, restore_dirty).await
        {
            tracing::warn!(serial = self.serial, %error, "ending a freeze");
        }
    }

    /// Hands out the frozen chunks.
    pub fn source(&self) -> IndexedSource {
        let (stage, staged) = (self.files.stage.clone(), self.files.staged.clone());
        let (live, serial, size, key) = (self.live.clone(), self.serial.clone(), self.size_bytes, self.key.clone());
        let read = move |chunk: u64| {
            let (stage, staged, live, serial) = (stage.clone(), staged.clone(), live.clone(), serial.clone());
            let key = key.clone();
            async move {
                if let Some(disks) = live {
                    await_staged(&staged, disks.as_ref(), &serial, chunk).await?;
                }
                let read = tokio::task::spawn_blocking(move || read_stage(&stage, chunk, size, key.as_ref())).await;
                read.map_err(SourceError::from)?.map_err(SourceError::from)
            }
            .boxed()
        };
        IndexedSource::new(self.chunks.iter(), Box::new(read))
    }
}

/// A chunk of a stage file, which ends with the volume or the last chunk in it.
fn read_stage(stage: &File, chunk: u64, size: u64, key: Option<&XtsKey>) -> std::io::Result<Option<Bytes>> {
    let mut content = vec![0; CHUNK_BYTES];
    let start = chunk * CHUNK_BYTES as u64;
    let inside = size.saturating_sub(start).min(CHUNK_BYTES as u64) as usize;
    let (mut at, part) = (0, content.get_mut(..inside).unwrap_or_default());
    while at < part.len() {
        let rest = part.get_mut(at..).unwrap_or_default();
        match stage.read_at(rest, start + at as u64)? {
            0 => break,
            count => at += count,
        }
    }
    if let Some(key) = key {
        key.decrypt(&mut content, start);
    }
    Ok(content.iter().any(|byte| *byte != 0).then(|| content.into()))
}

async fn await_staged(
    staged: &Arc<File>,
    disks: &dyn DiskControl,
    serial: &str,
    chunk: u64,
) -> Result<(), SourceError> {
    let look = || -> Result<bool, SourceError> {
        let view = StagedView::open(staged.try_clone()?)?;
        if view.is_broken()? {
            return Err("the host could not copy what the guest changed meanwhile".into());
        }
        Ok(view.is_staged(chunk)?)
    };
    if look()? {
        return Ok(());
    }
    disks.stage(serial, vec![chunk]).await?;
    let end = tokio::time::Instant::now() + STAGE_TIMEOUT;
    while !look()? {
        if tokio::time::Instant::now() > end {
            return Err(format!("chunk {chunk} does not come from the VMM").into());
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// Fixes the point in time of disks of one VMM, all at the same instant.
pub async fn freeze_live(frozen: &mut [&mut Frozen], disks: Arc<dyn DiskControl>) -> Result<(), String> {
    let copied = |file: &File| file.try_clone().map_err(|error| error.to_string());
    let mut orders = Vec::new();
    for one in frozen.iter() {
        let (stage, staged) = (copied(&one.files.stage)?, copied(&one.files.staged)?);
        orders.push(FreezeDisk { serial: one.serial.clone(), stage, staged });
    }
    disks.freeze(orders).await.map_err(|error| error.to_string())?;
    for one in frozen {
        one.live = Some(disks.clone());
        let view = StagedView::open(copied(&one.files.staged)?).map_err(|error| error.to_string())?;
        one.chunks = view.frozen().clone();
    }
    Ok(())
}
