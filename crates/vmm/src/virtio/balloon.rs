//! virtio-balloon (virtio 1.2, section 5.5) for free page reporting: the guest tells which of its free pages it does not
//! need for now, and the host takes them back until the guest touches them again. The balloon itself is never asked to
//! inflate.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};

use super::DeviceStats;
use super::backend::{Backend, Broken, Wake};
use super::guest_buffers::GuestBuffers;
use super::queue::{Chain, QueueError, VirtQueue};
use super::transport::Profile;

const QUEUE_SIZE: u16 = 128;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const DEFLATE_ON_OOM: u32 = 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING. Without PAGE_POISON, drivers report only where lost content does no harm (5.5.6.7).
const PAGE_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The reporting queue's number is 4 when drivers count the queues of features not offered (as the specification says) and
/// 2 when they do not (as Linux long did); from 2 on every queue is for reports.
const QUEUES: usize = 5;

/// Page frame numbers are in units of this.
const PAGE: u64 = 4096;
/// Most page frame numbers of one inflate request that are looked at.
const PFNS_MAX: usize = 1024;
/// Requests per turn.
const BUDGET: usize = 16;

/// The balloon as drivers see it.
pub(crate) fn profile() -> Profile {
    Profile {
        device_type: VIRTIO_ID_BALLOON as u16,
        class: 0xff_00_00,
        features: 1 << DEFLATE_ON_OOM | 1 << PAGE_REPORTING,
        acceptable: |_| true,
        queue_sizes: vec![QUEUE_SIZE; QUEUES],
    }
}

/// `struct virtio_balloon_config`: num_pages (0: stay deflated), actual, free_page_hint_cmd_id, poison_val.
pub(crate) fn config_space() -> Vec<u8> {
    vec![0; 16]
}

/// Gives memory back to the host.
pub(crate) struct BalloonBackend {
    queues: [Option<VirtQueue>; QUEUES],
    chain: Chain,
    pages: GuestBuffers,
}

impl BalloonBackend {
    pub(crate) fn new(memory: &Arc<GuestMemoryMmap>) -> Self {
        Self { queues: Default::default(), chain: Chain::new(memory), pages: GuestBuffers::new(Arc::clone(memory)) }
    }

    fn serve(&mut self, index: usize) -> Result<bool, QueueError> {
        for _ in 0..BUDGET {
            let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(false) };
            queue.disable_notification()?;
            let Some(head) = queue.pop(&mut self.chain)? else {
                if queue.enable_notification()? {
                    continue;
                }
                return Ok(false);
            };
            match index {
                INFLATE => self.inflate(),
                DEFLATE => {}
                _ => self.chain.writable.discard(),
            }
            if let Some(Some(queue)) = self.queues.get_mut(index) {
                queue.push_used(head, 0)?;
            }
        }
        Ok(true)
    }

    fn inflate(&mut self) {
        let mut raw = [0u8; PFNS_MAX * 4];
        let bytes = usize::try_from(self.chain.readable.len()).unwrap_or(raw.len()).min(raw.len());
        let Some(raw) = raw.get_mut(..bytes) else { return };
        self.chain.readable.read(raw);
        self.pages.clear();
        for pfn in raw.chunks_exact(4) {
            let pfn = pfn.try_into().map_or(0, u32::from_le_bytes);
            // Pages that do not exist are the driver's loss.
            self.pages.append(GuestAddress(u64::from(pfn) * PAGE), PAGE as u32, Permissions::Write);
        }
        self.pages.discard();
    }
}

impl Backend for BalloonBackend {
    fn activate(&mut self, _features: u64) -> Result<(), Broken> {
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        None
    }

    fn start_queue(&mut self, queue: VirtQueue) {
        if let Some(slot) = self.queues.get_mut(queue.index()) {
            *slot = Some(queue);
        }
    }

    fn stop_queue(&mut self, index: usize) {
        if let Some(slot) = self.queues.get_mut(index) {
            *slot = None;
        }
    }

    fn in_flight(&self, _index: usize) -> usize {
        0
    }

    fn wake(&mut self, _wake: Wake) {}

    fn run(&mut self, accept: bool) -> Result<bool, Broken> {
        if !accept {
            return Ok(false);
        }
        let mut more = false;
        for index in 0..QUEUES {
            more |= self.serve(index)?;
        }
        for queue in self.queues.iter_mut().flatten() {
            queue.signal_used()?;
        }
        Ok(more)
    }

    fn collect(&self, _stats: &mut DeviceStats) {}
}
