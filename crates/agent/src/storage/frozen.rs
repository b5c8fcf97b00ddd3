//! Disks whose content is fixed at a point in time.
//!
//! Whoever has the disk keeps what it was: a VMM copies a chunk to the stage before its guest changes it; while this process has the
//! volume open, nothing changes it. A VMM that ends has left every chunk that is not in the stage as it was, so that this process can
//! go on from there. [`Frozen::settle`] copies all that is left to the stage and sets the disk free.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt};
use hearth_block::{BlockError, FrozenSet, OfflineVolume, StagedView, XtsKey, staged_bytes};
use hearth_snapshot::{CHUNK_BYTES, IndexedSource, SourceError};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::volumes::Placed;
use super::{Base, Reader};
use crate::launch::{DiskControl, FreezeDisk};
use crate::state::Layout;

/// How often a stage is looked at for a chunk that was asked for.
const LOOK: Duration = Duration::from_millis(20);
/// Time after which a VMM is asked again for a chunk.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How long a VMM that does not answer may have the disk before the snapshot is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Chunk numbers in one order to a VMM.
const CHUNKS_PER_ORDER: usize = 4096;
/// Chunks copied to the stage at a time.
const COPIES: usize = 4;

/// Files of one stage; removed with it.
struct StageFiles {
    stage_path: PathBuf,
    staged_path: PathBuf,
    stage: Arc<File>,
    staged: Arc<File>,
}

impl Drop for StageFiles {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.stage_path);
        let _ = std::fs::remove_file(&self.staged_path);
        // A VMM may hold the file until its next freeze: its space is given back now. There may be much of it.
        let stage = self.stage.clone();
        let shorten = move || drop(stage.set_len(0));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(shorten)),
            Err(_) => shorten(),
        }
    }
}

/// Who keeps the chunks that are not in the stage.
#[derive(Clone)]
enum Keeper {
    /// Nothing is fixed yet.
    Nobody,
    /// A VMM.
    Vmm(Arc<dyn DiskControl>),
    /// This process, which has the volume open.
    Here(Arc<OfflineVolume>),
    /// Nobody has to: the stage has all that has not been handed out.
    Stage,
    /// They are lost, for this reason.
    Lost(Arc<str>),
}

/// A disk whose point in time is fixed, or is about to be. Dropping it ends that.
pub struct Frozen {
    serial: String,
    size_bytes: u64,
    /// The volume, for when its VMM has ended. `None` = without its VMM all is lost.
    placed: Option<Placed>,
    /// Key of the stage, when it is not in clear.
    key: Option<XtsKey>,
    files: StageFiles,
    keeper: Mutex<Keeper>,
    chunks: OnceLock<FrozenSet>,
    /// What a VMM tells of the stage.
    view: OnceLock<StagedView>,
    /// In the stage by this process.
    copied: Mutex<HashSet<u64>>,
    handed_out: Mutex<HashSet<u64>>,
    /// One keeper takes over from another.
    moving: tokio::sync::Mutex<()>,
    asked_to_settle: AtomicBool,
    ended: CancellationToken,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Called off: the VMM must not go on copying.
        if let Keeper::Vmm(disks) = self.keeper.get_mut()
            && !self.ended.is_cancelled()
        {
            let (disks, serial) = (disks.clone(), self.serial.clone());
            tokio::spawn(async move {
                if let Err(error) = disks.thaw(&serial, true).await {
                    tracing::warn!(serial, %error, "ending a freeze");
                }
            });
        }
    }
}

impl Frozen {
    /// A stage of that name for a volume; nothing is fixed yet.
    pub async fn of_volume(layout: &Layout, name: &str, placed: Placed) -> Result<Arc<Self>, String> {
        let (serial, size, key) = (placed.id.serial(), placed.wanted.size_bytes, placed.key.clone());
        Self::prepare(layout, name, serial, size, key, Some(placed)).await
    }

    /// A stage of that name for a disk that only its VMM knows; nothing is fixed yet.
    pub async fn of_disk(layout: &Layout, name: &str, serial: String, size_bytes: u64) -> Result<Arc<Self>, String> {
        Self::prepare(layout, name, serial, size_bytes, None, None).await
    }

