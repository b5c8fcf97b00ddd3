//! A machine without KVM: guest memory, the PCI bus, recorded interrupts, and the I/O loop turned by hand.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::events::{EventQueue, EventSink};
use crate::interrupt::{IoEventRegistry, IrqLine, MsiSender};
use crate::pci::PciLayout;
use crate::virtio::device_set::Builder;
use crate::virtio::io_thread::{Command, IoLoop};
use crate::virtio::{DeviceSet, DeviceStats, IoThread, Platform};

pub const MIB: u64 = 1 << 20;
pub const ECAM: u64 = 0xe800_0000;
pub const MMIO64: u64 = 0x40_0000_0000;
pub const MSI_ADDRESS: u64 = 0xfee0_0000;
/// Guest memory: two adjacent regions, so that buffers can lie across their border.
pub const REGION: u64 = 8 * MIB;
pub const MEMORY: u64 = 2 * REGION;

/// Messages sent, oldest first.
#[derive(Default)]
pub struct RecordedMsi(Mutex<Vec<(u64, u32)>>);

impl RecordedMsi {
    pub fn take(&self) -> Vec<u32> {
        self.0.lock().unwrap().drain(..).map(|(_, data)| data).collect()
    }
}

impl MsiSender for RecordedMsi {
    fn send(&self, address: u64, data: u32) -> io::Result<()> {
        self.0.lock().unwrap().push((address, data));
        Ok(())
    }
}

/// What KVM would signal on a guest write.
#[derive(Default)]
pub struct IoEvents(Mutex<HashMap<u64, (i32, EventFd)>>);

impl IoEvents {
    pub fn addresses(&self) -> Vec<u64> {
        let mut addresses: Vec<u64> = self.0.lock().unwrap().keys().copied().collect();
        addresses.sort_unstable();
        addresses
    }

    fn ring(&self, address: u64) -> bool {
        self.0.lock().unwrap().get(&address).map(|(_, event)| event.write(1).unwrap()).is_some()
    }
}

impl IoEventRegistry for IoEvents {
    fn register(&self, guest_address: u64, event: &EventFd) -> io::Result<()> {
        let mut events = self.0.lock().unwrap();
        if events.contains_key(&guest_address) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        events.insert(guest_address, (event.as_raw_fd(), event.try_clone().unwrap()));
        Ok(())
    }

    fn unregister(&self, guest_address: u64, event: &EventFd) -> io::Result<()> {
        let (fd, _) = self.0.lock().unwrap().remove(&guest_address).expect("registered before");
        assert_eq!(fd, event.as_raw_fd());
        Ok(())
    }
}

/// Who moves the queues: the test, turn by turn, or the real thread.
pub enum Io {
    Manual(IoLoop),
    Thread(IoThread),
}

impl Io {
    pub fn turn(&mut self, timeout: i32) {
        match self {
            Self::Manual(io) => assert!(io.turn(timeout).unwrap()),
            Self::Thread(_) => std::thread::yield_now(),
        }
    }

    /// From now on it looks for work for so long before it sleeps.
    pub fn be_patient(&mut self, window: Duration) {
        match self {
            Self::Manual(io) => io.be_patient(window),
            Self::Thread(_) => panic!("the thread finds out by itself"),
        }
    }

    pub fn device_stats(&self) -> DeviceStats {
        match self {
            Self::Manual(io) => io.device_stats(),
            Self::Thread(io) => io.stats().unwrap(),
        }
    }

    pub fn command(&self, command: Command) {
        match self {
            Self::Manual(io) => io.commands().send(command),
            Self::Thread(_) => panic!("the thread has methods of its own"),
        }
    }
}

pub struct Machine {
    pub memory: Arc<GuestMemoryMmap>,
    pub msi: Arc<RecordedMsi>,
    pub ioevents: Arc<IoEvents>,
    pub pulses: Arc<Pulses>,
    pub events: Arc<EventQueue>,
    pub ports: Arc<dyn BusDevice>,
    pub mmio: Vec<(std::ops::Range<u64>, Arc<dyn BusDevice>)>,
    pub hotplug: Arc<dyn BusDevice>,
    pub io: Io,
    next_free: u64,
}

/// What the devices did to the machine around them.
pub struct Recorders {
    pub msi: Arc<RecordedMsi>,
    pub ioevents: Arc<IoEvents>,
    /// Hot-plug interrupts.
    pub pulses: Arc<Pulses>,
    pub events: Arc<EventQueue>,
}

/// Counts interrupts.
#[derive(Default)]
pub struct Pulses(AtomicUsize);

