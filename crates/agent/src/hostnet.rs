//! [`HostNet`] on the real network of the host.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use async_trait::async_trait;
use hearth_net::{HostNetwork, HostNetworkConfig, InstanceMetadata, NetError, NicConfig};
use hearth_types::InstanceId;

use crate::config::NetworkConfig;
use crate::net::{HostNet, HostNetError, Metadata, NicRequest};

/// The bridge, DHCP and metadata of this host.
pub struct RealNetwork(HostNetwork);

impl RealNetwork {
    /// Brings it up, or takes over what an agent before left.
    pub async fn start(config: &NetworkConfig) -> Result<Self, NetError> {
        let config = HostNetworkConfig {
            bridge: config.bridge.clone(),
            instance_cidr: config.instance_cidr,
            nat: config.nat,
            dns: if config.dns.is_empty() { host_name_servers() } else { config.dns.clone() },
        };
        HostNetwork::start(config).await.map(Self)
    }
}

/// The name servers of this host that guests can reach too: those of resolv.conf(5), without what only this host's loopback
/// answers. systemd-resolved keeps the real ones in a file of its own.
fn host_name_servers() -> Vec<Ipv4Addr> {
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    let found = files.iter().map(|file| name_servers(&std::fs::read_to_string(file).unwrap_or_default()));
    found.into_iter().find(|servers| !servers.is_empty()).unwrap_or_default()
}

fn name_servers(resolv_conf: &str) -> Vec<Ipv4Addr> {
    let addresses = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse::<Ipv4Addr>().ok())?
    });
    addresses.filter(|address| !address.is_loopback() && !address.is_unspecified()).take(4).collect()
}

fn failed(error: NetError) -> HostNetError {
    HostNetError(error.to_string())
}

#[async_trait]
impl HostNet for RealNetwork {
    async fn attach(&self, nic: NicRequest) -> Result<OwnedFd, HostNetError> {
        let nic = NicConfig { instance_id: nic.instance_id, device_index: nic.device_index, mtu: nic.mtu };
        self.0.attach(nic).await.map_err(failed)
    }

    async fn register(&self, metadata: Metadata) -> Result<(), HostNetError> {
        let Metadata { instance_id, nics, spec } = metadata;
        let nic = |nic: NicRequest| hearth_net::Nic {
            device_index: nic.device_index,
            mac: nic.mac,
            ipv4: nic.ipv4,
            mtu: nic.mtu,
        };
        let key = (!spec.public_key.is_empty()).then_some((spec.key_name, spec.public_key));
        let metadata = InstanceMetadata {
            instance_id,
            image_id: spec.image_id,
            instance_type: spec.instance_type,
            account_id: spec.account_id,
            reservation_id: spec.reservation_id,
            ami_launch_index: spec.ami_launch_index,
            availability_zone: spec.availability_zone,
            region: spec.region,
            launch_time: spec.launch_time,
            public_key: key,
            user_data: (!spec.user_data.is_empty()).then(|| spec.user_data.to_vec()),
            tags: spec.tags.into_iter().map(|tag| (tag.key, tag.value)).collect(),
            nics: nics.into_iter().map(nic).collect(),
        };
        self.0.register(metadata).await.map_err(failed)
    }

    async fn unregister(&self, instance: &InstanceId) {
        if let Err(error) = self.0.unregister(instance).await {
            tracing::warn!(%instance, %error, "the instance's network rules stay behind until the agent's next start");
        }
    }

    fn has_lease(&self, instance: &InstanceId) -> bool {
        self.0.has_lease(instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_name_servers_that_guests_can_reach_are_handed_out() {
        let text = "# a comment\nsearch example.org\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\n\
                    nameserver\nnameserver 192.0.2.2 # second\n";
        assert_eq!(name_servers(text), [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)]);
        assert!(name_servers("").is_empty());
    }
}
