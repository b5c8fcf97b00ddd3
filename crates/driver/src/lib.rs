//! Volumes that somebody else keeps, as an agent manages them.
//!
//! - [`rbd`]: images of a Ceph cluster, managed by the `rbd` and `ceph` programs and served to the VMM by a `qemu-storage-daemon`.
//! - [`server`]: connections to NBD servers, which the agent makes for VMMs; [`tls`] for those that want TLS.
//! - [`Backend`]: a place for volumes as an operator names it, over either of them.
//!
//! Everything here blocks, for no longer than the caller's patience: call it from a thread that may.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod backend;
mod command;
mod error;
mod provisioner;
pub mod rbd;
pub mod server;
pub mod tls;

pub use backend::{Backend, BackendSettings, NbdSettings, RbdSettings, close, generation};
pub use error::DriverError;
pub use rbd::Name;
