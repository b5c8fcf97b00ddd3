//! A control plane in this process, users and fake agents over real TLS on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

mod agent;
mod cloud;

mod access;
mod agents;
mod attributes;
mod crash;
mod hostile;
mod images;
mod lease;
mod life;
mod lists;
mod placement;
mod storm;
