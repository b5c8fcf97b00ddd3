//! `kill -9` of every process of hearth while instances run and calls go on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeSet;
use std::time::Duration;

use hearth_tests::cloud::{Cloud, Shape, wait_until};
use hearth_tests::console::PATIENCE;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn daemons_die_and_come_back_and_no_guest_notices() {
    let mut cloud = Cloud::start(Shape::Apart);
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait=ok"]);
    let pids = cloud.vmm_pids();
    assert_eq!(pids.len(), 1);

    cloud.kill_agent(0);
    assert_eq!(cloud.vmm_pids(), pids, "the VMM went with its agent");
    cloud.start_agent(0);
    cloud.wait_for_hosts(1);
    let mut console = cloud.console("a");
    console.wait_for_shell();
    console.run("test $(cut -d . -f 1 /proc/uptime) -gt 0");
    drop(console);

    cloud.kill_control();
    assert_eq!(cloud.vmm_pids(), pids);
    cloud.start_control();
    cloud.wait_for_hosts(1);
    assert_eq!(cloud.instance("a")["state"], "running");

    cloud.kill_control();
    cloud.kill_agent(0);
    cloud.start_control();
    cloud.start_agent(0);
    cloud.wait_for_hosts(1);
    assert_eq!(cloud.vmm_pids(), pids, "still the same VMM after all of this");
    assert_eq!(cloud.hearth(&["instance", "console-output", "a"]).matches("HEARTH-GUEST ready").count(), 1);

    // Stopped while nobody watched the guest: the daemon is told on its return.
    cloud.hearth(&["instance", "stop", "a"]);
    cloud.kill_agent(0);
    cloud.start_agent(0);
    cloud.wait_for_state("a", "stopped");
    assert!(cloud.vmm_pids().is_empty());
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn a_killed_vmm_is_noticed_and_its_instance_runs_again_once() {
    let cloud = Cloud::start(Shape::One);
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait=ok"]);
    let pids = cloud.vmm_pids();
    kill(Pid::from_raw(pids[0]), Signal::SIGKILL).unwrap();
    assert!(wait_until(PATIENCE, || {
        let now = cloud.vmm_pids();
        now.len() == 1 && now != pids
    }));
    cloud.wait_for_output("a", "HEARTH-GUEST ready", 1);
    cloud.wait_for_state("a", "running");
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}

#[test]
fn no_acknowledged_call_is_lost_and_no_instance_doubled() {
    let mut cloud = Cloud::start(Shape::Apart);
    cloud.import_tiny();
    // A small generator, so that a failing run can be repeated from the number it prints.
    let mut seed = std::env::var("HEARTH_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(std::process::id() as u64);
    println!("HEARTH_SEED={seed}");
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let mut acknowledged = Vec::new();
    let mut terminated = Vec::new();
    for round in 0..6 {
        let token = format!("round-{round}");
        let name = format!("n{round}");
        let arguments =
            ["instance", "run", "tiny", "--type", "h1.tiny", "--name", &name, "--client-token", &token, "-o", "id"];
        let call = cloud.command(&arguments).stdout(std::process::Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(next(1500)));
        match next(3) {
            0 => {
                cloud.kill_control();
                cloud.start_control();
            }
            1 => {
                cloud.kill_agent(0);
                cloud.start_agent(0);
            }
            _ => {
                if let Some(pid) = cloud.vmm_pids().first() {
                    let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
                }
            }
        }
        let output = call.wait_with_output().unwrap();
        cloud.wait_for_hosts(1);
        // Whatever became of the first call, the same token names the same instance.
        let id = cloud.hearth(&arguments).trim().to_owned();
        if output.status.success() {
            assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), id, "an acknowledged call was lost");
        }
        acknowledged.push(id);
        if round % 3 == 2 {
            let id = acknowledged.remove(0);
            cloud.hearth(&["instance", "terminate", &id, "--yes"]);
            terminated.push(id);
        }
    }
    for id in &acknowledged {
        cloud.wait_for_state(id, "running");
    }
    for id in &terminated {
        cloud.wait_for_state(id, "terminated");
    }
    // One instance per acknowledged call, and none besides.
    let list = cloud.json(&["instance", "list", "--all"]);
    let known: BTreeSet<&str> =
        list.as_array().unwrap().iter().map(|instance| instance["instance_id"].as_str().unwrap()).collect();
    assert_eq!(known, acknowledged.iter().chain(&terminated).map(String::as_str).collect());
    assert!(wait_until(PATIENCE, || cloud.vmm_pids().len() == acknowledged.len()), "{:?}", cloud.vmm_pids());
    let ids: Vec<&str> = acknowledged.iter().map(String::as_str).collect();
    cloud.hearth(&[&["instance", "terminate", "--yes", "--wait"], ids.as_slice()].concat());
    cloud.assert_nothing_left();
}
