//! Resets at awkward moments, pause and resume, the I/O thread's end.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use hearth_block::Operation;

use super::block_test::header;
use super::driver::*;
use super::machine::*;
use super::volumes::Held;
use crate::virtio::io_thread::Command;

struct Setup {
    held: Held,
    machine: Machine,
    driver: Driver,
    queues: Vec<DriverQueue>,
    head: u64,
    data: u64,
    status: u64,
}

fn setup(queues: u16) -> Setup {
    let held = Held::new();
    let volume = held.clone();
    let mut machine = Machine::new(|builder| builder.add_volume("vol1", Arc::new(volume), queues).unwrap());
    let (driver, queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(64));
    machine.fill(head, &header(0, 0));
    machine.fill(status, &[0xee; 64]);
    Setup { held, machine, driver, queues, head, data, status }
}

impl Setup {
    fn add_read(&mut self, queue: usize) {
        let buffers = [(self.data, 512), (self.status, 1)];
        self.queues[queue].add(&self.machine, &[(self.head, 16)], &buffers);
        self.queues[queue].kick(&self.machine);
        self.machine.turn();
    }
}

#[test]
fn a_reset_waits_for_requests_in_flight_and_touches_the_rings_no_more() {
    let mut setup = setup(1);
    setup.add_read(0);
    assert_eq!(setup.held.waiting(), 1);
    setup.driver.set_status(&setup.machine, 0);
    setup.machine.turn();
    assert_ne!(setup.driver.status(&setup.machine), 0, "the disk may still write to guest memory");
    // The device listens to nothing meanwhile.
    setup.driver.set_status(&setup.machine, ACKNOWLEDGE);
    setup.driver.set_status(&setup.machine, 0);
    let ring = setup.machine.bytes(setup.queues[0].used, 64);
    setup.held.release(1, true);
    setup.machine.turn();
    assert_eq!(setup.driver.status(&setup.machine), 0);
    assert_eq!(setup.machine.bytes(setup.queues[0].used, 64), ring);
    assert_eq!(setup.machine.bytes(setup.status, 1), [0xee]);
    // And it starts again.
    setup.queues = setup.driver.restart(&mut setup.machine, u64::MAX, 16);
    setup.add_read(0);
    setup.held.release(1, true);
    setup.machine.turn();
    assert!(setup.queues[0].take_used(&setup.machine).is_some());
    assert_eq!(setup.machine.bytes(setup.status, 1), [0]);
}

#[test]
fn a_reset_before_the_driver_was_ready_is_immediate() {
    let held = Held::new();
    let machine = Machine::new(|builder| builder.add_volume("vol1", Arc::new(held), 1).unwrap());
    let mut driver = Driver::probe(&machine, 1);
    assert!(driver.negotiate(&machine, u64::MAX));
    driver.set_status(&machine, 0);
    assert_eq!(driver.status(&machine), 0);
}

#[test]
fn one_queue_is_reset_while_another_goes_on() {
    let mut setup = setup(2);
    setup.add_read(0);
    setup.add_read(1);
    let common = setup.driver.common;
    setup.driver.select_queue(&setup.machine, 0);
    setup.machine.write(common + 0x3a, &1u16.to_le_bytes());
    setup.machine.turn();
    assert_eq!(setup.machine.read64(common + 0x3a, 2), 1, "its request is in flight");
    assert_eq!(setup.machine.read64(common + 0x1c, 2), 0);
    setup.machine.write(common + 0x1c, &1u16.to_le_bytes());
    assert_eq!(setup.machine.read64(common + 0x1c, 2), 0, "not before the reset is done");
    setup.held.release(2, true);
    setup.machine.turn();
    assert_eq!(setup.machine.read64(common + 0x3a, 2), 0);
    assert!(setup.queues[1].take_used(&setup.machine).is_some());
    assert_eq!(setup.queues[0].take_used(&setup.machine), None);
    setup.queues[0] = setup.driver.enable_queue(&mut setup.machine, 0, 8);
    setup.machine.turn();
    for queue in [0, 1] {
        setup.add_read(queue);
        setup.held.release(1, true);
        setup.machine.turn();
        assert!(setup.queues[queue].take_used(&setup.machine).is_some());
    }
}

#[test]
fn pause_waits_for_what_is_in_flight_and_takes_nothing_new() {
    let mut setup = setup(1);
    setup.add_read(0);
    let (done, paused) = sync_channel(1);
    setup.machine.io.command(Command::Pause { done });
    setup.machine.turn();
    assert!(paused.try_recv().is_err());
    setup.add_read(0);
    setup.held.release(1, true);
    setup.machine.turn();
    paused.try_recv().unwrap();
    assert_eq!(setup.held.waiting(), 0, "the second read was not taken");
    assert!(setup.queues[0].take_used(&setup.machine).is_some());
    let (done, resumed) = sync_channel(1);
    setup.machine.io.command(Command::Resume { done });
    setup.machine.turn();
    resumed.try_recv().unwrap();
    assert_eq!(setup.held.waiting(), 1);
}

