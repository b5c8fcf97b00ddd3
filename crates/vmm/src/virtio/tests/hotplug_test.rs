//! Disks that come and go: politely, by force, in storms, and with guests that do as they like.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hearth_block::Operation;
use proptest::prelude::*;

use super::block_test::{disk_file, header};
use super::driver::*;
use super::machine::*;
use super::volumes::Held;
use crate::acpi::hotplug::{EJECT, INSERTED, REMOVALS};
use crate::events::MachineEvent;
use crate::pci::PciError;
use crate::pci::fuzzing::fuzz;
use crate::virtio::{Backing, Disk, DiskNews, DiskNotice, VirtioError};

const OK: u8 = 0;
const IOERR: u8 = 1;

impl Machine {
    fn register(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.hotplug.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn eject(&self, slots: u32) {
        self.hotplug.write(EJECT, &slots.to_le_bytes());
    }

    fn present(&self, slot: usize) -> bool {
        self.config_read32(slot, 0) != u32::MAX
    }

    fn attach_held(&self, serial: &str) -> Held {
        let held = Held::new();
        self.thread().attach_volume(serial, Arc::new(held.clone()), 1).unwrap();
        held
    }

    /// What the control thread would do with waiting events.
    fn take_detached(&self) -> Vec<DiskNotice> {
        let note = |event| match event {
            MachineEvent::Disk(event) => self.thread().note(event),
            other => panic!("{other:?}"),
        };
        self.events.take().into_iter().filter_map(note).collect()
    }

    fn wait_detached(&mut self) -> DiskNotice {
        let mut detached = Vec::new();
        self.turn_until(|machine| {
            detached.extend(machine.take_detached());
            !detached.is_empty()
        });
        assert_eq!(detached.len(), 1, "{detached:?}");
        detached.remove(0)
    }
}

fn detached(serial: &str, durable: bool) -> DiskNotice {
    DiskNotice { serial: serial.into(), news: DiskNews::Detached { durable } }
}

struct Request {
    status: u64,
}

impl Request {
    /// Puts a request of one sector into the queue.
    fn new(machine: &mut Machine, queue: &mut DriverQueue, kind: u32) -> Self {
        let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(1));
        machine.fill(head, &header(kind, 0));
        machine.fill(status, &[0xee]);
        let (readable, writable) = match kind {
            0 => (vec![(head, 16)], vec![(data, 512), (status, 1)]),
            8 => (vec![(head, 16)], vec![(data, 20), (status, 1)]),
            4 => (vec![(head, 16)], vec![(status, 1)]),
            _ => (vec![(head, 16), (data, 512)], vec![(status, 1)]),
        };
        queue.add(machine, &readable, &writable);
        queue.kick(machine);
        Self { status }
    }

    fn finish(&self, machine: &mut Machine, queue: &mut DriverQueue) -> u8 {
        let status = self.status;
        machine.turn_until(|machine| queue.take_used(machine).is_some());
        machine.bytes(status, 1)[0]
    }
}

fn file_disk(serial: &str, sectors: u64) -> (std::fs::File, Disk) {
    let file = disk_file(sectors);
    (
        file.try_clone().unwrap(),
        Disk { serial: serial.into(), backing: Backing::Raw(file), read_only: false, queues: 2 },
    )
}

#[test]
fn an_attached_disk_is_told_and_works() {
    let mut machine = Machine::threaded(|builder| builder.add_disk(file_disk("vol-root", 64).1).unwrap());
    assert_eq!((machine.register(INSERTED), machine.pulses.take()), (0, 0), "what was there at the start is no news");
    assert!(!machine.present(2));
    let (file, disk) = file_disk("vol-a", 64);
    machine.thread().attach_disk(disk).unwrap();
    assert_eq!((machine.register(INSERTED), machine.pulses.take()), (1 << 2, 1));
    let (_, mut queues) = Driver::start(&mut machine, 2, u64::MAX, 16);
    assert_eq!(machine.ioevents.addresses().len(), 2);
    let write = Request::new(&mut machine, &mut queues[1], 1);
    assert_eq!(write.finish(&mut machine, &mut queues[1]), OK);
    assert_eq!(file.metadata().unwrap().len(), 64 * 512);
    let stats = machine.io.device_stats().disks;
    assert_eq!((stats[0].serial.as_str(), stats[0].write_ops), ("vol-root", 0));
    assert_eq!((stats[1].serial.as_str(), stats[1].write_ops), ("vol-a", 1));
    let again = machine.thread().attach_disk(file_disk("vol-a", 64).1);
    assert!(matches!(again, Err(VirtioError::SerialTaken(_))), "{again:?}");
    assert!(matches!(machine.thread().detach_disk("vol-b", true), Err(VirtioError::NoSuchDisk(_))));
}

