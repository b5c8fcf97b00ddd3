#![doc = include_str!("../README.md")]
//!
//! # Entry points
//! [`Control::start`] opens a control plane, [`Control::serve`] answers calls, [`run`] does both. One TLS port serves users
//! (bearer tokens), agents (client certificates of the cluster's own CA), `grpc.health.v1` and gRPC reflection.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod config;
pub mod error;

mod api_error;
mod auth;
mod backends;
mod bootstrap;
mod check;
mod clock;
mod console;
mod core;
mod data_keys;
mod files;
mod keys;
mod layer;
mod life;
mod listing;
mod live;
mod mappings;
mod modification;
mod object_store_options;
mod paging;
mod pki;
mod placement;
mod quotas;
mod reconcile;
mod server;
mod service;
mod storage;
mod tables;
mod transfers;
mod volumes;

pub use config::ControlConfig;
pub use error::ControlError;
pub use object_store_options::{OBJECT_STORE_VARIABLES, object_store_options};
pub use server::{Control, run};
