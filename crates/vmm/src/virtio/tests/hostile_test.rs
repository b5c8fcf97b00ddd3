//! A guest that does whatever it likes: registers, rings and descriptors at random, at any moment. Nothing may panic, hang
//! or leave a device that a reset does not mend.

use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::block_test::{disk_file, header};
use super::driver::*;
use super::machine::*;
use super::net_test::wire;
use crate::pci::fuzzing::fuzz;
use crate::virtio::Disk;

/// Rings of all queues: device `d`, queue `q` at `RINGS + (d * 4 + q) * RING_SPACE`.
const RINGS: u64 = 0x10_0000;
const RING_SPACE: u64 = 0x4000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 16;
const DEVICES: usize = 4;
/// Where valid buffers and indirect tables lie; well apart from the rings.
const BUFFERS: u64 = 0x20_0000;

#[derive(Clone, Debug)]
enum Step {
    ConfigWrite {
        slot: usize,
        offset: usize,
        data: Vec<u8>,
    },
    ConfigRead {
        slot: usize,
        offset: usize,
        length: usize,
    },
    BarWrite {
        slot: usize,
        offset: u64,
        data: Vec<u8>,
    },
    BarRead {
        slot: usize,
        offset: u64,
        length: usize,
    },
    Common {
        slot: usize,
        register: u64,
        value: u64,
    },
    Start {
        slot: usize,
        features: u64,
    },
    Descriptor {
        queue: u64,
        index: u64,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    },
    Indirect {
        index: u64,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    },
    Available {
        queue: u64,
        entries: Vec<u16>,
        advance: u16,
    },
    Noise {
        address: u64,
        data: Vec<u8>,
    },
    /// A request as a correct driver would build it, perhaps with one descriptor spoilt.
    Request {
        slot: usize,
        queue: u64,
        start: u16,
        kind: u32,
        sector: u64,
        data: Vec<(u64, u32)>,
        spoilt: Option<Spoilt>,
    },
    BlockHeader {
        at: u64,
        kind: u32,
        sector: u64,
    },
    Kick {
        slot: usize,
        queue: u64,
    },
    Packet {
        length: usize,
    },
    Turn,
}

#[derive(Clone, Debug)]
struct Spoilt {
    position: usize,
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// Guest addresses: mostly plausible, sometimes at the edges, sometimes anything.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0u64..64).prop_map(|index| BUFFERS + index * 512),
        2 => (0u64..0x4000).prop_map(|offset| MEMORY - 0x2000 + offset),
        1 => (0u64..1024).prop_map(|offset| REGION - 512 + offset),
        1 => RINGS..RINGS + 16 * RING_SPACE,
        1 => any::<u64>(),
        1 => Just(0u64),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 8, 12, 16, 20, 26, 512, 1024, 1536, 4096]),
        1 => 0u32..70_000,
        1 => any::<u32>(),
    ]
}

fn flags() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 0u16..4, 2 => 0u16..8, 1 => any::<u16>()]
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 1..9)
}

