//! Packets from the guest.

use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::{ETHERNET_BYTES, HEADER_BYTES};
use crate::virtio::queue::{Chain, QueueError, VirtQueue};

/// Packets per turn.
const BUDGET: usize = 128;
/// UIO_MAXIOV.
const MAX_PIECES: usize = 1024;

/// Transmit side: each chain is one writev.
pub(crate) struct Transmitter {
    queue: Option<VirtQueue>,
    chain: Chain,
    /// Head of the packet in `chain` that the link had no room for.
    stalled: Option<u16>,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Transmitter {
    pub(crate) fn new(memory: &Arc<GuestMemoryMmap>) -> Self {
        Self { queue: None, chain: Chain::new(memory), stalled: None, packets: 0, bytes: 0 }
    }

    pub(crate) fn start(&mut self, queue: VirtQueue) {
        self.stop();
        self.queue = Some(queue);
    }

    pub(crate) fn stop(&mut self) {
        self.queue = None;
        self.stalled = None;
    }

    /// Sends until the ring is empty, the link is full or the budget is spent. True in the last case.
    pub(crate) fn run(&mut self, fd: RawFd) -> Result<bool, QueueError> {
        let more = self.send_all(fd)?;
        if let Some(queue) = self.queue.as_mut() {
            queue.signal_used()?;
        }
        Ok(more)
    }

    fn send_all(&mut self, fd: RawFd) -> Result<bool, QueueError> {
        let mut budget = BUDGET;
        loop {
            let Some(queue) = self.queue.as_mut() else { return Ok(false) };
            if budget == 0 {
                return Ok(true);
            }
            let head = match self.stalled.take() {
                Some(head) => head,
                None => {
                    queue.disable_notification()?;
                    match queue.pop(&mut self.chain)? {
                        Some(head) => head,
                        None if queue.enable_notification()? => continue,
                        None => return Ok(false),
                    }
                }
            };
            budget -= 1;
            if !send(fd, &self.chain, &mut self.packets, &mut self.bytes) {
                self.stalled = Some(head);
                return Ok(false);
            }
            queue.push_used(head, 0)?;
        }
    }
}

/// Writes one packet. False when the link is full; packets it refuses for other reasons are dropped, as a wire would.
fn send(fd: RawFd, chain: &Chain, packets: &mut u64, bytes: &mut u64) -> bool {
    let pieces = chain.readable.iovecs();
    if chain.readable.len() < (HEADER_BYTES + ETHERNET_BYTES) as u64 || pieces.len() > MAX_PIECES {
        return true;
    }
    loop {
        // SAFETY: the pieces are guest memory that `chain` keeps mapped.
        let result = unsafe { libc::writev(fd, pieces.as_ptr(), pieces.len() as i32) };
        if result >= 0 {
            *packets += 1;
            *bytes += chain.readable.len() - HEADER_BYTES as u64;
            return true;
        }
        match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => return false,
            _ => return true,
        }
    }
}
