use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::bus::BusDevice;

const MMIO64: u64 = 0x40_0000_0000;

fn layout() -> PciLayout {
    PciLayout { ecam: 0xe000_0000..0xe010_0000, mmio32: 0xc000_0000..0xd000_0000, mmio64: MMIO64..MMIO64 + (1 << 32) }
}

/// A function whose BAR is plain memory and which remembers where the bus put it.
struct Scratch {
    config: Mutex<ConfigSpace>,
    memory: Mutex<Vec<u8>>,
    home: Mutex<Option<u64>>,
}

impl Scratch {
    fn new(address: u64) -> Arc<Self> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: 0x02_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 1,
        });
        config.set_bar(0, 0x1000, address);
        Arc::new(Self { config: Mutex::new(config), memory: Mutex::new(vec![0; 0x1000]), home: Mutex::new(None) })
    }
}

impl PciDevice for Scratch {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn write_config(&self, offset: usize, data: &[u8]) -> bool {
        self.config.lock().unwrap().write(offset, data)
    }
    fn decoded_bar(&self) -> Option<DecodedBar> {
        let (_, address, size) = self.config.lock().unwrap().decoded_bar()?;
        Some(DecodedBar { address, size })
    }
    fn bar_moved(&self, address: Option<u64>) {
        *self.home.lock().unwrap() = address;
    }
    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.memory.lock().unwrap()[offset as usize..][..data.len()]);
    }
    fn write_bar(&self, offset: u64, data: &[u8]) {
        self.memory.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
    }
}

struct Machine {
    bus: Arc<PciBus>,
    ports: Arc<dyn BusDevice>,
    mmio: Vec<(std::ops::Range<u64>, Arc<dyn BusDevice>)>,
}

impl Machine {
    fn new() -> Self {
        let bus = Arc::new(PciBus::new(layout()));
        let (ports, mmio) = (bus.port_device(), bus.mmio_devices());
        Self { bus, ports, mmio }
    }

    fn select(&self, slot: u32, register: u32) {
        self.ports.write(0, &(0x8000_0000 | (slot << 11) | (register & 0xfc)).to_le_bytes());
    }

    fn port_read32(&self, slot: u32, register: u32) -> u32 {
        self.select(slot, register);
        let mut data = [0; 4];
        self.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn port_write(&self, slot: u32, register: u32, data: &[u8]) {
        self.select(slot, register);
        self.ports.write(4 + u64::from(register & 3), data);
    }

    fn mmio_read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0x77; length];
        let (range, device) = self.mmio.iter().find(|(range, _)| range.contains(&address)).unwrap();
        device.read(address - range.start, &mut data);
        data
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        let (range, device) = self.mmio.iter().find(|(range, _)| range.contains(&address)).unwrap();
        device.write(address - range.start, data);
    }
}

#[test]
fn ports_and_ecam_see_the_same_registers() {
    let machine = Machine::new();
    machine.bus.publish(3, Scratch::new(MMIO64)).unwrap();
    assert_eq!(machine.port_read32(0, 0), 0x0008_1b36);
    assert_eq!(machine.port_read32(3, 0), 0x1041_1af4);
    assert_eq!(machine.port_read32(4, 0), u32::MAX);
    assert_eq!(machine.mmio_read(0xe000_0000 + (3 << 15), 4), 0x1041_1af4u32.to_le_bytes());
    assert_eq!(machine.mmio_read(0xe000_0000 + (3 << 15) + 0x100, 4), [0; 4]);
    assert_eq!(machine.mmio_read(0xe000_0000 + (3 << 15) + 0x1000, 4), [0xff; 4], "no function 1");
    // Byte and word accesses through the data ports.
    machine.select(3, 0);
    let mut byte = [0];
    machine.ports.read(6, &mut byte);
    assert_eq!(byte, [0x41]);
    let mut word = [0; 2];
    machine.ports.read(6, &mut word);
    assert_eq!(word, [0x41, 0x10]);
    machine.ports.read(7, &mut word);
    assert_eq!(word, [0x10, 0xff], "an access over the dword's end reads nothing there");
    // The address latch reads back, and bytes at 0xCFB do not touch it.
    machine.ports.write(3, &[1]);
    let mut latch = [0; 4];
    machine.ports.read(0, &mut latch);
    assert_eq!(u32::from_le_bytes(latch), 0x8000_1800);
}