fn request() -> impl Strategy<Value = Step> {
    let good = (0u64..64, prop::sample::select(vec![512u32, 1024, 4096, 16, 20, 32]))
        .prop_map(|(index, length)| (BUFFERS + index * 512, length));
    let data = prop_oneof![
        3 => prop::collection::vec(good, 0..5),
        1 => prop::collection::vec((address(), length()), 0..5),
    ];
    let spoilt = (0usize..6, address(), length(), any::<u16>(), 0..SIZE + 2).prop_map(
        |(position, address, length, flags, next)| Spoilt { position, address, length, flags: flags & 7, next },
    );
    let kind = prop_oneof![9 => prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]), 1 => any::<u32>()];
    let sector = prop_oneof![9 => 0u64..80, 1 => any::<u64>()];
    (1usize..=DEVICES, 0u64..4, 0..SIZE, kind, sector, data, prop::option::weighted(0.15, spoilt)).prop_map(
        |(slot, queue, start, kind, sector, data, spoilt)| Step::Request {
            slot,
            queue,
            start,
            kind,
            sector,
            data,
            spoilt,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let slot = || 1usize..DEVICES + 1;
    let queue = || 0u64..16;
    let value = prop_oneof![
        4 => 0u64..20,
        2 => address(),
        1 => any::<u64>(),
        1 => Just(0x0fu64),
    ];
    let features = prop_oneof![Just(u64::MAX), Just(VERSION_1), Just(VERSION_1 | RING_RESET), any::<u64>()];
    prop_oneof![
        1 => (0usize..6, 0usize..300, bytes())
            .prop_map(|(slot, offset, data)| Step::ConfigWrite { slot, offset, data }),
        1 => (0usize..6, 0usize..300, 1usize..9)
            .prop_map(|(slot, offset, length)| Step::ConfigRead { slot, offset, length }),
        1 => (slot(), 0u64..0x8000, bytes()).prop_map(|(slot, offset, data)| Step::BarWrite { slot, offset, data }),
        1 => (slot(), 0u64..0x8000, 1usize..9)
            .prop_map(|(slot, offset, length)| Step::BarRead { slot, offset, length }),
        3 => (slot(), 0u64..0x40, value).prop_map(|(slot, register, value)| Step::Common { slot, register, value }),
        3 => (slot(), features).prop_map(|(slot, features)| Step::Start { slot, features }),
        12 => (queue(), 0..u64::from(SIZE), address(), length(), flags(), 0..SIZE + 2).prop_map(
            |(queue, index, address, length, flags, next)| Step::Descriptor { queue, index, address, length, flags, next }
        ),
        3 => (0u64..32, address(), length(), flags(), 0..SIZE * 2).prop_map(
            |(index, address, length, flags, next)| Step::Indirect { index, address, length, flags, next }
        ),
        12 => (queue(), prop::collection::vec(0..SIZE + 1, 1..6), prop_oneof![6 => 1u16..6, 1 => any::<u16>()])
            .prop_map(|(queue, entries, advance)| Step::Available { queue, entries, advance }),
        1 => (RINGS..RINGS + 16 * RING_SPACE, bytes()).prop_map(|(address, data)| Step::Noise { address, data }),
        3 => (0u64..64, prop_oneof![prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]), any::<u32>()], 0u64..80)
            .prop_map(|(at, kind, sector)| Step::BlockHeader { at, kind, sector }),
        12 => (slot(), 0u64..4).prop_map(|(slot, queue)| Step::Kick { slot, queue }),
        3 => (0usize..70_000).prop_map(|length| Step::Packet { length }),
        6 => Just(Step::Turn),
        30 => request(),
    ]
}

struct Guest {
    machine: Machine,
    drivers: Vec<Driver>,
    wire: UnixDatagram,
}

fn rings(queue: u64) -> u64 {
    RINGS + queue * RING_SPACE
}

impl Guest {
    fn new() -> Self {
        let (near, far) = wire();
        let machine = Machine::new(|builder| {
            let disk = Disk {
                serial: "vol1".into(),
                backing: crate::virtio::Backing::Raw(disk_file(64)),
                read_only: false,
                queues: 2,
            };
            builder.add_disk(disk).unwrap();
            builder.add_nic(0, [2, 0, 0, 0, 0, 1], 1500, Box::new(near)).unwrap();
            builder.add_rng(std::fs::File::open("/dev/urandom").unwrap()).unwrap();
            builder.add_balloon().unwrap();
        });
        let drivers = (1..=DEVICES).map(|slot| Driver::probe(&machine, slot)).collect();
        Self { machine, drivers, wire: far }
    }

    /// Writes inside a device's BAR, wherever the guest has moved it.
    fn bar_write(&self, slot: usize, offset: u64, data: &[u8]) {
        let address = self.drivers[slot - 1].bar + offset;
        self.machine.write(address, data);
    }

    /// A driver's start with the rings at their fixed places, without looking at what the device says.
    fn start(&mut self, slot: usize, features: u64) {
        let driver = &mut self.drivers[slot - 1];
        driver.set_status(&self.machine, 0);
        self.machine.turn();
        driver.negotiate(&self.machine, features);
        let common = driver.common;
        for queue in 0..4u16 {
            driver.select_queue(&self.machine, queue);
            let base = rings((slot as u64 - 1) * 4 + u64::from(queue));
            self.machine.write(common + 0x18, &SIZE.to_le_bytes());
            self.machine.write(common + 0x1a, &(queue + 1).to_le_bytes());
            for (register, offset) in [(0x20, 0), (0x28, AVAILABLE), (0x30, USED)] {
                self.machine.write(common + register, &(base + offset).to_le_bytes());
            }
            self.machine.fill(base + AVAILABLE, &[0; 64]);
            self.machine.write(common + 0x1c, &1u16.to_le_bytes());
        }
        driver.ready(&mut self.machine);
    }

