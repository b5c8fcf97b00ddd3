//! One host: reconciles desired instances and owns their VMM processes.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod boot;
pub mod config;
pub mod error;

pub use config::{AgentConfig, NetworkConfig};
pub use error::AgentError;
pub use tokio_util::sync::CancellationToken;

/// Runs one agent until `shutdown` is cancelled. Instances keep running then; the next agent with the same state folder
/// adopts them.
///
/// # Errors
/// When the host cannot be an agent at all (see [`AgentError`]); never because of one instance.
pub async fn run(config: AgentConfig, shutdown: CancellationToken) -> Result<(), AgentError> {
    std::fs::create_dir_all(&config.state_dir).map_err(AgentError::file("creating", &config.state_dir))?;
    shutdown.cancelled().await;
    Ok(())
}
