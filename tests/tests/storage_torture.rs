//! Volumes whose agents and VMMs are killed while guests write, with fio's own checks and with a writer that knows what it flushed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use hearth_tests::choices::Choices;
use hearth_tests::cloud::{Cloud, Shape, wait_until};
use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::disks::{Writer, disk, shell, volume};
use hearth_tests::fio;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where the writers' blocks begin, behind what fio uses, and how many there are.
const WRITERS: (u64, u64) = (1024, 256);
/// Where 1 MiB is that is written once.
const UNTOUCHED_MIB: u64 = 6;

/// The volumes that are written to: in the environment of fio's job `DISK_ONE` and so on.
const NAMES: [&str; 3] = ["blank", "sealed", "over"];

/// A guest with its disks.
struct Guest {
    console: Console,
    devices: Vec<String>,
}

/// Takes up a guest that has just booted, or whose console was lost.
fn take_up(cloud: &Cloud, volumes: &[String]) -> Guest {
    let mut console = shell(cloud, "a");
    // What the kernel says goes on, but not into the lines that are read here.
    console.run("dmesg -n 1");
    let devices = volumes.iter().map(|id| disk(&mut console, id)).collect();
    Guest { console, devices }
}

impl Guest {
    fn mount_fio(&mut self) {
        let device = self.devices[0].clone();
        self.console.run(&format!("mount -o ro {device} /mnt && cp /mnt/writer /tmp/writer"));
    }

    /// Environment and command of fio's job on the three volumes.
    fn fio(&self, seed: u64, size: &str, loops: u32, more: &str) -> String {
        let [_, one, two, three] = &self.devices[..] else { panic!("{:?}", self.devices) };
        format!(
            "DISK_ONE={one} DISK_TWO={two} DISK_THREE={three} SEED={seed} SIZE={size} LOOPS={loops} {} {more} /mnt/job",
            fio::FIO
        )
    }

    /// What fio says, whose exit code must be 0.
    fn fio_passes(&mut self, command: &str) {
        let (said, code) = self.console.try_run(&format!("{command} >/tmp/fio 2>&1 || (tail -n 40 /tmp/fio; false)"));
        assert_eq!(code, 0, "{command}: {said}");
    }

    fn untouched(&mut self) -> Vec<String> {
        self.console.run("echo 3 >/proc/sys/vm/drop_caches");
        let devices = self.devices[1..].to_vec();
        let sum = |device: &String| {
            self.console.run(&format!("dd if={device} bs=1M skip={UNTOUCHED_MIB} count=1 2>/dev/null | md5sum"))
        };
        devices.iter().map(sum).collect()
    }
}

/// Bytes that the guest's VMM has written so far.
fn written(cloud: &Cloud) -> u64 {
    let counters = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let text: String = cloud.vmm_pids().iter().map(counters).collect();
    text.lines().filter_map(|line| line.strip_prefix("write_bytes: ")?.parse::<u64>().ok()).sum()
}