    fn descriptor(&self, at: u64, (address, length, flags, next): (u64, u32, u16, u16)) {
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend_from_slice(&length.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        raw.extend_from_slice(&next.to_le_bytes());
        self.machine.fill(at, &raw);
    }

    fn request(
        &mut self,
        slot: usize,
        queue: u64,
        (start, kind, sector): (u16, u32, u64),
        data: &[(u64, u32)],
        spoilt: Option<Spoilt>,
    ) {
        let writes = match slot {
            1 => !matches!(kind, 1 | 11 | 13),
            2 => queue == 0,
            3 => true,
            // Inflate and deflate read page numbers, reports are writable.
            _ => queue >= 2,
        };
        let data = data.iter().map(|(address, length)| (*address, *length, writes));
        let mut buffers: Vec<(u64, u32, bool)> = Vec::new();
        if slot == 1 {
            let place = BUFFERS + 0x10000 + u64::from(start) * 16;
            self.machine.fill(place, &header(kind, sector));
            buffers.push((place, 16, false));
            // Ranges of DISCARD and WRITE_ZEROES.
            self.machine.fill(BUFFERS, &[header(sector as u32, 8).as_slice(), &header(3, 1 << 32)].concat());
            buffers.extend(data);
            buffers.push((BUFFERS + 0x12000 + u64::from(start), 1, true));
        } else {
            buffers.extend(data);
        }
        let table = rings((slot as u64 - 1) * 4 + queue);
        let count = buffers.len();
        for (position, (address, length, write)) in buffers.into_iter().enumerate() {
            let index = (start + position as u16) % SIZE;
            let next = (index + 1) % SIZE;
            let flags = u16::from(position + 1 < count) | u16::from(write) << 1;
            let descriptor = match &spoilt {
                Some(spoilt) if spoilt.position == position => {
                    (spoilt.address, spoilt.length, spoilt.flags, spoilt.next)
                }
                _ => (address, length, flags, next),
            };
            self.descriptor(table + u64::from(index) * 16, descriptor);
        }
        self.step(Step::Available { queue: (slot as u64 - 1) * 4 + queue, entries: vec![start], advance: 1 });
        self.step(Step::Kick { slot, queue });
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::ConfigWrite { slot, offset, data } => {
                let target = ECAM + ((slot as u64) << 15) + offset as u64;
                self.machine.write(target, &data);
                self.machine.config_write(slot, offset & 0xff, &data[..data.len().min(4)]);
            }
            Step::ConfigRead { slot, offset, length } => {
                self.machine.read(ECAM + ((slot as u64) << 15) + offset as u64, &mut vec![0; length]);
                self.machine.config_read(slot, offset & 0xff, &mut vec![0; length.min(4)]);
            }
            Step::BarWrite { slot, offset, data } => self.bar_write(slot, offset, &data),
            Step::BarRead { slot, offset, length } => {
                self.machine.read(self.drivers[slot - 1].bar + offset, &mut vec![0; length]);
            }
            Step::Common { slot, register, value } => {
                let width = match register {
                    0x14 | 0x15 => 1,
                    0x00..0x10 => 4,
                    0x20..0x38 => 8,
                    _ => 2,
                };
                self.bar_write(slot, register, &value.to_le_bytes()[..width]);
            }
            Step::Start { slot, features } => self.start(slot, features),
            Step::Descriptor { queue, index, address, length, flags, next } => {
                self.descriptor(rings(queue) + index * 16, (address, length, flags, next));
            }
            Step::Indirect { index, address, length, flags, next } => {
                self.descriptor(BUFFERS + index * 16, (address, length, flags, next));
            }
            Step::Available { queue, entries, advance } => {
                let ring = rings(queue) + AVAILABLE;
                let index: u16 = self.machine.memory.read_obj(GuestAddress(ring + 2)).unwrap();
                for (position, entry) in entries.iter().enumerate() {
                    let slot = u64::from(index.wrapping_add(position as u16) % SIZE);
                    self.machine.fill(ring + 4 + slot * 2, &entry.to_le_bytes());
                }
                self.machine.fill(ring + 2, &index.wrapping_add(advance).to_le_bytes());
            }
            Step::Noise { address, data } => self.machine.fill(address, &data),
            Step::Request { slot, queue, start, kind, sector, data, spoilt } => {
                self.request(slot, queue, (start, kind, sector), &data, spoilt);
            }
            Step::BlockHeader { at, kind, sector } => {
                self.machine.fill(BUFFERS + at * 512, &header(kind, sector));
            }
            Step::Kick { slot, queue } => {
                self.bar_write(slot, 0x4000 + queue * 4, &0u16.to_le_bytes());
                self.machine.turn();
            }
            Step::Packet { length } => {
                // A full socket drops it, as a wire would.
                let _ = self.wire.send(&vec![0x5a; length.max(1)]);
            }
            Step::Turn => self.machine.turn(),
        }
    }