#[test]
fn bars_answer_where_they_are_moved_and_nowhere_else() {
    let machine = Machine::new();
    let device = Scratch::new(MMIO64 + 0x3000);
    machine.bus.publish(1, device.clone()).unwrap();
    assert_eq!(machine.mmio_read(MMIO64 + 0x3000, 4), [0xff; 4], "decoding is off");
    machine.port_write(1, 4, &[2, 0]);
    machine.mmio_write(MMIO64 + 0x3010, &[1, 2, 3, 4]);
    assert_eq!(machine.mmio_read(MMIO64 + 0x3010, 4), [1, 2, 3, 4]);
    assert_eq!(machine.mmio_read(MMIO64 + 0x3ffe, 4), [0xff; 4], "over the end");
    machine.port_write(1, 0x10, &0xc000_5000u32.to_le_bytes());
    machine.port_write(1, 0x14, &0u32.to_le_bytes());
    assert_eq!(*device.home.lock().unwrap(), Some(0xc000_5000));
    assert_eq!(machine.mmio_read(0xc000_5010, 4), [1, 2, 3, 4]);
    assert_eq!(machine.mmio_read(MMIO64 + 0x3010, 4), [0xff; 4]);
    // Over RAM or half outside a window: nowhere.
    machine.port_write(1, 0x10, &0x0010_0000u32.to_le_bytes());
    assert_eq!(*device.home.lock().unwrap(), None);
}

#[test]
fn slots_are_published_and_taken_back() {
    let machine = Machine::new();
    assert_eq!(machine.bus.occupied(), 1);
    for slot in 1..SLOTS {
        assert_eq!(machine.bus.free_slot(), Ok(slot));
        machine.bus.publish(slot, Scratch::new(MMIO64)).unwrap();
    }
    assert_eq!(machine.bus.free_slot(), Err(PciError::BusFull));
    assert_eq!(machine.bus.publish(5, Scratch::new(MMIO64)), Err(PciError::SlotOccupied(5)));
    assert_eq!(machine.bus.publish(32, Scratch::new(MMIO64)), Err(PciError::NoSuchSlot(32)));
    machine.port_write(5, 4, &[2, 0]);
    assert!(machine.bus.unpublish(5).is_some());
    assert!(machine.bus.unpublish(5).is_none());
    assert_eq!(machine.mmio_read(MMIO64, 4), [0xff; 4]);
    assert_eq!(machine.port_read32(5, 0), u32::MAX);
}

/// Any accesses of any width anywhere: the bus's map always agrees with what the device was told.
#[test]
fn hostile_accesses_keep_bus_and_device_in_step() {
    let access = (0u8..6, any::<u64>(), any::<u32>(), 1usize..9);
    fuzzing::fuzz(256, &prop::collection::vec(access, 0..120), |accesses| {
        let machine = Machine::new();
        let device = Scratch::new(MMIO64);
        machine.bus.publish(1, device.clone()).unwrap();
        for (kind, place, value, length) in accesses {
            let data = [value.to_le_bytes(), value.to_be_bytes()].concat();
            match kind {
                0 => machine.ports.write(place % 8, &data[..length]),
                1 => machine.ports.read(place % 8, &mut vec![0; length]),
                2 => machine.mmio_write(0xe000_0000 + place % 0x10_0000, &data[..length]),
                3 => machine.port_write(1, [4, 0x10, 0x14][(place % 3) as usize], &data[..length.min(4)]),
                4 => machine.port_write(1, 0x14, &0x40u32.to_le_bytes()),
                _ => machine.mmio_write(MMIO64 + place % (1 << 32), &data[..length]),
            }
            let home = *device.home.lock().unwrap();
            let decoded = device.decoded_bar().map(|bar| bar.address);
            prop_assert!(home.is_none() || home == decoded);
            if let Some(home) = home {
                machine.mmio_write(home, &[0x5a]);
                prop_assert_eq!(machine.mmio_read(home, 1), vec![0x5a]);
            }
        }
        Ok(())
    });
}
