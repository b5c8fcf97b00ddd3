//! Instance-store-backed AMIs, root volumes that are replaced, and images kept as one object, as their users see them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hearth_tests::cloud::{Cloud, Shape, kill_now, wait_until};
use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::tiny_image;

fn shell(cloud: &Cloud, name: &str) -> Console {
    let mut console = cloud.console(name);
    console.wait_for_shell();
    console
}

/// Waits for the bundle and registers an image of it.
fn register(cloud: &Cloud, bundle: &str, name: &str) {
    let about = cloud.json(&["bundle", "describe", bundle]);
    let location = about["image_location"].as_str().unwrap_or_else(|| panic!("{about:#}"));
    cloud.hearth(&["image", "register", "--location", location, "--name", name]);
    let image = cloud.json(&["image", "describe", name]);
    assert_eq!(image["root_device_type"], "instance-store", "{image:#}");
}

#[test]
fn an_instance_store_backed_instance_lives_once_and_is_bundled() {
    let cloud = Cloud::start(Shape::Apart);
    cloud.import_tiny();
    let first = cloud.hearth(&["bundle", "create", "--image", "tiny", "first", "--wait", "-o", "id"]);
    register(&cloud, first.trim(), "ephemeral");
    cloud.hearth(&["instance", "run", "ephemeral", "--type", "own.capped", "--name", "a", "--wait"]);
    let mut guest = shell(&cloud, "a");
    // The type's instance-store disks are there without being asked for.
    assert_eq!(guest.run("cat /sys/block/vdb/size /sys/block/vdc/size"), "2097152\n2097152");
    guest.run("echo bundled > /root/file; sync");
    // There is nothing to stop: its root would be gone.
    let (code, said) = cloud.try_hearth(&["instance", "stop", "a"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("UnsupportedOperation"), "{said}");
    // It lives through a reboot, and is packed as it is at one moment while it runs.
    cloud.hearth(&["instance", "reboot", "a"]);
    cloud.wait_for_output("a", "HEARTH-GUEST ready", 2);
    drop(guest);
    let mut guest = shell(&cloud, "a");
    assert_eq!(guest.run("cat /root/file"), "bundled");
    let second = cloud.hearth(&["bundle", "create", "--instance", "a", "second", "--wait", "-o", "id"]);
    guest.run("echo later > /root/file; sync");
    register(&cloud, second.trim(), "again");
    cloud.hearth(&["instance", "run", "again", "--type", "h1.tiny", "--name", "b", "--wait"]);
    let mut other = shell(&cloud, "b");
    assert_eq!(other.run("cat /root/file"), "bundled");
    // Powered off from inside it is gone for good.
    other.send("poweroff");
    cloud.wait_for_state("b", "terminated");
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn a_root_volume_is_replaced_and_an_image_comes_back_from_its_archive() {
    let cloud = Cloud::start(Shape::One);
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let mut guest = shell(&cloud, "a");
    guest.run("echo old > /root/file; sync");
    let address = cloud.instance("a")["network_interfaces"][0]["private_ip_address"].clone();
    let root = cloud.instance("a")["block_devices"][0]["volume_id"].clone();
    drop(guest);
    cloud.hearth(&["instance", "replace-root", "a", "--delete-replaced", "--wait"]);
    let about = cloud.instance("a");
    assert_eq!(about["network_interfaces"][0]["private_ip_address"], address);
    assert_ne!(about["block_devices"][0]["volume_id"], root);
    let mut guest = shell(&cloud, "a");
    assert_eq!(guest.run("ls /root; echo new > /root/file; sync"), "");
    let gone = || cloud.json(&["volume", "list"]).as_array().is_some_and(|volumes| volumes.len() == 1);
    assert!(wait_until(PATIENCE, gone), "the replaced volume is still there");

    cloud.hearth(&["image", "create", "a", "--name", "mine", "--no-reboot", "--wait"]);
    cloud.hearth(&["image", "store", "mine", "--wait"]);
    let tasks = cloud.json(&["image", "store-tasks"]);
    let object = tasks[0]["object_key"].as_str().unwrap_or_else(|| panic!("{tasks:#}")).to_owned();
    cloud.hearth(&["image", "deregister", "mine", "--yes"]);
    cloud.hearth(&["image", "restore", &object, "--name", "restored", "--wait"]);
    cloud.hearth(&["instance", "run", "restored", "--type", "h1.tiny", "--name", "b", "--wait"]);
    let mut copy = shell(&cloud, "b");
    assert_eq!(copy.run("cat /root/file"), "new");
    cloud.hearth(&["storage", "verify"]);
    cloud.hearth(&["instance", "terminate", "a", "b", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

/// The tiny image with noise behind it, which takes its time to be sent and is in no object store yet.
fn long_disk(cloud: &Cloud, name: &str, seed: u32) -> PathBuf {
    let disk = cloud.path(name);
    let copied = Command::new("cp").arg("--sparse=always").arg(tiny_image()).arg(&disk).status().unwrap();
    assert!(copied.success());
    let mut file = std::fs::OpenOptions::new().append(true).open(&disk).unwrap();
    let mut state = seed;
    for _ in 0..96 {
        let mut noise = Vec::with_capacity(1 << 20);
        while noise.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            noise.extend_from_slice(&state.to_le_bytes());
        }
        file.write_all(&noise).unwrap();
    }
    disk
}

fn size(file: &Path) -> u64 {
    std::fs::metadata(file).unwrap().len()
}

/// Size of the file that an upload is collected in.
fn spooled(cloud: &Cloud) -> Option<u64> {
    let mut entries = std::fs::read_dir(cloud.path("state/control/spool")).into_iter().flatten().flatten();
    entries.next().and_then(|entry| entry.metadata().ok()).map(|metadata| metadata.len())
}

/// Waits for a moment that does not stay long.
fn catch(call: &mut Child, what: &str, is_now: impl Fn() -> bool) {
    while !is_now() {
        assert!(call.try_wait().unwrap().is_none(), "{what}: it was over before that was seen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Most of the file has come, and was made durable more than once; the end has not.
fn catch_upload(cloud: &Cloud, call: &mut Child, file: &Path) {
    let whole = size(file);
    catch(call, "upload", || spooled(cloud).is_some_and(|bytes| bytes > whole * 3 / 4 && bytes < whole - (8 << 20)));
}

fn import(cloud: &Cloud, file: &Path, name: &str) -> Child {
    let arguments = ["image", "import", file.to_str().unwrap(), "--name", name, "-o", "id"];
    cloud.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The image of a call that has ended well, and what it said meanwhile.
fn ended(call: Child) -> (String, String) {
    let output = call.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    (out.trim().to_owned(), err.into_owned())
}

fn assert_same(cloud: &Cloud, image: &str, disk: &Path) {
    let back = cloud.path("back.raw");
    cloud.hearth(&["image", "export", image, back.to_str().unwrap(), "--overwrite"]);
    let compared = Command::new("cmp").arg(disk).arg(&back).status().unwrap();
    assert!(compared.success(), "{image} is not what was imported");
}

#[test]
fn imports_outlive_every_end_of_control_plane_and_client() {
    let mut cloud = Cloud::start(Shape::Apart);
    let raw = long_disk(&cloud, "disk.raw", 1);
    // The control plane is killed in mid-upload and again in mid-conversion; the one command brings the image all the same.
    let mut call = import(&cloud, &raw, "first");
    catch_upload(&cloud, &mut call, &raw);
    cloud.kill_control();
    cloud.start_control();
    let chunks = cloud.path("state/control/objects/chunk");
    catch(&mut call, "conversion", || chunks.exists() && spooled(&cloud) == Some(size(&raw)));
    cloud.kill_control();
    cloud.start_control();
    let (first, said) = ended(call);
    assert!(said.contains("reconnecting") && said.contains("resuming at "), "{said}");
    assert_same(&cloud, &first, &raw);

    // The same in another format, whose content is in the object store by now.
    let qcow2 = cloud.path("disk.qcow2");
    cloud.hearth(&["image", "export", &first, qcow2.to_str().unwrap()]);
    let mut call = import(&cloud, &qcow2, "second");
    catch_upload(&cloud, &mut call, &qcow2);
    cloud.kill_control();
    cloud.start_control();
    let (second, said) = ended(call);
    assert!(said.contains("reconnecting") && said.contains("resuming at "), "{said}");
    assert_same(&cloud, &second, &raw);

    // The client is killed, and the command repeated.
    let other = long_disk(&cloud, "other.raw", 2);
    let mut call = import(&cloud, &other, "third");
    catch_upload(&cloud, &mut call, &other);
    kill_now(&mut call);
    let mut about = cloud.json(&["image", "describe", "third"]);
    let waits = wait_until(PATIENCE, || {
        about = cloud.json(&["image", "describe", "third"]);
        about["upload_expires"].as_str().is_some_and(|time| !time.is_empty())
    });
    assert!(waits && about["state"] == "pending", "{about:#}");
    let had = about["progress"]["done_bytes"].as_u64().unwrap();
    assert!(had > size(&other) / 2 && had < size(&other), "{about:#}");
    let (third, said) = ended(import(&cloud, &other, "third"));
    assert!(said.contains("resuming at "), "{said}");
    assert_eq!(about["image_id"].as_str(), Some(third.as_str()));
    assert_same(&cloud, &third, &other);

    // One that is given up leaves nothing, and a guest boots from one that was not.
    let last = long_disk(&cloud, "last.raw", 3);
    let mut call = import(&cloud, &last, "fourth");
    catch_upload(&cloud, &mut call, &last);
    kill_now(&mut call);
    cloud.hearth(&["image", "deregister", "fourth", "--yes"]);
    assert_eq!(spooled(&cloud), None);
    assert_eq!(cloud.json(&["image", "list"]).as_array().map(Vec::len), Some(3));
    cloud.hearth(&["storage", "verify"]);
    cloud.hearth(&["instance", "run", "second", "--type", "h1.tiny", "--name", "a", "--wait=ok"]);
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}