impl Pulses {
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl IrqLine for Pulses {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

pub struct Parts {
    pub memory: Arc<GuestMemoryMmap>,
    pub recorders: Recorders,
    pub set: DeviceSet,
}

fn assemble() -> (Platform, Recorders) {
    let ranges = [(GuestAddress(0), REGION as usize), (GuestAddress(REGION), REGION as usize)];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let msi = Arc::new(RecordedMsi::default());
    let ioevents = Arc::new(IoEvents::default());
    let pulses = Arc::new(Pulses::default());
    let events = Arc::new(EventQueue::new().unwrap());
    let layout = PciLayout { ecam: ECAM..ECAM + MIB, mmio32: 0xc000_0000..ECAM, mmio64: MMIO64..MMIO64 + (1 << 30) };
    let platform = Platform {
        layout,
        memory,
        msi: Arc::clone(&msi) as Arc<dyn MsiSender>,
        ioevents: Arc::clone(&ioevents) as Arc<dyn IoEventRegistry>,
        hotplug_line: Arc::clone(&pulses) as Arc<dyn IrqLine>,
        events: Arc::clone(&events) as Arc<dyn EventSink>,
    };
    (platform, Recorders { msi, ioevents, pulses, events })
}

pub fn platform() -> Platform {
    assemble().0
}

/// Memory, recorders and the devices that `fill` adds.
pub fn parts(fill: impl FnOnce(&mut Builder)) -> Parts {
    let (platform, recorders) = assemble();
    let memory = Arc::clone(&platform.memory);
    let mut builder = Builder::new(platform).unwrap();
    fill(&mut builder);
    Parts { memory, recorders, set: builder.finish().unwrap() }
}

impl Machine {
    pub fn new(fill: impl FnOnce(&mut Builder)) -> Self {
        Self::of(parts(fill), |mut set| Io::Manual(set.take_io_loop()))
    }

    /// The same with a running I/O thread.
    pub fn threaded(fill: impl FnOnce(&mut Builder)) -> Self {
        Self::of(parts(fill), |set| Io::Thread(set.start(|| Ok(())).unwrap()))
    }

    fn of(parts: Parts, io: impl FnOnce(DeviceSet) -> Io) -> Self {
        let Parts { memory, recorders, set } = parts;
        let Recorders { msi, ioevents, pulses, events } = recorders;
        let (ports, mmio, hotplug) = (set.port_device(), set.mmio_devices(), set.hotplug_device());
        Self { memory, msi, ioevents, pulses, events, ports, mmio, hotplug, io: io(set), next_free: 0x10000 }
    }

    /// The running I/O thread's handle.
    pub fn thread(&self) -> &IoThread {
        match &self.io {
            Io::Thread(io) => io,
            Io::Manual(_) => panic!("the test turns the loop itself"),
        }
    }

    /// Fresh guest memory, 4 KiB aligned.
    pub fn allocate(&mut self, bytes: u64) -> u64 {
        let address = self.next_free;
        self.next_free += bytes.next_multiple_of(4096);
        assert!(self.next_free <= MEMORY, "test used up its guest memory");
        address
    }

    /// Lets the I/O loop do everything that is due now.
    pub fn turn(&mut self) {
        for _ in 0..20 {
            self.io.turn(0);
        }
    }

    /// Turns the I/O loop, sleeping for its events, until `done`.
    pub fn turn_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let rounds = if matches!(self.io, Io::Manual(_)) { 200 } else { 20_000_000 };
        for _ in 0..rounds {
            if done(self) {
                return;
            }
            self.io.turn(50);
        }
        panic!("the device did not get there");
    }

    pub fn config_read(&self, slot: usize, register: usize, data: &mut [u8]) {
        let address = 0x8000_0000 | ((slot as u32) << 11) | (register as u32 & 0xfc);
        self.ports.write(0, &address.to_le_bytes());
        self.ports.read(4 + (register as u64 & 3), data);
    }

    pub fn config_read32(&self, slot: usize, register: usize) -> u32 {
        let mut data = [0; 4];
        self.config_read(slot, register, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn config_read8(&self, slot: usize, register: usize) -> u8 {
        let mut data = [0];
        self.config_read(slot, register, &mut data);
        data[0]
    }

    pub fn config_write(&self, slot: usize, register: usize, data: &[u8]) {
        let address = 0x8000_0000 | ((slot as u32) << 11) | (register as u32 & 0xfc);
        self.ports.write(0, &address.to_le_bytes());
        self.ports.write(4 + (register as u64 & 3), data);
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        let (range, device) = self.mmio.iter().find(|(range, _)| range.contains(&address)).expect("an MMIO range");
        device.read(address - range.start, data);
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        if self.ioevents.ring(address) {
            return;
        }
        let (range, device) = self.mmio.iter().find(|(range, _)| range.contains(&address)).expect("an MMIO range");
        device.write(address - range.start, data);
    }

    pub fn read64(&self, address: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.read(address, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    pub fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}
