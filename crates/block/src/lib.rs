//! Volumes as the VMM sees them: the [`Volume`] and [`VolumeQueue`] traits, the layered engine [`LayeredVolume`] (a volume's
//! own `data` file over the shared base of its snapshot), the raw-file engine [`RawFile`] and the client of network block
//! devices [`nbd::NbdVolume`].
//!
//! A disk front-end (virtio-blk) opens one [`VolumeQueue`] per I/O thread, hands it requests whose buffers are iovecs into
//! guest memory, kicks once per batch and drains completions. Engines differ in where the bytes live; front-ends do not
//! notice.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod error;
mod layered;
mod limit;
pub mod map;
pub mod nbd;
mod raw;
mod task;
mod volume;
mod xts;

pub use error::{BlockError, IoError};
pub use layered::{
    BaseFiles, Cause, ChunkFetcher, FreezeState, FrozenSet, LayeredVolume, OfflineVolume, OpenOptions, Stage,
    StagedView, VolumeEvents, VolumeFiles, presence_words, staged_bytes,
};
pub use limit::{IO_UNIT_BYTES, RateLimits};
pub use map::{BLOCK_BYTES, CHUNK_BYTES, MapError};
pub use raw::{Engine, RawFile};
pub use volume::{Completion, Limits, Operation, Request, SECTOR_BYTES, Volume, VolumeQueue};
pub use xts::{DATA_UNIT_BYTES, XtsKey};
