//! Bases: the content of a snapshot, once per host, filled chunk by chunk for all volumes made from it.

use std::collections::{HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use hearth_block::XtsKey;
use hearth_block::map::Extent;
use hearth_snapshot::{CHUNK_BYTES, ChunkStore, Manifest, StorageError};
use hearth_snapshot::{load_prefetch, store_prefetch};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{Notify, Semaphore};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::keyring::KeyError;
use super::presence::Presence;
use super::working_set::{WorkingSet, unite};

/// Chunks fetched at a time for one base.
const PARALLEL: usize = 32;
/// Pauses between tries while the object store does not answer.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// How often it is looked whether a launch is over.
const LOOK: Duration = Duration::from_secs(1);

/// Why a base cannot be used.
#[derive(Debug, Error)]
pub enum BaseError {
    /// What the control plane says of it makes no sense.
    #[error("base {id}: {reason}")]
    Spec {
        /// Which snapshot.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// Its keys.
    #[error("base {id}: {source}")]
    Key {
        /// Which snapshot.
        id: String,
        /// What is missing.
        source: KeyError,
    },
    /// The object store.
    #[error("base {id}: {source}")]
    Storage {
        /// Which snapshot.
        id: String,
        /// What it said.
        source: Box<StorageError>,
    },
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
}

impl BaseError {
    /// Whether trying again later may help without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Spec { .. } => false,
            Self::Key { source, .. } => source.is_transient(),
            Self::Storage { source, .. } => source.is_transient(),
            Self::Io { .. } => true,
        }
    }
}

/// For whom a chunk is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Nobody waits for it yet.
    Nobody,
    /// Somebody waits: a guest that has been running, a snapshot in the making.
    Waiting,
    /// A guest that boots, or who prepares that, waits: what it reads is fetched ahead by later launches.
    Launch,
}

/// One base on this host, which is filled while it lives.
pub struct Base {
    content: Arc<Content>,
    work: Vec<AbortHandle>,
}

impl Drop for Base {
    fn drop(&mut self) {
        self.work.iter().for_each(AbortHandle::abort);
    }
}

impl std::ops::Deref for Base {
    type Target = Content;

    fn deref(&self) -> &Content {
        &self.content
    }
}

impl Base {
    /// Opens a base in `folder`, which is made if it is not there, and begins to fill it: with what is asked for, what earlier
    /// launches read, and in the background at `fill_rate` bytes per second, if that is not 0. Blocks.
    pub(super) fn open(
        folder: &Path,
        boot_id: &str,
        manifest: Manifest,
        store: ChunkStore,
        key: Option<XtsKey>,
        fill_rate: u64,
    ) -> Result<Self, BaseError> {
        let failed = |action: &'static str| {
            let path = folder.to_owned();
            move |source| BaseError::Io { action, path, source }
        };
        std::fs::create_dir_all(folder).map_err(failed("creating"))?;
        let path = folder.join("data");
        let mut options = OpenOptions::new();
        let data = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let data = data.map_err(failed("opening the data of"))?;
        let bytes = manifest.chunk_count() * CHUNK_BYTES as u64;
        if data.metadata().map_err(failed("reading"))?.len() < bytes {
            data.set_len(bytes).map_err(failed("setting the size of the data of"))?;
        }
        let extent = Extent::of(manifest.chunks());
        let presence = Presence::open(folder, boot_id, manifest.chunk_count(), &extent);
        let presence = presence.map_err(failed("opening"))?;
        let content = Arc::new(Content {
            manifest,
            extent,
            store,
            key,
            data,
            path,
            presence,
            wanted: Mutex::default(),
            asked: Notify::new(),
            came: Notify::new(),
            launched: Notify::new(),
            listeners: Mutex::default(),
        });
        let mut work = vec![
            tokio::spawn(content.clone().run()).abort_handle(),
            tokio::spawn(content.clone().follow_working_set()).abort_handle(),
        ];
        if fill_rate > 0 {
            work.push(tokio::spawn(content.clone().fill(fill_rate)).abort_handle());
        }
        Ok(Self { content, work })
    }
}

/// What a base is, shared with those who fill it.
pub struct Content {
    /// What is in it.
    pub manifest: Manifest,
    /// Chunks that the manifest has.
    pub extent: Extent,
    store: ChunkStore,
    /// Key of its data on this host.
    key: Option<XtsKey>,
    data: File,
    path: PathBuf,
    presence: Presence,
    wanted: Mutex<Wanted>,
    /// Something is wanted. Apart from `came`: who waits for a chunk must not wake itself by asking for it.
    asked: Notify,
    /// Something has come.
    came: Notify,
    /// A launch has read something.
    launched: Notify,
    /// Told after chunks have come.
    listeners: Mutex<Vec<Weak<dyn Fn() + Send + Sync>>>,
}

