//! Finds kernel, initrd and command line inside a root disk, as a boot loader would, without mounting anything.
//!
//! The disk belongs to a guest: everything here treats it as hostile. Sizes, counts, nesting and the steps of a grub.cfg are bounded;
//! nothing panics on any content.

mod bls;
mod discover;
mod error;
mod files;
mod filesystem;
mod grub;
mod grub_parser;
mod journal;
mod kernel;
mod partition;
mod read_at;

pub use discover::{BootSet, Override, discover};
pub use error::BootError;
pub use files::{BootFilesError, BootLoader};
pub use journal::JournalError;
pub use kernel::{KernelKind, extract_vmlinux, kind as kernel_kind};
pub use read_at::{FileDisk, ReadAt};
pub(crate) use read_at::{le_u16, le_u32, le_u64};

/// Longest kernel command line in bytes (x86 COMMAND_LINE_SIZE without its NUL).
pub const MAX_CMDLINE: usize = 2047;
/// Largest kernel file in bytes.
pub const MAX_KERNEL_BYTES: u64 = 256 << 20;
/// Largest initrd, all its parts together, in bytes.
pub const MAX_INITRD_BYTES: u64 = 512 << 20;

#[cfg(test)]
pub(crate) mod tests;
