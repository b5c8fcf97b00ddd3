//! The real I/O thread against a driver that never waits longer than it must: lost notifications would hang, torn or
//! misdirected requests would show in the data.

use super::block_test::{disk_file, header};
use super::driver::*;
use super::machine::*;
use super::net_test::wire;
use crate::virtio::Disk;

const SECTORS: u64 = 512;
const SLOTS: usize = 24;

/// xorshift64: the same requests in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

struct Slot {
    header: u64,
    data: u64,
    status: u64,
    /// What is under way: sector, and the fill byte of a write.
    busy: Option<(u64, Option<u8>)>,
}

fn blocks(features: u64, seed: u64, requests: usize) {
    let file = disk_file(SECTORS);
    let disk = Disk { serial: "vol1".into(), backing: crate::virtio::Backing::Raw(file), read_only: false, queues: 2 };
    let mut machine = Machine::threaded(|builder| builder.add_disk(disk).unwrap());
    let (driver, mut queues) = Driver::start(&mut machine, 1, features, 64);
    let mut random = Random(seed);
    let mut model = vec![0u8; SECTORS as usize];
    let mut slots: Vec<Slot> = (0..SLOTS)
        .map(|_| Slot {
            header: machine.allocate(16),
            data: machine.allocate(512),
            status: machine.allocate(1),
            busy: None,
        })
        .collect();
    let mut heads = [[None; 64]; 2];
    let (mut sent, mut done) = (0, 0);
    while done < requests {
        // A burst of requests on free sectors, then one notification per queue.
        for _ in 0..random.below(6) {
            let sector = random.below(SECTORS);
            let taken = slots.iter().any(|slot| slot.busy.is_some_and(|(busy, _)| busy == sector));
            let Some(index) = slots.iter().position(|slot| slot.busy.is_none()) else { break };
            if taken || sent == requests {
                continue;
            }
            let fill = (random.below(2) == 0).then(|| random.below(256) as u8);
            let slot = &mut slots[index];
            slot.busy = Some((sector, fill));
            machine.fill(slot.header, &header(u32::from(fill.is_some()), sector));
            machine.fill(slot.status, &[0xee]);
            machine.fill(slot.data, &[fill.unwrap_or(0xaa); 512]);
            let queue = random.below(2) as usize;
            let (out, back) = ((slot.header, 16), (slot.status, 1));
            let head = match fill {
                Some(_) => queues[queue].add(&machine, &[out, (slot.data, 512)], &[back]),
                None => queues[queue].add(&machine, &[out], &[(slot.data, 512), back]),
            };
            heads[queue][usize::from(head)] = Some(index);
            sent += 1;
        }
        for queue in &mut queues {
            queue.kick(&machine);
        }
        // Sometimes go on at once, sometimes wait until something is back.
        let wait = random.below(3) == 0 && sent > done;
        let before = done;
        machine.turn_until(|machine| {
            for (number, queue) in queues.iter_mut().enumerate() {
                while let Some((head, _)) = queue.take_used(machine) {
                    let slot = &mut slots[heads[number][usize::from(head)].take().expect("a head we gave")];
                    let (sector, fill) = slot.busy.take().expect("a request under way");
                    assert_eq!(machine.bytes(slot.status, 1), [0]);
                    match fill {
                        Some(fill) => model[sector as usize] = fill,
                        None => assert_eq!(machine.bytes(slot.data, 512), vec![model[sector as usize]; 512]),
                    }
                    done += 1;
                }
            }
            !wait || done > before
        });
    }
    assert_eq!(driver.status(&machine) & NEEDS_RESET, 0);
    let stats = machine.io.device_stats().disks[0].clone();
    assert_eq!((stats.read_ops + stats.write_ops) as usize, requests);
}

#[test]
fn thousands_of_racing_block_requests_arrive_whole() {
    for (features, seed) in [(u64::MAX, 1), (!EVENT_IDX, 2), (!(EVENT_IDX | INDIRECT), 3)] {
        blocks(features, seed, 6000);
    }
}

#[test]
fn no_packet_is_lost_or_reordered_under_load() {
    for features in [u64::MAX, !EVENT_IDX] {
        let (near, far) = wire();
        far.set_nonblocking(false).unwrap();
        let mut machine = Machine::threaded(|builder| builder.add_nic(0, [2; 6], 1500, Box::new(near)).unwrap());
        let (_, mut queues) = Driver::start(&mut machine, 1, features, 64);
        // Every packet the guest sends comes straight back.
        let echo = std::thread::spawn(move || {
            let mut packet = [0; 2048];
            for _ in 0..4000 {
                let length = far.recv(&mut packet).unwrap();
                far.send(&packet[..length]).unwrap();
            }
        });
        let buffers = machine.allocate(128 * 2048);
        let mut receive = Vec::new();
        for index in 0..48 {
            let at = buffers + index * 2048;
            receive.push((queues[0].add(&machine, &[], &[(at, 2048)]), at));
        }
        queues[0].kick(&machine);
        let (mut sent, mut received) = (0u32, 0u32);
        while received < 4000 {
            while sent < 4000 && sent - received < 40 {
                let at = buffers + (64 + u64::from(sent % 64)) * 2048;
                machine.fill(at, &[0; 12]);
                machine.fill(at + 12, &[sent.to_le_bytes(); 100].concat());
                queues[1].add(&machine, &[(at, 412)], &[]);
                sent += 1;
            }
            queues[1].kick(&machine);
            machine.turn_until(|machine| {
                while queues[1].take_used(machine).is_some() {}
                let before = received;
                while let Some((head, length)) = queues[0].take_used(machine) {
                    assert_eq!(length, 412);
                    let position = receive.iter().position(|(posted, _)| *posted == head).expect("a head we gave");
                    let (_, at) = receive.swap_remove(position);
                    assert_eq!(machine.bytes(at + 12, 400), [received.to_le_bytes(); 100].concat());
                    received += 1;
                    receive.push((queues[0].add(machine, &[], &[(at, 2048)]), at));
                }
                queues[0].kick(machine);
                received > before
            });
        }
        echo.join().unwrap();
    }
}
