//! What callers say: the host's network, NICs, and what guests are told about themselves.

use std::net::Ipv4Addr;

use hearth_types::InstanceId;
use ipnet::Ipv4Net;

use crate::NetError;

/// Smallest network that still holds a gateway and a useful number of instances.
const LONGEST_PREFIX: u8 = 28;

/// Largest network that is one host's.
const SHORTEST_PREFIX: u8 = 8;

/// The longest interface name Linux takes, without its NUL.
const MAX_INTERFACE_NAME: usize = 15;

/// One host's instance network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostNetworkConfig {
    /// Name of the bridge, at most 15 characters of `a-z A-Z 0-9 _ -`. Also the name of the nftables tables.
    pub bridge: String,
    /// Where instances get their addresses; the first one is the host's own (their gateway).
    pub instance_cidr: Ipv4Net,
    /// Masquerade what leaves the bridge for elsewhere.
    pub nat: bool,
    /// Name servers that DHCP hands out, at most 4.
    pub dns: Vec<Ipv4Addr>,
}

impl HostNetworkConfig {
    /// The host's own address on the bridge.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.instance_cidr.network()).saturating_add(1))
    }

    /// Refuses what the kernel or nftables would not take.
    pub fn check(&self) -> Result<(), NetError> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        if self.bridge.is_empty() || self.bridge.len() > MAX_INTERFACE_NAME || !self.bridge.bytes().all(word) {
            return Err(NetError::Config(format!(
                "bridge name '{}': 1 to {MAX_INTERFACE_NAME} letters, digits, '_' and '-'",
                self.bridge
            )));
        }
        if !self.bridge.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(NetError::Config(format!("bridge name '{}' must begin with a letter", self.bridge)));
        }
        check_instance_cidr(self.instance_cidr)?;
        if self.dns.len() > 4 {
            return Err(NetError::Config(format!("{} name servers, at most 4", self.dns.len())));
        }
        Ok(())
    }
}

/// Refuses a network that is too small or too large to be one host's instance network, or is written with host bits.
///
/// # Errors
/// [`NetError::Config`].
pub fn check_instance_cidr(cidr: Ipv4Net) -> Result<(), NetError> {
    if !(SHORTEST_PREFIX..=LONGEST_PREFIX).contains(&cidr.prefix_len()) {
        return Err(NetError::Config(format!(
            "instance network {cidr}: its prefix must be /{SHORTEST_PREFIX} to /{LONGEST_PREFIX}"
        )));
    }
    if cidr.network() != cidr.addr() {
        let meant = cidr.trunc();
        return Err(NetError::Config(format!("instance network {cidr} has host bits set; did you mean {meant}?")));
    }
    Ok(())
}

/// A NIC to make a tap for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicConfig {
    /// Whose NIC.
    pub instance_id: InstanceId,
    /// 0 = the first; at most 15.
    pub device_index: u32,
    /// Bytes, 576..=65535.
    pub mtu: u16,
}

/// One NIC as its guest should know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// 0 = the first; only that one gets a default route.
    pub device_index: u32,
    /// Station address.
    pub mac: [u8; 6],
    /// The address that DHCP hands out.
    pub ipv4: Ipv4Addr,
    /// Bytes.
    pub mtu: u16,
}

/// What an instance may ask about itself.
/// Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html>
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceMetadata {
    /// Who it is.
    pub instance_id: InstanceId,
    /// `ami-…`.
    pub image_id: String,
    /// Its shape's name.
    pub instance_type: String,
    /// Owner.
    pub account_id: String,
    /// The launch it came from.
    pub reservation_id: String,
    /// Which one of that launch.
    pub ami_launch_index: u32,
    /// Where.
    pub availability_zone: String,
    /// Where.
    pub region: String,
    /// RFC 3339.
    pub launch_time: String,
    /// OpenSSH public key with the key pair's name.
    pub public_key: Option<(String, String)>,
    /// As given at launch; `None` answers 404.
    pub user_data: Option<Vec<u8>>,
    /// Shown under `tags/instance`.
    pub tags: Vec<(String, String)>,
    /// In order.
    pub nics: Vec<Nic>,
}

/// The tap of an instance's NIC: `ht`, the first 11 digits of the id, and the device index in hex. 14 characters.
pub fn tap_name(instance: &InstanceId, device_index: u32) -> String {
    let hex: String = instance.hex().chars().take(11).collect();
    format!("ht{hex}{:x}", device_index & 0xf)
}

/// `aa:bb:cc:dd:ee:ff`.
pub(crate) fn mac_text(mac: &[u8; 6]) -> String {
    mac.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
}
