//! One-host clouds as their users see them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::process::Command;
use std::time::Duration;

use hearth_tests::cloud::{Cloud, Shape};
use hearth_tests::{debian_image, tiny_image};

/// How long a whole distribution may take to boot on an emulated CPU beside other guests.
const FULL_SYSTEM: Duration = Duration::from_secs(420);

#[test]
fn an_instance_lives_through_stop_start_reboot_power_off_and_terminate() {
    let cloud = Cloud::start(Shape::One);
    cloud.import_tiny();
    assert!(cloud.hearth(&["key-pair", "create", "me"]).contains("OPENSSH PRIVATE KEY"));
    let run = ["instance", "run", "tiny", "--type", "own.capped", "--name", "a", "--key-name", "me", "--wait=ok"];
    let disks = ["-b", "device=/dev/sdb,virtual=ephemeral0", "-b", "device=/dev/sdc,virtual=ephemeral1"];
    cloud.hearth(&[run.as_slice(), &disks].concat());
    let pids = cloud.vmm_pids();
    assert_eq!(pids.len(), 1);
    let jail: Vec<_> = std::fs::read_dir(format!("/proc/{}/root", pids[0])).unwrap().collect();
    assert!(jail.is_empty(), "the VMM sees {jail:?}");
    let group = std::fs::read_to_string(format!("/proc/{}/cgroup", pids[0])).unwrap();
    let limit = |name: &str| {
        let path = format!("/sys/fs/cgroup{}/{name}", group.trim().trim_start_matches("0::"));
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    // 128 MiB of guest memory, 1/64 of that for page tables, 128 MiB for the VMM.
    assert_eq!(limit("memory.max").trim(), (258u64 << 20).to_string());
    let quota: u64 =
        limit("cpu.max").trim().strip_suffix(" 100000").unwrap().parse().expect("a quota, from the type's ECU");
    assert!((1000..200_000).contains(&quota), "{quota}");
    let about = cloud.instance("a");
    assert_eq!(
        (&about["state"], &about["system_status"], &about["instance_status"]),
        (&"running".into(), &"ok".into(), &"ok".into())
    );

    let mut console = cloud.console("a");
    console.wait_for_shell();
    assert_eq!(console.run("imds meta-data/instance-id"), about["instance_id"].as_str().unwrap());
    assert!(console.run("imds meta-data/public-keys/0/openssh-key").starts_with("ssh-ed25519 "));
    let address = about["network_interfaces"][0]["private_ip_address"].as_str().unwrap();
    assert!(console.run("ip -4 address show eth0").contains(address));
    console.run("ping -c 1 -W 5 172.30.1.1");
    // Instance store: two empty disks that survive a reboot.
    assert_eq!(console.run("cat /sys/block/vdb/size /sys/block/vdc/size"), "2097152\n2097152");
    console.run("echo kept > /root/file; echo ephemeral | dd of=/dev/vdb conv=fsync; sync");
    cloud.hearth(&["instance", "reboot", "a"]);
    cloud.wait_for_output("a", "HEARTH-GUEST ready", 2);
    drop(console);
    let mut console = cloud.console("a");
    console.wait_for_shell();
    assert_eq!(console.run("cat /root/file; head -n 1 /dev/vdb"), "kept\nephemeral");
    drop(console);

    cloud.hearth(&["instance", "stop", "a", "--wait"]);
    let stopped = cloud.instance("a");
    assert_eq!(stopped["state"], "stopped");
    assert_eq!(stopped["state_reason"]["code"], "Client.UserInitiatedShutdown");
    assert!(cloud.vmm_pids().is_empty());
    // Pressed, not pulled: the guest saw its power button.
    assert!(cloud.hearth(&["instance", "console-output", "a"]).contains("HEARTH-GUEST power-button"));
    let (code, said) = cloud.try_hearth(&["instance", "reboot", "a"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("IncorrectInstanceState"), "{said}");

    cloud.hearth(&["instance", "start", "a", "--wait"]);
    cloud.wait_for_output("a", "HEARTH-GUEST ready", 1);
    let mut console = cloud.console("a");
    console.wait_for_shell();
    assert_eq!(console.run("cat /root/file; tr -d '\\0' </dev/vdb | wc -c"), "kept\n0");
    console.send("poweroff");
    cloud.wait_for_state("a", "stopped");
    assert_eq!(cloud.instance("a")["state_reason"]["code"], "Client.InstanceInitiatedShutdown");

    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    assert_eq!(cloud.json(&["instance", "list", "--all"])[0]["state"], "terminated");
    cloud.assert_nothing_left();
}

#[test]
fn debian_takes_its_key_and_user_data_and_lets_in() {
    let cloud = Cloud::start(Shape::One);
    cloud.hearth(&["image", "import", debian_image().to_str().unwrap(), "--name", "debian"]);
    let key = cloud.path("key");
    std::fs::write(&key, cloud.hearth(&["key-pair", "create", "me"])).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let user_data = cloud.path("user-data");
    std::fs::write(&user_data, "#cloud-config\npassword: hearth-secret\nchpasswd: {expire: false}\n").unwrap();
    let user_data = user_data.to_str().unwrap();
    let run = ["instance", "run", "debian", "--type", "h1.small", "--name", "d", "--key-name", "me"];
    cloud.hearth(&[run.as_slice(), &["--user-data", user_data, "--wait"]].concat());

    // The password came as user data; the console is a terminal that systemd's getty has opened.
    let mut console = cloud.console("d");
    console.wait_for_within(" login: ", FULL_SYSTEM);
    cloud.wait_for_output("d", " finished at ", 1);
    console.send("admin");
    console.wait_for("assword: ");
    console.send("hearth-secret");
    console.wait_for("admin@ip-");
    drop(console);

    let address = cloud.instance("d")["network_interfaces"][0]["private_ip_address"].as_str().unwrap().to_owned();
    let ssh = Command::new("ssh")
        .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-i"])
        .arg(&key)
        .args([&format!("admin@{address}"), "hostname; cat /var/lib/cloud/data/instance-id"])
        .output()
        .unwrap();
    let (said, complained) = (String::from_utf8_lossy(&ssh.stdout), String::from_utf8_lossy(&ssh.stderr));
    let id = cloud.instance("d")["instance_id"].as_str().unwrap().to_owned();
    assert_eq!(said.trim(), format!("ip-{}\n{id}", address.replace('.', "-")), "{complained}");

    // systemd shuts down at the power button.
    cloud.hearth(&["instance", "stop", "d", "--wait"]);
    assert_eq!(cloud.instance("d")["state_reason"]["code"], "Client.UserInitiatedShutdown");
    cloud.hearth(&["instance", "terminate", "d", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn twenty_instances_start_at_once() {
    let cloud = Cloud::start(Shape::One);
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--count", "20", "--wait=ok", "--timeout", "9min"]);
    let list = cloud.json(&["instance", "list"]);
    let list = list.as_array().unwrap();
    assert_eq!(list.iter().filter(|i| i["state"] == "running" && i["instance_status"] == "ok").count(), 20);
    let mut addresses: Vec<_> =
        list.iter().map(|i| i["network_interfaces"][0]["private_ip_address"].as_str().unwrap()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), 20);
    assert_eq!(cloud.vmm_pids().len(), 20);
    let ids: Vec<_> = list.iter().map(|i| i["instance_id"].as_str().unwrap()).collect();
    cloud.hearth(&[&["instance", "terminate", "--yes", "--wait"], ids.as_slice()].concat());
    cloud.assert_nothing_left();
}

#[test]
fn bad_input_is_refused_in_words_and_harms_nothing() {
    let cloud = Cloud::start(Shape::One);
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(cloud.path(name), bytes).unwrap();
        cloud.path(name).to_str().unwrap().to_owned()
    };
    let refused = |arguments: &[&str], code: i32, word: &str| {
        let (got, said) = cloud.try_hearth(arguments);
        assert_eq!(got, Some(code), "hearth {}: {said}", arguments.join(" "));
        assert!(said.contains(word), "hearth {}: {said}", arguments.join(" "));
    };
    let mut garbage = b"QFI\xfb\0\0\0\x03".to_vec();
    garbage.extend([0xa5; 4096]);
    refused(&["image", "import", &write("bad.qcow2", &garbage), "--name", "bad"], 1, "qcow2");
    refused(&["instance", "run", "i-0123456789abcdef0"], 3, "image");
    refused(&["instance", "describe", "i-0123456789abcdef0"], 3, "i-0123456789abcdef0");
    refused(&["instance", "list", "--token", "hearth_wrong"], 1, "token");

    // An image that holds nothing to boot, and one cut short of its kernel (volumes are whole GiB, zeros behind the image).
    let whole = std::fs::read(tiny_image()).unwrap();
    cloud.hearth(&["image", "import", &write("empty.raw", &vec![0u8; 4 << 20]), "--name", "empty"]);
    cloud.hearth(&["image", "import", &write("cut.raw", &whole[..whole.len() / 50]), "--name", "cut"]);
    for name in ["empty", "cut"] {
        cloud.try_hearth(&["instance", "run", name, "--type", "h1.tiny", "--name", name, "--wait"]);
        cloud.wait_for_state(name, "terminated");
        let reason = &cloud.instance(name)["state_reason"];
        assert_eq!(reason["code"], "Client.InvalidImage", "{reason}");
    }
    refused(&["instance", "run", "empty", "--type", "m5.8xlarge"], 4, "memory");
    refused(&["instance", "run", "empty", "--type", "no.such"], 2, "no.such");
    refused(&["instance", "run", "empty", "--user-data", &write("big", &vec![b'x'; 20_000])], 2, "16");

    // The cloud still works.
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "good", "--wait"]);
    cloud.hearth(&["instance", "terminate", "good", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}
