//! hearth-vmm boots a stock kernel and gives it disks, NICs, memory, CPUs and power.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use hearth_tests::machine::{BootFiles, Machine, boot_files, copy_disk, packed_boot_files};
use hearth_tests::report::of_kind;
use hearth_tests::{scratch, tiny_image};

struct Setup {
    folder: tempfile::TempDir,
    boot: BootFiles,
}

impl Setup {
    fn new() -> Self {
        let folder = scratch();
        let boot = boot_files(&tiny_image(), folder.path());
        copy_disk(&tiny_image(), &folder.path().join("root.raw"));
        Self { folder, boot }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn root(&self) -> String {
        format!("{},serial=vol0123456789abcdef0", self.path("root.raw"))
    }

    fn blank(&self, name: &str, mib: u64) -> String {
        std::fs::File::create(self.path(name)).unwrap().set_len(mib << 20).unwrap();
        self.path(name)
    }
}

/// A network namespace for this thread and its children, with taps on a bridge that has an address.
fn taps(names: &[&str]) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("this test needs root");
    let ip = |words: &str| {
        assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success(), "ip {words}");
    };
    ip("link add br0 type bridge");
    ip("address add 10.9.0.1/24 dev br0");
    ip("link set br0 up");
    for name in names {
        ip(&format!("tuntap add {name} mode tap vnet_hdr"));
        ip(&format!("link set {name} master br0 up"));
    }
}

#[test]
fn three_disks_and_two_nics_are_seen_with_their_serials_and_macs() {
    let setup = Setup::new();
    taps(&["tap0", "tap1"]);
    let second = format!("{},serial=vol1111111111111111a,queues=2", setup.blank("second.raw", 64));
    let third = format!("{},serial=vol2222222222222222b,ro", setup.blank("third.raw", 32));
    let options = [
        "--disk",
        &setup.root(),
        "--disk",
        &second,
        "--disk",
        &third,
        "--tap",
        "tap0,mac=02:00:00:00:00:01",
        "--tap",
        "tap1,mac=02:00:00:00:00:02,mtu=1400",
        "--instance-id",
        "i-0123456789abcdef0",
        "--instance-type",
        "t3.micro",
        "--uuid",
        "ec2a0b1c-0000-4000-8000-000000000001",
    ];
    let mut machine = Machine::start(&setup.boot, &options);
    machine.console.wait_for("HEARTH-GUEST ready");
    machine.console.wait_for_shell();
    let seen = machine.console.seen().to_owned();
    let disks: Vec<_> = of_kind(&seen, "disk")
        .iter()
        .map(|d| (d.name.clone(), d.get("serial").to_owned(), d.get("ro").to_owned(), d.get("bytes").to_owned()))
        .collect();
    let root_bytes = std::fs::metadata(setup.path("root.raw")).unwrap().len().to_string();
    let row = |name: &str, serial: &str, ro: &str, bytes: &str| (name.into(), serial.into(), ro.into(), bytes.into());
    assert_eq!(
        disks,
        [
            row("vda", "vol0123456789abcdef0", "0", &root_bytes),
            row("vdb", "vol1111111111111111a", "0", "67108864"),
            row("vdc", "vol2222222222222222b", "1", "33554432"),
        ]
    );
    let nics: Vec<_> = of_kind(&seen, "nic").iter().map(|n| n.get("mac").to_owned()).collect();
    assert_eq!(nics, ["02:00:00:00:00:01", "02:00:00:00:00:02"]);
    let smbios = &of_kind(&seen, "smbios")[0];
    assert_eq!(smbios.get("product_uuid").to_lowercase(), "ec2a0b1c-0000-4000-8000-000000000001");
    assert_eq!(smbios.get("product_serial").to_lowercase(), smbios.get("product_uuid").to_lowercase());
    assert_eq!(smbios.get("product_name"), "t3.micro");
    assert_eq!(machine.console.run("cat /sys/class/dmi/id/board_asset_tag"), "i-0123456789abcdef0");
    assert_eq!(machine.console.run("cat /sys/class/net/eth1/mtu"), "1400");
    let (said, code) = machine.console.try_run("dd if=/dev/zero of=/dev/vdc bs=4k count=1 conv=fsync");
    assert_ne!(code, 0, "a read-only disk was written: {said}");
    machine.console.send("poweroff");
    assert_eq!(machine.exit_code(), 0);
}

#[test]
fn what_the_guest_flushed_is_in_the_file_and_what_it_discards_leaves_it() {
    let setup = Setup::new();
    let data = setup.blank("data.raw", 64);
    let mut machine = Machine::start(&setup.boot, &["--disk", &setup.root(), "--disk", &data]);
    machine.console.wait_for("HEARTH-GUEST ready");
    machine.console.wait_for_shell();
    machine.console.run("yes hearth | dd of=/dev/vdb bs=1M count=16 iflag=fullblock conv=fsync");
    let written = std::fs::read(&data).unwrap();
    assert!(written[..16 << 20].chunks(7).all(|chunk| b"hearth\n".starts_with(chunk)), "flushed data is missing");
    let allocated = std::fs::metadata(&data).unwrap().blocks() * 512;
    assert!(allocated >= 16 << 20, "{allocated}");
    machine.console.run("blkdiscard -o 0 -l 8388608 /dev/vdb");
    let allocated = std::fs::metadata(&data).unwrap().blocks() * 512;
    assert!(allocated <= 9 << 20, "discarded space was not given back: {allocated} bytes");
    assert_eq!(machine.console.run("dd if=/dev/vdb bs=1M count=8 2>/dev/null | tr -d '\\0' | wc -c"), "0");
    machine.console.send("poweroff");
    assert_eq!(machine.exit_code(), 0);
}

