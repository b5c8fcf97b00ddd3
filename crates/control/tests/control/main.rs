//! A control plane in this process, users and fake agents over real TLS on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

mod agent;
mod cloud;
mod console;
mod disks;

mod access;
mod agents;
mod amis;
mod attributes;
mod backends;
mod bundles;
mod crash;
mod encryption;
mod fast_restore;
mod hostile;
mod images;
mod imports;
mod lease;
mod life;
mod lists;
mod modifications;
mod moves;
mod objects;
mod placement;
mod quotas;
mod replace;
mod snapshot_sets;
mod snapshots;
mod storage_lists;
mod storm;
mod tags;
mod transfers;
mod volumes;
