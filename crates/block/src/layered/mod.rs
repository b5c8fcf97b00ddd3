//! A volume as its own sparse `data` file plus a map of which blocks that file holds, over a base that is shared by all
//! volumes of a snapshot and filled on demand. The design and the formats are in docs/storage.md.

mod buffer;
mod clock;
mod core;
mod files;
mod freeze;
mod inline;
mod internal;
mod offline;
mod op;
mod pool;
mod ring;
mod shared;
mod sync;
mod transfer;

#[cfg(test)]
mod tests;

/// The simulated disk, for the map's tests.
#[cfg(test)]
pub(crate) mod testing {
    pub(crate) use super::op::FileId;
    pub(crate) use super::tests::disk::{Rng, SimDisk};
}

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use files::{BaseFiles, VolumeFiles, presence_words};
use files::{Descriptors, PresenceMap};
pub use freeze::{FreezeState, FrozenSet, Stage, StagedView, staged_bytes};
use inline::Inline;
pub use offline::OfflineVolume;
use shared::{Alignment, Mail, Nobody, Parts, Presence, Shared};
pub use shared::{Cause, ChunkFetcher, VolumeEvents};

use crate::map::{self, Header, Storage};
use crate::xts::{Xts, XtsKey};
use crate::{BlockError, Engine, Limits, MapError, RateLimits, Volume, VolumeQueue};

/// How to open a volume.
pub struct OpenOptions {
    /// Attachment generation: one older than the map's is refused, a newer one is written to it.
    pub generation: u64,
    /// Who brings chunks of the base.
    pub fetcher: Arc<dyn ChunkFetcher>,
    /// Who learns of the volume's condition.
    pub events: Arc<dyn VolumeEvents>,
    /// How requests reach the kernel.
    pub engine: Engine,
    /// Use `O_DIRECT` on `data` where the file system has it.
    pub direct: bool,
}

impl std::fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenOptions").field("generation", &self.generation).field("engine", &self.engine).finish()
    }
}

/// A volume over a base. Methods may be called from any thread; those that do not say so do not block.
#[derive(Debug)]
pub struct LayeredVolume {
    shared: Arc<Shared>,
    descriptors: Arc<Descriptors>,
    engine: Engine,
    /// Also serialises what changes the header.
    header: Mutex<Header>,
    read_only: bool,
}

/// What both ways to open a volume have in common.
struct Opened {
    header: Header,
    shared: Arc<Shared>,
    descriptors: Arc<Descriptors>,
}

fn open(files: VolumeFiles, options: &OpenOptions) -> Result<Opened, BlockError> {
    let VolumeFiles { data, map, base, key } = files;
    files::lock(&map)?;
    // Whoever had this open file description before may have left it direct, which headers are not aligned for.
    files::set_direct(&map, false).map_err(BlockError::Data)?;
    files::set_direct(&data, false).map_err(BlockError::Data)?;
    let (presence, extent, base_key, base): (Box<dyn Presence>, _, _, _) = match base {
        None => (Box::new(Nobody), None, None, None),
        Some(base) => {
            // Through the page cache, which all volumes over this base share.
            files::set_direct(&base.data, false).map_err(BlockError::Data)?;
            let presence = PresenceMap::new(&base.presence)?;
            (Box::new(presence), Some(files::read_extent(&base.presence)?), base.key, Some(base.data))
        }
    };
    let (mut header, bits) = open_map(&map, &data, options.generation, extent)?;
    let alignment = if options.direct { files::go_direct(&data) } else { buffered(&data)? };
    let expand = |key: Option<XtsKey>| key.as_ref().map(Xts::new);
    let parts = Parts {
        volume_id: header.volume_id,
        bits,
        alignment,
        data_key: expand(key),
        base_key: expand(base_key),
        presence,
        fetcher: Arc::clone(&options.fetcher),
        events: Arc::clone(&options.events),
    };
    let descriptors = Arc::new(Descriptors::new(data, map, base));
    claim(&descriptors.map, &mut header, options.generation)?;
    Ok(Opened { header, shared: Arc::new(Shared::new(parts)), descriptors })
}

