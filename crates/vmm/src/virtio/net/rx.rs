//! Packets to the guest.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::{ETHERNET_BYTES, GSO_FRAME_BYTES, HEADER_BYTES, QUEUE_SIZE, RX};
use crate::virtio::guest_buffers::GuestBuffers;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};

/// Packets per turn.
const BUDGET: usize = 128;
/// `num_buffers` in the header.
const NUM_BUFFERS: u64 = 10;
/// Pieces of one readv: IOV_MAX without the spill.
const MAX_PIECES: usize = 1023;

/// What stopped a turn.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The link has no packet.
    Empty,
    /// The driver gave no buffers.
    Starved,
    /// Other devices' turn.
    Budget,
    /// The interface behind the link is gone.
    LinkLost,
}

/// Receive side: chains are collected ahead, so that one readv can fill as many as a large segment needs.
pub(crate) struct Receiver {
    queue: Option<VirtQueue>,
    chain: Chain,
    /// Collected chains (head, bytes) and their buffers end to end.
    chains: VecDeque<(u16, u32)>,
    ring: GuestBuffers,
    mergeable: bool,
    checksums: bool,
    /// Header and largest frame.
    frame_bytes: usize,
    /// The driver has given buffers for a largest frame at once before.
    ample: bool,
    /// Takes what does not fit the driver's buffers; such packets are dropped.
    spill: Vec<u8>,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Receiver {
    pub(crate) fn new(memory: &Arc<GuestMemoryMmap>) -> Self {
        Self {
            queue: None,
            chain: Chain::new(memory),
            chains: VecDeque::new(),
            ring: GuestBuffers::new(Arc::clone(memory)),
            mergeable: false,
            checksums: false,
            frame_bytes: 0,
            ample: false,
            spill: Vec::new(),
            packets: 0,
            bytes: 0,
        }
    }

    /// Negotiation's outcome: whether packets may span buffers, whether the guest takes checksum flags and segments.
    pub(crate) fn configure(&mut self, mergeable: bool, checksums: bool, segments: bool, mtu: u16) {
        self.mergeable = mergeable;
        self.checksums = checksums;
        // A VLAN tag may come on top.
        let plain = usize::from(mtu).max(1500) + ETHERNET_BYTES + 4;
        self.frame_bytes = HEADER_BYTES + if segments { GSO_FRAME_BYTES } else { plain };
    }

    pub(crate) fn start(&mut self, queue: VirtQueue) {
        self.stop();
        self.queue = Some(queue);
    }

    pub(crate) fn stop(&mut self) {
        self.queue = None;
        self.chains.clear();
        self.ring.clear();
        self.ample = false;
    }

    /// Moves packets until something stops it.
    pub(crate) fn run(&mut self, fd: RawFd) -> Result<Stop, QueueError> {
        if self.queue.is_none() {
            return Ok(Stop::Starved);
        }
        let result = self.receive(fd);
        if let Some(queue) = self.queue.as_mut() {
            queue.signal_used()?;
        }
        result
    }

    fn receive(&mut self, fd: RawFd) -> Result<Stop, QueueError> {
        for _ in 0..BUDGET {
            if !self.collect()? {
                return Ok(Stop::Starved);
            }
            match self.read_packet(fd) {
                Ok(bytes) => self.deliver(bytes)?,
                Err(libc::EAGAIN) => return Ok(Stop::Empty),
                Err(libc::EINTR) => {}
                Err(libc::EBADFD) => return Ok(Stop::LinkLost),
                // Interface down and the like: the next edge tries again.
                Err(_) => return Ok(Stop::Empty),
            }
        }
        Ok(Stop::Budget)
    }

    /// Collects chains for one largest frame. False when the driver has to give more first.
    fn collect(&mut self) -> Result<bool, QueueError> {
        let Some(queue) = self.queue.as_mut() else { return Ok(false) };
        let enough = if self.mergeable { self.frame_bytes as u64 } else { 1 };
        while self.ring.len() < enough && self.chains.len() < usize::from(QUEUE_SIZE) {
            let Some(head) = queue.pop(&mut self.chain)? else {
                if queue.enable_notification()? {
                    continue;
                }
                // A driver that once gave enough will do so again: packets wait in the link. One that never does gets what fits.
                return Ok(!self.ample && !self.chains.is_empty());
            };
            let bytes = self.chain.writable.len();
            let pieces = self.ring.iovecs().len() + self.chain.writable.iovecs().len();
            if bytes == 0 || self.chain.readable.len() != 0 || pieces > MAX_PIECES {
                return Err(QueueError::Request(RX));
            }
            self.ring.extend(&self.chain.writable);
            self.chains.push_back((head, u32::try_from(bytes).unwrap_or(u32::MAX)));
        }
        self.ample |= self.mergeable && self.ring.len() >= enough;
        Ok(true)
    }

    /// One readv into the collected buffers and, where they are too small for a largest frame, the spill.
    fn read_packet(&mut self, fd: RawFd) -> Result<usize, i32> {
        let missing = (self.frame_bytes as u64).saturating_sub(self.ring.len()) as usize;
        if missing > self.spill.len() {
            self.spill.resize(missing, 0);
        }
        let result = self.ring.with_tail(&mut self.spill, missing, |pieces| {
            // SAFETY: the pieces are guest memory kept mapped by `self.ring`, and the spill.
            unsafe { libc::readv(fd, pieces.as_ptr(), pieces.len() as i32) }
        });
        usize::try_from(result).map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }

    /// Gives the chains that a packet of `bytes` (with header) fills to the driver.
    fn deliver(&mut self, bytes: usize) -> Result<(), QueueError> {
        if bytes < HEADER_BYTES + ETHERNET_BYTES || bytes as u64 > self.ring.len() {
            return Ok(());
        }
        let Some(queue) = self.queue.as_mut() else { return Ok(()) };
        let mut count = 0u16;
        let mut covered = 0u64;
        for (_, length) in &self.chains {
            if covered >= bytes as u64 {
                break;
            }
            covered += u64::from(*length);
            count += 1;
        }
        self.ring.write(NUM_BUFFERS, &count.to_le_bytes());
        if !self.checksums {
            // 5.1.6.4.1: no flags without GUEST_CSUM.
            self.ring.write(0, &[0]);
        }
        self.ring.advance(covered);
        let mut left = bytes as u64;
        for (head, length) in self.chains.drain(..usize::from(count)) {
            let stored = left.min(u64::from(length));
            left -= stored;
            queue.push_used(head, stored as u32)?;
        }
        self.packets += 1;
        self.bytes += (bytes - HEADER_BYTES) as u64;
        Ok(())
    }
}
