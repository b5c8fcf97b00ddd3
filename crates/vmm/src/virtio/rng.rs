//! virtio-rng (virtio 1.2, section 5.4).

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::DeviceStats;
use super::backend::{Backend, Broken, Wake};
use super::queue::{Chain, QueueError, VirtQueue};
use super::transport::Profile;

const QUEUE_SIZE: u16 = 64;
/// Most bytes one request gets: overlapping descriptors could otherwise make a small table cost the host gigabytes.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;
/// Requests per turn.
const BUDGET: usize = 16;

/// The entropy source as drivers see it.
pub(crate) fn profile() -> Profile {
    Profile {
        device_type: VIRTIO_ID_RNG as u16,
        class: 0x10_00_00,
        features: 0,
        acceptable: |_| true,
        queue_sizes: vec![QUEUE_SIZE],
    }
}

/// Fills requests from a file of random bytes.
pub(crate) struct RngBackend {
    source: File,
    queue: Option<VirtQueue>,
    chain: Chain,
}

impl RngBackend {
    pub(crate) fn new(source: File, memory: &Arc<GuestMemoryMmap>) -> Self {
        Self { source, queue: None, chain: Chain::new(memory) }
    }

    fn fill(&self) -> u32 {
        let pieces = self.chain.writable.iovecs();
        let count = pieces.len().min(1024);
        loop {
            // SAFETY: the pieces are guest memory that `self.chain` keeps mapped.
            let result = unsafe { libc::readv(self.source.as_raw_fd(), pieces.as_ptr(), count as i32) };
            match u32::try_from(result) {
                Ok(bytes) => return bytes,
                Err(_) if std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
                // The driver sees no bytes and asks again.
                Err(_) => return 0,
            }
        }
    }

    fn serve(&mut self) -> Result<bool, QueueError> {
        for _ in 0..BUDGET {
            let Some(queue) = self.queue.as_mut() else { return Ok(false) };
            queue.disable_notification()?;
            let Some(head) = queue.pop(&mut self.chain)? else {
                if queue.enable_notification()? {
                    continue;
                }
                return Ok(false);
            };
            self.chain.writable.truncate(REQUEST_BYTES_MAX);
            let written = self.fill();
            if let Some(queue) = self.queue.as_mut() {
                queue.push_used(head, written)?;
            }
        }
        Ok(true)
    }
}

impl Backend for RngBackend {
    fn activate(&mut self, _features: u64) -> Result<(), Broken> {
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        None
    }

    fn start_queue(&mut self, queue: VirtQueue) {
        self.queue = Some(queue);
    }

    fn stop_queue(&mut self, _index: usize) {
        self.queue = None;
    }

    fn in_flight(&self, _index: usize) -> usize {
        0
    }

    fn wake(&mut self, _wake: Wake) {}

    fn run(&mut self, accept: bool) -> Result<bool, Broken> {
        if !accept {
            return Ok(false);
        }
        let more = self.serve()?;
        if let Some(queue) = self.queue.as_mut() {
            queue.signal_used()?;
        }
        Ok(more)
    }

    fn collect(&self, _stats: &mut DeviceStats) {}
}
