//! A small virtio driver: finds a device by its PCI capabilities, negotiates, and works its queues.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};

use super::machine::{MSI_ADDRESS, Machine};

pub const VERSION_1: u64 = 1 << 32;
pub const RING_RESET: u64 = 1 << 40;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;

pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// A buffer in guest memory: address and length.
pub type Buffer = (u64, u32);

pub struct Driver {
    pub slot: usize,
    pub bar: u64,
    pub common: u64,
    pub notify: u64,
    pub notify_multiplier: u64,
    pub isr: u64,
    pub device: u64,
    pub msix_table: u64,
    pub msix_control: usize,
    pub pci_window: usize,
    pub features: u64,
}

impl Driver {
    /// Finds the structures of the device in `slot`, turns on decoding and MSI-X; vector `n` sends `slot << 8 | n`.
    pub fn probe(machine: &Machine, slot: usize) -> Self {
        assert_eq!(machine.config_read32(slot, 0) & 0xffff, 0x1af4);
        machine.config_write(slot, 4, &[0x06, 0x04]);
        let low = machine.config_read32(slot, 0x10);
        assert_eq!(low & 0x7, 4, "a 64-bit memory BAR");
        let bar = (u64::from(machine.config_read32(slot, 0x14)) << 32) | u64::from(low & !0xf);
        let mut driver = Self {
            slot,
            bar,
            common: 0,
            notify: 0,
            notify_multiplier: 0,
            isr: 0,
            device: 0,
            msix_table: 0,
            msix_control: 0,
            pci_window: 0,
            features: 0,
        };
        let mut at = usize::from(machine.config_read8(slot, 0x34));
        while at != 0 {
            match machine.config_read8(slot, at) {
                0x09 => driver.note_structure(machine, at),
                0x11 => {
                    driver.msix_control = at + 2;
                    driver.msix_table = bar + u64::from(machine.config_read32(slot, at + 4) & !7);
                }
                other => panic!("unexpected capability {other:#x}"),
            }
            at = usize::from(machine.config_read8(slot, at + 1));
        }
        driver.program_vectors(machine);
        driver
    }

    fn note_structure(&mut self, machine: &Machine, at: usize) {
        let address = self.bar + u64::from(machine.config_read32(self.slot, at + 8));
        match machine.config_read8(self.slot, at + 3) {
            1 => self.common = address,
            2 => {
                self.notify = address;
                self.notify_multiplier = u64::from(machine.config_read32(self.slot, at + 16));
            }
            3 => self.isr = address,
            4 => self.device = address,
            5 => self.pci_window = at,
            other => panic!("unexpected structure {other}"),
        }
    }

    pub fn vectors(&self, machine: &Machine) -> u16 {
        (machine.config_read32(self.slot, self.msix_control & !3) >> 16 & 0x7ff) as u16 + 1
    }

    fn program_vectors(&self, machine: &Machine) {
        for vector in 0..self.vectors(machine) {
            let entry = self.msix_table + u64::from(vector) * 16;
            machine.write(entry, &MSI_ADDRESS.to_le_bytes());
            machine.write(entry + 8, &(((self.slot as u32) << 8) | u32::from(vector)).to_le_bytes());
            machine.write(entry + 12, &0u32.to_le_bytes());
        }
        machine.config_write(self.slot, self.msix_control, &0x8000u16.to_le_bytes());
    }

    pub fn status(&self, machine: &Machine) -> u8 {
        machine.read64(self.common + 0x14, 1) as u8
    }

    pub fn set_status(&self, machine: &Machine, status: u8) {
        machine.write(self.common + 0x14, &[status]);
    }

    pub fn offered(&self, machine: &Machine) -> u64 {
        (0..2u32).fold(0, |features, select| {
            machine.write(self.common, &select.to_le_bytes());
            features | (machine.read64(self.common + 4, 4) << (32 * select))
        })
    }

