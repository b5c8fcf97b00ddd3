use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use hearth_block::Operation;

use super::driver::*;
use super::machine::*;
use super::volumes::Held;
use crate::virtio::io_thread::Command;
use crate::virtio::{Backing, Disk};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
pub const ALL: u64 = u64::MAX;
const FLUSH_FEATURE: u64 = 1 << 9;

pub fn disk_file(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * 512).unwrap();
    file
}

fn disk(file: &File, read_only: bool, queues: u16) -> Disk {
    Disk { serial: "vol0123456789abcdef0".into(), backing: Backing::Raw(file.try_clone().unwrap()), read_only, queues }
}

struct Setup {
    machine: Machine,
    driver: Driver,
    queues: Vec<DriverQueue>,
    file: File,
}

fn setup(wanted: u64, read_only: bool, queues: u16) -> Setup {
    let file = disk_file(2048);
    let mut machine = Machine::new(|builder| builder.add_disk(disk(&file, read_only, queues)).unwrap());
    let (driver, queues) = Driver::start(&mut machine, 1, wanted, 128);
    Setup { machine, driver, queues, file }
}

pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

impl Setup {
    /// One request in the usual layout: header, data, status. Returns status and used length.
    fn request(&mut self, kind: u32, sector: u64, data_out: &[u8], data_in: u32) -> (u8, u32, Vec<u8>) {
        let head = self.machine.allocate(16);
        self.machine.fill(head, &header(kind, sector));
        let out = self.machine.allocate(data_out.len().max(1) as u64);
        self.machine.fill(out, data_out);
        let back = self.machine.allocate(u64::from(data_in) + 1);
        let status = self.machine.allocate(1);
        self.machine.fill(status, &[0xee]);
        let mut readable = vec![(head, 16)];
        if !data_out.is_empty() {
            readable.push((out, data_out.len() as u32));
        }
        let mut writable = vec![];
        if data_in > 0 {
            writable.push((back, data_in));
        }
        writable.push((status, 1));
        self.queues[0].add(&self.machine, &readable, &writable);
        let (_, length) = self.queues[0].run(&mut self.machine);
        (self.machine.bytes(status, 1)[0], length, self.machine.bytes(back, data_in as usize))
    }

    fn stored(&self, sector: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.file.read_exact_at(&mut data, sector * 512).unwrap();
        data
    }
}

#[test]
fn reads_writes_flushes_and_names_itself() {
    let mut setup = setup(ALL, false, 1);
    let data: Vec<u8> = (0..2048).map(|index| (index % 253) as u8).collect();
    assert_eq!(setup.request(1, 3, &data, 0), (OK, 1, vec![]));
    assert_eq!(setup.stored(3, 2048), data);
    let (status, length, back) = setup.request(0, 3, &[], 2048);
    assert_eq!((status, length), (OK, 2049));
    assert_eq!(back, data);
    assert_eq!(setup.request(4, 0, &[], 0), (OK, 1, vec![]));
    let (status, length, id) = setup.request(8, 0, &[], 20);
    assert_eq!((status, length, id.as_slice()), (OK, 21, b"vol0123456789abcdef0".as_slice()));
    assert_eq!(setup.request(99, 0, &[], 512).0, UNSUPP);
    let stats = stats(&mut setup.machine);
    assert_eq!((stats.read_ops, stats.write_ops, stats.flush_ops, stats.errors), (1, 1, 1, 1));
    assert_eq!((stats.read_bytes, stats.write_bytes), (2048, 2048));
}

pub fn stats(machine: &mut Machine) -> crate::control::protocol::DiskStats {
    machine.io.device_stats().disks[0].clone()
}

#[test]
fn configuration_space_tells_the_truth() {
    let setup = setup(ALL, false, 4);
    let read = |offset, bytes| setup.machine.read64(setup.driver.device + offset, bytes);
    assert_eq!(read(0, 8), 2048, "capacity");
    assert_eq!(read(4, 4), 0, "its high half");
    assert_eq!(read(12, 4), 254, "seg_max");
    assert_eq!(read(20, 4), 512, "blk_size");
    assert_eq!(read(24, 1), 3, "4 KiB physical blocks");
    assert_eq!(read(34, 2), 4, "num_queues");
    assert_eq!(read(40, 4), 16, "max_discard_seg");
    assert_eq!(read(56, 1), 1, "write_zeroes_may_unmap");
    assert_eq!(read(4000, 8), 0);
    assert_eq!(setup.queues.len(), 4);
    assert_eq!(setup.driver.vectors(&setup.machine), 5);
    assert_eq!(setup.machine.config_read32(1, 0), 0x1042_1af4);
    assert_ne!(setup.driver.offered(&setup.machine) & (1 << 12), 0, "MQ");
}

