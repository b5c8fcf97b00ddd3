use super::driver::*;
use super::machine::*;

fn machine() -> Machine {
    Machine::new(|builder| builder.add_balloon().unwrap())
}

#[test]
fn reported_pages_go_back_to_the_host_and_no_others() {
    // The reporting queue is number 4 by the specification, number 2 for many drivers.
    for index in [2, 4] {
        let mut machine = machine();
        let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 32);
        assert_eq!(machine.config_read32(1, 0), 0x1045_1af4);
        let pages = machine.allocate(64 * 4096);
        machine.fill(pages, &[7; 64 * 4096]);
        let border = REGION - 4096;
        machine.fill(border, &[7; 8192]);
        // Whole pages, a range over the regions' border, and one that covers no whole page but a part of two.
        let reported = [(pages, 8 * 4096), (border, 8192), (pages + 0xa800, 4096), (pages + 0x10100, 0x2000)];
        queues[index].add(&machine, &[], &reported);
        queues[index].run(&mut machine);
        assert_eq!(machine.bytes(pages, 8 * 4096), vec![0; 8 * 4096]);
        assert_eq!(machine.bytes(border, 8192), vec![0; 8192]);
        assert_eq!(machine.bytes(pages + 0xa000, 8192), vec![7; 8192]);
        assert_eq!(machine.bytes(pages + 0x10000, 4096), vec![7; 4096]);
        assert_eq!(machine.bytes(pages + 0x11000, 4096), vec![0; 4096]);
        assert_eq!(machine.bytes(pages + 0x12000, 4096), vec![7; 4096]);
    }
}

#[test]
fn inflated_pages_go_back_and_nonsense_does_no_harm() {
    let mut machine = machine();
    let (driver, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 32);
    let pages = machine.allocate(2 * 4096);
    machine.fill(pages, &[7; 2 * 4096]);
    let list = machine.allocate(4096);
    let pfns = [(pages / 4096) as u32, u32::MAX, (MEMORY / 4096) as u32];
    machine.fill(list, &pfns.map(u32::to_le_bytes).concat());
    queues[0].add(&machine, &[(list, 12)], &[]);
    queues[0].run(&mut machine);
    assert_eq!(machine.bytes(pages, 4096), vec![0; 4096]);
    assert_eq!(machine.bytes(pages + 4096, 4096), vec![7; 4096]);
    queues[1].add(&machine, &[(list, 12)], &[]);
    queues[1].run(&mut machine);
    assert_eq!(driver.status(&machine) & NEEDS_RESET, 0);
}