#[test]
fn a_disk_asked_back_works_until_the_guest_ejects_it_and_is_flushed_after_that() {
    let mut machine = Machine::threaded(|_| {});
    let held = machine.attach_held("vol-a");
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    machine.register(INSERTED);
    machine.eject(2);
    assert!(machine.present(1), "an eject nobody asked for");
    machine.thread().detach_disk("vol-a", false).unwrap();
    assert_eq!(machine.register(REMOVALS), 2);
    let read = Request::new(&mut machine, &mut queues[0], 0);
    machine.turn_until(|_| held.waiting() == 1);
    held.release(1, true);
    assert_eq!(read.finish(&mut machine, &mut queues[0]), OK, "until then it works");
    machine.thread().detach_disk("vol-a", false).unwrap();
    assert_eq!(machine.register(REMOVALS), 2, "asked again");

    // Ejected with a request in flight.
    Request::new(&mut machine, &mut queues[0], 1);
    machine.turn_until(|_| held.waiting() == 1);
    let ring = machine.bytes(queues[0].used, 64);
    machine.eject(2);
    assert!(!machine.present(1));
    assert_eq!(machine.ioevents.addresses(), Vec::<u64>::new());
    machine.thread().detach_disk("vol-a", false).unwrap();
    assert_eq!(machine.register(REMOVALS), 0, "the guest has done its part");
    let again = machine.thread().attach_volume("vol-a", Arc::new(Held::new()), 1);
    assert!(matches!(again, Err(VirtioError::SerialTaken(_))), "not over yet: {again:?}");
    assert_eq!(machine.take_detached(), []);
    held.release(1, true);
    machine.turn_until(|_| held.waiting() == 1);
    assert_eq!(held.seen(), [Operation::Read, Operation::Write, Operation::Flush]);
    held.release(1, true);
    assert_eq!(machine.wait_detached(), detached("vol-a", true));
    assert_eq!(machine.bytes(queues[0].used, 64), ring, "the rings of a function that has gone are not touched");
    machine.turn_until(|_| held.handles() == 1);
    assert!(machine.io.device_stats().disks.is_empty());

    // The slot and the name are free again.
    machine.attach_held("vol-a");
    assert!(machine.present(1));
    machine.eject(2);
    assert!(machine.present(1), "the new disk was not asked back");
}

#[test]
fn a_forced_detachment_takes_the_volume_and_leaves_a_dead_disk_for_the_guest_to_let_go() {
    let mut machine = Machine::threaded(|_| {});
    let held = machine.attach_held("vol-a");
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let write = Request::new(&mut machine, &mut queues[0], 1);
    machine.turn_until(|_| held.waiting() == 1);
    machine.thread().detach_disk("vol-a", true).unwrap();
    assert_eq!(machine.register(REMOVALS), 2);
    let late = Request::new(&mut machine, &mut queues[0], 1);
    assert_eq!(late.finish(&mut machine, &mut queues[0]), IOERR);
    assert_eq!(machine.take_detached(), [], "what is in flight finishes first");
    held.release(1, true);
    assert_eq!(write.finish(&mut machine, &mut queues[0]), OK);
    machine.turn_until(|_| held.waiting() == 1);
    assert_eq!(held.seen(), [Operation::Write, Operation::Flush]);
    held.release(1, true);
    assert_eq!(machine.wait_detached(), detached("vol-a", true));
    machine.turn_until(|_| held.handles() == 1);

    // The guest still talks to it, and may even start it again.
    for (kind, expected) in [(0, IOERR), (1, IOERR), (4, IOERR), (8, OK)] {
        let request = Request::new(&mut machine, &mut queues[0], kind);
        assert_eq!(request.finish(&mut machine, &mut queues[0]), expected, "request {kind}");
    }
    let mut driver = Driver::probe(&machine, 1);
    driver.reset(&mut machine);
    let mut queues = driver.restart(&mut machine, u64::MAX, 16);
    let request = Request::new(&mut machine, &mut queues[0], 0);
    assert_eq!(request.finish(&mut machine, &mut queues[0]), IOERR);

    // Its name is free, its slot is not.
    assert!(matches!(machine.thread().detach_disk("vol-a", true), Err(VirtioError::NoSuchDisk(_))));
    let second = machine.attach_held("vol-a");
    assert!(machine.present(2));
    machine.eject(2);
    assert!(!machine.present(1));
    machine.turn();
    machine.turn_until(|machine| !machine.events.take().is_empty());
    assert_eq!(machine.take_detached(), []);
    assert!(second.handles() > 1);
}

