//! One network interface's I/O side.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::GuestMemoryMmap;

use super::rx::{Receiver, Stop};
use super::tx::Transmitter;
use super::{CONFIG_STATUS, Link, RX, TX, has};
use crate::control::protocol::NicStats;
use crate::virtio::DeviceStats;
use crate::virtio::backend::{Backend, Broken, Wake};
use crate::virtio::queue::VirtQueue;
use crate::virtio::shared::DeviceShared;

/// Receiver, transmitter and their link.
pub(crate) struct NetBackend {
    link: Box<dyn Link>,
    shared: Arc<DeviceShared>,
    mtu: u16,
    receiver: Receiver,
    transmitter: Transmitter,
    /// The link may have packets (its edge came and EAGAIN has not).
    readable: bool,
    link_lost: bool,
}

impl NetBackend {
    pub(crate) fn new(link: Box<dyn Link>, shared: Arc<DeviceShared>, mtu: u16, memory: &Arc<GuestMemoryMmap>) -> Self {
        Self {
            link,
            shared,
            mtu,
            receiver: Receiver::new(memory),
            transmitter: Transmitter::new(memory),
            readable: true,
            link_lost: false,
        }
    }

    fn lose_link(&mut self) {
        self.readable = false;
        if !std::mem::replace(&mut self.link_lost, true) {
            self.shared.update_config(|config| {
                if let Some(status) = config.get_mut(CONFIG_STATUS..CONFIG_STATUS + 2) {
                    status.fill(0);
                }
            });
        }
    }
}

impl Backend for NetBackend {
    fn activate(&mut self, features: u64) -> Result<(), Broken> {
        self.link.set_guest_features(features).map_err(Broken::Offloads)?;
        let segments = has(features, VIRTIO_NET_F_GUEST_TSO4) || has(features, VIRTIO_NET_F_GUEST_TSO6);
        let checksums = has(features, VIRTIO_NET_F_GUEST_CSUM);
        self.receiver.configure(has(features, VIRTIO_NET_F_MRG_RXBUF), checksums, segments, self.mtu);
        self.readable = true;
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.link.fd())
    }

    fn start_queue(&mut self, queue: VirtQueue) {
        match queue.index() {
            RX => self.receiver.start(queue),
            TX => self.transmitter.start(queue),
            _ => {}
        }
    }

    fn stop_queue(&mut self, index: usize) {
        match index {
            RX => self.receiver.stop(),
            TX => self.transmitter.stop(),
            _ => {}
        }
    }

    fn in_flight(&self, _index: usize) -> usize {
        // Packets are moved by synchronous, non-blocking calls.
        0
    }

    fn wake(&mut self, wake: Wake) {
        self.readable |= wake == Wake::Fd;
    }

    fn run(&mut self, accept: bool) -> Result<bool, Broken> {
        if !accept {
            return Ok(false);
        }
        let mut more = self.transmitter.run(self.link.fd())?;
        if self.readable && !self.link_lost {
            match self.receiver.run(self.link.fd())? {
                Stop::Empty => self.readable = false,
                Stop::Starved => {}
                Stop::Budget => more = true,
                Stop::LinkLost => self.lose_link(),
            }
        }
        Ok(more)
    }

    fn collect(&self, stats: &mut DeviceStats) {
        stats.nics.push(NicStats {
            rx_packets: self.receiver.packets,
            rx_bytes: self.receiver.bytes,
            tx_packets: self.transmitter.packets,
            tx_bytes: self.transmitter.bytes,
        });
    }
}
