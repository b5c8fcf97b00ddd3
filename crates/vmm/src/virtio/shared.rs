//! What vCPU threads and the I/O thread share of one device.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};

use crate::interrupt::MsiSender;
use crate::pci::{MsiMessage, Msix};

/// VIRTIO_MSI_NO_VECTOR.
pub(crate) const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A lock that a panicking holder does not take away from everybody else.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device's interrupts: MSI-X vectors, or the ISR register while MSI-X is off.
pub(crate) struct Interrupt {
    msix: Mutex<Msix>,
    sender: Arc<dyn MsiSender>,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Interrupt {
    /// One vector per queue and one for configuration changes.
    pub(crate) fn new(queues: usize, sender: Arc<dyn MsiSender>) -> Self {
        Self {
            msix: Mutex::new(Msix::new(queues as u16 + 1)),
            sender,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// Used buffers wait in queue `index`.
    pub(crate) fn signal_queue(&self, index: usize) {
        let vector = self.queue_vectors.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire));
        self.signal(vector, ISR_QUEUE);
    }

    /// The device configuration or the status changed.
    pub(crate) fn signal_config(&self) {
        self.signal(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }

    fn signal(&self, vector: u16, isr: u8) {
        let message = {
            let mut msix = lock(&self.msix);
            if !msix.enabled() {
                self.isr.fetch_or(isr, Ordering::AcqRel);
            }
            msix.trigger(vector)
        };
        self.send(message);
    }

    /// Works on the MSI-X state and sends what that releases.
    pub(crate) fn with_msix<M: IntoIterator<Item = MsiMessage>>(&self, change: impl FnOnce(&mut Msix) -> M) {
        let messages = change(&mut lock(&self.msix));
        self.send(messages);
    }

    fn send(&self, messages: impl IntoIterator<Item = MsiMessage>) {
        for message in messages {
            // A guest can program an address that is no local APIC; its interrupt is lost, as on hardware.
            let _ = self.sender.send(message.address, message.data);
        }
    }

    /// Reads and clears the ISR register.
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// Number of MSI-X vectors.
    pub(crate) fn vectors(&self) -> u16 {
        self.queue_vectors.len() as u16 + 1
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.vectors() { vector } else { NO_VECTOR }
    }

    /// The configuration vector register.
    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// Writes it; a vector that does not exist reads back as none.
    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::Release);
    }

    /// A queue's vector register.
    pub(crate) fn queue_vector(&self, index: usize) -> u16 {
        self.queue_vectors.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// Writes it; a vector that does not exist reads back as none.
    pub(crate) fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(index) {
            slot.store(self.existing(vector), Ordering::Release);
        }
    }

    fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }
}

/// Status, device configuration and interrupts of one device.
pub(crate) struct DeviceShared {
    pub(crate) interrupt: Interrupt,
    status: AtomicU8,
    /// A reset was asked for and the I/O thread has not finished it.
    resetting: AtomicBool,
    /// Queues whose reset the I/O thread has not finished, bit by bit.
    queues_resetting: AtomicU64,
    config: Mutex<Vec<u8>>,
    generation: AtomicU8,
    bus_master: AtomicBool,
}

impl DeviceShared {
    pub(crate) fn new(queues: usize, config: Vec<u8>, sender: Arc<dyn MsiSender>) -> Self {
        Self {
            interrupt: Interrupt::new(queues, sender),
            status: AtomicU8::new(0),
            resetting: AtomicBool::new(false),
            queues_resetting: AtomicU64::new(0),
            config: Mutex::new(config),
            generation: AtomicU8::new(0),
            bus_master: AtomicBool::new(false),
        }
    }

    /// The guest lets the function access memory (PCI command register). A kernel that starts another one takes this away
    /// from devices it does not reset.
    pub(crate) fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }

    /// True when that changed.
    pub(crate) fn set_bus_master(&self, on: bool) -> bool {
        self.bus_master.swap(on, Ordering::AcqRel) != on
    }

    /// The device status register.
    pub(crate) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    pub(crate) fn resetting(&self) -> bool {
        self.resetting.load(Ordering::Acquire)
    }

    /// The driver reset a device the I/O thread knows of; `finish_reset` follows.
    pub(crate) fn begin_reset(&self) {
        self.interrupt.reset();
        self.resetting.store(true, Ordering::Release);
    }

    /// Nothing of the device is in flight any more.
    pub(crate) fn finish_reset(&self) {
        self.interrupt.reset();
        self.queues_resetting.store(0, Ordering::Release);
        self.status.store(0, Ordering::Release);
        self.resetting.store(false, Ordering::Release);
    }

    pub(crate) fn queue_resetting(&self, index: usize) -> bool {
        index < 64 && self.queues_resetting.load(Ordering::Acquire) & (1 << index) != 0
    }

    pub(crate) fn begin_queue_reset(&self, index: usize) {
        if index < 64 {
            self.interrupt.set_queue_vector(index, NO_VECTOR);
            self.queues_resetting.fetch_or(1 << index, Ordering::AcqRel);
        }
    }

    pub(crate) fn finish_queue_reset(&self, index: usize) {
        if index < 64 {
            self.queues_resetting.fetch_and(!(1 << index), Ordering::AcqRel);
        }
    }

    /// The device cannot go on (a broken ring, a lost backend): virtio 1.2, 2.1.2.
    pub(crate) fn needs_reset(&self) {
        let bit = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
        let before = self.status.fetch_or(bit, Ordering::AcqRel);
        if before & bit == 0 && before & VIRTIO_CONFIG_S_DRIVER_OK as u8 != 0 {
            self.interrupt.signal_config();
        }
    }

    /// Reads device configuration; beyond its end zeros.
    pub(crate) fn read_config(&self, offset: usize, data: &mut [u8]) {
        crate::pci::copy_padded(data, lock(&self.config).get(offset..).unwrap_or_default());
    }

    /// Changes device configuration and tells the driver.
    pub(crate) fn update_config(&self, change: impl FnOnce(&mut [u8])) {
        {
            let mut config = lock(&self.config);
            change(&mut config);
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        if self.status() & VIRTIO_CONFIG_S_DRIVER_OK as u8 != 0 {
            self.interrupt.signal_config();
        }
    }

    pub(crate) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }
}