    async fn prepare(
        layout: &Layout,
        name: &str,
        serial: String,
        size_bytes: u64,
        key: Option<XtsKey>,
        placed: Option<Placed>,
    ) -> Result<Arc<Self>, String> {
        let (stage_path, staged_path) = (layout.stages().join(name), layout.staged().join(name));
        let make = move || {
            let create = |path: &PathBuf| {
                let mut options = OpenOptions::new();
                let options = options.read(true).write(true).create(true).truncate(true).mode(0o600);
                options.open(path).map_err(|error| format!("creating {}: {error}", path.display()))
            };
            let (stage, staged) = (create(&stage_path)?, create(&staged_path)?);
            let files = StageFiles { stage_path, staged_path, stage: Arc::new(stage), staged: Arc::new(staged) };
            let failed = |error: std::io::Error| format!("making {}: {error}", files.staged_path.display());
            files.staged.set_len(staged_bytes(size_bytes)).map_err(failed)?;
            Ok::<_, String>(files)
        };
        let files = tokio::task::spawn_blocking(make).await.map_err(|error| error.to_string())??;
        Ok(Arc::new(Self {
            serial,
            size_bytes,
            placed,
            key,
            files,
            keeper: Mutex::new(Keeper::Nobody),
            chunks: OnceLock::new(),
            view: OnceLock::new(),
            copied: Mutex::default(),
            handed_out: Mutex::default(),
            moving: tokio::sync::Mutex::default(),
            asked_to_settle: AtomicBool::new(false),
            ended: CancellationToken::new(),
        }))
    }

    /// The volume, unless it is another disk.
    pub fn placed(&self) -> Option<&Placed> {
        self.placed.as_ref()
    }

    /// The chunks that are fixed.
    pub fn chunks(&self) -> FrozenSet {
        self.chunks.get().cloned().unwrap_or_default()
    }

    /// Fixes a volume that no VMM has, by keeping it open. False when somebody else has it open.
    pub async fn fix_here(&self) -> Result<bool, String> {
        let Some(volume) = self.open_here().await? else { return Ok(false) };
        let _ = self.chunks.set(volume.dirty_chunks());
        *self.keeper.lock() = Keeper::Here(Arc::new(volume));
        Ok(true)
    }

