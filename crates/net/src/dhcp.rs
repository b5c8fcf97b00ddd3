//! A DHCP server with one fixed lease per NIC.
//! Source: RFC 2131 (protocol), RFC 2132 (options), RFC 6842 (client identifier echoed).

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::IntoRawFd;
use std::sync::Arc;

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode};
use dhcproto::{Encodable, Encoder};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, bind, setsockopt, socket, sockopt};
use tracing::{debug, warn};

use crate::NetError;
use crate::config::{HostNetworkConfig, Nic};
use crate::dhcp_request::Request;
use crate::host::Registry;

/// Seconds. EC2 hands out an hour too.
const LEASE_SECONDS: u32 = 3600;

/// RFC 2131 section 2: no DHCP message that a client must take is larger.
const MAX_PACKET_BYTES: usize = 1500;

/// EC2's name for an address: `ip-172-31-0-5`.
pub fn host_name(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("ip-{a}-{b}-{c}-{d}")
}

/// What to answer one packet: the packet, and whether it grants the lease. `None` = be silent.
pub(crate) fn answer(
    config: &HostNetworkConfig,
    find: impl Fn(&[u8; 6]) -> Option<Nic>,
    packet: &[u8],
) -> Option<(Message, bool)> {
    let request = Request::parse(packet)?;
    let nic = find(&request.mac)?;
    let gateway = config.gateway();
    if request.server.is_some_and(|server| server != gateway) {
        return None;
    }
    let wanted = request.requested_address.unwrap_or(request.client_address);
    let kind = match MessageType::from(request.message_type) {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request if wanted == nic.ipv4 => MessageType::Ack,
        MessageType::Request => MessageType::Nak,
        MessageType::Inform => MessageType::Ack,
        _ => return None,
    };
    let inform = MessageType::from(request.message_type) == MessageType::Inform;
    let mut reply = Message::default();
    reply.set_opcode(Opcode::BootReply).set_xid(request.transaction).set_chaddr(&request.mac);
    // No ARP entry can exist for a client that has no address yet: answers are broadcast on the bridge.
    reply.set_flags(Flags::default().set_broadcast());
    let options = reply.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ServerIdentifier(gateway));
    if let Some(identifier) = request.client_identifier {
        options.insert(DhcpOption::ClientIdentifier(identifier));
    }
    if kind == MessageType::Nak {
        return Some((reply, false));
    }
    options.insert(DhcpOption::SubnetMask(config.instance_cidr.netmask()));
    options.insert(DhcpOption::BroadcastAddr(config.instance_cidr.broadcast()));
    if nic.device_index == 0 {
        options.insert(DhcpOption::Router(vec![gateway]));
        if !config.dns.is_empty() {
            options.insert(DhcpOption::DomainNameServer(config.dns.clone()));
        }
    }
    options.insert(DhcpOption::InterfaceMtu(nic.mtu));
    options.insert(DhcpOption::Hostname(host_name(nic.ipv4)));
    if !inform {
        options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
        options.insert(DhcpOption::Renewal(LEASE_SECONDS / 2));
        options.insert(DhcpOption::Rebinding(LEASE_SECONDS / 8 * 7));
        reply.set_yiaddr(nic.ipv4);
    }
    reply.set_siaddr(gateway);
    Some((reply, kind == MessageType::Ack && !inform))
}

/// A UDP socket for port 67 that hears and speaks on the bridge only.
pub(crate) fn bind_server(bridge: &str) -> Result<UdpSocket, NetError> {
    let action = || format!("listen for DHCP on {bridge}");
    let failed = |errno: nix::Error| NetError::System { action: action(), source: errno.into() };
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
        .map_err(failed)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true).map_err(failed)?;
    setsockopt(&fd, sockopt::Broadcast, &true).map_err(failed)?;
    setsockopt(&fd, sockopt::BindToDevice, &bridge.into()).map_err(failed)?;
    let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 67);
    bind(fd.as_raw_fd(), &nix::sys::socket::SockaddrIn::from(address)).map_err(failed)?;
    // SAFETY: the descriptor is a UDP socket and its ownership is handed over.
    Ok(unsafe { UdpSocket::from_raw_fd(fd.into_raw_fd()) })
}

/// Answers until the task is dropped.
pub(crate) async fn serve(socket: tokio::net::UdpSocket, config: HostNetworkConfig, registry: Arc<Registry>) {
    let mut buffer = [0u8; MAX_PACKET_BYTES];
    loop {
        let packet = match socket.recv_from(&mut buffer).await {
            Ok((length, _)) => buffer.get(..length).unwrap_or_default(),
            Err(error) => {
                warn!(%error, bridge = config.bridge, "DHCP server cannot receive");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some((reply, granted)) = answer(&config, |mac| registry.nic_by_mac(mac), packet) else { continue };
        let mut bytes = Vec::with_capacity(600);
        if let Err(error) = reply.encode(&mut Encoder::new(&mut bytes)) {
            warn!(%error, "DHCP answer cannot be encoded");
            continue;
        }
        // Some old BOOTP-minded clients drop anything shorter (RFC 1542 section 2.1).
        bytes.resize(bytes.len().max(300), 0);
        debug!(address = %reply.yiaddr(), granted, "DHCP answer");
        let to = SocketAddrV4::new(Ipv4Addr::BROADCAST, 68);
        match socket.send_to(&bytes, to).await {
            Ok(_) if granted => registry.lease_taken(reply.chaddr()),
            Ok(_) => {}
            Err(error) => warn!(%error, bridge = config.bridge, "DHCP answer cannot be sent"),
        }
    }
}

#[cfg(test)]
#[path = "dhcp_test.rs"]
mod tests;
