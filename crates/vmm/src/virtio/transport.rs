//! Virtio over PCI, modern interface (virtio 1.2, section 4.1): one function, one 64-bit BAR, MSI-X.
//!
//! ```text
//! BAR 0   0x0000  common configuration
//!         0x1000  ISR status
//!         0x2000  device configuration
//!         0x3000  MSI-X table, 0x3800 pending bits
//!         0x4000  notifications, 4 bytes a queue: in a page of their own, one ioeventfd each
//! ```

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::common_config::{Action, COMMON_CONFIG_BYTES, CommonConfig};
use super::io_device::DeviceId;
use super::io_thread::{Command, CommandSender};
use super::shared::{DeviceShared, lock};
use crate::interrupt::IoEventRegistry;
use crate::pci::{
    ConfigSpace, DecodedBar, Identity, MSIX_CAPABILITY_ID, MSIX_ENTRY_BYTES, Msix, PciDevice, copy_padded,
};

/// Size of BAR 0.
pub(crate) const BAR_BYTES: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const MSIX_TABLE: u64 = 0x3000;
const MSIX_PENDING: u64 = 0x3800;
const NOTIFY: u64 = 0x4000;
const REGION: u64 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR_CAPABILITY_ID: u8 = 0x09;
/// `struct virtio_pci_cap` after id and next: cap_len, cfg_type, bar, id, padding, offset, length.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

const VIRTIO_VENDOR: u16 = 0x1af4;
/// Modern device ids are this plus the virtio device type.
const MODERN_DEVICE_BASE: u16 = 0x1040;

/// What a device tells its transport once.
pub(crate) struct Profile {
    /// Virtio device type (section 5).
    pub(crate) device_type: u16,
    /// PCI class code `0x00BBSSPP`.
    pub(crate) class: u32,
    /// Offered features without the transport's.
    pub(crate) features: u64,
    /// Whether a set of accepted features is consistent.
    pub(crate) acceptable: fn(u64) -> bool,
    /// Largest size per queue.
    pub(crate) queue_sizes: Vec<u16>,
}

/// A queue's doorbell: the eventfd the I/O thread sleeps on, and where KVM signals it.
struct Doorbell {
    event: Arc<EventFd>,
    registered: Option<u64>,
}

struct Registers {
    common: CommonConfig,
    doorbells: Vec<Doorbell>,
    /// Where BAR 0 answers.
    home: Option<u64>,
}

/// One virtio device as a PCI function. Register accesses come from vCPU threads.
pub(crate) struct VirtioPci {
    shared: Arc<DeviceShared>,
    /// Names the device to the I/O thread.
    device: DeviceId,
    commands: CommandSender,
    ioevents: Arc<dyn IoEventRegistry>,
    config: Mutex<ConfigSpace>,
    msix_control: usize,
    window: usize,
    registers: Mutex<Registers>,
}

