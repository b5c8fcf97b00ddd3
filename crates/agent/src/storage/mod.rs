//! Volumes of a host and what they are made from.

pub mod base;
pub mod bases;
mod bundles;
mod departures;
pub mod fills;
mod frozen;
pub mod keyring;
pub mod network;
pub mod presence;
pub mod remote;
pub mod snapshots;
pub mod volumes;
pub mod working_set;

pub use base::{Base, BaseError, Reader};
pub use bases::{Bases, Evicted};
pub use bundles::{BundleRootError, make_root, open_root};
pub use fills::Fills;
pub use keyring::{KeyError, Keyring};
pub use network::{Connect, NetworkError, NetworkVolumes, is_network};
pub use remote::RemoteObjects;
pub use snapshots::{Running, Snapshots};
pub use volumes::{HostVolumes, Lineage, Placed, VolumeDisk, VolumeError};

#[cfg(test)]
mod tenants_test;
