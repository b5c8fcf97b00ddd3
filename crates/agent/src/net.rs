//! The host's network as the agent sees it: a seam, so that instances can be tested without one.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use async_trait::async_trait;
use hearth_types::InstanceId;
use thiserror::Error;

/// One NIC to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicRequest {
    /// Whose NIC.
    pub instance_id: InstanceId,
    /// 0 = the first.
    pub device_index: u32,
    /// Station address.
    pub mac: [u8; 6],
    /// Address that DHCP hands out.
    pub ipv4: Ipv4Addr,
    /// Bytes.
    pub mtu: u16,
}

/// What DHCP and the metadata service answer for one instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Metadata {
    /// Whose.
    pub instance_id: InstanceId,
    /// Its NICs in order.
    pub nics: Vec<NicRequest>,
    /// The rest, as the control plane wants it.
    pub spec: hearth_proto::v1::InstanceSpec,
}

/// The network failed. The text is what the network layer said.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("network: {0}")]
pub struct HostNetError(pub String);

/// What instances need from the host's network.
#[async_trait]
pub trait HostNet: Send + Sync {
    /// Makes a tap in the instance's network. It vanishes when the last descriptor of it is closed.
    async fn attach(&self, nic: NicRequest) -> Result<OwnedFd, HostNetError>;
    /// Answers DHCP and metadata requests of the instance from now on. Done again it replaces what was said before.
    async fn register(&self, metadata: Metadata) -> Result<(), HostNetError>;
    /// Stops answering.
    async fn unregister(&self, instance: &InstanceId);
    /// Whether the guest has taken a DHCP lease since it was registered.
    fn has_lease(&self, instance: &InstanceId) -> bool;
}