    /// `None` while somebody else has it open.
    async fn open_here(&self) -> Result<Option<OfflineVolume>, String> {
        let Some(placed) = self.placed.clone() else { return Err("its VMM has ended".to_owned()) };
        match tokio::task::spawn_blocking(move || placed.open_offline()).await.map_err(|error| error.to_string())? {
            Ok(volume) => Ok(Some(volume)),
            Err(error) if error.is_in_use() => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Ends it; `restore_dirty` = the frozen chunks belong to the next snapshot too.
    pub async fn thaw(&self, restore_dirty: bool) {
        self.ended.cancel();
        let keeper = std::mem::replace(&mut *self.keeper.lock(), Keeper::Stage);
        match keeper {
            Keeper::Vmm(disks) => {
                if let Err(error) = disks.thaw(&self.serial, restore_dirty).await {
                    tracing::warn!(serial = self.serial, %error, "ending a freeze");
                }
            }
            // All of it is in the snapshot, and no VMM ever had it since.
            Keeper::Here(volume) if !restore_dirty && self.view.get().is_none() => {
                let cleared = tokio::task::spawn_blocking(move || volume.clear_dirty()).await;
                if let Ok(Err(error)) = cleared {
                    tracing::warn!(serial = self.serial, %error, "noting that a volume has not changed");
                }
            }
            _ => {}
        }
    }

    /// Hands out the frozen chunks.
    pub fn source(self: &Arc<Self>) -> IndexedSource {
        let this = self.clone();
        let read = move |chunk: u64| {
            let this = this.clone();
            async move { this.read(chunk).await }.boxed()
        };
        IndexedSource::new(self.chunks().iter(), Box::new(read))
    }

    fn keeper(&self) -> Keeper {
        self.keeper.lock().clone()
    }

    fn lose(&self, why: &str) {
        tracing::warn!(serial = self.serial, why, "what a snapshot needs of a disk is lost");
        *self.keeper.lock() = Keeper::Lost(why.into());
    }

    /// A chunk as it was; `None` = zeros.
    async fn read(&self, chunk: u64) -> Result<Option<Bytes>, SourceError> {
        let content = loop {
            let keeper = self.keeper();
            if let Keeper::Lost(why) = &keeper {
                return Err(why.as_ref().into());
            }
            if matches!(keeper, Keeper::Stage | Keeper::Nobody) || self.is_staged(chunk)? {
                let (stage, size, key) = (self.files.stage.clone(), self.size_bytes, self.key.clone());
                let read = tokio::task::spawn_blocking(move || read_stage(&stage, chunk, size, key.as_ref())).await;
                break read.map_err(SourceError::from)?.map_err(SourceError::from)?;
            }
            match keeper {
                Keeper::Vmm(disks) => self.await_staged(&disks, &[chunk]).await?,
                Keeper::Here(volume) => break read_offline(&volume, self.base(), chunk).await?,
                Keeper::Nobody | Keeper::Stage | Keeper::Lost(_) => {}
            }
        };
        self.handed_out.lock().insert(chunk);
        Ok(content)
    }

    fn base(&self) -> Option<&Base> {
        self.placed.as_ref().and_then(|placed| placed.base.as_deref())
    }

    fn is_staged(&self, chunk: u64) -> Result<bool, SourceError> {
        if self.copied.lock().contains(&chunk) {
            return Ok(true);
        }
        let Some(view) = self.view.get() else { return Ok(false) };
        if view.is_broken()? {
            return Err("the host could not copy what the guest changed meanwhile".into());
        }
        Ok(view.is_staged(chunk)?)
    }

    /// Has the VMM copy chunks to the stage, until they are there or another keeper has taken over.
    async fn await_staged(&self, disks: &Arc<dyn DiskControl>, chunks: &[u64]) -> Result<(), SourceError> {
        let began = Instant::now();
        let mut asked = None::<Instant>;
        let mut missing = chunks.to_vec();
        loop {
            let mut left = Vec::new();
            for chunk in missing {
                if !self.is_staged(chunk)? {
                    left.push(chunk);
                }
            }
            missing = left;
            if missing.is_empty() || !matches!(self.keeper(), Keeper::Vmm(_)) {
                return Ok(());
            }
            if asked.is_none_or(|asked| asked.elapsed() >= ASK_AGAIN) {
                asked = Some(Instant::now());
                for part in missing.chunks(CHUNKS_PER_ORDER) {
                    let Err(error) = disks.stage(&self.serial, part.to_vec()).await else { continue };
                    if self.take_over().await? {
                        return Ok(());
                    }
                    // It has the disk and does not answer.
                    if began.elapsed() >= PATIENCE {
                        return Err(error.into());
                    }
                    asked = None;
                }
                if asked.is_none() {
                    sleep(LOOK * 10).await;
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Keeps a disk that its VMM does not have any more. False while it has it.
    async fn take_over(&self) -> Result<bool, SourceError> {
        let _one = self.moving.lock().await;
        if !matches!(self.keeper(), Keeper::Vmm(_)) {
            return Ok(true);
        }
        let Some(volume) = self.open_here().await? else { return Ok(false) };
        *self.keeper.lock() = Keeper::Here(Arc::new(volume));
        Ok(true)
    }

    /// [`Self::settle`] is needed before anybody else can have the volume.
    pub fn holds_the_volume(&self) -> bool {
        matches!(self.keeper(), Keeper::Vmm(_) | Keeper::Here(_))
    }

    /// True the first time.
    pub fn is_asked_to_settle(&self) -> bool {
        !self.asked_to_settle.swap(true, Ordering::Relaxed)
    }

    /// Copies everything that is still needed of the disk to the stage, so that a VMM can have it, or another freeze begin. What
    /// cannot be copied fails the snapshot.
    pub async fn settle(&self) {
        if !self.holds_the_volume() {
            return;
        }
        let copied = tokio::select! {
            copied = self.copy_rest() => copied,
            () = self.ended.cancelled() => Ok(()),
        };
        if let Err(error) = copied {
            self.lose(&error.to_string());
        }
    }

    async fn copy_rest(&self) -> Result<(), SourceError> {
        loop {
            let left: Vec<u64> = {
                let handed_out = self.handed_out.lock();
                self.chunks().iter().filter(|chunk| !handed_out.contains(chunk)).collect()
            };
            match self.keeper() {
                Keeper::Vmm(disks) => {
                    self.await_staged(&disks, &left).await?;
                    let _one = self.moving.lock().await;
                    if matches!(self.keeper(), Keeper::Vmm(_)) {
                        *self.keeper.lock() = Keeper::Stage;
                        // The snapshot may still fail, so the next one has these chunks as well.
                        if let Err(error) = disks.thaw(&self.serial, true).await {
                            tracing::debug!(serial = self.serial, %error, "ending a freeze: the VMM may have ended");
                        }
                        return Ok(());
                    }
                }
                Keeper::Here(volume) => {
                    let copies = futures::stream::iter(left).map(|chunk| self.copy(&volume, chunk));
                    copies.buffer_unordered(COPIES).try_collect::<()>().await?;
                    *self.keeper.lock() = Keeper::Stage;
                    // Whoever reads from it right now ends soon; the lock goes with the last of them.
                    let open = Arc::downgrade(&volume);
                    drop(volume);
                    while open.strong_count() > 0 {
                        sleep(LOOK).await;
                    }
                    return Ok(());
                }
                Keeper::Nobody | Keeper::Stage | Keeper::Lost(_) => return Ok(()),
            }
        }
    }

    async fn copy(&self, volume: &Arc<OfflineVolume>, chunk: u64) -> Result<(), SourceError> {
        if self.is_staged(chunk)? {
            return Ok(());
        }
        if let Some(content) = read_offline(volume, self.base(), chunk).await? {
            let (stage, key) = (self.files.stage.clone(), self.key.clone());
            let written = tokio::task::spawn_blocking(move || {
                let at = chunk * CHUNK_BYTES as u64;
                let mut content = Vec::from(content);
                if let Some(key) = &key {
                    key.encrypt(&mut content, at);
                }
                stage.write_all_at(&content, at)
            });
            written.await?.map_err(|error| format!("writing the stage: {error}"))?;
        }
        self.copied.lock().insert(chunk);
        Ok(())
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

/// Reads a chunk of a volume that this process has open; `None` = zeros.
pub async fn read_offline(
    volume: &Arc<OfflineVolume>,
    base: Option<&Base>,
    chunk: u64,
) -> Result<Option<Bytes>, String> {
    loop {
        let reader = volume.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut content = vec![0; CHUNK_BYTES];
            reader.read_chunk(chunk, &mut content).map(|()| content)
        });
        match read.await.map_err(|error| error.to_string())? {
            Ok(content) if content.iter().all(|byte| *byte == 0) => return Ok(None),
            Ok(content) => return Ok(Some(content.into())),
            Err(BlockError::ChunkMissing { .. }) if base.is_some() => {
                if let Some(base) = base {
                    base.ensure(chunk, Reader::Waiting).await;
                }
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Fixes the point in time of disks of one VMM, all at the same instant.
pub async fn freeze_live(frozen: &[Arc<Frozen>], disks: Arc<dyn DiskControl>) -> Result<(), String> {
    let copied = |file: &File| file.try_clone().map_err(|error| error.to_string());
    let mut orders = Vec::new();
    for one in frozen {
        let (stage, staged) = (copied(&one.files.stage)?, copied(&one.files.staged)?);
        orders.push(FreezeDisk { serial: one.serial.clone(), stage, staged });
    }
    disks.freeze(orders).await.map_err(|error| error.to_string())?;
    for one in frozen {
        *one.keeper.lock() = Keeper::Vmm(disks.clone());
    }
    for one in frozen {
        let staged = copied(&one.files.staged)?;
        let view = tokio::task::spawn_blocking(move || StagedView::open(staged)).await;
        let view = view.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let _ = one.chunks.set(view.frozen().clone());
        let _ = one.view.set(view);
    }
    Ok(())
}
