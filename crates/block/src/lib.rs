//! Volumes as the VMM sees them: the [`Volume`] and [`VolumeQueue`] traits and the raw-file engine [`RawFile`].
//!
//! A disk front-end (virtio-blk) opens one [`VolumeQueue`] per I/O thread, hands it requests whose buffers are iovecs into
//! guest memory, kicks once per batch and drains completions. Engines differ in where the bytes live; front-ends do not
//! notice.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod error;
mod raw;
mod volume;

pub use error::{BlockError, IoError};
pub use raw::{Engine, RawFile};
pub use volume::{Completion, Limits, Operation, Request, SECTOR_BYTES, Volume, VolumeQueue};
