//! Volumes of a host and what they are made from.

pub mod base;
mod bundles;
mod frozen;
pub mod network;
pub mod presence;
pub mod remote;
pub mod snapshots;
pub mod volumes;

pub use base::{Base, BaseError, Bases, chunk_store};
pub use bundles::{BundleRootError, make_root, open_root};
pub use network::{Connect, NetworkError, NetworkVolumes, is_network};
pub use remote::RemoteObjects;
pub use snapshots::{Running, Snapshots};
pub use volumes::{HostVolumes, Lineage, Placed, VolumeDisk, VolumeError};
