//! A volume without a guest: the agent reads it for a snapshot.

use std::sync::{Arc, Mutex, PoisonError};

use super::inline::Inline;
use super::shared::Nobody;
use super::{FrozenSet, OpenOptions, Opened, VolumeFiles, open};
use crate::map::{CHUNK_BYTES, Header};
use crate::{BlockError, Engine};

/// A detached volume, or one whose VMM died. Locked like an attached one; every call blocks.
pub struct OfflineVolume {
    inline: Mutex<Inline>,
    opened: Opened,
    header: Mutex<Header>,
}

impl std::fmt::Debug for OfflineVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OfflineVolume").field("header", &self.header).finish_non_exhaustive()
    }
}

impl OfflineVolume {
    /// Opens a volume. A map that was not closed clean stays marked so: see [`dirty_chunks`](Self::dirty_chunks).
    pub fn open(files: VolumeFiles, generation: u64) -> Result<Self, BlockError> {
        let options = OpenOptions {
            generation,
            fetcher: Arc::new(Nobody),
            events: Arc::new(Nobody),
            engine: Engine::ThreadPool,
            direct: false,
        };
        let opened = open(files, &options)?;
        let inline = Inline::new(Arc::clone(&opened.shared), Arc::clone(&opened.descriptors));
        let header = opened.header.clone();
        Ok(Self { inline: Mutex::new(inline), opened, header: Mutex::new(header) })
    }

    /// What the map's header says.
    pub fn header(&self) -> Header {
        self.header.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.opened.shared.size()
    }

    /// Reads a chunk, decrypted. `into` is `CHUNK_BYTES` long; the part beyond the volume's end is filled with zeros.
    ///
    /// # Errors
    /// [`BlockError::ChunkMissing`] when the base does not have it: have it fetched and try again.
    pub fn read_chunk(&self, chunk: u64, into: &mut [u8]) -> Result<(), BlockError> {
        let start = chunk.saturating_mul(CHUNK_BYTES);
        let inside = self.size_bytes().saturating_sub(start).min(into.len() as u64);
        let (into, beyond) = into.split_at_mut(inside as usize);
        beyond.fill(0);
        let shared = &self.opened.shared;
        shared.presence_changed();
        let mut inline = self.inline.lock().unwrap_or_else(PoisonError::into_inner);
        let result = inline.read(start, into);
        if result.is_err() {
            // What the read left behind (a wait for a chunk) goes with its queue.
            *inline = Inline::new(Arc::clone(shared), Arc::clone(&self.opened.descriptors));
        }
        result
    }

    /// Chunks that may differ from the last snapshot. After a crash these are all that the volume itself holds, which
    /// includes ranges that were always blank.
    pub fn dirty_chunks(&self) -> FrozenSet {
        let coord = self.opened.shared.coord();
        FrozenSet::of(coord.bits.chunks(), &coord.bits.dirty_chunks())
    }

    /// A snapshot of the whole volume as it is now is complete: clears DIRTY, durably. From now on the map's DIRTY bits are
    /// exact, whatever happened before.
    pub fn clear_dirty(&self) -> Result<(), BlockError> {
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        let map = &self.opened.descriptors.map;
        super::clear_dirty(map, &mut header, &self.opened.shared, || {
            self.inline.lock().unwrap_or_else(PoisonError::into_inner).flush()
        })
    }

    /// Makes the volume larger, as [`LayeredVolume::grow`](crate::LayeredVolume::grow).
    pub fn grow(&self, size_bytes: u64) -> Result<(), BlockError> {
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        let Opened { shared, descriptors, .. } = &self.opened;
        super::grow(&descriptors.map, &descriptors.data, &mut header, shared, size_bytes)
    }
}