/// Reads and checks a map.
pub(crate) fn open_map(
    map: &dyn Storage,
    data: &dyn Storage,
    generation: u64,
    extent: Option<map::Extent>,
) -> Result<(Header, map::Bits), BlockError> {
    let header = map::read_header(map)?;
    if generation < header.generation {
        return Err(BlockError::Fenced { ours: generation, theirs: header.generation });
    }
    let found = data.length().map_err(BlockError::Size)?;
    if found < header.size_bytes {
        return Err(BlockError::DataTooShort { found, expected: header.size_bytes });
    }
    if extent.is_none() && header.base_root.is_some() {
        return Err(BlockError::BaseMissing);
    }
    let mut bits = map::load(map, &header, extent.unwrap_or_default())?;
    // A killed process may have left both in the page cache only. LOCAL bits read from there are never written again, so
    // they must be made durable now, after the data they stand for.
    if !header.clean {
        data.sync().map_err(BlockError::Sync)?;
    }
    map.sync().map_err(BlockError::Sync)?;
    map::even_out(map, &header)?;
    if !header.clean {
        replay(map, data, &header, &mut bits)?;
        bits.distrust_dirty();
    }
    Ok((header, bits))
}

/// Puts what only the log has where it belongs. It stays in the log until the first flush writes the pages.
fn replay(map: &dyn Storage, data: &dyn Storage, header: &Header, bits: &mut map::Bits) -> Result<(), BlockError> {
    let kept = map::log::read(map, header, bits)?;
    for (block, content) in &kept {
        data.write_at(content, block * map::BLOCK_BYTES).map_err(BlockError::Data)?;
        bits.set_local(*block..block + 1);
        bits.touch(*block);
    }
    if kept.is_empty() { Ok(()) } else { data.sync().map_err(BlockError::Sync) }
}

/// Says in the map which attachment has the volume now: older ones are refused from here on.
fn claim(map: &dyn Storage, header: &mut Header, generation: u64) -> Result<(), MapError> {
    if generation > header.generation {
        header.generation = generation;
        map::write_header(map, header)?;
    }
    Ok(())
}

/// Says in the map that the volume is in use, before anything in it changes.
fn mark_in_use(map: &dyn Storage, header: &mut Header) -> Result<(), MapError> {
    if header.clean {
        header.clean = false;
        map::write_header(map, header)?;
    }
    Ok(())
}

/// Says in the map that it is exact, after everything else was made durable.
fn mark_clean(map: &dyn Storage, header: &mut Header) -> Result<(), MapError> {
    header.clean = true;
    map::write_header(map, header)
}

/// Ends the use of a volume whose queues are gone. `flush` is one flush of the volume, through the engine.
fn close(
    map: &dyn Storage,
    header: &mut Header,
    shared: &Shared,
    flush: impl FnOnce() -> Result<(), BlockError>,
) -> Result<(), BlockError> {
    {
        let mut coord = shared.coord();
        coord.end_freeze(true);
        coord.flush_everything();
    }
    flush()?;
    shared.coord().closed = true;
    Ok(mark_clean(map, header)?)
}

/// Clears DIRTY, durably; `flush` as above.
fn clear_dirty(
    map: &dyn Storage,
    header: &mut Header,
    shared: &Shared,
    flush: impl FnOnce() -> Result<(), BlockError>,
) -> Result<(), BlockError> {
    // While pages are being written the map is not clean: a crash may leave one written in part.
    mark_in_use(map, header)?;
    {
        let mut coord = shared.coord();
        for chunk in coord.bits.dirty_chunks() {
            coord.bits.clear_dirty(chunk);
        }
        coord.flush_everything();
    }
    flush()?;
    Ok(mark_clean(map, header)?)
}

/// Makes an open volume larger.
fn grow(
    map: &dyn Storage,
    data: &dyn Storage,
    header: &mut Header,
    shared: &Shared,
    size_bytes: u64,
) -> Result<(), BlockError> {
    map::grow(map, data, header, size_bytes)?;
    shared.coord().bits.grow(size_bytes);
    shared.size.store(size_bytes, Ordering::Release);
    Ok(())
}

fn buffered(data: &std::fs::File) -> Result<Alignment, BlockError> {
    files::set_direct(data, false).map_err(BlockError::Data)?;
    Ok(Alignment { memory: 1, offset: 1 })
}

impl LayeredVolume {
    /// Opens a volume for a guest; blocks. From now on its map says that it is in use, until
    /// [`close_clean`](Self::close_clean).
    pub fn open(files: VolumeFiles, options: OpenOptions) -> Result<Self, BlockError> {
        let Opened { mut header, shared, descriptors } = open(files, &options)?;
        mark_in_use(&descriptors.map, &mut header)?;
        if options.direct {
            // Pages go past the page cache: their buffers are aligned, and nobody reads them again.
            files::go_direct(&descriptors.map);
        }
        Ok(Self { shared, descriptors, engine: options.engine, header: Mutex::new(header), read_only: false })
    }

