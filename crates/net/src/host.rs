//! A host's instance network as one object.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hearth_types::InstanceId;
use parking_lot::RwLock;
use tokio::task::JoinHandle;

use crate::config::{HostNetworkConfig, InstanceMetadata, Nic, NicConfig, tap_name};
use crate::links::Links;
use crate::{NetError, dhcp, firewall, metadata, tap};

/// The instances that DHCP and metadata requests are answered for.
#[derive(Default)]
pub(crate) struct Registry {
    instances: RwLock<HashMap<InstanceId, Entry>>,
}

struct Entry {
    metadata: Arc<InstanceMetadata>,
    lease_taken: bool,
}

impl Registry {
    pub(crate) fn nic_by_mac(&self, mac: &[u8; 6]) -> Option<Nic> {
        let instances = self.instances.read();
        instances.values().flat_map(|e| &e.metadata.nics).find(|nic| nic.mac == *mac).cloned()
    }

    pub(crate) fn by_address(&self, address: Ipv4Addr) -> Option<Arc<InstanceMetadata>> {
        let instances = self.instances.read();
        let entry = instances.values().find(|e| e.metadata.nics.iter().any(|nic| nic.ipv4 == address))?;
        Some(entry.metadata.clone())
    }

    pub(crate) fn lease_taken(&self, station: &[u8]) {
        let mut instances = self.instances.write();
        for entry in instances.values_mut() {
            if entry.metadata.nics.iter().any(|nic| station.get(..6) == Some(nic.mac.as_slice())) {
                entry.lease_taken = true;
            }
        }
    }

    /// Keeps nothing of an earlier registration but returns it.
    pub(crate) fn insert(&self, metadata: InstanceMetadata) -> Option<Arc<InstanceMetadata>> {
        let entry = Entry { metadata: Arc::new(metadata), lease_taken: false };
        let id = entry.metadata.instance_id.clone();
        self.instances.write().insert(id, entry).map(|old| old.metadata)
    }
}

/// One host's bridge with its DHCP, metadata and NAT. Dropping it ends the two servers and leaves the bridge, its rules
/// and the taps as they are, so that guests do not notice an agent's restart.
pub struct HostNetwork {
    config: HostNetworkConfig,
    links: Links,
    registry: Arc<Registry>,
    servers: Vec<JoinHandle<()>>,
}

impl Drop for HostNetwork {
    fn drop(&mut self) {
        for server in &self.servers {
            server.abort();
        }
    }
}

impl HostNetwork {
    /// Makes the bridge, its rules and servers, or takes over what an earlier run left. Needs root and `nft`.
    pub async fn start(config: HostNetworkConfig) -> Result<Self, NetError> {
        config.check()?;
        let links = Links::open()?;
        links.ensure_bridge(&config.bridge, config.gateway(), config.instance_cidr.prefix_len()).await?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .map_err(NetError::system("turn on IPv4 forwarding (/proc/sys/net/ipv4/ip_forward)"))?;
        let registry = Arc::new(Registry::default());
        let listener = metadata::bind(&config).await?;
        let port = listener.local_addr().map_err(NetError::system("read the metadata service's port"))?.port();
        firewall::apply(&config.bridge, &firewall::host_rules(&config, port)).await?;
        firewall::prune(&config.bridge, &links).await?;
        let dhcp = tokio::net::UdpSocket::from_std(dhcp::bind_server(&config.bridge)?)
            .map_err(NetError::system("listen for DHCP"))?;
        let servers = vec![
            tokio::spawn(dhcp::serve(dhcp, config.clone(), registry.clone())),
            tokio::spawn(metadata::serve(listener, config.clone(), registry.clone())),
        ];
        Ok(Self { config, links, registry, servers })
    }

    /// Opens the tap of a NIC and puts it on the bridge. It vanishes with the last descriptor of it.
    pub async fn attach(&self, nic: NicConfig) -> Result<OwnedFd, NetError> {
        let name = tap_name(&nic.instance_id, nic.device_index);
        let fd = tap::open(&name)?;
        self.links.join_bridge(&name, &self.config.bridge, nic.mtu).await?;
        Ok(fd)
    }

    /// From now on answers the instance's DHCP and metadata requests and lets its taps send. Done again, what was said
    /// before is replaced and the instance counts as one that has not taken its lease yet.
    pub async fn register(&self, metadata: InstanceMetadata) -> Result<(), NetError> {
        let bridge = &self.config.bridge;
        let allow = firewall::allow(bridge, &metadata);
        let forbid = self.registry.insert(metadata).map(|old| firewall::forbid(bridge, &old)).unwrap_or_default();
        firewall::apply(bridge, &(forbid + &allow)).await
    }

    /// Forgets the instance.
    pub async fn unregister(&self, instance: &InstanceId) -> Result<(), NetError> {
        let Some(entry) = self.registry.instances.write().remove(instance) else { return Ok(()) };
        firewall::apply(&self.config.bridge, &firewall::forbid(&self.config.bridge, &entry.metadata)).await
    }

    /// Whether the guest has taken a lease since it was registered.
    pub fn has_lease(&self, instance: &InstanceId) -> bool {
        self.registry.instances.read().get(instance).is_some_and(|entry| entry.lease_taken)
    }

    /// Removes the bridge and every rule: for a host that stops being one.
    pub async fn remove(self) -> Result<(), NetError> {
        firewall::apply(&self.config.bridge, &firewall::no_rules(&self.config.bridge)).await?;
        self.links.remove(&self.config.bridge).await
    }
}
