//! A split virtqueue in motion (virtio 1.2, section 2.7), on top of the `virtio-queue` crate: whole chains as checked
//! buffers, bounded in flight, interrupts when the driver wants them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::common_config::QueueSetup;
use super::guest_buffers::GuestBuffers;
use super::shared::DeviceShared;

/// The driver broke the queue's rules; the device needs a reset.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("queue {0}: its rings are misaligned or not in guest memory")]
    Setup(usize),
    #[error("queue {0}: the available ring cannot be read or claims more entries than it has")]
    AvailableRing(usize),
    #[error("queue {0}: a descriptor chain is malformed or points outside guest memory")]
    Chain(usize),
    #[error("queue {0}: the used ring cannot be written")]
    UsedRing(usize),
    #[error("queue {0}: a request is too short to be answered")]
    Request(usize),
}

/// One popped chain: device-readable bytes, then device-writable ones.
pub(crate) struct Chain {
    pub(crate) readable: GuestBuffers,
    pub(crate) writable: GuestBuffers,
    /// Where the last writable byte lies (the status byte of block requests).
    pub(crate) last_writable: Option<GuestAddress>,
}

impl Chain {
    pub(crate) fn new(memory: &Arc<GuestMemoryMmap>) -> Self {
        Self {
            readable: GuestBuffers::new(Arc::clone(memory)),
            writable: GuestBuffers::new(Arc::clone(memory)),
            last_writable: None,
        }
    }

    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.last_writable = None;
    }
}

/// A queue the driver enabled.
pub(crate) struct VirtQueue {
    index: usize,
    queue: Queue,
    memory: Arc<GuestMemoryMmap>,
    shared: Arc<DeviceShared>,
    /// Chains popped and not yet used; a correct driver never has more than the queue's size.
    outstanding: u16,
    /// Buffers were used since the last `signal_used`.
    unsignalled: bool,
}

impl VirtQueue {
    /// Checks the driver's set-up.
    pub(crate) fn new(
        setup: &QueueSetup,
        event_idx: bool,
        memory: Arc<GuestMemoryMmap>,
        shared: Arc<DeviceShared>,
    ) -> Result<Self, QueueError> {
        let bad = |_| QueueError::Setup(setup.index);
        let mut queue = Queue::new(setup.max_size).map_err(bad)?;
        queue.try_set_size(setup.size).map_err(bad)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(bad)?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available)).map_err(bad)?;
        queue.try_set_used_ring_address(GuestAddress(setup.used)).map_err(bad)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // An available ring at 0 is the crate's sign for "not configured".
        if setup.available == 0 || !queue.is_valid(memory.as_ref()) {
            return Err(QueueError::Setup(setup.index));
        }
        Ok(Self { index: setup.index, queue, memory, shared, outstanding: 0, unsignalled: false })
    }

    /// Takes the next available chain into `chain`; `None` when there is none.
    pub(crate) fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, QueueError> {
        let mut available = self.queue.iter(self.memory.as_ref()).map_err(|_| QueueError::AvailableRing(self.index))?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        let (head, size) = (descriptors.head_index(), self.queue.size());
        // More outstanding chains than descriptors: heads are being offered twice.
        if self.outstanding >= size || head >= size {
            return Err(QueueError::AvailableRing(self.index));
        }
        chain.clear();
        let mut count = 0u16;
        let mut complete = false;
        for descriptor in descriptors {
            count += 1;
            let (address, length) = (descriptor.addr(), descriptor.len());
            let stored = if descriptor.is_write_only() {
                if length > 0 {
                    chain.last_writable = address.checked_add(u64::from(length) - 1);
                }
                chain.writable.append(address, length, Permissions::Write)
            } else {
                // Readable after writable is against 2.7.4.2.
                chain.writable.len() == 0 && chain.readable.append(address, length, Permissions::Read)
            };
            if !stored || count > size {
                return Err(QueueError::Chain(self.index));
            }
            complete = !descriptor.has_next();
        }
        // The iterator ends early on loops, bad indices and unreadable tables.
        if !complete {
            return Err(QueueError::Chain(self.index));
        }
        self.outstanding += 1;
        Ok(Some(head))
    }

    /// Gives chain `head` back with `written` bytes stored in it.
    pub(crate) fn push_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.unsignalled = true;
        self.queue.add_used(self.memory.as_ref(), head, written).map_err(|_| QueueError::UsedRing(self.index))
    }

    /// Interrupts the driver once for everything used since the last call, if it wants that.
    pub(crate) fn signal_used(&mut self) -> Result<(), QueueError> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(());
        }
        let wanted =
            self.queue.needs_notification(self.memory.as_ref()).map_err(|_| QueueError::AvailableRing(self.index))?;
        // Without EVENT_IDX the driver has only the flag (2.7.7).
        let suppressed = !self.queue.event_idx_enabled() && {
            let flags = self.memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
            u16::from_le(flags.unwrap_or(0)) & VRING_AVAIL_F_NO_INTERRUPT as u16 != 0
        };
        if wanted && !suppressed {
            self.shared.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to notify while the queue is being worked on.
    pub(crate) fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(self.memory.as_ref()).map_err(|_| QueueError::UsedRing(self.index))
    }

    /// Asks for notifications again; true when chains came meanwhile (go on instead of sleeping).
    pub(crate) fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(self.memory.as_ref()).map_err(|_| QueueError::UsedRing(self.index))
    }

    /// Whether the driver has made chains available that were not popped.
    pub(crate) fn has_chains(&self) -> bool {
        let available = self.queue.avail_idx(self.memory.as_ref(), Ordering::Acquire);
        available.is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Stores one byte, for status bytes that outlive their chain's buffers.
    pub(crate) fn store_byte(&self, address: GuestAddress, value: u8) -> Result<(), QueueError> {
        self.memory.write_obj(value, address).map_err(|_| QueueError::Request(self.index))
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }
}
