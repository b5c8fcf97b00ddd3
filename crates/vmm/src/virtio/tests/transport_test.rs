use super::block_test::disk_file;
use super::driver::*;
use super::machine::*;
use crate::virtio::device_set::Builder;
use crate::virtio::{Backing, DeviceList, DeviceSet, Disk, Nic, VirtioError};

fn two_disks() -> Machine {
    Machine::new(|builder| {
        for serial in ["vol-a", "vol-b"] {
            let disk =
                Disk { serial: serial.into(), backing: Backing::Raw(disk_file(64)), read_only: false, queues: 2 };
            builder.add_disk(disk).unwrap();
        }
    })
}

#[test]
fn features_are_negotiated_as_the_specification_says() {
    let machine = two_disks();
    let mut driver = Driver::probe(&machine, 1);
    let offered = driver.offered(&machine);
    for bit in [VERSION_1, EVENT_IDX, INDIRECT, RING_RESET] {
        assert_ne!(offered & bit, 0);
    }
    machine.write(driver.common, &7u32.to_le_bytes());
    assert_eq!(machine.read64(driver.common + 4, 4), 0, "no features above 64");

    assert!(!driver.negotiate(&machine, !VERSION_1), "a legacy driver");
    driver.set_status(&machine, 0);
    assert_eq!(driver.status(&machine), 0);

    // An unoffered bit.
    driver.set_status(&machine, ACKNOWLEDGE | DRIVER);
    machine.write(driver.common + 8, &1u32.to_le_bytes());
    machine.write(driver.common + 12, &(1u32 | 1 << 30).to_le_bytes());
    driver.set_status(&machine, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(driver.status(&machine), ACKNOWLEDGE | DRIVER);
    driver.set_status(&machine, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(driver.status(&machine), ACKNOWLEDGE | DRIVER, "no DRIVER_OK before FEATURES_OK");

    driver.set_status(&machine, 0);
    assert!(driver.negotiate(&machine, VERSION_1 | EVENT_IDX));
    machine.write(driver.common + 12, &0u32.to_le_bytes());
    assert_eq!(machine.read64(driver.common + 12, 4), 1, "accepted features are final");
    driver.set_status(&machine, ACKNOWLEDGE);
    assert_eq!(driver.status(&machine), ACKNOWLEDGE | DRIVER | FEATURES_OK, "bits go only by a reset");
}

#[test]
fn queue_registers_hold_what_is_legal() {
    let mut machine = two_disks();
    let mut driver = Driver::probe(&machine, 1);
    assert!(driver.negotiate(&machine, u64::MAX));
    driver.select_queue(&machine, 2);
    assert_eq!(machine.read64(driver.common + 0x18, 2), 0, "no third queue");
    driver.select_queue(&machine, 1);
    assert_eq!(machine.read64(driver.common + 0x18, 2), 256);
    for bad in [0u16, 3, 512, 0xffff] {
        machine.write(driver.common + 0x18, &bad.to_le_bytes());
        assert_eq!(machine.read64(driver.common + 0x18, 2), 256);
    }
    machine.write(driver.common + 0x1a, &9u16.to_le_bytes());
    assert_eq!(machine.read64(driver.common + 0x1a, 2), 0xffff, "no such vector");
    machine.write(driver.common + 0x20, &0x1234_5678_9abc_def0u64.to_le_bytes());
    assert_eq!(machine.read64(driver.common + 0x20, 8), 0x1234_5678_9abc_def0);
    let queue = driver.enable_queue(&mut machine, 1, 64);
    machine.write(driver.common + 0x20, &0u64.to_le_bytes());
    assert_eq!(machine.read64(driver.common + 0x20, 8), queue.descriptors, "an enabled queue stands still");
    assert_eq!(machine.read64(driver.common + 0x1c, 2), 1);
}

#[test]
fn ioeventfds_follow_the_bar() {
    let mut machine = two_disks();
    assert!(machine.ioevents.addresses().is_empty());
    let (driver, mut queues) = Driver::start(&mut machine, 2, u64::MAX, 16);
    assert_eq!(machine.ioevents.addresses(), [driver.notify, driver.notify + 4]);
    // Move the BAR with decoding on; a request through the new doorbell works.
    let offset = driver.notify - driver.bar;
    machine.config_write(2, 0x10, &0xd000_0000u32.to_le_bytes());
    machine.config_write(2, 0x14, &0u32.to_le_bytes());
    assert_eq!(machine.ioevents.addresses(), [0xd000_0000 + offset, 0xd000_0004 + offset]);
    let (head, status) = (machine.allocate(16), machine.allocate(1));
    machine.fill(head, &super::block_test::header(4, 0));
    queues[0].doorbell = 0xd000_0000 + offset;
    queues[0].add(&machine, &[(head, 16)], &[(status, 1)]);
    assert_eq!(queues[0].run(&mut machine).1, 1);
    machine.config_write(2, 4, &[0]);
    assert!(machine.ioevents.addresses().is_empty());
}

#[test]
fn two_devices_on_one_address_do_no_harm() {
    let mut machine = two_disks();
    let (first, _) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let (_second, _) = Driver::start(&mut machine, 2, u64::MAX, 16);
    machine.config_write(2, 0x10, &(first.bar as u32).to_le_bytes());
    machine.config_write(2, 0x14, &((first.bar >> 32) as u32).to_le_bytes());
    assert_eq!(machine.ioevents.addresses().len(), 2);
    machine.config_write(1, 4, &[0]);
    machine.config_write(2, 4, &[0]);
    assert!(machine.ioevents.addresses().is_empty());
}

#[test]
fn notifications_work_without_ioeventfds() {
    let mut machine = two_disks();
    let (_, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let (head, status) = (machine.allocate(16), machine.allocate(1));
    machine.fill(head, &super::block_test::header(4, 0));
    queues[1].add(&machine, &[(head, 16)], &[(status, 1)]);
    let doorbell = queues[1].doorbell;
    let (range, window) = machine.mmio.iter().find(|(range, _)| range.contains(&doorbell)).unwrap();
    window.write(doorbell - range.start, &1u16.to_le_bytes());
    machine.turn_until(|machine| queues[1].take_used(machine).is_some());
}

#[test]
fn the_configuration_window_reaches_every_register() {
    let mut machine = two_disks();
    let mut driver = Driver::probe(&machine, 1);
    let window = driver.pci_window;
    let select = |offset: u64, length: u32| {
        machine.config_write(1, window + 4, &[0]);
        machine.config_write(1, window + 8, &(offset as u32).to_le_bytes());
        machine.config_write(1, window + 12, &length.to_le_bytes());
    };
    select(driver.common - driver.bar + 0x12, 2);
    assert_eq!(machine.config_read32(1, window + 16), 2, "num_queues");
    select(driver.common - driver.bar + 0x14, 1);
    machine.config_write(1, window + 16, &[ACKNOWLEDGE]);
    assert_eq!(driver.status(&machine), ACKNOWLEDGE);
    for (offset, length) in [(0x14, 3), (0x15, 2), (0x8000, 4), (u64::from(u32::MAX), 4)] {
        select(offset, length);
        machine.config_write(1, window + 16, &[0]);
        assert_eq!(driver.status(&machine), ACKNOWLEDGE);
    }
    driver.set_status(&machine, 0);
    assert!(driver.negotiate(&machine, u64::MAX));
    let _ = driver.enable_queue(&mut machine, 0, 16);
}

#[test]
fn without_msix_the_isr_register_tells() {
    let mut machine = two_disks();
    let (driver, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    machine.config_write(1, driver.msix_control, &[0, 0]);
    machine.msi.take();
    let (head, status) = (machine.allocate(16), machine.allocate(1));
    machine.fill(head, &super::block_test::header(4, 0));
    queues[0].add(&machine, &[(head, 16)], &[(status, 1)]);
    queues[0].run(&mut machine);
    assert!(machine.msi.take().is_empty());
    assert_eq!(machine.read64(driver.isr, 1), 1);
    assert_eq!(machine.read64(driver.isr, 1), 0, "reading clears");
}

#[test]
fn masked_vectors_pend_until_unmasked() {
    let mut machine = two_disks();
    let (driver, mut queues) = Driver::start(&mut machine, 1, u64::MAX, 16);
    let control = driver.msix_table + 16 + 12;
    machine.write(control, &1u32.to_le_bytes());
    machine.msi.take();
    let (head, status) = (machine.allocate(16), machine.allocate(1));
    machine.fill(head, &super::block_test::header(4, 0));
    queues[0].add(&machine, &[(head, 16)], &[(status, 1)]);
    queues[0].run(&mut machine);
    assert!(machine.msi.take().is_empty());
    assert_eq!(machine.read64(driver.bar + 0x3800, 8), 2, "pending bit of vector 1");
    machine.write(control, &0u32.to_le_bytes());
    assert_eq!(machine.msi.take(), [0x101]);
    // The function mask works alike.
    machine.config_write(1, driver.msix_control, &0xc000u16.to_le_bytes());
    queues[0].add(&machine, &[(head, 16)], &[(status, 1)]);
    queues[0].run(&mut machine);
    assert!(machine.msi.take().is_empty());
    machine.config_write(1, driver.msix_control, &0x8000u16.to_le_bytes());
    assert_eq!(machine.msi.take(), [0x101]);
}

#[test]
fn impossible_specs_are_refused_with_reasons() {
    let build = |disk: Disk| {
        let mut error = None;
        parts(|builder| error = builder.add_disk(disk).err());
        error.expect("an error")
    };
    let disk = || Disk { serial: "vol1".into(), backing: Backing::Raw(disk_file(8)), read_only: false, queues: 1 };
    assert!(matches!(build(Disk { serial: "x".repeat(21), ..disk() }), VirtioError::BadSerial(_)));
    assert!(matches!(build(Disk { queues: 17, ..disk() }), VirtioError::BadQueueCount { queues: 17, .. }));
    assert!(matches!(build(Disk { queues: 0, ..disk() }), VirtioError::BadQueueCount { queues: 0, .. }));
    let directory = std::fs::File::open("/").unwrap();
    assert!(matches!(build(Disk { backing: Backing::Raw(directory), ..disk() }), VirtioError::Volume { .. }));

    let twice = |builder: &mut Builder| builder.add_disk(disk()).and_then(|()| builder.add_disk(disk())).err();
    let mut error = None;
    parts(|builder| error = twice(builder));
    assert!(matches!(error, Some(VirtioError::SerialTaken(_))));

    let mut results = Vec::new();
    let Parts { .. } = parts(|builder| {
        for number in 0..32 {
            results.push(builder.add_disk(Disk { serial: format!("vol{number}"), ..disk() }).is_ok());
        }
    });
    assert_eq!(results.iter().filter(|ok| **ok).count(), 31, "slot 0 is the host bridge");

    let list =
        DeviceList { nics: vec![Nic { mac: [0; 6], mtu: 1500, tap: disk_file(1).into() }], ..DeviceList::default() };
    let error = DeviceSet::build(list, platform()).err();
    assert!(matches!(error, Some(VirtioError::Tap { what: "TUNSETVNETHDRSZ", .. })), "a file is no tap");
}
