//! Volumes that somebody else keeps, as an agent manages them.
//!
//! - [`rbd`]: images of a Ceph cluster, managed by the `rbd` and `ceph` programs and served to the VMM by a `qemu-storage-daemon`.
//! - [`server`]: connections to NBD servers, which the agent makes for VMMs.
//!
//! Everything here blocks, for no longer than the caller's patience: call it from a thread that may.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod command;
mod error;
pub mod rbd;
pub mod server;

pub use error::DriverError;