#[test]
fn killed_vmm_loses_no_flushed_write() {
    let setup = Setup::new();
    let data = setup.blank("data.raw", 64);
    let mut machine = Machine::start(&setup.boot, &["--disk", &setup.root(), "--disk", &data]);
    machine.console.wait_for("HEARTH-GUEST ready");
    machine.console.wait_for_shell();
    // Each round is written and flushed before its number is printed.
    machine.console.send(
        "n=0; while :; do n=$((n+1)); printf '%08d' $n | dd of=/dev/vdb bs=8 seek=$((n*512)) conv=fsync,notrunc 2>/dev/null; echo \"done\" $n .; done",
    );
    machine.console.wait_for("done 5 .");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(machine.pid()), nix::sys::signal::SIGKILL).unwrap();
    let seen = machine.console.to_end().to_owned();
    let last: u64 =
        seen.lines().filter_map(|l| l.trim().strip_prefix("done ")?.strip_suffix(" .")?.parse().ok()).max().unwrap();
    let bytes = std::fs::read(&data).unwrap();
    for n in 1..=last {
        let at = n as usize * 4096;
        assert_eq!(&bytes[at..at + 8], format!("{n:08}").as_bytes(), "flushed round {n} of {last} is lost");
    }
}

#[test]
fn processors_and_memory_are_what_was_asked_for() {
    let setup = Setup::new();
    for (cpus, memory) in [(1u64, 128u64), (32, 700), (2, 3500), (2, 64 << 10)] {
        let (c, m) = (cpus.to_string(), memory.to_string());
        let mut machine = Machine::start(&setup.boot, &["--disk", &setup.root(), "--cpus", &c, "--memory", &m]);
        machine.console.wait_for("HEARTH-GUEST ready");
        machine.console.wait_for_shell();
        let line = of_kind(machine.console.seen(), "machine").remove(0);
        assert_eq!(line.get("cpus"), c);
        let total: u64 = line.get("memory_kib").parse().unwrap();
        // The kernel keeps its own image and page structs for itself.
        assert!(total < memory * 1024 && total > memory * 1024 * 8 / 10 - 50_000, "{total} KiB of {memory} MiB");
        if memory == 3500 {
            // More than fits below the hole between 3 and 4 GiB, all of it written.
            machine.console.run("mount -t tmpfs -o size=95% none /mnt && dd if=/dev/zero of=/mnt/f bs=1M count=3150");
        }
        machine.console.send("poweroff");
        assert_eq!(machine.exit_code(), 0);
    }
}

#[test]
fn a_bzimage_boots_as_it_is() {
    let setup = Setup::new();
    let boot = packed_boot_files(&tiny_image(), setup.folder.path());
    let mut machine = Machine::start(&boot, &["--disk", &setup.root()]);
    machine.console.wait_for("HEARTH-GUEST ready");
    machine.console.wait_for_shell();
    machine.console.send("poweroff");
    assert_eq!(machine.exit_code(), 0);
}

#[test]
fn a_reset_and_a_crash_have_their_own_exit_codes() {
    let setup = Setup::new();
    let mut machine = Machine::start(&setup.boot, &["--disk", &setup.root()]);
    machine.console.wait_for("HEARTH-GUEST ready");
    machine.console.wait_for_shell();
    machine.console.send("reboot");
    assert_eq!(machine.exit_code(), 10, "{}", machine.console.seen());
    let mut machine = Machine::start(&setup.boot, &["--disk", &setup.root()]);
    machine.console.wait_for("HEARTH-GUEST ready");
    machine.console.wait_for_shell();
    machine.console.send("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger");
    // panic=1 on the image's command line: the kernel resets a second after its panic.
    assert_eq!(machine.exit_code(), 10, "{}", machine.console.seen());
    let seen = machine.console.to_end();
    assert!(seen.contains("Kernel panic"), "{seen}");
}

#[test]
fn packets_pass_in_both_directions_with_offloads() {
    let setup = Setup::new();
    taps(&["tap0"]);
    let folder = setup.folder.path().join("www");
    std::fs::create_dir(&folder).unwrap();
    let mut file = std::fs::File::create(folder.join("blob")).unwrap();
    let blob: Vec<u8> = (0..8u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    file.write_all(&blob).unwrap();
    let mut machine = Machine::start(&setup.boot, &["--disk", &setup.root(), "--tap", "tap0,mac=02:00:00:00:00:01"]);
    machine.console.wait_for("HEARTH-GUEST ready");
    machine.console.wait_for_shell();
    machine.console.run("ip address add 10.9.0.2/24 dev eth0");
    machine.console.run("ping -c 2 -W 5 10.9.0.1");
    let server = Command::new("busybox")
        .args(["httpd", "-f", "-p", "10.9.0.1:8080", "-h"])
        .arg(&folder)
        .spawn()
        .expect("busybox on the host");
    let sum = Command::new("md5sum").arg(folder.join("blob")).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap().split(' ').next().unwrap().to_owned();
    let got = machine.console.run("wget -q -O - http://10.9.0.1:8080/blob | md5sum | cut -d ' ' -f 1");
    assert_eq!(got, sum, "host to guest");
    // And back: the guest serves what it has.
    machine
        .console
        .run("mkdir -p /tmp/www && wget -q -O /tmp/www/blob http://10.9.0.1:8080/blob && httpd -p 80 -h /tmp/www");
    let back = setup.path("back");
    let status = Command::new("busybox").args(["wget", "-q", "-O", &back, "http://10.9.0.2/blob"]).status().unwrap();
    assert!(status.success());
    assert!(std::fs::read(Path::new(&back)).unwrap() == blob, "guest to host");
    end(server);
    machine.console.send("poweroff");
    assert_eq!(machine.exit_code(), 0);
}

fn end(mut child: std::process::Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}
