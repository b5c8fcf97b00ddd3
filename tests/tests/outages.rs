//! What storage does while the object store is away, or the host's disk is full.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hearth_tests::choices::Choices;
use hearth_tests::cloud::{Cloud, Settings, Shape, wait_until};
use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::disks::{disk, shell, volume};
use hearth_tests::objects::S3Server;

/// Status of a volume, and what is said of it.
fn status(cloud: &Cloud, volume: &str) -> (String, String) {
    let about = cloud.json(&["volume", "describe", volume]);
    let text = |field: &str| about[field].as_str().unwrap_or_default().to_owned();
    (text("status"), text("status_detail"))
}

fn wait_for_status(cloud: &Cloud, volume: &str, wanted: &str) -> String {
    let mut last = Default::default();
    let reached = wait_until(PATIENCE, || {
        last = status(cloud, volume);
        last.0 == wanted
    });
    assert!(reached, "{volume} does not become {wanted}: {last:?}");
    last.1
}

/// Fails if the guest's kernel has told of a disk that failed.
fn assert_no_disk_errors(console: &mut Console) {
    let errors = console.run("dmesg | grep -iE 'i/o error|ext4-fs error|remount|blocked for more' || true");
    assert_eq!(errors, "");
}

/// A cloud whose object store is a server of its own.
fn cloud_with_server(options: &[&str]) -> (Cloud, S3Server) {
    let mut server = None;
    let cloud = Cloud::start_on(Shape::Apart, |folder| {
        server = Some(S3Server::start(folder, options));
        S3Server::settings()
    });
    (cloud, server.unwrap())
}

