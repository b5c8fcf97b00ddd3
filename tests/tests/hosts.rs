//! Several hosts in one testbed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeSet;

use hearth_tests::cloud::{Cloud, Shape, wait_until};
use hearth_tests::console::PATIENCE;

fn hosts_of(cloud: &Cloud, names: &[&str]) -> Vec<String> {
    names.iter().map(|name| cloud.instance(name)["host_id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn three_hosts_spread_pack_drain_and_die() {
    let mut cloud = Cloud::start(Shape::Hosts(3));
    cloud.import_tiny();
    let run = |name: &str, more: &[&str]| {
        cloud.hearth(&[&["instance", "run", "tiny", "--type", "h1.tiny", "--name", name], more].concat());
    };
    for name in ["s0", "s1", "s2"] {
        run(name, &["--spread-group", "web"]);
    }
    assert_eq!(hosts_of(&cloud, &["s0", "s1", "s2"]).into_iter().collect::<BTreeSet<_>>().len(), 3);
    let (code, said) = cloud.try_hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--spread-group", "web"]);
    assert_eq!(code, Some(4), "{said}");
    run("p0", &[]);
    run("p1", &[]);
    let packed = hosts_of(&cloud, &["p0", "p1"]);
    assert_eq!(packed[0], packed[1], "packing filled two hosts");

    cloud.hearth(&["host", "drain", &packed[0]]);
    run("p2", &[]);
    assert_ne!(hosts_of(&cloud, &["p2"])[0], packed[0], "a drained host got an instance");
    for name in ["s0", "s1", "s2", "p0", "p1", "p2"] {
        cloud.wait_for_state(name, "running");
    }

    // A dead host is seen and reported, and its instance is not started elsewhere.
    let names: Vec<String> = cloud
        .json(&["host", "list"])
        .as_array()
        .unwrap()
        .iter()
        .map(|host| host["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 3);
    let before = cloud.vmm_pids().len();
    cloud.kill_agent(0);
    let silent = || {
        let hosts = cloud.json(&["host", "list"]);
        hosts.as_array().unwrap().iter().any(|host| host["name"] == "host0" && host["connected"] == false)
    };
    assert!(wait_until(PATIENCE, silent), "the dead host is not reported");
    let lost = cloud.json(&["host", "describe", "host0"])["host_id"].clone();
    let of_lost: Vec<_> =
        ["s0", "s1", "s2"].into_iter().filter(|name| cloud.instance(name)["host_id"] == lost).collect();
    assert_eq!(of_lost.len(), 1);
    assert!(wait_until(PATIENCE, || cloud.instance(of_lost[0])["system_status"] == "impaired"));
    assert_eq!(cloud.vmm_pids().len(), before, "an instance was started twice");

    cloud.start_agent(0);
    cloud.wait_for_hosts(3);
    assert!(wait_until(PATIENCE, || cloud.instance(of_lost[0])["system_status"] == "ok"));
    cloud.hearth(&["instance", "terminate", "s0", "s1", "s2", "p0", "p1", "p2", "--yes", "--wait"]);
    cloud.assert_nothing_left();
}
