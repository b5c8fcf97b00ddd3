//! Copying the write-ahead log back into the database file, beside the writer.
//!
//! SQLite would do it within some unlucky commit, which then takes tens of milliseconds. Here a
//! thread of its own does most of the copying and its fsync while commits go on. The writer's own
//! checkpoint, at a much larger log, then finds little left to do and starts the log over.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use rusqlite::{Connection, ErrorCode};

use super::Shared;
use super::schema;
use crate::error::{Error, Result};

/// Pages in the log, about, from which they are copied back.
const PAGES: usize = 1000;

/// The checkpointing thread, as the writer sees it.
#[derive(Debug)]
pub(super) struct Checkpointer {
    wake: SyncSender<()>,
    thread: JoinHandle<()>,
    /// Pages written to the log since it was last woken.
    pages: usize,
}

impl Checkpointer {
    pub(super) fn start(shared: &Arc<Shared>) -> Result<Self> {
        let conn = schema::open_checkpointer(&shared.path)?;
        // One wake-up may wait while another is worked on; more would be the same.
        let (wake, woken) = sync_channel(1);
        let failed = Arc::clone(&shared.stopped);
        let thread = std::thread::Builder::new()
            .name("store-checkpoint".to_owned())
            .spawn(move || run(&conn, &woken, &failed))
            .map_err(|e| Error::io("cannot start the checkpoint thread of", &shared.path, &e))?;
        Ok(Self { wake, thread, pages: 0 })
    }

    /// Tells it that about so many pages went into the log.
    pub(super) fn written(&mut self, pages: usize) {
        self.pages += pages;
        if self.pages >= PAGES && self.wake.try_send(()).is_ok() {
            self.pages = 0;
        }
    }

    /// Waits for it to finish.
    pub(super) fn stop(self) {
        drop(self.wake);
        if self.thread.join().is_err() {
            tracing::error!("the store's checkpoint thread panicked");
        }
    }
}

fn run(conn: &Connection, woken: &Receiver<()>, stopped: &OnceLock<String>) {
    for () in woken {
        let Err(error) = conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())) else { continue };
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {}
            // The log keeps what the file has no room for.
            Some(ErrorCode::DiskFull) => tracing::warn!(%error, "the store's log cannot be copied back"),
            _ => {
                // The log still has everything, but the disk cannot be trusted with more.
                tracing::error!(%error, "store stops accepting writes: its log cannot be copied back");
                stopped.get_or_init(|| format!("its log cannot be copied back: {error}"));
            }
        }
    }
}