    /// Up to FEATURES_OK with the offered part of `wanted`; false when the device refuses.
    pub fn negotiate(&mut self, machine: &Machine, wanted: u64) -> bool {
        self.set_status(machine, ACKNOWLEDGE);
        self.set_status(machine, ACKNOWLEDGE | DRIVER);
        self.features = self.offered(machine) & wanted;
        for select in 0..2u32 {
            machine.write(self.common + 8, &select.to_le_bytes());
            machine.write(self.common + 12, &((self.features >> (32 * select)) as u32).to_le_bytes());
        }
        self.set_status(machine, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status(machine) & FEATURES_OK != 0
    }

    pub fn select_queue(&self, machine: &Machine, index: u16) {
        machine.write(self.common + 0x16, &index.to_le_bytes());
    }

    /// Places and enables a queue; its vector is `index + 1`, vector 0 is for configuration changes.
    pub fn enable_queue(&self, machine: &mut Machine, index: u16, size: u16) -> DriverQueue {
        let entries = u64::from(size);
        let descriptors = machine.allocate(entries * 16);
        let available = machine.allocate(6 + entries * 2);
        let used = machine.allocate(6 + entries * 8);
        for (address, bytes) in [(descriptors, entries * 16), (available, 6 + entries * 2), (used, 6 + entries * 8)] {
            machine.fill(address, &vec![0; bytes as usize]);
        }
        self.select_queue(machine, index);
        machine.write(self.common + 0x18, &size.to_le_bytes());
        assert_eq!(machine.read64(self.common + 0x18, 2), entries);
        machine.write(self.common + 0x1a, &(index + 1).to_le_bytes());
        for (register, address) in [(0x20, descriptors), (0x28, available), (0x30, used)] {
            machine.write(self.common + register, &(address as u32).to_le_bytes());
            machine.write(self.common + register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        let offset = machine.read64(self.common + 0x1e, 2);
        machine.write(self.common + 0x1c, &1u16.to_le_bytes());
        DriverQueue {
            size,
            descriptors,
            available,
            used,
            doorbell: self.notify + offset * self.notify_multiplier,
            event_idx: self.features & EVENT_IDX != 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_available: 0,
            kicked: 0,
            next_used: 0,
        }
    }

    pub fn ready(&self, machine: &mut Machine) {
        machine.write(self.common + 0x10, &0u16.to_le_bytes());
        self.set_status(machine, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        machine.turn();
    }

    /// Probe, negotiate everything in `wanted`, enable all queues with this size, go.
    pub fn start(machine: &mut Machine, slot: usize, wanted: u64, size: u16) -> (Self, Vec<DriverQueue>) {
        let mut driver = Self::probe(machine, slot);
        let queues = driver.restart(machine, wanted, size);
        (driver, queues)
    }

    /// The same after a reset.
    pub fn restart(&mut self, machine: &mut Machine, wanted: u64, size: u16) -> Vec<DriverQueue> {
        assert!(self.negotiate(machine, wanted));
        let count = machine.read64(self.common + 0x12, 2) as u16;
        let queues = (0..count).map(|index| self.enable_queue(machine, index, size)).collect();
        self.ready(machine);
        assert_eq!(self.status(machine), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        queues
    }

    pub fn reset(&self, machine: &mut Machine) {
        self.set_status(machine, 0);
        let common = self.common;
        machine.turn_until(|machine| machine.read64(common + 0x14, 1) == 0);
    }
}

pub struct DriverQueue {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub doorbell: u64,
    event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    next_available: u16,
    kicked: u16,
    next_used: u16,
}

impl DriverQueue {
    pub fn write_descriptor(&self, machine: &Machine, table: u64, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = table + u64::from(index) * 16;
        let mut raw = buffer.0.to_le_bytes().to_vec();
        raw.extend_from_slice(&buffer.1.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        raw.extend_from_slice(&next.to_le_bytes());
        machine.fill(at, &raw);
    }

    /// Makes one chain available; returns its head.
    pub fn add(&mut self, machine: &Machine, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let buffers: Vec<(Buffer, u16)> =
            readable.iter().map(|buffer| (*buffer, 0)).chain(writable.iter().map(|buffer| (*buffer, WRITE))).collect();
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (position, (buffer, flags)) in buffers.iter().enumerate() {
            let next = indices.get(position + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(machine, self.descriptors, indices[position], *buffer, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.offer(machine, head);
        head
    }

    /// The same through an indirect table.
    pub fn add_indirect(&mut self, machine: &mut Machine, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let count = readable.len() + writable.len();
        let table = machine.allocate(count as u64 * 16);
        for (index, buffer) in readable.iter().chain(writable).enumerate() {
            let write = if index >= readable.len() { WRITE } else { 0 };
            let next = if index + 1 < count { NEXT } else { 0 };
            self.write_descriptor(machine, table, index as u16, *buffer, write | next, index as u16 + 1);
        }
        let head = self.free.pop().expect("a free descriptor");
        self.write_descriptor(machine, self.descriptors, head, (table, count as u32 * 16), INDIRECT_FLAG, 0);
        self.chains[usize::from(head)] = vec![head];
        self.offer(machine, head);
        head
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, machine: &Machine, head: u16) {
        let slot = self.available + 4 + u64::from(self.next_available % self.size) * 2;
        machine.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        machine.memory.store(self.next_available, GuestAddress(self.available + 2), Ordering::Release).unwrap();
    }

    fn load(&self, machine: &Machine, address: u64) -> u16 {
        machine.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    /// What a driver does before it notifies: true when the device asked for it.
    pub fn wants_kick(&mut self, machine: &Machine) -> bool {
        let old = std::mem::replace(&mut self.kicked, self.next_available);
        // The device must see the new index before we look whether it sleeps (virtio 1.2, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(machine, self.used + 4 + u64::from(self.size) * 8);
            let passed = self.next_available.wrapping_sub(event).wrapping_sub(1);
            passed < self.next_available.wrapping_sub(old)
        } else {
            self.load(machine, self.used) & 1 == 0
        }
    }

    /// Notifies if the device wants it; returns whether it did.
    pub fn kick(&mut self, machine: &Machine) -> bool {
        let wanted = self.wants_kick(machine);
        if wanted {
            machine.write(self.doorbell, &0u16.to_le_bytes());
        }
        wanted
    }

    /// Takes the next used element.
    pub fn take_used(&mut self, machine: &Machine) -> Option<(u16, u32)> {
        if self.load(machine, self.used + 2) == self.next_used {
            return None;
        }
        let at = self.used + 4 + u64::from(self.next_used % self.size) * 8;
        let head: u32 = machine.memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = machine.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        self.free.append(&mut self.chains[head as usize]);
        if self.event_idx {
            self.set_used_event(machine, self.next_used);
        }
        Some((head as u16, length))
    }

    pub fn set_used_event(&self, machine: &Machine, value: u16) {
        let at = self.available + 4 + u64::from(self.size) * 2;
        machine.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn set_no_interrupt(&self, machine: &Machine, off: bool) {
        machine.memory.write_obj(u16::from(off), GuestAddress(self.available)).unwrap();
    }

    /// Kicks and waits for one used element.
    pub fn run(&mut self, machine: &mut Machine) -> (u16, u32) {
        self.kick(machine);
        let mut used = None;
        machine.turn_until(|machine| {
            used = self.take_used(machine);
            used.is_some()
        });
        used.unwrap()
    }
}
