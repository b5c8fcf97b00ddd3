use std::fs::File;

use super::driver::*;
use super::machine::*;

fn machine(source: &str) -> Machine {
    let file = File::open(source).unwrap();
    Machine::new(|builder| builder.add_rng(file).unwrap())
}

#[test]
fn fills_scattered_buffers() {
    let mut machine = machine("/dev/urandom");
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let buffer = machine.allocate(8192);
    let border = REGION - 64;
    queues[0].add(&machine, &[], &[(buffer, 100), (buffer + 4096, 1), (border, 128)]);
    let (_, length) = queues[0].run(&mut machine);
    assert_eq!(length, 229);
    assert_ne!(machine.bytes(buffer, 100), vec![0; 100]);
    assert_eq!(machine.bytes(buffer + 100, 100), vec![0; 100]);
    assert_ne!(machine.bytes(border + 64, 64), vec![0; 64], "beyond the memory region's border");
    assert_eq!(machine.msi.take().last(), Some(&0x101));
}

#[test]
fn a_request_gets_at_most_64_kib() {
    let mut machine = machine("/dev/urandom");
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 64);
    let buffer = machine.allocate(MIB);
    // The same megabyte sixteen times over.
    queues[0].add(&machine, &[], &[(buffer, MIB as u32); 16]);
    assert_eq!(queues[0].run(&mut machine).1, 65536);
    assert_eq!(machine.bytes(buffer + 65536, 4096), vec![0; 4096]);
}

#[test]
fn a_dry_source_gives_nothing_and_the_queue_lives() {
    let mut machine = machine("/dev/null");
    let (driver, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let buffer = machine.allocate(64);
    for _ in 0..3 {
        queues[0].add(&machine, &[], &[(buffer, 64)]);
        assert_eq!(queues[0].run(&mut machine).1, 0);
    }
    assert_eq!(driver.status(&machine) & NEEDS_RESET, 0);
}
