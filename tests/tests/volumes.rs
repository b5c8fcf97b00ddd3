//! EBS volumes and their snapshots as their users see them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use hearth_tests::cloud::{Cloud, Shape, wait_until};
use hearth_tests::console::{Console, PATIENCE};
use serde_json::Value;

/// The serial number that a guest sees of a volume.
fn serial(volume: &str) -> String {
    volume.replace('-', "")
}

/// Runs a tiny instance and waits for its shell.
fn run(cloud: &Cloud, image: &str, name: &str) -> Console {
    cloud.hearth(&["instance", "run", image, "--type", "h1.tiny", "--name", name, "--wait"]);
    shell(cloud, name)
}

fn shell(cloud: &Cloud, name: &str) -> Console {
    let mut console = cloud.console(name);
    console.wait_for_shell();
    console
}

/// A new volume with a name; its id.
fn volume(cloud: &Cloud, name: &str, more: &[&str]) -> String {
    cloud.hearth(&[&["volume", "create", "--name", name, "--wait", "-o", "id"], more].concat()).trim().to_owned()
}

/// The guest's device of a volume, if it has one.
fn find_disk(console: &mut Console, volume: &str) -> Option<String> {
    let look = format!(
        "for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = {} ] && echo /dev/${{d##*/}}; done; true",
        serial(volume)
    );
    Some(console.run(&look)).filter(|device| !device.is_empty())
}

/// Waits until the guest has a volume.
fn disk(console: &mut Console, volume: &str) -> String {
    let mut found = None;
    wait_until(PATIENCE, || {
        found = find_disk(console, volume);
        found.is_some()
    });
    found.unwrap_or_else(|| panic!("the guest does not see {volume}"))
}

/// Fills 4 MiB at a MiB of a disk with bytes that tell of `word`; their checksum.
fn fill(console: &mut Console, device: &str, at_mib: u32, word: &str) -> String {
    console.run(&format!(
        "yes {word} | head -c 4194304 >/tmp/fill; dd if=/tmp/fill of={device} bs=1M seek={at_mib} conv=fsync,notrunc 2>/dev/null; \
         md5sum </tmp/fill"
    ))
}

/// Checksum of 4 MiB at a MiB of a disk.
fn sum(console: &mut Console, device: &str, at_mib: u32) -> String {
    console.run(&format!("dd if={device} bs=1M skip={at_mib} count=4 2>/dev/null | md5sum"))
}

fn describe(cloud: &Cloud, kind: &str, id: &str) -> Value {
    cloud.json(&[kind, "describe", id])
}

