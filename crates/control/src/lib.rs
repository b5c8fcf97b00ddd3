//! The region: API services, accounts, reconcilers and scheduling.
//!
//! [`Control::start`] opens a control plane, [`Control::serve`] answers calls. One TLS port serves users (bearer tokens),
//! agents (client certificates of the cluster's own CA), `grpc.health.v1` and gRPC reflection. How calls become records, and
//! records desired state of hosts, is described in `docs/control-plane.md`.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod config;
pub mod error;

mod api_error;
mod auth;
mod bootstrap;
mod check;
mod clock;
mod console;
mod core;
mod files;
mod keys;
mod layer;
mod life;
mod live;
mod paging;
mod pki;
mod placement;
mod reconcile;
mod server;
mod service;
mod tables;

pub use config::ControlConfig;
pub use error::ControlError;
pub use server::{Control, run};
