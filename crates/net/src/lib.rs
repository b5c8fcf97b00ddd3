//! Turns a host's desired network into kernel state and answers DHCP and instance metadata.
//!
//! One bridge per host carries all its instances' taps. The host is their gateway, NATs what leaves the bridge, and keeps
//! every tap to the station and IPv4 address of its instance. Nothing here survives an instance: a tap lives as long as
//! its VMM's file descriptor.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod config;
mod dhcp;
mod dhcp_request;
mod error;
mod firewall;
mod host;
mod links;
mod metadata;
mod tap;

pub use config::{HostNetworkConfig, InstanceMetadata, Nic, NicConfig, check_instance_cidr, tap_name};
pub use dhcp::host_name;
pub use error::NetError;
pub use host::HostNetwork;
