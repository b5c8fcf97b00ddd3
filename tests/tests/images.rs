//! Instance-store-backed AMIs, root volumes that are replaced, and images kept as one object, as their users see them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use hearth_tests::cloud::{Cloud, Shape, wait_until};
use hearth_tests::console::{Console, PATIENCE};

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