impl VirtioPci {
    /// `address` is where BAR 0 starts out; the device answers there once the guest turns decoding on.
    pub(crate) fn new(
        profile: &Profile,
        device: DeviceId,
        address: u64,
        shared: Arc<DeviceShared>,
        doorbells: &[Arc<EventFd>],
        commands: CommandSender,
        ioevents: Arc<dyn IoEventRegistry>,
    ) -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: VIRTIO_VENDOR,
            device: MODERN_DEVICE_BASE + profile.device_type,
            revision: 1,
            class: profile.class,
            subsystem_vendor: VIRTIO_VENDOR,
            subsystem: 0x40 + profile.device_type,
        });
        config.set_bar(0, BAR_BYTES, address);
        let msix_control = add_msix(&mut config, shared.interrupt.vectors());
        let window = add_virtio_capabilities(&mut config);
        let doorbells = doorbells.iter().map(|event| Doorbell { event: Arc::clone(event), registered: None });
        let registers = Registers {
            common: CommonConfig::new(profile.features, profile.acceptable, &profile.queue_sizes),
            doorbells: doorbells.collect(),
            home: None,
        };
        Self {
            shared,
            device,
            commands,
            ioevents,
            config: Mutex::new(config),
            msix_control,
            window,
            registers: Mutex::new(registers),
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut registers = lock(&self.registers);
        match registers.common.write(&self.shared, offset, data) {
            Action::Nothing => {}
            Action::Activate { features, queues } => {
                registers.ring_by_kvm(self.ioevents.as_ref());
                self.commands.send(Command::Activate { device: self.device, features, queues });
            }
            Action::StartQueue(setup) => {
                registers.ring_by_kvm(self.ioevents.as_ref());
                self.commands.send(Command::StartQueue { device: self.device, setup });
            }
            Action::ResetQueue(index) => {
                self.commands.send(Command::ResetQueue { device: self.device, index });
            }
            Action::Reset { was_active: true } => {
                self.shared.begin_reset();
                self.commands.send(Command::Reset { device: self.device });
            }
            Action::Reset { was_active: false } => self.shared.finish_reset(),
        }
    }

    fn write_notify(&self, offset: u64) {
        // The slow path: before DRIVER_OK, or without ioeventfds.
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        if let Some(doorbell) = lock(&self.registers).doorbells.get(index) {
            // Only fails when the counter is full, and then the reader is signalled anyway.
            let _ = doorbell.event.write(1);
        }
    }

    /// The BAR access that the VIRTIO_PCI_CAP_PCI_CFG window asks for: offset and length.
    fn window_target(&self) -> Option<(u64, usize)> {
        let config = lock(&self.config);
        let mut bar = [0];
        config.read(self.window + 4, &mut bar);
        let offset = u64::from(config.u32_at(self.window + 8));
        let length = config.u32_at(self.window + 12);
        let fits = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(u64::from(length)) && offset < BAR_BYTES;
        (bar == [0] && fits).then_some((offset, length as usize))
    }

    /// Whether a configuration access of `length` bytes at `offset` touches the window's data field.
    fn touches_window(&self, offset: usize, length: usize) -> bool {
        let field = self.window + 16;
        offset < field + 4 && offset.saturating_add(length) > field
    }
}

impl Registers {
    /// Lets KVM ring the doorbells of enabled queues without an exit. A refusal (an address taken twice) only costs speed.
    fn ring_by_kvm(&mut self, ioevents: &dyn IoEventRegistry) {
        let Some(home) = self.home else { return };
        for index in self.common.enabled_queues() {
            let address = home + NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER);
            if let Some(doorbell) = self.doorbells.get_mut(index)
                && doorbell.registered.is_none()
                && ioevents.register(address, &doorbell.event).is_ok()
            {
                doorbell.registered = Some(address);
            }
        }
    }

    fn silence(&mut self, ioevents: &dyn IoEventRegistry) {
        for doorbell in &mut self.doorbells {
            if let Some(address) = doorbell.registered.take() {
                // Nothing else could be done about a failure; the eventfd stays valid either way.
                let _ = ioevents.unregister(address, &doorbell.event);
            }
        }
    }
}