#[derive(Default)]
struct Wanted {
    /// What a guest waits for, oldest first; then what it may want soon.
    urgent: VecDeque<u64>,
    ahead: VecDeque<u64>,
    /// Being fetched, or in a queue.
    known: HashSet<u64>,
    /// Being fetched.
    taken: HashSet<u64>,
    /// Somebody waits for them.
    hurried: HashSet<u64>,
    working_set: WorkingSet,
}

impl Wanted {
    /// The next chunk to fetch.
    fn next(&mut self) -> Option<u64> {
        loop {
            let next = self.urgent.pop_front().or_else(|| self.ahead.pop_front())?;
            if self.known.contains(&next) && self.taken.insert(next) {
                return Some(next);
            }
        }
    }

    fn done(&mut self, chunk: u64) {
        self.known.remove(&chunk);
        self.taken.remove(&chunk);
        self.hurried.remove(&chunk);
    }
}

impl Content {
    /// Data and presence, for a VMM.
    pub fn files(&self) -> io::Result<(File, File)> {
        // A descriptor of its own: flags such as O_DIRECT belong to the open file.
        Ok((File::open(&self.path)?, self.presence.file().try_clone()?))
    }

    /// Key of the data, when it is not in clear.
    pub fn key(&self) -> Option<&XtsKey> {
        self.key.as_ref()
    }

    /// Whether a chunk can be read.
    pub fn has(&self, chunk: u64) -> bool {
        self.presence.has(chunk)
    }

    /// Chunks here and in all.
    pub fn progress(&self) -> (u64, u64) {
        (self.presence.count(), self.manifest.present_chunks())
    }

    /// A launch reads a chunk, here or not.
    pub fn note(&self, chunk: u64) {
        if self.manifest.entry(chunk).is_some() && self.wanted.lock().working_set.note(chunk) {
            self.launched.notify_one();
        }
    }

    /// Has a chunk fetched.
    pub fn want(&self, chunk: u64, reader: Reader) {
        if self.presence.has(chunk) || self.manifest.entry(chunk).is_none() {
            return;
        }
        if reader == Reader::Launch {
            self.note(chunk);
        }
        let mut wanted = self.wanted.lock();
        let new = wanted.known.insert(chunk);
        if reader != Reader::Nobody {
            // It may stand in the other queue as well, and is passed over there.
            if wanted.hurried.insert(chunk) && !wanted.taken.contains(&chunk) {
                wanted.urgent.push_back(chunk);
            }
        } else if new {
            wanted.ahead.push_back(chunk);
        }
        drop(wanted);
        self.asked.notify_one();
    }

    /// Has everything fetched that is not here yet, as fast as it comes, behind what somebody waits for.
    pub fn want_all(&self) {
        self.manifest.chunks().for_each(|chunk| self.want(chunk, Reader::Nobody));
    }

    /// Tells `listener` of chunks that come, as long as it lives.
    pub fn listen(&self, listener: &Arc<dyn Fn() + Send + Sync>) {
        self.listeners.lock().push(Arc::downgrade(listener));
    }

    fn tell(&self) {
        self.came.notify_waiters();
        self.listeners.lock().retain(|listener| match listener.upgrade() {
            Some(listener) => {
                listener();
                true
            }
            None => false,
        });
    }

    /// Waits until a chunk is here. May be given up.
    pub async fn ensure(&self, chunk: u64, reader: Reader) {
        loop {
            let came = self.came.notified();
            tokio::pin!(came);
            came.as_mut().enable();
            if self.presence.has(chunk) || self.manifest.entry(chunk).is_none() {
                return;
            }
            self.want(chunk, reader);
            came.await;
        }
    }

    /// Has everything fetched that is not here yet, at most `bytes_per_second`, behind everything that somebody asks for.
    pub async fn fill(self: Arc<Self>, bytes_per_second: u64) {
        let pause = Duration::from_secs_f64(CHUNK_BYTES as f64 / bytes_per_second.max(1) as f64);
        let missing: Vec<u64> = self.manifest.chunks().filter(|chunk| !self.presence.has(*chunk)).collect();
        for chunk in missing {
            let begun = Instant::now();
            self.bring_quietly(chunk).await;
            tokio::time::sleep_until(begun + pause).await;
        }
    }

    /// Fetches a chunk for nobody in particular, when nobody asks for others.
    async fn bring_quietly(&self, chunk: u64) {
        loop {
            let came = self.came.notified();
            tokio::pin!(came);
            came.as_mut().enable();
            if self.presence.has(chunk) {
                return;
            }
            if self.wanted.lock().known.is_empty() {
                self.want(chunk, Reader::Nobody);
            }
            came.await;
        }
    }