#[test]
fn a_guest_that_boots_waits_for_the_object_store() {
    let mut choices = Choices::new();
    // Slow enough that the boot is not over before the outage.
    let (mut cloud, mut server) = cloud_with_server(&[]);
    cloud.import_tiny();
    server.kill();
    server.restart_with(&["--latency-ms", "100"]);
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a"]);
    assert!(wait_until(PATIENCE, || !cloud.vmm_pids().is_empty()), "no VMM");
    choices.pause(500);
    server.kill();
    let pids = cloud.vmm_pids();
    let about = cloud.instance("a");
    let root = about["block_devices"][0]["volume_id"].as_str().unwrap_or_else(|| panic!("{about:#}")).to_owned();
    let detail = wait_for_status(&cloud, &root, "impaired");
    assert!(detail.contains("does not come from the object store"), "{detail}");
    let said = cloud.try_hearth(&["instance", "console-output", "a"]).1;
    assert!(!said.contains("HEARTH-GUEST ready"), "it has booted before the outage:\n{said}");

    // Another agent takes over meanwhile, and knows what the guest suffers from.
    cloud.kill_agent(0);
    cloud.start_agent(0);
    cloud.wait_for_hosts(1);
    let detail = wait_for_status(&cloud, &root, "impaired");
    assert!(detail.contains("does not come from the object store"), "{detail}");
    // What concerns other things is done meanwhile.
    let spare = volume(&cloud, "spare", &["--size", "1G"]);
    cloud.hearth(&["volume", "attach", "spare", "a", "--wait"]);

    server.restart_with(&[]);
    let mut guest = shell(&cloud, "a");
    assert_no_disk_errors(&mut guest);
    assert_eq!(cloud.vmm_pids(), pids, "one boot");
    guest.run("find / -xdev -type f -exec md5sum {} + >/dev/null");
    disk(&mut guest, &spare);
    wait_for_status(&cloud, &root, "ok");
    assert_no_disk_errors(&mut guest);
    drop(guest);
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn a_snapshot_outlives_an_outage_of_the_object_store() {
    let mut choices = Choices::new();
    let (cloud, mut server) = cloud_with_server(&[]);
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let mut guest = shell(&cloud, "a");
    let data = volume(&cloud, "data", &["--size", "1G"]);
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    // Nothing that compression makes small.
    guest.run(&format!("dd if=/dev/urandom of={device} bs=1M count=16 conv=fsync 2>/dev/null"));
    let sum = |guest: &mut Console, device: &str| {
        guest.run("echo 3 >/proc/sys/vm/drop_caches");
        guest.run(&format!("dd if={device} bs=1M count=16 2>/dev/null | md5sum"))
    };
    let mut wanted = sum(&mut guest, &device);
    let snapshot = |name: &str| cloud.json(&["snapshot", "describe", name]);
    for (name, dies) in [("stopped", false), ("killed", true)] {
        server.kill();
        server.restart_with(&["--mbit", "10"]);
        cloud.hearth(&["snapshot", "create", "data", "--name", name]);
        choices.pause(3000);
        match dies {
            true => server.kill(),
            false => server.stop(),
        }
        assert_eq!(snapshot(name)["state"], "pending", "the upload was over before the outage");
        // The guest's disk is as it was: over what is being uploaded, too.
        guest.run(&format!("dd if=/dev/urandom of={device} bs=1M count=8 conv=fsync,notrunc 2>/dev/null"));
        let changed = sum(&mut guest, &device);
        assert_ne!(changed, wanted);
        std::thread::sleep(Duration::from_secs(5));
        assert_eq!(snapshot(name)["state"], "pending", "{:#}", snapshot(name));
        match dies {
            true => server.restart_with(&[]),
            false => server.go_on(),
        }
        assert!(wait_until(PATIENCE, || snapshot(name)["state"] == "completed"), "{:#}", snapshot(name));
        let copy = volume(&cloud, &format!("{name}-copy"), &["--snapshot", name]);
        cloud.hearth(&["volume", "attach", &copy, "a", "--wait"]);
        let copied = disk(&mut guest, &copy);
        assert_eq!(sum(&mut guest, &copied), wanted, "the volume when the snapshot was asked for ({name})");
        wanted = changed;
    }
    assert_eq!(sum(&mut guest, &device), wanted);
    assert_no_disk_errors(&mut guest);
    cloud.hearth(&["storage", "verify"]);
    drop(guest);
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

/// A file system of a few hundred MiB.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, mib: u64) -> Self {
        let image = at.with_extension("ext4");
        std::fs::create_dir_all(at).unwrap();
        std::fs::File::create_new(&image).unwrap().set_len(mib << 20).unwrap();
        let made = Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(&image).status().unwrap();
        assert!(made.success(), "mke2fs");
        let mounted = Command::new("mount").args(["-o", "loop"]).args([&image, at]).status().unwrap();
        assert!(mounted.success(), "mount");
        Self(at.to_owned())
    }

    /// Leaves no room in it but for what is in the file that this makes.
    fn fill(&self, mib: u64) {
        let ballast = std::fs::File::create_new(self.0.join("ballast")).unwrap();
        nix::fcntl::posix_fallocate(&ballast, 0, (mib << 20) as i64).unwrap();
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }

    fn available_mib(&self) -> u64 {
        let about = nix::sys::statvfs::statvfs(&self.0).unwrap();
        (about.blocks_available() * about.fragment_size()) >> 20
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_of_the_host_holds_writes_until_there_is_room() {
    let mut small = None;
    let cloud = Cloud::start_on(Shape::Apart, |folder| {
        small = Some(SmallDisk::mount(&folder.join("agent0"), 600));
        Settings::default()
    });
    let small = small.unwrap();
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let mut guest = shell(&cloud, "a");
    let pids = cloud.vmm_pids();
    let data = volume(&cloud, "data", &["--size", "1G"]);
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    guest.run("find / -xdev -type f -exec md5sum {} + >/dev/null");
    let room = small.available_mib();
    assert!(room > 200, "{room} MiB");
    small.fill(room - 4);
    let writing = format!("yes overflow | head -c 12582912 | dd of={device} bs=1M conv=fsync,notrunc 2>/dev/null");
    guest.run(&format!("({writing}; echo $? >/tmp/code) & true"));
    let detail = wait_for_status(&cloud, &data, "impaired");
    assert!(detail.contains("file system is full"), "{detail}");
    assert_eq!(guest.try_run("test -s /tmp/code").1, 1, "where was it written?");
    // Its console's ring is a file on that disk as well, and gets some pages further.
    guest.run("yes 'as much as the console takes' | head -c 16000");
    assert_eq!(cloud.vmm_pids(), pids, "the VMM lives on");

    small.free();
    assert!(wait_until(PATIENCE, || guest.try_run("test -s /tmp/code").1 == 0), "the guest's disk stands still");
    assert_eq!(guest.run("cat /tmp/code"), "0");
    wait_for_status(&cloud, &data, "ok");
    assert_no_disk_errors(&mut guest);
    let sum = guest.run("yes overflow | head -c 12582912 | md5sum");
    guest.run("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(guest.run(&format!("dd if={device} bs=1M count=12 2>/dev/null | md5sum")), sum);
    drop(guest);
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}