impl PciDevice for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((target, length)) = self.window_target()
        {
            let mut bytes = [0; 4];
            if let Some(bytes) = bytes.get_mut(..length) {
                self.read_bar(target, bytes);
            }
            lock(&self.config).put(self.window + 16, &bytes);
        }
        lock(&self.config).read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> bool {
        let (moved, control, master) = {
            let mut config = lock(&self.config);
            let before = config.u16_at(self.msix_control);
            let moved = config.write(offset, data);
            let after = config.u16_at(self.msix_control);
            (moved, (before != after).then_some(after), config.bus_master())
        };
        if self.shared.set_bus_master(master) && master {
            // What the driver asked for meanwhile is still due.
            for doorbell in &lock(&self.registers).doorbells {
                let _ = doorbell.event.write(1);
            }
        }
        if let Some(control) = control {
            self.shared.interrupt.with_msix(|msix| msix.set_control(control));
        }
        if self.touches_window(offset, data.len())
            && let Some((target, length)) = self.window_target()
        {
            let mut bytes = [0; 4];
            lock(&self.config).read(self.window + 16, &mut bytes);
            if let Some(bytes) = bytes.get(..length) {
                self.write_bar(target, bytes);
            }
        }
        moved
    }

    fn decoded_bar(&self) -> Option<DecodedBar> {
        let (_, address, size) = lock(&self.config).decoded_bar()?;
        Some(DecodedBar { address, size })
    }

    fn bar_moved(&self, address: Option<u64>) {
        let mut registers = lock(&self.registers);
        if registers.home == address {
            return;
        }
        registers.silence(self.ioevents.as_ref());
        registers.home = address;
        registers.ring_by_kvm(self.ioevents.as_ref());
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => lock(&self.registers).common.read(&self.shared, offset - COMMON, data),
            ISR => copy_padded(data, &[self.shared.interrupt.take_isr()]),
            DEVICE..MSIX_TABLE => self.shared.read_config((offset - DEVICE) as usize, data),
            MSIX_TABLE..MSIX_PENDING => {
                self.shared.interrupt.with_msix(|msix| {
                    msix.read_table(offset - MSIX_TABLE, data);
                    None
                });
            }
            MSIX_PENDING..NOTIFY => {
                self.shared.interrupt.with_msix(|msix| {
                    msix.read_pending(offset - MSIX_PENDING, data);
                    None
                });
            }
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset - COMMON, data),
            MSIX_TABLE..MSIX_PENDING => {
                self.shared.interrupt.with_msix(|msix| msix.write_table(offset - MSIX_TABLE, data));
            }
            NOTIFY.. => self.write_notify(offset - NOTIFY),
            // ISR and pending bits are read-only, and none of our devices has a writable configuration field.
            _ => {}
        }
    }
}

/// Adds the MSI-X capability; returns the offset of its message control register.
fn add_msix(config: &mut ConfigSpace, vectors: u16) -> usize {
    debug_assert!(u64::from(vectors) * MSIX_ENTRY_BYTES <= MSIX_PENDING - MSIX_TABLE);
    let mut body = Vec::with_capacity(10);
    body.extend_from_slice(&Msix::new(vectors).control().to_le_bytes());
    body.extend_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
    body.extend_from_slice(&(MSIX_PENDING as u32).to_le_bytes());
    // Enable and function mask.
    let offset = config.add_capability(MSIX_CAPABILITY_ID, &body, &0xc000u16.to_le_bytes());
    offset.unwrap_or_default() + 2
}

/// Adds the five virtio structures; returns the offset of the VIRTIO_PCI_CAP_PCI_CFG window.
fn add_virtio_capabilities(config: &mut ConfigSpace) -> usize {
    let structure = |cfg_type: u8, offset: u64, length: u32, tail: &[u8]| {
        let mut body = vec![16 + tail.len() as u8, cfg_type, 0, 0, 0, 0];
        body.extend_from_slice(&(offset as u32).to_le_bytes());
        body.extend_from_slice(&length.to_le_bytes());
        body.extend_from_slice(tail);
        body
    };
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    config.add_capability(VENDOR_CAPABILITY_ID, &structure(CFG_COMMON, COMMON, COMMON_CONFIG_BYTES, &[]), &[]);
    config.add_capability(VENDOR_CAPABILITY_ID, &structure(CFG_ISR, ISR, 4, &[]), &[]);
    config.add_capability(VENDOR_CAPABILITY_ID, &structure(CFG_DEVICE, DEVICE, REGION as u32, &[]), &[]);
    config.add_capability(VENDOR_CAPABILITY_ID, &structure(CFG_NOTIFY, NOTIFY, REGION as u32, &multiplier), &[]);
    // Its bar, offset, length and data fields belong to the driver.
    let mut writable = [0u8; 18];
    for index in [2].into_iter().chain(6..18) {
        if let Some(mask) = writable.get_mut(index) {
            *mask = 0xff;
        }
    }
    let offset = config.add_capability(VENDOR_CAPABILITY_ID, &structure(CFG_PCI, 0, 0, &[0; 4]), &writable);
    offset.unwrap_or_default()
}
