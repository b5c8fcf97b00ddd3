//! virtio-net (virtio 1.2, section 5.1) on a tap: one queue pair, offloads passed through to the host's network stack.

mod backend;
mod link;
mod rx;
mod tx;

pub(crate) use backend::NetBackend;
pub(crate) use link::{Link, Tap};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::transport::Profile;

/// Descriptors per queue.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// `struct virtio_net_hdr_v1`, in front of every packet on both sides.
pub(crate) const HEADER_BYTES: usize = 12;
/// Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// Largest segmentation-offload frame.
const GSO_FRAME_BYTES: usize = 65535 + ETHERNET_BYTES + 4;
const RX: usize = 0;
const TX: usize = 1;

/// Offset of the link status in device configuration.
const CONFIG_STATUS: usize = 6;

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// The interface as drivers see it.
pub(crate) fn profile() -> Profile {
    let bits = [
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
    ];
    Profile {
        device_type: VIRTIO_ID_NET as u16,
        class: 0x02_00_00,
        features: bits.iter().fold(0, |features, bit| features | 1 << bit),
        acceptable,
        queue_sizes: vec![QUEUE_SIZE; 2],
    }
}

/// 5.1.3.1: segmentation needs checksum offload in the same direction.
fn acceptable(features: u64) -> bool {
    let guest_tso = has(features, VIRTIO_NET_F_GUEST_TSO4) || has(features, VIRTIO_NET_F_GUEST_TSO6);
    let host_tso = has(features, VIRTIO_NET_F_HOST_TSO4) || has(features, VIRTIO_NET_F_HOST_TSO6);
    (!guest_tso || has(features, VIRTIO_NET_F_GUEST_CSUM)) && (!host_tso || has(features, VIRTIO_NET_F_CSUM))
}

/// `struct virtio_net_config`: mac, status, max_virtqueue_pairs, mtu.
pub(crate) fn config_space(mac: [u8; 6], mtu: u16) -> Vec<u8> {
    let mut config = mac.to_vec();
    config.extend_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    config.extend_from_slice(&1u16.to_le_bytes());
    config.extend_from_slice(&mtu.to_le_bytes());
    config
}