#[test]
fn a_failed_last_flush_is_told() {
    let mut machine = Machine::threaded(|_| {});
    // One disk no driver ever touched, one in use.
    for (slot, force) in [(1, false), (2, true)] {
        let serial = format!("vol-{slot}");
        let held = machine.attach_held(&serial);
        if force {
            Driver::start(&mut machine, slot, u64::MAX, 16);
        }
        machine.thread().detach_disk(&serial, force).unwrap();
        if !force {
            machine.eject(1 << slot);
        }
        machine.turn_until(|_| held.waiting() == 1);
        held.release(1, false);
        assert_eq!(machine.wait_detached(), detached(&serial, false));
        if !force {
            machine.attach_held("vol-filler");
        }
    }
}

#[test]
fn a_broken_disk_leaves_as_well() {
    let mut machine = Machine::threaded(|_| {});
    let held = machine.attach_held("vol-a");
    let (driver, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    // A chain without room for a status byte.
    queues[0].add(&machine, &[(0x1000, 16)], &[]);
    queues[0].kick(&machine);
    machine.turn_until(|machine| driver.status(machine) & NEEDS_RESET != 0);
    machine.thread().detach_disk("vol-a", true).unwrap();
    machine.turn_until(|_| held.waiting() == 1);
    held.release(1, true);
    assert_eq!(machine.wait_detached(), detached("vol-a", true));
    machine.eject(2);
    assert!(!machine.present(1));
}

#[test]
fn slots_run_out_with_a_clear_error_and_come_back() {
    let mut machine = Machine::threaded(|builder| builder.add_balloon().unwrap());
    for number in 0..30 {
        machine.thread().attach_disk(file_disk(&format!("vol-{number}"), 8).1).unwrap();
    }
    let full = machine.thread().attach_disk(file_disk("vol-more", 8).1);
    assert!(matches!(full, Err(VirtioError::Pci(PciError::BusFull))), "{full:?}");
    assert_eq!(machine.io.device_stats().disks.len(), 30);
    machine.thread().detach_disk("vol-7", false).unwrap();
    machine.eject(u32::MAX);
    assert_eq!(machine.wait_detached().serial, "vol-7");
    machine.thread().attach_disk(file_disk("vol-more", 8).1).unwrap();
}

#[test]
fn a_disk_grows_under_its_driver() {
    let mut machine = Machine::threaded(|_| {});
    let (file, disk) = file_disk("vol-a", 8);
    machine.thread().attach_disk(disk).unwrap();
    let (driver, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    machine.msi.take();
    let generation = machine.read64(driver.common + 0x15, 1);
    for bad in [7 * 512, 8 * 512 + 1] {
        let refused = machine.thread().resize_disk("vol-a", bad);
        assert!(matches!(refused, Err(VirtioError::Shrink { from: 4096, .. })), "{refused:?}");
    }
    machine.thread().resize_disk("vol-a", 64 * 512).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 64 * 512);
    assert_eq!(machine.read64(driver.device, 8), 64);
    assert_ne!(machine.read64(driver.common + 0x15, 1), generation);
    assert_eq!(machine.msi.take(), [0x100], "the configuration change interrupt");
    let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(1));
    machine.fill(head, &header(1, 63));
    machine.fill(data, &[0x5a; 512]);
    queues[0].add(&machine, &[(head, 16), (data, 512)], &[(status, 1)]);
    queues[0].run(&mut machine);
    assert_eq!(machine.bytes(status, 1), [OK]);
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 63 * 512).unwrap();
    assert_eq!(sector, [0x5a; 512]);
    // Someone else has made it larger already.
    file.set_len(80 * 512).unwrap();
    machine.thread().resize_disk("vol-a", 72 * 512).unwrap();
    assert_eq!((file.metadata().unwrap().len(), machine.read64(driver.device, 8)), (80 * 512, 72));
}

