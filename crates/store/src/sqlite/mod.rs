//! The default backend: one SQLite file in write-ahead-log mode.
//!
//! - A single writer thread commits queued requests in groups, one fsync each
//!   (`synchronous = FULL`), and answers callers only after it.
//! - Readers have connections of their own and see committed, durable states only.
//! - A lock file keeps other processes away.
//! - A full disk refuses writes until there is room; any other failed write stops writes for good
//!   (until the store is opened again), because after a failed fsync nothing is known about what
//!   the disk holds. Reads go on in both cases.
//!
//! The file can be inspected with the stock `sqlite3` tool while the store is closed.

mod backup;
mod checkpoint;
mod files;
mod group;
mod hub;
mod leases;
mod lock;
mod read;
mod schema;
mod watcher;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};

pub use backup::{backup, restore, restore_over};

use self::checkpoint::Checkpointer;
use self::hub::Hub;
use self::leases::Leases;
use self::lock::StoreLock;
use self::read::Reader;
use self::watcher::Watcher;
use self::writer::{Queued, Request, Writer};
use crate::error::{Error, Result};
use crate::limits;
use crate::model::{KeyValue, LeaseId, LeaseInfo, RangeRequest, RangeResponse, Revision, Txn, TxnOutcome};
use crate::store::Store;
use crate::watch::WatchStream;

/// Bytes of transactions that may wait for the writer; callers beyond it wait to queue.
const QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// Grain of the queue's accounting in bytes.
const QUEUE_GRAIN: usize = 1024;

/// How a store is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Revisions of history to keep; older ones are compacted as new ones come. When the file is
    /// nearly full, an eighth of them is kept. `None`: only [`Store::compact`] compacts.
    pub keep_revisions: Option<u64>,
    /// Size of the database file in bytes from which puts get [`Error::NoSpace`]. Deletions and
    /// compaction, which make room, go on.
    pub max_bytes: u64,
    /// Connections that read at once.
    pub readers: usize,
    /// Recent revisions that are kept in memory for watchers.
    pub recent_revisions: usize,
    /// Bytes of recent revisions that are kept in memory for watchers.
    pub recent_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            keep_revisions: Some(100_000),
            max_bytes: 8 * 1024 * 1024 * 1024,
            readers: 4,
            recent_revisions: 4096,
            recent_bytes: 32 * 1024 * 1024,
        }
    }
}

/// An open store. Dropping it finishes what was queued and closes the file.
#[derive(Debug)]
pub struct SqliteStore {
    shared: Arc<Shared>,
    queue: Sender<Queued>,
    room: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
}

/// What the writer, the readers and the watchers share. Fields drop in order: the lock after the
/// connections, the temporary directory last.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    options: Options,
    hub: Hub,
    leases: Leases,
    /// Why writes have stopped.
    stopped: Arc<OnceLock<String>>,
    idle_readers: Mutex<Vec<Connection>>,
    reader_slots: Semaphore,
    _lock: StoreLock,
    _temporary: Option<tempfile::TempDir>,
}

impl Shared {
    /// Runs `work` on a reading connection, off the async threads.
    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Reader<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _slot = self.reader_slots.acquire().await.map_err(|_| Error::Closed)?;
        let shared = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            let idle = shared.idle_readers.lock().pop();
            let conn = match idle {
                Some(conn) => conn,
                None => schema::open_reader(&shared.path)?,
            };
            let result = work(&Reader { conn: &conn, path: &shared.path });
            shared.idle_readers.lock().push(conn);
            result
        });
        task.await.map_err(|_| Error::Closed)?
    }

    /// Like [`Self::read`], with all of `work`'s queries seeing one state.
    async fn snapshot<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Reader<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.read(move |reader| {
            let _transaction = reader
                .conn
                .unchecked_transaction()
                .map_err(|e| schema::sql_error(reader.path, "cannot begin a transaction in", &e))?;
            work(reader)
        })
        .await
    }
}