#[test]
fn requests_beyond_the_disk_or_misaligned_fail_alone() {
    let mut setup = setup(ALL, false, 1);
    assert_eq!(setup.request(1, 2047, &[1; 1024], 0).0, IOERR);
    assert_eq!(setup.request(0, 2048, &[], 512).0, IOERR);
    assert_eq!(setup.request(0, u64::MAX, &[], 512).0, IOERR);
    assert_eq!(setup.request(0, 1 << 55, &[], 512).0, IOERR);
    assert_eq!(setup.request(1, 0, &[1; 100], 0).0, IOERR);
    assert_eq!(setup.request(8, 0, &[], 10).0, IOERR);
    assert_eq!(setup.request(0, 2047, &[], 512).0, OK);
    assert_eq!(setup.request(1, 0, &[], 0).0, OK, "nothing to write");
    assert_eq!(setup.driver.status(&setup.machine) & NEEDS_RESET, 0);
}

#[test]
fn read_only_disks_refuse_writes() {
    let mut setup = setup(ALL, true, 1);
    let offered = setup.driver.offered(&setup.machine);
    assert_eq!(offered & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(setup.request(1, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(setup.request(11, 0, &range(0, 8, 0), 0).0, IOERR);
    assert_eq!(setup.request(0, 0, &[], 512), (OK, 513, vec![0; 512]));
    assert_eq!(setup.request(4, 0, &[], 0).0, OK);
    assert_eq!(setup.stored(0, 512), vec![0; 512]);
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend_from_slice(&sectors.to_le_bytes());
    range.extend_from_slice(&flags.to_le_bytes());
    range
}

#[test]
fn discard_and_write_zeroes() {
    let mut setup = setup(ALL, false, 1);
    setup.file.write_all_at(&vec![5; 1 << 20], 0).unwrap();
    let two = [range(0, 8, 0), range(16, 8, 0)].concat();
    assert_eq!(setup.request(11, 0, &two, 0).0, OK);
    assert_eq!(setup.stored(0, 4096), vec![0; 4096]);
    assert_eq!(setup.stored(8, 4096), vec![5; 4096]);
    assert_eq!(setup.stored(16, 4096), vec![0; 4096]);
    assert_eq!(setup.request(13, 0, &range(100, 3, 1), 0).0, OK);
    assert_eq!(setup.request(13, 0, &range(200, 3, 0), 0).0, OK);
    for sector in [100, 200] {
        assert_eq!(setup.stored(sector, 1536), vec![0; 1536]);
        assert_eq!(setup.stored(sector + 3, 512), vec![5; 512]);
    }
    assert_eq!(setup.request(11, 0, &range(0, 8, 1), 0).0, UNSUPP, "unmap is no discard flag");
    assert_eq!(setup.request(13, 0, &range(0, 8, 2), 0).0, UNSUPP);
    assert_eq!(setup.request(11, 0, &range(2040, 9, 0), 0).0, IOERR);
    assert_eq!(setup.request(11, 0, &range(u64::MAX, 1, 0), 0).0, IOERR);
    assert_eq!(setup.request(11, 0, &[0; 17], 0).0, IOERR);
    assert_eq!(setup.request(11, 0, &[], 0).0, IOERR);
    assert_eq!(setup.request(11, 0, &vec![0; 16 * 17], 0).0, IOERR, "more ranges than max_discard_seg");
}

#[test]
fn any_descriptor_layout_of_a_request_is_the_same_request() {
    let mut setup = setup(ALL, false, 1);
    let data: Vec<u8> = (0..1024).map(|index| (index % 249) as u8).collect();
    // The header in three pieces, the last of them with the first data byte; data across two memory regions.
    let head = setup.machine.allocate(4096);
    setup.machine.fill(head, &[header(1, 7).as_slice(), &data[..1]].concat());
    let border = REGION - 512;
    setup.machine.fill(border, &data[1..]);
    let status = setup.machine.allocate(1);
    let readable = [(head, 3), (head + 3, 5), (head + 8, 9), (border, 1000), (border + 1000, 23)];
    setup.queues[0].add(&setup.machine, &readable, &[(status, 1)]);
    assert_eq!(setup.queues[0].run(&mut setup.machine).1, 1);
    assert_eq!(setup.stored(7, 1024), data);

    // Reading back through an indirect table, the status byte at the end of the last data buffer, one buffer empty.
    setup.machine.fill(head, &header(0, 7));
    let back = REGION - 100;
    setup.machine.fill(back, &[0xee; 1025]);
    let writable = [(back, 1), (status, 0), (back + 1, 1024)];
    let Setup { machine, queues, .. } = &mut setup;
    queues[0].add_indirect(machine, &[(head, 16)], &writable);
    assert_eq!(queues[0].run(machine).1, 1025);
    assert_eq!(machine.bytes(back, 1024), data);
    assert_eq!(machine.bytes(back + 1024, 1), [OK]);
}

#[test]
fn a_batch_costs_one_notification_and_one_interrupt() {
    for features in [ALL, ALL & !EVENT_IDX] {
        let held = Held::new();
        let volume = held.clone();
        let mut machine = Machine::new(|builder| builder.add_volume("vol1", Arc::new(volume), 1).unwrap());
        let (_, mut queues) = Driver::start(&mut machine, 1, features, 128);
        let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(64));
        machine.fill(head, &header(0, 0));
        for _ in 0..3 {
            for index in 0..32 {
                queues[0].add(&machine, &[(head, 16)], &[(data, 512), (status + index, 1)]);
            }
            machine.msi.take();
            assert!(queues[0].kick(&machine));
            machine.turn();
            assert_eq!(held.waiting(), 32);
            held.release(32, true);
            machine.turn();
            for _ in 0..32 {
                assert!(queues[0].take_used(&machine).is_some());
            }
            assert_eq!(machine.msi.take(), [0x101]);
        }
    }
}

#[test]
fn who_asks_again_while_the_thread_looks_for_work_need_not_notify() {
    for features in [ALL, ALL & !EVENT_IDX] {
        let held = Held::new();
        let volume = held.clone();
        let mut machine = Machine::new(|builder| builder.add_volume("vol1", Arc::new(volume), 1).unwrap());
        let (_, mut queues) = Driver::start(&mut machine, 1, features, 32);
        let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(1));
        machine.fill(head, &header(0, 0));
        machine.io.be_patient(Duration::from_secs(60));
        let mut ask = |machine: &Machine| {
            queues[0].add(machine, &[(head, 16)], &[(data, 512), (status, 1)]);
            queues[0].kick(machine)
        };
        assert!(ask(&machine));
        machine.io.turn(0);
        assert_eq!(held.waiting(), 1);
        for asked in 2..6 {
            assert!(!ask(&machine), "a notification that nobody needs");
            let (reply, stats) = sync_channel(1);
            machine.io.command(Command::Stats { reply });
            machine.io.turn(60_000);
            assert_eq!(held.waiting(), asked);
            assert!(stats.try_recv().is_ok(), "a command waits until the driver pauses");
        }
        // Before it sleeps it sees what came since it last looked, and wants to be told of the next one.
        assert!(!ask(&machine));
        machine.turn();
        assert_eq!(held.waiting(), 6);
        assert!(ask(&machine));
    }
}

#[test]
fn interrupts_are_held_back_when_the_driver_says_so() {
    // EVENT_IDX: none before the used index passes used_event.
    let mut setup = setup(ALL, false, 1);
    setup.queues[0].set_used_event(&setup.machine, 2);
    setup.machine.msi.take();
    let head = setup.machine.allocate(16);
    let status = setup.machine.allocate(1);
    setup.machine.fill(head, &header(4, 0));
    for expected in [vec![], vec![], vec![0x101]] {
        setup.queues[0].add(&setup.machine, &[(head, 16)], &[(status, 1)]);
        setup.queues[0].kick(&setup.machine);
        let before = setup.machine.io.device_stats().disks[0].flush_ops;
        setup.machine.turn_until(|machine| machine.io.device_stats().disks[0].flush_ops > before);
        assert_eq!(setup.machine.msi.take(), expected);
    }
    // Without EVENT_IDX: the flag.
    let mut setup = self::setup(ALL & !EVENT_IDX, false, 1);
    setup.queues[0].set_no_interrupt(&setup.machine, true);
    setup.machine.msi.take();
    assert_eq!(setup.request(4, 0, &[], 0).0, OK);
    assert!(setup.machine.msi.take().is_empty());
    setup.queues[0].set_no_interrupt(&setup.machine, false);
    assert_eq!(setup.request(4, 0, &[], 0).0, OK);
    assert_eq!(setup.machine.msi.take(), [0x101]);
}

#[test]
fn queues_have_their_own_vectors_and_share_the_disk() {
    let mut setup = setup(ALL, false, 4);
    for index in 0..4usize {
        let machine = &mut setup.machine;
        let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(1));
        machine.fill(head, &header(1, index as u64));
        machine.fill(data, &[index as u8 + 1; 512]);
        machine.msi.take();
        setup.queues[index].add(machine, &[(head, 16), (data, 512)], &[(status, 1)]);
        setup.queues[index].run(machine);
        assert_eq!(machine.msi.take(), [0x101 + index as u32]);
    }
    for index in 0..4u8 {
        assert_eq!(setup.stored(u64::from(index), 512), vec![index + 1; 512]);
    }
}