    /// Starts devices that gave up or were reset afresh, so that the next rings reach them.
    fn revive(&mut self, features: u64) {
        for slot in 1..=DEVICES {
            let status = self.drivers[slot - 1].status(&self.machine);
            if status & NEEDS_RESET != 0 || status & DRIVER_OK == 0 {
                self.start(slot, features);
            }
        }
    }

    /// After everything: each device comes back by a reset and works.
    fn recover(&mut self) {
        // First out of each other's way: the guest may have put one BAR over another.
        for slot in 1..=DEVICES {
            self.machine.config_write(slot, 4, &[0, 4]);
        }
        for slot in 1..=DEVICES {
            let driver = &self.drivers[slot - 1];
            self.machine.config_write(slot, 0x10, &(driver.bar as u32).to_le_bytes());
            self.machine.config_write(slot, 0x14, &((driver.bar >> 32) as u32).to_le_bytes());
            self.machine.config_write(slot, 4, &[6, 4]);
            driver.reset(&mut self.machine);
        }
        let status = BUFFERS + 0x8000;
        let (_, mut queues) = Driver::start(&mut self.machine, 1, u64::MAX, SIZE);
        self.machine.fill(BUFFERS, &header(4, 0));
        self.machine.fill(status, &[0xee]);
        queues[1].add(&self.machine, &[(BUFFERS, 16)], &[(status, 1)]);
        assert_eq!(queues[1].run(&mut self.machine).1, 1);
        assert_eq!(self.machine.bytes(status, 1), [0]);

        let (_, mut queues) = Driver::start(&mut self.machine, 3, u64::MAX, SIZE);
        queues[0].add(&self.machine, &[], &[(BUFFERS, 64)]);
        assert_eq!(queues[0].run(&mut self.machine).1, 64);

        let (_, mut queues) = Driver::start(&mut self.machine, 4, u64::MAX, SIZE);
        queues[2].add(&self.machine, &[], &[(BUFFERS, 8192)]);
        queues[2].run(&mut self.machine);

        let (_, mut queues) = Driver::start(&mut self.machine, 2, u64::MAX, SIZE);
        while self.wire.recv(&mut [0; 16]).is_ok() {}
        queues[1].add(&self.machine, &[(BUFFERS, 100)], &[]);
        queues[1].run(&mut self.machine);
        assert_eq!(self.wire.recv(&mut [0; 200]).unwrap(), 100);
    }
}

#[test]
fn a_hostile_guest_harms_only_itself() {
    fuzz(64, &prop::collection::vec(step(), 1..120), |steps| {
        let mut guest = Guest::new();
        for slot in 1..=DEVICES {
            guest.start(slot, u64::MAX);
        }
        for (number, step) in steps.into_iter().enumerate() {
            guest.step(step);
            if number % 16 == 15 {
                guest.revive(u64::MAX);
            }
        }
        guest.recover();
        Ok(())
    });
}

/// Rings alone, hard: descriptors and available entries at full tilt on started devices.
#[test]
fn hostile_rings_never_hang_or_panic() {
    let ring = prop_oneof![
        3 => (0u64..16, 0..u64::from(SIZE), address(), length(), flags(), 0..SIZE + 2).prop_map(
            |(queue, index, address, length, flags, next)| Step::Descriptor { queue, index, address, length, flags, next }
        ),
        1 => (0u64..32, address(), length(), flags(), 0..SIZE * 2).prop_map(
            |(index, address, length, flags, next)| Step::Indirect { index, address, length, flags, next }
        ),
        2 => (0u64..16, prop::collection::vec(0..SIZE, 1..6), 1u16..6)
            .prop_map(|(queue, entries, advance)| Step::Available { queue, entries, advance }),
        1 => (0u64..64, prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]), 0u64..80)
            .prop_map(|(at, kind, sector)| Step::BlockHeader { at, kind, sector }),
        6 => request(),
        1 => (0usize..70_000).prop_map(|length| Step::Packet { length }),
    ];
    let features = prop_oneof![Just(u64::MAX), Just(!EVENT_IDX), Just(!(1u64 << 15))];
    fuzz(48, &(features, prop::collection::vec(ring, 1..100)), |(features, steps)| {
        let mut guest = Guest::new();
        for slot in 1..=DEVICES {
            guest.start(slot, features);
        }
        for (number, step) in steps.into_iter().enumerate() {
            guest.step(step);
            if number % 8 == 7 {
                for slot in 1..=DEVICES {
                    for queue in 0..2 {
                        guest.step(Step::Kick { slot, queue });
                    }
                }
                guest.revive(features);
            }
        }
        guest.recover();
        Ok(())
    });
}
