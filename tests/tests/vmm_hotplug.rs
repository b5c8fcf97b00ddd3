//! Disks that come to and go from a stock kernel while it runs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::vmm::{Vmm, open};
use hearth_vmm::control::client::ClientError;
use hearth_vmm::control::protocol::{Command, DiskBacking, DiskSpec, Event, Outcome, exit};

const MIB: u64 = 1 << 20;

fn serial(number: u64) -> String {
    format!("vol{number:017x}")
}

trait Disks {
    fn attach(&mut self, number: u64) -> Result<Outcome, ClientError>;
    fn detach(&mut self, number: u64, force: bool);
    fn detached(&mut self, number: u64);
}

impl Disks for Vmm {
    /// Attaches the file `disk-N`, made with 64 MiB if it is not there.
    fn attach(&mut self, number: u64) -> Result<Outcome, ClientError> {
        let path = self.path(&format!("disk-{number}"));
        let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path).unwrap();
        if file.metadata().unwrap().len() == 0 {
            file.set_len(64 * MIB).unwrap();
        }
        let fd = open(&path);
        let disk =
            DiskSpec { serial: serial(number), backing: DiskBacking::Raw { file: 0 }, read_only: false, queues: 2 };
        self.client.call(Command::AttachDisk(Box::new(disk)), &[fd.as_fd()], PATIENCE)
    }

    fn detach(&mut self, number: u64, force: bool) {
        assert_eq!(self.call(Command::DetachDisk { serial: serial(number), force }), Outcome::Done);
    }

    fn detached(&mut self, number: u64) {
        assert_eq!(self.event(), Event::DiskDetached { serial: serial(number), durable: true });
    }
}

