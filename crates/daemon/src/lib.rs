//! hearthd: control plane and agent, in one process or apart.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod backup;
pub mod error;
pub mod layout;
pub mod logging;
pub mod run;
pub mod service;
pub mod settings;

pub use error::DaemonError;