#[test]
fn without_flush_every_write_is_durable_before_it_completes() {
    let held = Held::new();
    let volume = held.clone();
    let mut machine = Machine::new(|builder| builder.add_volume("vol1", Arc::new(volume), 1).unwrap());
    let (_, mut queues) = Driver::start(&mut machine, 1, ALL & !FLUSH_FEATURE, 16);
    let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(1));
    machine.fill(head, &header(1, 0));
    machine.fill(status, &[0xee]);
    queues[0].add(&machine, &[(head, 16), (data, 512)], &[(status, 1)]);
    queues[0].kick(&machine);
    machine.turn();
    assert_eq!(held.seen(), [Operation::Write]);
    held.release(1, true);
    machine.turn();
    assert_eq!(held.seen(), [Operation::Write, Operation::Flush]);
    assert_eq!(queues[0].take_used(&machine), None);
    held.release(1, true);
    machine.turn();
    assert_eq!(queues[0].take_used(&machine), Some((queues_head(), 1)));
    assert_eq!(machine.bytes(status, 1), [OK]);
}

/// The first descriptor the driver hands out.
fn queues_head() -> u16 {
    0
}

#[test]
fn a_failing_disk_fails_the_request_and_no_more() {
    let held = Held::new();
    let volume = held.clone();
    let mut machine = Machine::new(|builder| builder.add_volume("vol1", Arc::new(volume), 1).unwrap());
    let (driver, mut queues) = Driver::start(&mut machine, 1, ALL, 16);
    let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(2));
    machine.fill(head, &header(0, 0));
    for (index, ok) in [(0, false), (1, true)] {
        queues[0].add(&machine, &[(head, 16)], &[(data, 512), (status + index, 1)]);
        queues[0].kick(&machine);
        machine.turn();
        held.release(1, ok);
        machine.turn();
        assert!(queues[0].take_used(&machine).is_some());
    }
    assert_eq!(machine.bytes(status, 2), [IOERR, OK]);
    assert_eq!(driver.status(&machine) & NEEDS_RESET, 0);
    let stats = stats(&mut machine);
    assert_eq!((stats.errors, stats.read_ops), (1, 1));
}

#[test]
fn only_so_many_requests_reach_the_volume_at_once() {
    let held = Held::new();
    let volume = held.clone();
    let mut machine = Machine::new(|builder| builder.add_volume("vol1", Arc::new(volume), 2).unwrap());
    let (_, mut queues) = Driver::start(&mut machine, 1, ALL, 256);
    let (head, status) = (machine.allocate(16), machine.allocate(1));
    machine.fill(head, &header(4, 0));
    for queue in &mut queues {
        for _ in 0..100 {
            queue.add(&machine, &[(head, 16)], &[(status, 1)]);
        }
        queue.kick(&machine);
    }
    let mut done = 0;
    machine.turn_until(|machine| {
        assert!(held.waiting() <= 64);
        held.release(7, true);
        for queue in &mut queues {
            while queue.take_used(machine).is_some() {
                done += 1;
            }
        }
        done == 200
    });
}
