//! The common configuration structure (virtio 1.2, 4.1.4.3): feature negotiation, queue set-up and the device's life. Pure:
//! what has to happen elsewhere is returned as an [`Action`].

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::shared::DeviceShared;

/// Bytes of the structure, including queue_notify_data and queue_reset.
pub(crate) const COMMON_CONFIG_BYTES: u32 = 0x40;

/// Features every device of ours offers.
pub(crate) const TRANSPORT_FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_F_RING_RESET)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC);

/// Status bits a driver may set.
const DRIVER_STATUS: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED) as u8;

/// Where a queue's rings lie, as the driver wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueSetup {
    pub(crate) index: usize,
    pub(crate) max_size: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// What a register write asks of the rest of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Nothing,
    /// DRIVER_OK: these queues move.
    Activate {
        features: u64,
        queues: Vec<QueueSetup>,
    },
    /// One more queue after DRIVER_OK (after its reset).
    StartQueue(QueueSetup),
    /// The queue must stop and forget.
    ResetQueue(usize),
    /// The whole device must stop and forget; `was_active` when the I/O thread knows of it.
    Reset {
        was_active: bool,
    },
}

#[derive(Clone, Debug)]
struct QueueRegisters {
    setup: QueueSetup,
    enabled: bool,
}

/// The driver's side of one device's negotiation.
#[derive(Clone, Debug)]
pub(crate) struct CommonConfig {
    offered: u64,
    acceptable: fn(u64) -> bool,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    active: bool,
}

impl CommonConfig {
    /// `device_features` without the transport's; `acceptable` judges dependencies between accepted ones.
    pub(crate) fn new(device_features: u64, acceptable: fn(u64) -> bool, queue_sizes: &[u16]) -> Self {
        let queues = queue_sizes.iter().enumerate().map(|(index, size)| QueueRegisters {
            setup: QueueSetup { index, max_size: *size, size: *size, descriptors: 0, available: 0, used: 0 },
            enabled: false,
        });
        Self {
            offered: device_features | TRANSPORT_FEATURES,
            acceptable,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            queue_select: 0,
            queues: queues.collect(),
            active: false,
        }
    }

    /// Queues the driver enabled.
    pub(crate) fn enabled_queues(&self) -> impl Iterator<Item = usize> {
        self.queues.iter().filter(|queue| queue.enabled).map(|queue| queue.setup.index)
    }

    /// Reads any width at any offset.
    pub(crate) fn read(&self, shared: &DeviceShared, offset: u64, data: &mut [u8]) {
        let mut image = [0u8; COMMON_CONFIG_BYTES as usize];
        self.image(shared, &mut image);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        crate::pci::copy_padded(data, image.get(start..).unwrap_or_default());
    }

