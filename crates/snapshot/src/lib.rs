//! Disk images: formats, import and copies of image files.
//!
//! [`convert`] turns an uploaded disk image of any known [`Format`] into a sparse raw file, [`clone_file`] makes a volume
//! from such a file. Both write to a temporary file beside the target and rename it when everything is on disk, so that a
//! target that exists is complete.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod clone;
mod convert;
mod error;
mod format;
mod qcow2;
mod raw;
mod source;
mod vmdk;
mod writer;

pub use clone::{CloneMethod, Cloned, clone_file};
pub use convert::{Converted, DEFAULT_MAX_VIRTUAL_BYTES, Limits, convert, convert_with_limits};
pub use error::ImageError;
pub use format::{Format, UnknownFormat, detect};
pub use raw::next_data;

/// Called with (bytes done, bytes in all) as work goes on; both count the virtual disk.
pub type ProgressFn<'a> = &'a dyn Fn(u64, u64);

/// Disk sizes are multiples of this: virtio-blk counts in sectors of 512 bytes (virtio 1.2, section 5.2.4).
pub const SECTOR: u64 = 512;