#[test]
fn the_io_thread_runs_pauses_and_ends_with_durable_disks() {
    let held = Held::new();
    let volume = held.clone();
    let parts = parts(|builder| builder.add_volume("vol1", Arc::new(volume), 1).unwrap());
    let (started, hook) = sync_channel(1);
    let io = parts
        .set
        .start(move || {
            started.send(std::thread::current().name().map(str::to_owned)).unwrap();
            Ok(())
        })
        .unwrap();
    assert_eq!(hook.recv().unwrap().as_deref(), Some("io"));
    io.pause().unwrap();
    io.resume().unwrap();
    assert_eq!(io.stats().unwrap().disks.len(), 1);
    assert_eq!(held.seen(), Vec::<Operation>::new());
    assert!(!io.ended());
    io.stop().unwrap();
    assert_eq!(held.syncs(), 1);
}

#[test]
fn a_thread_that_cannot_start_is_reported() {
    let parts = parts(|_| {});
    let io = parts.set.start(|| Err(std::io::Error::other("no seccomp"))).unwrap();
    assert!(io.pause().unwrap_err().to_string().contains("I/O thread"));
    assert!(io.ended());
    assert!(io.stop().unwrap_err().to_string().contains("no seccomp"));
}

#[test]
fn rings_outside_memory_break_the_device_and_a_reset_mends_it() {
    let mut setup = setup(1);
    setup.driver.reset(&mut setup.machine);
    assert!(setup.driver.negotiate(&setup.machine, u64::MAX));
    let common = setup.driver.common;
    setup.driver.select_queue(&setup.machine, 0);
    for register in [0x20, 0x28, 0x30] {
        setup.machine.write(common + register, &(MEMORY - 16).to_le_bytes());
    }
    setup.machine.write(common + 0x1c, &1u16.to_le_bytes());
    setup.machine.msi.take();
    setup.driver.ready(&mut setup.machine);
    assert_ne!(setup.driver.status(&setup.machine) & NEEDS_RESET, 0);
    assert_eq!(setup.machine.msi.take(), [0x100], "a configuration interrupt");
    setup.driver.reset(&mut setup.machine);
    setup.queues = setup.driver.restart(&mut setup.machine, u64::MAX, 16);
    setup.add_read(0);
    assert_eq!(setup.held.waiting(), 1);
}

#[test]
fn a_broken_ring_breaks_only_its_device() {
    let (first, second) = (Held::new(), Held::new());
    let (one, two) = (first.clone(), second.clone());
    let mut machine = Machine::new(|builder| {
        builder.add_volume("vol1", Arc::new(one), 1).unwrap();
        builder.add_volume("vol2", Arc::new(two), 1).unwrap();
    });
    let (broken, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let (healthy, mut others) = Driver::start(&mut machine, 2, u64::MAX, 16);
    let (head, data, status) = (machine.allocate(16), machine.allocate(512), machine.allocate(1));
    machine.fill(head, &header(0, 0));
    queues[0].add(&machine, &[(head, 16)], &[(data, 512), (MEMORY + 5, 1)]);
    queues[0].kick(&machine);
    others[0].add(&machine, &[(head, 16)], &[(data, 512), (status, 1)]);
    others[0].kick(&machine);
    machine.turn();
    assert_ne!(broken.status(&machine) & NEEDS_RESET, 0);
    assert_eq!(first.waiting(), 0);
    second.release(1, true);
    machine.turn();
    assert!(others[0].take_used(&machine).is_some());
    assert_eq!(healthy.status(&machine) & NEEDS_RESET, 0);
}

#[test]
fn requests_taken_just_before_a_queue_breaks_are_still_finished() {
    let file = super::block_test::disk_file(64);
    let disk = crate::virtio::Disk {
        serial: "vol1".into(),
        backing: crate::virtio::Backing::Raw(file),
        read_only: false,
        queues: 2,
    };
    let mut machine = Machine::new(|builder| builder.add_disk(disk).unwrap());
    let (driver, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let (head, status) = (machine.allocate(16), machine.allocate(1));
    machine.fill(head, &header(4, 0));
    queues[0].add(&machine, &[(head, 16)], &[(status, 1)]);
    queues[1].add(&machine, &[(head, 16)], &[(MEMORY, 1)]);
    queues[0].kick(&machine);
    queues[1].kick(&machine);
    machine.turn();
    assert_ne!(driver.status(&machine) & NEEDS_RESET, 0);
    driver.reset(&mut machine);
}

#[test]
fn a_function_that_is_no_bus_master_leaves_memory_alone() {
    let mut setup = setup(1);
    setup.machine.config_write(1, 4, &[0x02, 0x04]);
    setup.add_read(0);
    assert_eq!(setup.held.waiting(), 0);
    setup.machine.config_write(1, 4, &[0x06, 0x04]);
    setup.machine.turn();
    assert_eq!(setup.held.waiting(), 1);
}