#[derive(Clone, Debug)]
enum Step {
    Attach(u8),
    Detach(u8, bool),
    Eject(u32),
    /// The guest starts, resets or uses what is in the slot.
    Start(usize),
    Reset(usize),
    Write(usize),
    Registers(u64, u32),
    Events,
}

/// Any order of attachments, detachments and guest actions: every detachment that could finish is told exactly once, a slot
/// holds what the host put there, and nothing is left of what has gone.
#[test]
fn storms_leave_nothing_behind() {
    let slot = 1usize..8;
    let step = prop_oneof![
        3 => (0u8..6).prop_map(Step::Attach),
        3 => (0u8..6, any::<bool>()).prop_map(|(n, force)| Step::Detach(n, force)),
        3 => prop_oneof![any::<u32>(), Just(u32::MAX)].prop_map(Step::Eject),
        2 => slot.clone().prop_map(Step::Start),
        1 => slot.clone().prop_map(Step::Reset),
        2 => slot.prop_map(Step::Write),
        1 => (0u64..16, any::<u32>()).prop_map(|(offset, word)| Step::Registers(offset & !3, word)),
        2 => Just(Step::Events),
    ];
    fuzz(48, &prop::collection::vec(step, 1..60), |steps| {
        let mut machine = Machine::threaded(|_| {});
        let mut attached: Vec<String> = Vec::new();
        let mut drivers: Vec<Option<(Driver, Vec<DriverQueue>)>> = (0..32).map(|_| None).collect();
        let (mut asked, mut told) = (0, 0);
        let name = |n: u8| format!("vol-{n}");
        for step in steps {
            for (slot, driver) in drivers.iter_mut().enumerate() {
                if !machine.present(slot) {
                    *driver = None;
                }
            }
            match step {
                Step::Attach(n) => match machine.thread().attach_disk(file_disk(&name(n), 16).1) {
                    Ok(()) => attached.push(name(n)),
                    Err(VirtioError::SerialTaken(_)) => prop_assert!(attached.contains(&name(n))),
                    Err(other) => prop_assert!(false, "{}", other),
                },
                Step::Detach(n, force) => match machine.thread().detach_disk(&name(n), force) {
                    Ok(()) => asked += 1,
                    Err(VirtioError::NoSuchDisk(_)) => prop_assert!(!attached.contains(&name(n))),
                    Err(other) => prop_assert!(false, "{}", other),
                },
                Step::Eject(slots) => machine.eject(slots),
                Step::Registers(offset, word) if offset != EJECT => {
                    machine.hotplug.write(offset, &word.to_le_bytes());
                    machine.register(offset);
                }
                Step::Registers(..) => {}
                Step::Start(slot) if machine.present(slot) && drivers[slot].is_none() => {
                    drivers[slot] = Some(Driver::start(&mut machine, slot, u64::MAX, 16));
                }
                Step::Reset(slot) => {
                    if let Some((driver, _)) = drivers[slot].take() {
                        driver.reset(&mut machine);
                    }
                }
                Step::Write(slot) => {
                    if let Some((_, queues)) = &mut drivers[slot] {
                        let write = Request::new(&mut machine, &mut queues[0], 1);
                        let status = write.finish(&mut machine, &mut queues[0]);
                        prop_assert!(status == OK || status == IOERR, "{}", status);
                    }
                }
                Step::Start(_) => {}
                Step::Events => {
                    for disk in machine.take_detached() {
                        prop_assert_eq!(disk.news, DiskNews::Detached { durable: true });
                        told += 1;
                        let at = attached.iter().position(|serial| *serial == disk.serial);
                        attached.remove(at.expect("told once per attachment"));
                    }
                }
            }
        }
        // Everything is asked back and let go.
        for serial in attached.clone() {
            machine.thread().detach_disk(&serial, false).unwrap();
            asked += 1;
        }
        machine.eject(u32::MAX);
        machine.turn_until(|machine| {
            for disk in machine.take_detached() {
                told += 1;
                let at = attached.iter().position(|serial| *serial == disk.serial);
                attached.remove(at.expect("told once per attachment"));
            }
            attached.is_empty()
        });
        prop_assert!(told <= asked);
        for slot in 1..32 {
            prop_assert!(!machine.present(slot), "slot {}", slot);
        }
        prop_assert!(machine.ioevents.addresses().is_empty());
        prop_assert!(machine.io.device_stats().disks.is_empty());
        Ok(())
    });
}