/// The name the guest gives the disk with this number, once it has it.
fn name_of(console: &mut Console, number: u64) -> String {
    let find = format!("grep -l {} /sys/block/vd*/serial 2>/dev/null | cut -d / -f 4", serial(number));
    let end = Instant::now() + PATIENCE;
    loop {
        let (found, _) = console.try_run(&find);
        if !found.trim().is_empty() {
            return found.trim().to_owned();
        }
        assert!(Instant::now() < end, "the guest does not find disk {number}: {}", console.seen());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_gone(console: &mut Console, name: &str) {
    console.run(&format!("while [ -e /sys/block/{name} ]; do usleep 20000; done"));
}

/// Writes a text of its own to the disk and reads it back past the page cache.
fn use_disk(console: &mut Console, name: &str, text: &str) {
    console.run(&format!(
        "yes {text} | dd of=/dev/{name} bs=1M count=4 iflag=fullblock conv=fsync 2>/dev/null; \
         echo 3 > /proc/sys/vm/drop_caches"
    ));
    let lines = console.run(&format!("dd if=/dev/{name} bs=1M count=4 2>/dev/null | grep -c '^{text}$'"));
    assert_eq!(lines.parse::<usize>().unwrap(), 4 * MIB as usize / (text.len() + 1));
}

#[test]
fn disks_are_attached_used_grown_and_detached_with_one_and_with_four_cpus() {
    for vcpus in [1, 4] {
        let mut vmm = Vmm::start();
        vmm.vcpus = vcpus;
        let mut console = vmm.boot_tiny();
        let before = Instant::now();
        vmm.attach(1).unwrap();
        let name = name_of(&mut console, 1);
        eprintln!("{vcpus} vCPUs: found as {name} within {:?}", before.elapsed());
        assert_eq!(name, "vdb");
        use_disk(&mut console, &name, "hot-plugged");
        let stats = vmm.stats().disks;
        assert_eq!(stats.len(), 2);
        assert!(stats[1].serial == serial(1) && stats[1].write_bytes >= 4 * MIB, "{stats:?}");

        let sectors = 96 * MIB / 512;
        assert_eq!(vmm.call(Command::ResizeDisk { serial: serial(1), bytes: 96 * MIB }), Outcome::Done);
        console.run(&format!("while [ $(cat /sys/block/{name}/size) != {sectors} ]; do usleep 20000; done"));
        console.run(&format!("echo end | dd of=/dev/{name} bs=512 seek={} conv=fsync", sectors - 1));

        let before = Instant::now();
        vmm.detach(1, false);
        vmm.detached(1);
        eprintln!("{vcpus} vCPUs: let go within {:?}", before.elapsed());
        wait_gone(&mut console, &name);
        let file = std::fs::File::open(vmm.path("disk-1")).unwrap();
        let mut end = [0; 3];
        file.read_exact_at(&mut end, 96 * MIB - 512).unwrap();
        assert_eq!(&end, b"end");
        assert_eq!(vmm.stats().disks.len(), 1);

        // What it wrote is there when it comes again, with its new size.
        vmm.attach(1).unwrap();
        let name = name_of(&mut console, 1);
        assert_eq!(console.run(&format!("cat /sys/block/{name}/size")), sectors.to_string());
        assert_eq!(console.run(&format!("head -n 1 /dev/{name}")), "hot-plugged");
        assert_eq!(vmm.call(Command::PowerButton), Outcome::Done);
        assert_eq!(vmm.event(), Event::PoweredOff);
        assert_eq!(vmm.exit_code(), exit::POWER_OFF);
    }
}

#[test]
fn a_storm_of_attachments_and_detachments_leaves_the_guest_whole() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    // Disks that are torn away make the kernel complain on the console.
    console.run("dmesg -n 1");
    for round in 0..20 {
        // Two at once, and the next pair before the guest has looked at the first.
        let pair = [2 * round, 2 * round + 1];
        for number in pair {
            vmm.attach(number).unwrap();
        }
        if round % 4 != 3 {
            for number in pair {
                let name = name_of(&mut console, number);
                console.run(&format!("echo disk {number} | dd of=/dev/{name} conv=fsync 2>/dev/null"));
            }
        }
        for number in pair {
            vmm.detach(number, round % 5 == 4);
        }
        let mut gone: Vec<_> = (0..2).map(|_| vmm.event()).collect();
        gone.sort_by_key(|event| format!("{event:?}"));
        let expected = pair.map(|number| Event::DiskDetached { serial: serial(number), durable: true });
        assert_eq!(gone, expected, "round {round}");
        if round % 4 != 3 {
            for number in pair {
                let text = std::fs::read(vmm.path(&format!("disk-{number}"))).unwrap();
                let expected = format!("disk {number}\n");
                assert!(text.starts_with(expected.as_bytes()), "disk {number} lost what was written");
            }
        }
    }
    console.run("while [ $(ls -d /sys/block/vd* | wc -l) != 1 ]; do usleep 20000; done");
    console.run("! dmesg | grep -E 'BUG:|Oops|Call Trace|blocked for more'");
    assert_eq!(console.run("ls / | grep -c bin"), "2", "the root disk is there");
    // All 31 slots but those of the root disk, the entropy source and the balloon can be filled.
    // (The guest may still be at the disks of the last round, of which it never saw more than their end.)
    let end = Instant::now() + PATIENCE;
    for number in 100..128 {
        while let Err(error) = vmm.attach(number) {
            assert!(Instant::now() < end && error.to_string().contains("slots"), "disk {number}: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    match vmm.attach(128) {
        Err(ClientError::Refused(text)) => assert!(text.contains("PCI slots are occupied"), "{text}"),
        other => panic!("{other:?}"),
    }
    name_of(&mut console, 127);
    vmm.detach(113, false);
    vmm.detached(113);
    vmm.attach(128).unwrap();
    name_of(&mut console, 128);
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}

#[test]
fn a_forced_detachment_frees_the_file_while_the_guest_uses_the_disk() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    vmm.attach(1).unwrap();
    let name = name_of(&mut console, 1);
    // Once the device is gone, dd would make a file of its name.
    console.send(&format!(
        "(while [ -b /dev/{name} ]; do dd if=/dev/zero of=/dev/{name} bs=64k count=900 conv=fsync; done; \
         [ -b /dev/{name} ] || rm -f /dev/{name}; echo writer-\"over\") 2>&1 | tail -n 1 &"
    ));
    std::thread::sleep(Duration::from_millis(500));
    vmm.detach(1, true);
    vmm.detached(1);
    console.wait_for("writer-over");
    wait_gone(&mut console, &name);
    // The guest's hot-plug still works, and so does the file.
    vmm.attach(1).unwrap();
    let name = name_of(&mut console, 1);
    use_disk(&mut console, &name, "again");
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}

/// Linux lets go of a virtio disk even while a file system on it is mounted: it writes back what it has first. A guest that
/// does not answer is one whose kernel was told not to.
#[test]
fn a_mounted_disk_is_written_back_and_a_guest_that_does_not_answer_keeps_its_disk_until_force() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    vmm.attach(1).unwrap();
    let name = name_of(&mut console, 1);
    console.run(&format!("mke2fs -F /dev/{name} >/dev/null 2>&1 && mount -t ext4 /dev/{name} /mnt"));
    console.run("echo kept > /mnt/file");
    vmm.detach(1, false);
    vmm.detached(1);
    console.run("umount -l /mnt");
    vmm.attach(1).unwrap();
    let name = name_of(&mut console, 1);
    console.run(&format!("mount -t ext4 /dev/{name} /mnt"));
    assert_eq!(console.run("cat /mnt/file"), "kept");
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);

    let mut vmm = Vmm::start();
    vmm.more_cmdline = "acpiphp.disable=1".into();
    let mut console = vmm.boot_tiny();
    vmm.attach(1).unwrap();
    vmm.detach(1, false);
    console.run("sleep 2");
    assert_eq!(vmm.client.next_event(Duration::from_millis(100)).unwrap(), None);
    assert_eq!(vmm.stats().disks.len(), 2);
    vmm.detach(1, true);
    vmm.detached(1);
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}