    /// The same volume, refusing what changes it. (Its map is still marked as in use.)
    #[must_use]
    pub fn into_read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// To be called after presence bits were set: requests that wait for chunks are looked at again.
    pub fn presence_changed(&self) {
        self.shared.presence_changed();
    }

    /// Chunks that were asked for and have not come, ascending: for an agent that came back.
    pub fn pending_fetches(&self) -> Vec<u64> {
        self.shared.coord().fetches.keys().copied().collect()
    }

    /// New rate limits, from now on.
    pub fn set_rate_limits(&self, limits: RateLimits) {
        let mut coord = self.shared.coord();
        coord.limiter.set(limits);
        coord.post_all(Mail::LimitsChanged);
    }

    /// Makes the volume larger; blocks. The new range reads as zeros. Durable on return; a crash leaves the old or the new
    /// size.
    pub fn grow(&self, size_bytes: u64) -> Result<(), BlockError> {
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        let direct = files::set_direct(&self.descriptors.map, false).map_err(BlockError::Data)?;
        let grown = grow(&self.descriptors.map, &self.descriptors.data, &mut header, &self.shared, size_bytes);
        files::set_direct(&self.descriptors.map, direct).map_err(BlockError::Data)?;
        grown
    }

    /// Begins to prepare a freeze: flushes, then holds new writes back and waits for those in flight. The volume's queues
    /// do the work in their [`drain`](VolumeQueue::drain); their descriptors become readable for it. Without an open queue
    /// this blocks until it is done. Any number of volumes may be prepared before the first is frozen.
    ///
    /// # Errors
    /// Another freeze is under way.
    pub fn freeze_prepare(&self) -> Result<(), BlockError> {
        let left = {
            let mut coord = self.shared.coord();
            let state = coord.freeze.state;
            if coord.closed {
                return Err(BlockError::Closed);
            }
            if state != FreezeState::Idle {
                return Err(BlockError::FreezeState(state, FreezeState::Idle));
            }
            let mail = coord.begin_prepare();
            match coord.any_queue() {
                Some(queue) => {
                    coord.post(queue, mail, None);
                    None
                }
                None => Some(mail),
            }
        };
        if let Some(mail) = left {
            let mut inline = self.inline();
            inline.mail(mail);
            inline.run(|core| core.freeze_state() != FreezeState::Preparing)?;
        }
        Ok(())
    }

    /// How far a freeze is. When a preparation fails it is [`FreezeState::Idle`] again, and
    /// [`freeze`](Self::freeze) tells why.
    pub fn freeze_state(&self) -> FreezeState {
        self.shared.coord().freeze.state
    }

    /// Since when a preparation has held writes back; `None` when it does not.
    pub fn writes_held_since(&self) -> Option<Instant> {
        self.shared.coord().freeze.gate
    }

    /// Blocks until a preparation ended or time is up. Not for the thread of one of the volume's queues.
    pub fn wait_prepared(&self, timeout: Duration) -> FreezeState {
        let deadline = Instant::now() + timeout;
        loop {
            let seen = self.shared.prepared.count();
            let state = self.freeze_state();
            let left = deadline.saturating_duration_since(Instant::now());
            if state != FreezeState::Preparing || left.is_zero() {
                return state;
            }
            self.shared.prepared.wait(seen, left);
        }
    }

    /// Fixes the point in time of a prepared freeze and lets writes go on: the DIRTY chunks become the frozen set, DIRTY is
    /// cleared, and from now on every chunk of the set is copied to the stage before it changes. The set is also written to
    /// the head of `stage.staged`.
    ///
    /// # Errors
    /// The volume is not [`FreezeState::Ready`], or the stage cannot be written; then writes go on and nothing is frozen.
    pub fn freeze(&self, stage: Stage) -> Result<FrozenSet, BlockError> {
        let (set, size) = {
            let coord = self.shared.coord();
            let state = coord.freeze.state;
            if state != FreezeState::Ready {
                let error = coord.freeze.error.filter(|_| state == FreezeState::Idle);
                return Err(error.map_or(BlockError::FreezeState(state, FreezeState::Ready), |errno| {
                    BlockError::Freeze(io::Error::from_raw_os_error(errno))
                }));
            }
            (FrozenSet::of(coord.bits.chunks(), &coord.bits.dirty_chunks()), coord.bits.size_bytes())
        };
        if let Err(error) = write_stage(&stage, size, &set) {
            self.freeze_cancel();
            return Err(BlockError::Stage(error));
        }
        self.descriptors.set_stage(Some(stage));
        let mut coord = self.shared.coord();
        coord.begin_freeze(set.clone());
        coord.wake_blocked(None);
        Ok(set)
    }