#[test]
fn a_volume_is_attached_grown_snapshotted_and_restored_while_the_guest_runs() {
    let cloud = Cloud::start(Shape::One);
    cloud.import_tiny();
    let mut guest = run(&cloud, "tiny", "a");
    let data = volume(&cloud, "data", &["--size", "1G"]);
    assert_eq!(describe(&cloud, "volume", &data)["state"], "available");
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    assert_eq!(guest.run(&format!("cat /sys/block/{}/size", &device[5..])), (2 << 20).to_string());
    let first = fill(&mut guest, &device, 10, "first");

    // It grows while the guest uses it.
    cloud.hearth(&["volume", "modify", "data", "--size", "2G", "--wait"]);
    let size = format!("cat /sys/block/{}/size", &device[5..]);
    assert!(wait_until(PATIENCE, || guest.run(&size) == (4 << 20).to_string()), "the guest does not see that it grew");
    let end = fill(&mut guest, &device, 2040, "end");

    // A snapshot holds what was there when it was asked for, whatever the guest writes after that.
    cloud.hearth(&["snapshot", "create", "data", "--name", "before", "--wait"]);
    let second = fill(&mut guest, &device, 10, "second");
    assert_ne!(first, second);
    cloud.hearth(&["snapshot", "create", "data", "--name", "after", "--wait"]);
    let after = describe(&cloud, "snapshot", "after");
    assert_eq!(after["state"], "completed", "{after:#}");
    let copy = volume(&cloud, "copy", &["--snapshot", "before", "--type", "gp2"]);
    let later = volume(&cloud, "later", &["--snapshot", "after"]);
    for name in ["copy", "later"] {
        cloud.hearth(&["volume", "attach", name, "a", "--wait"]);
    }
    let (copied, updated) = (disk(&mut guest, &copy), disk(&mut guest, &later));
    assert_eq!((sum(&mut guest, &copied, 10), sum(&mut guest, &copied, 2040)), (first, end.clone()));
    assert_eq!((sum(&mut guest, &updated, 10), sum(&mut guest, &updated, 2040)), (second.clone(), end.clone()));
    // Volumes of one snapshot are apart from then on.
    let changed = fill(&mut guest, &copied, 10, "changed");
    assert_eq!((sum(&mut guest, &copied, 10), sum(&mut guest, &updated, 10)), (changed, second.clone()));

    // Snapshots may go in any order, volumes made of them stay.
    cloud.hearth(&["snapshot", "delete", "before", "--yes"]);
    cloud.hearth(&["storage", "gc"]);
    assert_eq!(sum(&mut guest, &copied, 2040), end);

    // Away, and back with everything in it.
    cloud.hearth(&["volume", "detach", "data", "--yes", "--wait"]);
    assert!(wait_until(PATIENCE, || find_disk(&mut guest, &data).is_none()), "the guest still has it");
    assert_eq!(describe(&cloud, "volume", &data)["state"], "available");
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    assert_eq!((sum(&mut guest, &device, 10), sum(&mut guest, &device, 2040)), (second, end));
    let (code, said) = cloud.try_hearth(&["volume", "delete", "data", "--yes"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("VolumeInUse"), "{said}");

    // Attached volumes live on after the instance, its root does not.
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    let left = || {
        let volumes = cloud.json(&["volume", "list"]);
        let mut names: Vec<_> =
            volumes.as_array().unwrap().iter().map(|v| (v["name"].clone(), v["state"].clone())).collect();
        names.sort_by_key(|(name, _)| name.to_string());
        names
    };
    let wanted: Vec<(Value, Value)> =
        ["copy", "data", "later"].iter().map(|name| ((*name).into(), "available".into())).collect();
    assert!(wait_until(PATIENCE, || left() == wanted), "{:?}", left());
    for name in ["copy", "data", "later"] {
        cloud.hearth(&["volume", "delete", name, "--yes", "--wait"]);
    }
    cloud.assert_nothing_left();
}

#[test]
fn a_volume_moves_to_another_host_with_what_was_written() {
    let cloud = Cloud::start(Shape::Hosts(2));
    cloud.import_tiny();
    let data = volume(&cloud, "data", &["--size", "4G"]);
    let mut known = Vec::new();
    // One after the other, so that the second goes where there is more room.
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let first_host = cloud.instance("a")["host_id"].as_str().unwrap().to_owned();
    let mut guest = shell(&cloud, "a");
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    for at in [0, 100, 4000] {
        known.push((at, fill(&mut guest, &device, at, &format!("at{at}"))));
    }
    cloud.hearth(&["volume", "detach", "data", "--yes", "--wait"]);
    cloud.hearth(&["host", "drain", &first_host]);
    // The other host has all of the image before anything is launched there.
    let image = describe(&cloud, "image", "tiny");
    let snapshot = image["block_device_mappings"][0]["snapshot_id"].as_str().unwrap_or_else(|| panic!("{image:#}"));
    let hosts = cloud.json(&["host", "list"]);
    let names = hosts.as_array().unwrap().iter().filter(|host| host["host_id"] != *first_host);
    let name = names.map(|host| host["name"].as_str().unwrap()).next().unwrap();
    cloud.hearth(&["snapshot", "fast-restore", "enable", snapshot, "--host", name, "--wait"]);
    let restored = cloud.json(&["snapshot", "fast-restore", "list", snapshot]);
    assert_eq!((&restored[0]["state"], &restored[0]["progress"]), (&"enabled".into(), &100.into()), "{restored:#}");
    let mut other = run(&cloud, "tiny", "b");
    assert_ne!(cloud.instance("b")["host_id"], *first_host);
    cloud.hearth(&["volume", "attach", "data", "b", "--wait"]);
    let device = disk(&mut other, &data);
    for (at, checksum) in &known {
        assert_eq!(sum(&mut other, &device, *at), *checksum, "at {at} MiB");
    }
    // What is written there counts on the way back too.
    known[1].1 = fill(&mut other, &device, 100, "there");
    cloud.hearth(&["volume", "detach", "data", "--yes", "--wait"]);
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    for (at, checksum) in &known {
        assert_eq!(sum(&mut guest, &device, *at), *checksum, "at {at} MiB, back again");
    }
    cloud.hearth(&["instance", "terminate", "a", "b", "--yes", "--wait"]);
    cloud.hearth(&["volume", "delete", "data", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn an_image_of_an_instance_holds_all_its_volumes() {
    let cloud = Cloud::start(Shape::One);
    cloud.import_tiny();
    let run_with =
        ["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "-b", "device=/dev/sdf,size=1G", "--wait"];
    cloud.hearth(&run_with);
    let mut guest = shell(&cloud, "a");
    let about = cloud.instance("a");
    let data = about["block_devices"][1]["volume_id"].as_str().unwrap_or_else(|| panic!("{about:#}")).to_owned();
    let device = disk(&mut guest, &data);
    let checksum = fill(&mut guest, &device, 7, "data");
    guest.run("echo rooted > /root/file; sync");
    cloud.hearth(&["image", "create", "a", "--name", "live", "--no-reboot", "--wait"]);
    guest.run("echo later > /root/file; sync");
    drop(guest);
    cloud.hearth(&["image", "create", "a", "--name", "rebooted", "--wait"]);
    for (image, content) in [("live", "rooted"), ("rebooted", "later")] {
        let mut copy = run(&cloud, image, image);
        assert_eq!(copy.run("cat /root/file"), content, "{image}");
        let about = cloud.instance(image);
        let id = about["block_devices"][1]["volume_id"].as_str().unwrap_or_else(|| panic!("{about:#}")).to_owned();
        let device = disk(&mut copy, &id);
        assert_eq!(sum(&mut copy, &device, 7), checksum, "{image}");
    }
    // An image in use by instances may be deregistered; its snapshots belong to it until then.
    let image = describe(&cloud, "image", "live");
    let snapshot =
        image["block_device_mappings"][0]["snapshot_id"].as_str().unwrap_or_else(|| panic!("{image:#}")).to_owned();
    let (code, said) = cloud.try_hearth(&["snapshot", "delete", &snapshot, "--yes"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("InvalidSnapshot.InUse"), "{said}");
    cloud.hearth(&["image", "deregister", "live", "--yes"]);
    cloud.hearth(&["snapshot", "delete", &snapshot, "--yes"]);
    cloud.hearth(&["instance", "terminate", "a", "live", "rebooted", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn what_a_guest_has_flushed_outlives_killed_vmms_and_agents() {
    let mut cloud = Cloud::start(Shape::Apart);
    cloud.import_tiny();
    let mut guest = run(&cloud, "tiny", "a");
    let data = volume(&cloud, "data", &["--size", "1G"]);
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    let before = fill(&mut guest, &device, 1, "before");

    // Another agent takes over; the guest's disks go on, also those parts that have to be fetched first.
    let later = "yes without | head -c 4194304 | dd of=DEVICE bs=1M seek=20 conv=fsync,notrunc; touch /tmp/done";
    guest.run(&format!("(sleep 4; {}) >/dev/null 2>&1 & true", later.replace("DEVICE", &device)));
    cloud.kill_agent(0);
    drop(guest);
    std::thread::sleep(Duration::from_secs(6));
    cloud.start_agent(0);
    cloud.wait_for_hosts(1);
    let mut guest = shell(&cloud, "a");
    assert!(wait_until(PATIENCE, || guest.try_run("test -e /tmp/done").1 == 0), "the guest's disk stands still");
    let without = guest.run("yes without | head -c 4194304 | md5sum");
    assert_eq!((sum(&mut guest, &device, 1), sum(&mut guest, &device, 20)), (before.clone(), without.clone()));
    guest.run("find / -xdev -type f -exec md5sum {} + >/dev/null; true");
    cloud.hearth(&["snapshot", "create", "data", "--name", "s", "--wait"]);
    let other = volume(&cloud, "other", &["--snapshot", "s"]);
    cloud.hearth(&["volume", "attach", "other", "a", "--wait"]);
    let device = disk(&mut guest, &other);
    assert_eq!((sum(&mut guest, &device, 1), sum(&mut guest, &device, 20)), (before.clone(), without.clone()));

    // A VMM dies in the middle of writing; the instance starts again with all that had been flushed.
    guest.send(&format!("while true; do dd if=/dev/urandom of={device} bs=1M seek=200 count=100 conv=notrunc; done"));
    std::thread::sleep(Duration::from_secs(1));
    let pids = cloud.vmm_pids();
    for pid in &pids {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    drop(guest);
    let again =
        || cloud.instance("a")["state"] == "running" && !cloud.vmm_pids().is_empty() && cloud.vmm_pids() != pids;
    assert!(wait_until(PATIENCE, again), "it does not start again");
    let mut guest = shell(&cloud, "a");
    for id in [&data, &other] {
        let device = disk(&mut guest, id);
        assert_eq!((sum(&mut guest, &device, 1), sum(&mut guest, &device, 20)), (before.clone(), without.clone()));
    }
    // Snapshots after a crash are whole as well.
    cloud.hearth(&["snapshot", "create", "other", "--name", "t", "--wait"]);
    let third = volume(&cloud, "third", &["--snapshot", "t"]);
    cloud.hearth(&["volume", "attach", "third", "a", "--wait"]);
    let device = disk(&mut guest, &third);
    assert_eq!((sum(&mut guest, &device, 1), sum(&mut guest, &device, 20)), (before, without));
    cloud.hearth(&["storage", "verify"]);
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn a_snapshot_outlives_its_control_plane_and_its_instance() {
    let mut cloud = Cloud::start(Shape::Apart);
    cloud.import_tiny();
    let mut guest = run(&cloud, "tiny", "a");
    let data = volume(&cloud, "data", &["--size", "1G"]);
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    guest.run(&format!("dd if=/dev/urandom of={device} bs=1M count=8 conv=fsync,notrunc 2>/dev/null"));
    let sum =
        |guest: &mut Console, device: &str| guest.run(&format!("dd if={device} bs=1M count=8 2>/dev/null | md5sum"));
    let before = sum(&mut guest, &device);
    cloud.hearth(&["snapshot", "create", "data", "--name", "s"]);
    // Its point in time is fixed; the upload has hardly begun.
    cloud.kill_control();
    drop(guest);
    cloud.start_control();
    cloud.wait_for_hosts(1);
    let mut guest = shell(&cloud, "a");
    fill(&mut guest, &device, 2, "later");
    cloud.hearth(&["snapshot", "create", "data", "--name", "t"]);
    drop(guest);
    cloud.hearth(&["instance", "stop", "a", "--force", "--wait"]);
    cloud.hearth(&["instance", "start", "a", "--wait"]);
    let mut guest = shell(&cloud, "a");
    guest.run(&format!("yes after | head -c 8388608 >{device}; sync"));
    for name in ["s", "t"] {
        let complete = || match describe(&cloud, "snapshot", name)["state"].as_str() {
            Some("error") => panic!("{:#}", describe(&cloud, "snapshot", name)),
            state => state == Some("completed"),
        };
        assert!(wait_until(PATIENCE, complete), "{name} does not complete");
    }
    let first = volume(&cloud, "first", &["--snapshot", "s"]);
    let second = volume(&cloud, "second", &["--snapshot", "t"]);
    for name in ["first", "second"] {
        cloud.hearth(&["volume", "attach", name, "a", "--wait"]);
    }
    let (first, second) = (disk(&mut guest, &first), disk(&mut guest, &second));
    assert_eq!(sum(&mut guest, &first), before);
    assert_ne!(sum(&mut guest, &second), before);
    assert_eq!(guest.run(&format!("dd if={second} bs=1M skip=2 count=1 2>/dev/null | head -c 5")), "later");
    cloud.hearth(&["storage", "verify"]);
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

/// Files below a folder, holes left out, in which this word stands on many lines.
fn files_with_lines_of(folder: &Path, word: &str) -> Vec<PathBuf> {
    use std::os::unix::fs::FileExt;
    let pattern = format!("{word}\n").repeat(4).into_bytes();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files_with_lines_of(&entry.path(), word));
        } else if kind.is_file() {
            let file = std::fs::File::open(entry.path()).unwrap();
            let (size, mut at) = (file.metadata().unwrap().len(), 0);
            while at < size {
                at = match nix::unistd::lseek(&file, at as i64, nix::unistd::Whence::SeekData) {
                    Ok(data) => data as u64,
                    Err(_) => break,
                };
                let mut piece = vec![0; (size - at).min(1 << 20) as usize];
                file.read_exact_at(&mut piece, at).unwrap();
                if piece.windows(pattern.len()).any(|part| part == pattern) {
                    found.push(entry.path());
                    break;
                }
                at += piece.len() as u64;
            }
        }
    }
    found
}

#[test]
fn an_encrypted_volume_is_nowhere_in_clear() {
    let mut cloud = Cloud::start(Shape::Hosts(2));
    cloud.import_tiny();
    cloud.hearth(&["image", "copy", "tiny", "--name", "sealed", "--encrypted", "--wait"]);
    let data = volume(&cloud, "data", &["--size", "1G", "--encrypted"]);
    let open = volume(&cloud, "open", &["--size", "1G"]);
    cloud.hearth(&["instance", "run", "sealed", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let host = cloud.instance("a")["host_id"].as_str().unwrap().to_owned();
    let number = usize::from(cloud.json(&["host", "list"])[1]["host_id"] == *host);
    let mut guest = shell(&cloud, "a");
    for name in ["data", "open"] {
        cloud.hearth(&["volume", "attach", name, "a", "--wait"]);
    }
    let device = disk(&mut guest, &data);
    let secret = fill(&mut guest, &device, 5, "confidential");
    guest.run("yes confidential | head -c 1000000 > /root/file; sync");
    let in_clear = disk(&mut guest, &open);
    fill(&mut guest, &in_clear, 5, "printed");

    // Another agent takes over, as after a boot of its host without the keys: they come with the session.
    cloud.kill_agent(number);
    drop(guest);
    std::fs::remove_file(cloud.run_dir(number).join(".keys")).unwrap();
    cloud.start_agent(number);
    cloud.wait_for_hosts(2);
    let mut guest = shell(&cloud, "a");
    assert_eq!(sum(&mut guest, &device, 5), secret);

    // Its snapshot, and a volume of that.
    cloud.hearth(&["snapshot", "create", "data", "--name", "s", "--wait"]);
    assert_eq!(describe(&cloud, "snapshot", "s")["encrypted"], true);
    let copy = volume(&cloud, "copy", &["--snapshot", "s"]);
    assert_eq!(describe(&cloud, "volume", "copy")["encrypted"], true);
    cloud.hearth(&["volume", "attach", "copy", "a", "--wait"]);
    let copied = disk(&mut guest, &copy);
    assert_eq!(sum(&mut guest, &copied, 5), secret);
    fill(&mut guest, &copied, 9, "confidential");

    // Stopped and started again, and moved to another host.
    cloud.hearth(&["volume", "detach", "data", "--yes", "--wait"]);
    drop(guest);
    cloud.hearth(&["instance", "stop", "a", "--wait"]);
    cloud.hearth(&["instance", "start", "a", "--wait"]);
    let mut guest = shell(&cloud, "a");
    assert_eq!(guest.run("sort -u /root/file | tail -n 1"), "confidential");
    cloud.hearth(&["host", "drain", &host]);
    let mut other = run(&cloud, "sealed", "b");
    cloud.hearth(&["volume", "attach", "data", "b", "--wait"]);
    let device = disk(&mut other, &data);
    assert_eq!(sum(&mut other, &device, 5), secret);

    // A search that finds what is in clear finds nothing of it.
    guest.run("sync");
    assert_ne!(files_with_lines_of(&cloud.path(""), "printed"), Vec::<PathBuf>::new());
    assert_eq!(files_with_lines_of(&cloud.path(""), "confidential"), Vec::<PathBuf>::new());
    cloud.hearth(&["storage", "verify"]);
    cloud.hearth(&["instance", "terminate", "a", "b", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}