impl SqliteStore {
    /// Opens the store at `path`, and creates it when there is none. Its directory must exist.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::NotAStore`], [`Error::NewerSchema`], [`Error::Corrupt`], [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, Options::default())
    }

    /// Opens the store at `path` with `options`.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_with(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        Self::start(path.as_ref().to_owned(), options, None)
    }

    /// A new store in a temporary directory that goes with it.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_temporary() -> Result<Self> {
        Self::open_temporary_with(Options::default())
    }

    /// A new store in a temporary directory that goes with it.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_temporary_with(options: Options) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("hearth-store-")
            .tempdir()
            .map_err(|e| Error::io("cannot make a directory in", std::env::temp_dir(), &e))?;
        Self::start(directory.path().join("store.db"), options, Some(directory))
    }

    fn start(path: PathBuf, options: Options, temporary: Option<tempfile::TempDir>) -> Result<Self> {
        let lock = StoreLock::take(&path)?;
        if !files::exists(&path)? {
            schema::create(&path)?;
        }
        let conn = schema::open_writer(&path, options.max_bytes)?;
        let reader = Reader { conn: &conn, path: &path };
        let (revision, compacted) = (reader.revision()?, reader.compacted()?);
        let leases = Leases::default();
        for (id, ttl) in writer::load_leases(&conn, &path)? {
            leases.add(id, ttl, Instant::now());
        }
        let shared = Arc::new(Shared {
            hub: Hub::new(revision, options.recent_revisions, options.recent_bytes),
            leases,
            stopped: Arc::new(OnceLock::new()),
            idle_readers: Mutex::new(Vec::new()),
            reader_slots: Semaphore::new(options.readers.max(1)),
            path,
            options,
            _lock: lock,
            _temporary: temporary,
        });
        let (queue, requests) = channel();
        let checkpointer = Checkpointer::start(&shared)?;
        let writer = Writer::new(conn, Arc::clone(&shared), requests, checkpointer, revision, compacted);
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|e| Error::io("cannot start the writer thread of", &shared.path, &e))?;
        let room = Arc::new(Semaphore::new(QUEUE_BYTES / QUEUE_GRAIN));
        Ok(Self { shared, queue, room, writer: Some(writer) })
    }

    /// Path of the database file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Queues a request of `size` bytes and waits for its answer.
    async fn write<T>(&self, size: usize, request: impl FnOnce(oneshot::Sender<Result<T>>) -> Request) -> Result<T> {
        self.check_writable()?;
        let grains = u32::try_from(size / QUEUE_GRAIN + 1).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.room).acquire_many_owned(grains).await.map_err(|_| Error::Closed)?;
        let (reply, answer) = oneshot::channel();
        let queued = Queued { request: request(reply), size, _permit: Some(permit) };
        self.queue.send(queued).map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }

    fn check_writable(&self) -> Result<()> {
        match self.shared.stopped.get() {
            Some(cause) => Err(Error::WritesStopped { path: self.shared.path.clone(), cause: cause.clone() }),
            None => Ok(()),
        }
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        let shutdown = Queued { request: Request::Shutdown, size: 0, _permit: None };
        if self.queue.send(shutdown).is_ok()
            && let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!(path = %self.shared.path.display(), "the store's writer thread panicked");
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        limits::check_key(key)?;
        let key = key.to_owned();
        self.shared.read(move |reader| reader.get(&key)).await
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        limits::check_range(&request)?;
        self.shared.snapshot(move |reader| reader.range(&request)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        limits::check_txn(&txn)?;
        self.write(txn.size(), |reply| Request::Txn(txn, reply)).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        limits::check_prefix(prefix)?;
        if from < 0 {
            return Err(Error::InvalidRevision { requested: from });
        }
        let next = self
            .shared
            .snapshot(move |reader| match from {
                0 => Ok(reader.revision()? + 1),
                _ => reader.check_watchable(from).map(|()| from),
            })
            .await?;
        Ok(WatchStream::new(Watcher::new(&self.shared, prefix, next).into_stream()))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        limits::check_lease_ttl(ttl)?;
        self.write(0, |reply| Request::LeaseGrant(ttl, reply)).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration> {
        self.check_writable()?;
        self.shared.leases.keep_alive(id, Instant::now())
    }

    async fn lease_revoke(&self, id: LeaseId) -> Result<Revision> {
        self.write(0, |reply| Request::LeaseRevoke(id, reply)).await
    }

    async fn lease_info(&self, id: LeaseId) -> Result<LeaseInfo> {
        let keys = self.shared.read(move |reader| reader.leased(id)).await?;
        let (ttl, remaining) = self.shared.leases.times(id, Instant::now())?;
        Ok(LeaseInfo { id, ttl, remaining, keys: keys.into_iter().map(|kv| kv.key).collect() })
    }

    async fn compact(&self, at: Revision) -> Result<()> {
        if at < 0 {
            return Err(Error::InvalidRevision { requested: at });
        }
        self.write(0, |reply| Request::Compact(at, reply)).await
    }

    async fn revision(&self) -> Result<Revision> {
        self.shared.read(|reader| reader.revision()).await
    }

    async fn backup(&self, path: &Path) -> Result<Revision> {
        let (source, target) = (self.shared.path.clone(), path.to_owned());
        tokio::task::spawn_blocking(move || backup::backup(&source, &target)).await.map_err(|_| Error::Closed)?
    }
}

#[cfg(test)]
#[path = "sqlite_test.rs"]
mod tests;