    /// Calls a preparation off, whether it is done or not. Does nothing to a freeze.
    pub fn freeze_cancel(&self) {
        let mut coord = self.shared.coord();
        coord.freeze.abandon(libc::ECANCELED);
        coord.wake_blocked(None);
        coord.wake_flushes(None);
    }

    /// Has a chunk of the frozen set copied to the stage soon. Its mark in `staged` and [`VolumeEvents::staged`] tell when it
    /// is there; nothing happens when it is there already, does not belong to the set, or no freeze is under way. Without an
    /// open queue this blocks until it is done.
    pub fn stage_chunk(&self, chunk: u64) -> Result<(), BlockError> {
        let queued = {
            let mut coord = self.shared.coord();
            let queue = coord.any_queue();
            if let Some(queue) = queue {
                coord.post(queue, Mail::Stage { chunk }, None);
            }
            queue.is_some()
        };
        if !queued {
            let mut inline = self.inline();
            inline.mail(Mail::Stage { chunk });
            inline.run(|core| core.is_copied(chunk))?;
        }
        Ok(())
    }

    /// Ends a freeze. `restore_dirty` puts the frozen set back into DIRTY: the snapshot failed, and the next one has to have
    /// these chunks too.
    pub fn thaw(&self, restore_dirty: bool) {
        let mut coord = self.shared.coord();
        coord.end_freeze(restore_dirty);
        coord.wake_blocked(None);
    }

    /// Flushes, writes DIRTY bits and marks the map as closed in order; blocks. Afterwards requests fail with `ESHUTDOWN`.
    /// All queues must be dropped before.
    ///
    /// # Errors
    /// After a failed sync the volume can never be closed clean.
    pub fn close_clean(&self) -> Result<(), BlockError> {
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.coord().closed {
            return Ok(());
        }
        close(&self.descriptors.map, &mut header, &self.shared, || {
            self.inline().flush()?;
            files::set_direct(&self.descriptors.map, false).map_err(BlockError::Data)?;
            Ok(())
        })?;
        files::unlock(&self.descriptors.map);
        Ok(())
    }

    fn inline(&self) -> Inline {
        Inline::new(Arc::clone(&self.shared), Arc::clone(&self.descriptors))
    }
}

fn write_stage(stage: &Stage, size: u64, set: &FrozenSet) -> io::Result<()> {
    files::set_direct(&stage.file, false)?;
    stage.file.set_len(size)?;
    if stage.staged.metadata()?.len() < staged_bytes(size) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the staged file is too short"));
    }
    stage.staged.write_at(&freeze::encode_staged(size, set), 0)
}

impl Volume for LayeredVolume {
    fn size_bytes(&self) -> u64 {
        self.shared.size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            optimal_io_bytes: 0,
            max_discard_bytes: 1 << 30,
            discard_granularity_bytes: 4096,
            max_write_zeroes_bytes: 1 << 30,
        }
    }

    fn open_queue(&self, capacity: usize) -> Result<Box<dyn VolumeQueue>, BlockError> {
        let capacity = capacity.clamp(1, 4096);
        let ring = || ring::RingQueue::open(Arc::clone(&self.shared), Arc::clone(&self.descriptors), capacity);
        let pool = || pool::PoolQueue::open(Arc::clone(&self.shared), Arc::clone(&self.descriptors), capacity);
        match self.engine {
            Engine::IoUring => Ok(Box::new(ring()?)),
            Engine::ThreadPool => Ok(Box::new(pool()?)),
            Engine::Auto => match ring() {
                Ok(queue) => Ok(Box::new(queue)),
                // Forbidden by sysctl or seccomp, or a kernel without it: the pool does the same, slower.
                Err(_) => Ok(Box::new(pool()?)),
            },
        }
    }

    fn grow(&self, bytes: u64) -> Result<(), BlockError> {
        LayeredVolume::grow(self, bytes)
    }

    fn close(&self) -> Result<(), BlockError> {
        self.close_clean()
    }

    /// Not for the thread of a queue while requests are in flight on it.
    fn sync(&self) -> Result<(), BlockError> {
        self.inline().flush()
    }
}