    /// Fetches what earlier launches from this snapshot read, in their order, and notes what else the next one reads.
    async fn follow_working_set(self: Arc<Self>) {
        let objects = self.store.objects().clone();
        let known = match load_prefetch(&*objects, self.manifest.id()).await {
            Ok(known) => known,
            Err(error) => return tracing::debug!(snapshot = %self.manifest.id(), %error, "reading a prefetch list"),
        };
        for chunk in known.iter().flatten() {
            self.want(u64::from(*chunk), Reader::Nobody);
        }
        self.launched.notified().await;
        while !self.is_launch_over() {
            tokio::time::sleep(LOOK).await;
        }
        let touched = self.wanted.lock().working_set.take();
        let Some(list) = unite(known.as_deref(), &touched, self.manifest.present_chunks()) else { return };
        match store_prefetch(&*objects, self.manifest.id(), &list).await {
            Ok(()) => tracing::info!(snapshot = %self.manifest.id(), chunks = list.len(), "noted what launches read"),
            Err(error) => tracing::debug!(snapshot = %self.manifest.id(), %error, "storing a prefetch list"),
        }
    }

    fn is_launch_over(&self) -> bool {
        let wanted = self.wanted.lock();
        wanted.working_set.is_over(wanted.known.is_empty())
    }

    async fn run(self: Arc<Self>) {
        let slots = Arc::new(Semaphore::new(PARALLEL));
        // They end with this.
        let mut fetches = JoinSet::new();
        loop {
            while fetches.try_join_next().is_some() {}
            // The slot first: what is chosen before it would keep a chunk that somebody asks for meanwhile waiting.
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let next = self.wanted.lock().next();
            let Some(chunk) = next else {
                drop(slot);
                self.asked.notified().await;
                continue;
            };
            let base = self.clone();
            fetches.spawn(async move {
                base.bring(chunk).await;
                base.wanted.lock().done(chunk);
                drop(slot);
                base.tell();
            });
        }
    }

    /// Fetches one chunk, however long it takes.
    async fn bring(self: &Arc<Self>, chunk: u64) {
        let mut pause = PAUSES.0;
        loop {
            match self.fetch(chunk).await {
                Ok(()) => return,
                Err(error) if error.is_transient() => tracing::warn!(chunk, %error, "a chunk is fetched again"),
                Err(error) => tracing::error!(chunk, %error, "a chunk cannot be had; guests that need it wait"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn fetch(self: &Arc<Self>, chunk: u64) -> Result<(), BaseError> {
        let Some(entry) = self.manifest.entry(chunk) else { return Ok(()) };
        let failed = |source| BaseError::Storage { id: self.manifest.id().to_string(), source: Box::new(source) };
        let base = self.clone();
        let domain = self.store.domain().clone();
        // It may be here from before this boot: then its bytes tell.
        let kept = tokio::task::spawn_blocking(move || {
            let at = chunk * CHUNK_BYTES as u64;
            if is_hole(&base.data, at, CHUNK_BYTES as u64) {
                return false;
            }
            let mut content = vec![0; CHUNK_BYTES];
            let read = base.data.read_exact_at(&mut content, at);
            if let Some(key) = &base.key {
                key.decrypt(&mut content, at);
            }
            read.is_ok() && domain.name_of(&content) == entry.hash
        });
        if !kept.await.unwrap_or(false) {
            let content = self.store.get_chunk(&entry).await.map_err(failed)?;
            let base = self.clone();
            let written = tokio::task::spawn_blocking(move || {
                let at = chunk * CHUNK_BYTES as u64;
                match &base.key {
                    None => base.data.write_all_at(&content, at),
                    Some(key) => {
                        let mut sealed = content.to_vec();
                        key.encrypt(&mut sealed, at);
                        base.data.write_all_at(&sealed, at)
                    }
                }
            });
            let written = written.await.map_err(io::Error::other).and_then(|written| written);
            written.map_err(|source| BaseError::Io { action: "writing", path: self.path.clone(), source })?;
        }
        self.presence.set(chunk);
        Ok(())
    }
}

/// Whether nothing was ever written there. File systems that cannot tell say no.
fn is_hole(file: &File, at: u64, length: u64) -> bool {
    let Ok(from) = i64::try_from(at) else { return false };
    match lseek(file, from, Whence::SeekData) {
        Ok(data) => u64::try_from(data).is_ok_and(|data| data >= at.saturating_add(length)),
        Err(errno) => errno == Errno::ENXIO,
    }
}

#[cfg(test)]
#[path = "base_test.rs"]
mod tests;
