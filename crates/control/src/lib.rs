//! The region: API services, accounts, reconcilers and scheduling.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod config;
pub mod error;

mod api_error;
mod clock;
mod files;
mod keys;
mod pki;
mod tables;

pub use config::ControlConfig;
pub use error::ControlError;

use hearth_types::JoinToken;
use std::net::SocketAddr;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A control plane that holds its store, leads its region and listens, but does not answer yet.
pub struct Control {}

impl Control {
    /// Opens the store, waits for leadership and binds the port.
    pub async fn start(config: ControlConfig) -> Result<Self, ControlError> {
        let _ = config;
        Err(ControlError::Stopped("not written yet"))
    }
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 0))
    }
    /// Makes a one-time token with which one agent may join.
    pub async fn create_join_token(&self, ttl: Duration) -> Result<JoinToken, ControlError> {
        let _ = ttl;
        Err(ControlError::Stopped("not written yet"))
    }
    /// Answers calls until `shutdown` is cancelled or leadership or the store is lost.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ControlError> {
        let _ = shutdown;
        Ok(())
    }
}

/// [`Control::start`] and [`Control::serve`].
pub async fn run(config: ControlConfig, shutdown: CancellationToken) -> Result<(), ControlError> {
    Control::start(config).await?.serve(shutdown).await
}
