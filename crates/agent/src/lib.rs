//! One host: reconciles desired instances and owns their VMM processes.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod boot;
pub mod capacity;
pub mod config;
pub mod epoch;
pub mod error;
pub mod hostnet;
pub mod instance;
pub mod instance_store;
pub mod launch;
pub mod link;
pub mod net;
pub mod reports;
mod run;
pub mod state;
pub mod storage;
pub mod supervisor;

pub use config::{AgentConfig, NetworkConfig};
pub use error::AgentError;
pub use hearth_driver::BackendSettings;
pub use run::run;
pub use tokio_util::sync::CancellationToken;