    fn image(&self, shared: &DeviceShared, image: &mut [u8; COMMON_CONFIG_BYTES as usize]) {
        let mut put = |offset: usize, bytes: &[u8]| {
            if let Some(target) = image.get_mut(offset..offset + bytes.len()) {
                target.copy_from_slice(bytes);
            }
        };
        put(0x00, &self.offered_select.to_le_bytes());
        put(0x04, &half(self.offered, self.offered_select).to_le_bytes());
        put(0x08, &self.accepted_select.to_le_bytes());
        put(0x0c, &half(self.accepted, self.accepted_select).to_le_bytes());
        put(0x10, &shared.interrupt.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[shared.status()]);
        put(0x15, &[shared.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        let index = usize::from(self.queue_select);
        put(0x1a, &shared.interrupt.queue_vector(index).to_le_bytes());
        // A queue that does not exist reads size 0 (4.1.4.3.1).
        if let Some(queue) = self.queues.get(index) {
            put(0x18, &queue.setup.size.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.setup.descriptors.to_le_bytes());
            put(0x28, &queue.setup.available.to_le_bytes());
            put(0x30, &queue.setup.used.to_le_bytes());
            put(0x38, &self.queue_select.to_le_bytes());
            put(0x3a, &u16::from(shared.queue_resetting(index)).to_le_bytes());
        }
    }

    /// Takes a write. Fields have one width each (4.1.3.1: the driver uses it; 64-bit fields also as two halves); other
    /// writes are ignored.
    pub(crate) fn write(&mut self, shared: &DeviceShared, offset: u64, data: &[u8]) -> Action {
        let mut bytes = [0u8; 8];
        match bytes.get_mut(..data.len()) {
            Some(target) => target.copy_from_slice(data),
            None => return Action::Nothing,
        }
        let value = u64::from_le_bytes(bytes);
        if (offset, data.len()) == (0x14, 1) {
            return self.write_status(shared, value as u8);
        }
        if shared.resetting() {
            return Action::Nothing;
        }
        let index = usize::from(self.queue_select);
        match (offset, data.len()) {
            (0x00, 4) => self.offered_select = value as u32,
            (0x08, 4) => self.accepted_select = value as u32,
            (0x0c, 4) => self.accept(shared, value as u32),
            (0x10, 2) => shared.interrupt.set_config_vector(value as u16),
            (0x16, 2) => self.queue_select = value as u16,
            (0x18, 2) => self.change_queue(|setup| {
                let size = value as u16;
                if size.is_power_of_two() && size <= setup.max_size {
                    setup.size = size;
                }
            }),
            (0x1a, 2) => shared.interrupt.set_queue_vector(index, value as u16),
            (0x1c, 2) if value == 1 => return self.enable_queue(shared),
            (0x20..0x38, 4 | 8) => self.change_queue(|setup| {
                let field = match offset & !7 {
                    0x20 => &mut setup.descriptors,
                    0x28 => &mut setup.available,
                    _ => &mut setup.used,
                };
                match (offset & 7, data.len()) {
                    (0, 8) => *field = value,
                    (0, 4) => *field = (*field & !0xffff_ffff) | value,
                    (4, 4) => *field = (*field & 0xffff_ffff) | (value << 32),
                    _ => {}
                }
            }),
            (0x3a, 2) if value == 1 => return self.reset_queue(shared),
            _ => {}
        }
        Action::Nothing
    }

    fn accept(&mut self, shared: &DeviceShared, value: u32) {
        // Negotiation is over once FEATURES_OK is set (3.1.1).
        if shared.status() & VIRTIO_CONFIG_S_FEATURES_OK as u8 != 0 {
            return;
        }
        match self.accepted_select {
            0 => self.accepted = (self.accepted & !0xffff_ffff) | u64::from(value),
            1 => self.accepted = (self.accepted & 0xffff_ffff) | (u64::from(value) << 32),
            _ => {}
        }
    }

    /// Set-up registers of an enabled queue do not change.
    fn change_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !queue.enabled
        {
            change(&mut queue.setup);
        }
    }

    fn ring_reset_negotiated(&self) -> bool {
        self.accepted & (1 << VIRTIO_F_RING_RESET) != 0
    }

    fn enable_queue(&mut self, shared: &DeviceShared) -> Action {
        let late = self.active;
        if late && !self.ring_reset_negotiated() {
            return Action::Nothing;
        }
        match self.queues.get_mut(usize::from(self.queue_select)) {
            Some(queue) if !queue.enabled && !shared.queue_resetting(queue.setup.index) => {
                queue.enabled = true;
                if late { Action::StartQueue(queue.setup) } else { Action::Nothing }
            }
            _ => Action::Nothing,
        }
    }

    fn reset_queue(&mut self, shared: &DeviceShared) -> Action {
        if !self.ring_reset_negotiated() {
            return Action::Nothing;
        }
        let active = self.active;
        match self.queues.get_mut(usize::from(self.queue_select)) {
            Some(queue) if queue.enabled => {
                let index = queue.setup.index;
                queue.clear();
                if !active {
                    return Action::Nothing;
                }
                shared.begin_queue_reset(index);
                Action::ResetQueue(index)
            }
            _ => Action::Nothing,
        }
    }

    fn write_status(&mut self, shared: &DeviceShared, value: u8) -> Action {
        if shared.resetting() {
            return Action::Nothing;
        }
        if value == 0 {
            let was_active = self.active;
            self.clear();
            return Action::Reset { was_active };
        }
        // Bits are only ever added; the driver clears them by a reset.
        let before = shared.status();
        let mut added = value & DRIVER_STATUS & !before;
        if added & VIRTIO_CONFIG_S_FEATURES_OK as u8 != 0 && !self.features_ok() {
            added &= !(VIRTIO_CONFIG_S_FEATURES_OK as u8);
        }
        let ready = (before | added) & VIRTIO_CONFIG_S_FEATURES_OK as u8 != 0;
        let start = added & VIRTIO_CONFIG_S_DRIVER_OK as u8 != 0;
        if start && !ready {
            added &= !(VIRTIO_CONFIG_S_DRIVER_OK as u8);
        }
        shared.add_status(added);
        if !start || !ready {
            return Action::Nothing;
        }
        self.active = true;
        let queues = self.queues.iter().filter(|queue| queue.enabled).map(|queue| queue.setup).collect();
        Action::Activate { features: self.accepted, queues }
    }

    fn features_ok(&self) -> bool {
        let within_offer = self.accepted & !self.offered == 0;
        within_offer && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0 && (self.acceptable)(self.accepted)
    }

    fn clear(&mut self) {
        self.accepted = 0;
        self.offered_select = 0;
        self.accepted_select = 0;
        self.queue_select = 0;
        self.active = false;
        for queue in &mut self.queues {
            queue.clear();
        }
    }
}

impl QueueRegisters {
    fn clear(&mut self) {
        let QueueSetup { index, max_size, .. } = self.setup;
        self.setup = QueueSetup { index, max_size, size: max_size, descriptors: 0, available: 0, used: 0 };
        self.enabled = false;
    }
}

/// The low or high 32 bits; selectors above 1 read zero.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}