#[test]
fn fio_and_flushed_writes_survive_killed_agents_and_vmms() {
    let mut choices = Choices::new();
    let mut cloud = Cloud::start(Shape::Apart);
    cloud.import_tiny();
    let image = fio::disk_image(&cloud.path(""));
    cloud.hearth(&["image", "import", image.to_str().unwrap(), "--name", "fio"]);
    let image = cloud.json(&["image", "describe", "fio"]);
    let snapshot = image["block_device_mappings"][0]["snapshot_id"].as_str().unwrap_or_else(|| panic!("{image:#}"));
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a"]);
    let mut volumes = vec![volume(&cloud, "fio", &["--snapshot", snapshot])];
    volumes.push(volume(&cloud, "blank", &["--size", "1G"]));
    volumes.push(volume(&cloud, "sealed", &["--size", "1G", "--encrypted"]));
    cloud.wait_for_state("a", "running");
    for name in ["fio", "blank", "sealed"] {
        cloud.hearth(&["volume", "attach", name, "a", "--wait"]);
    }

    // What the third volume is made from.
    let mut guest = take_up(&cloud, &volumes);
    for device in &guest.devices[1..] {
        guest.console.run(&format!(
            "yes untouched | head -c 1048576 | dd of={device} bs=1M seek={UNTOUCHED_MIB} conv=fsync,notrunc 2>/dev/null; \
             yes before | head -c 2097152 | dd of={device} bs=1M conv=fsync,notrunc 2>/dev/null"
        ));
    }
    cloud.hearth(&["snapshot", "create", "blank", "--name", "first", "--wait"]);
    volumes.push(volume(&cloud, "over", &["--snapshot", "first"]));
    cloud.hearth(&["volume", "attach", "over", "a", "--wait"]);
    guest.devices.push(disk(&mut guest.console, &volumes[3]));
    guest.mount_fio();
    let untouched = guest.untouched();
    assert!(untouched.iter().all(|sum| *sum == untouched[0]), "{untouched:?}");

    // fio goes on without an agent, and when the next one is there.
    let fio = guest.fio(choices.below(1 << 20), "2m", 1000, "--runtime=20");
    guest.console.run(&format!("({fio} >/tmp/fio 2>&1; echo $? >/tmp/code) & true"));
    for kills in 0..3 {
        choices.pause(5000);
        cloud.kill_agent(0);
        choices.pause(4000);
        cloud.start_agent(0);
        cloud.wait_for_hosts(1);
        let before = written(&cloud);
        let mut console = shell(&cloud, "a");
        let goes_on = || written(&cloud) > before || console.try_run("test -s /tmp/code").1 == 0;
        assert!(wait_until(PATIENCE, goes_on), "after {} killed agents nothing is written any more", kills + 1);
    }
    guest = take_up(&cloud, &volumes);
    assert!(wait_until(PATIENCE, || guest.console.try_run("test -s /tmp/code").1 == 0), "fio does not end");
    let said = guest.console.run("cat /tmp/code; tail -n 40 /tmp/fio");
    assert!(said.starts_with("0\n"), "{said}");
    println!("{said}");

    // A VMM dies while three writers write: what they have called flushed is there.
    let mut last = Vec::new();
    for round in 0..2 {
        let writers: Vec<Writer> = NAMES
            .iter()
            .map(|name| Writer { name: format!("{name}-{round}"), blocks: WRITERS, seed: choices.below(1 << 31) })
            .collect();
        for (writer, device) in writers.iter().zip(&guest.devices[1..]) {
            guest.console.send(&writer.command(device, "/tmp/writer"));
        }
        let told = |cloud: &Cloud| cloud.try_hearth(&["instance", "console-output", "a"]).1;
        let begun = || writers.iter().all(|writer| writer.flushed(&told(&cloud)) >= Some(3));
        assert!(wait_until(PATIENCE, begun), "{}", told(&cloud));
        choices.pause(3000);
        let pids = cloud.vmm_pids();
        // The second time no agent sees it.
        if round == 1 {
            cloud.kill_agent(0);
            choices.pause(1000);
        }
        pids.iter().for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap());
        if round == 1 {
            cloud.start_agent(0);
            cloud.wait_for_hosts(1);
        }
        let output = told(&cloud);
        let again = || !cloud.vmm_pids().is_empty() && cloud.vmm_pids() != pids;
        assert!(wait_until(PATIENCE, again), "the instance does not start again");
        guest = take_up(&cloud, &volumes);
        last = Vec::new();
        for (writer, device) in writers.into_iter().zip(&guest.devices[1..]) {
            let flushed = writer.flushed(&output).unwrap_or_else(|| panic!("{}: {output}", writer.name));
            println!("{}: round {flushed} was flushed", writer.name);
            writer.check(&mut guest.console, device, flushed);
            last.push((writer, flushed));
        }
        guest.mount_fio();
    }
    assert_eq!(guest.untouched(), untouched);

    // Snapshots of all three hold the same; what fio has written is right in them as well.
    let seed = choices.below(1 << 20);
    let fio = guest.fio(seed, "512k", 1, "");
    guest.fio_passes(&fio);
    let mut copies = vec![volumes[0].clone()];
    for name in NAMES {
        cloud.hearth(&["snapshot", "create", name, "--name", &format!("{name}-s"), "--wait"]);
        copies.push(volume(&cloud, &format!("{name}-copy"), &["--snapshot", &format!("{name}-s")]));
        cloud.hearth(&["volume", "attach", &format!("{name}-copy"), "a", "--wait"]);
    }
    cloud.hearth(&["storage", "verify"]);
    guest.devices = copies.iter().map(|id| disk(&mut guest.console, id)).collect();
    for ((writer, flushed), device) in last.iter().zip(&guest.devices[1..]) {
        writer.check(&mut guest.console, device, *flushed);
    }
    assert_eq!(guest.untouched(), untouched);
    let fio = guest.fio(seed, "512k", 1, "--verify_only=1");
    guest.fio_passes(&fio);
    drop(guest);
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}
