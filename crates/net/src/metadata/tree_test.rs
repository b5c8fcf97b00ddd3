use super::*;
use crate::Nic;

fn instance() -> InstanceMetadata {
    InstanceMetadata {
        instance_id: "i-0123456789abcdef0".parse().unwrap(),
        image_id: "ami-0123456789abcdef0".into(),
        instance_type: "t3.micro".into(),
        account_id: "000000000001".into(),
        reservation_id: "r-0123456789abcdef0".into(),
        ami_launch_index: 3,
        availability_zone: "local-1a".into(),
        region: "local-1".into(),
        launch_time: "2026-01-01T00:00:00Z".into(),
        public_key: Some(("me".into(), "ssh-ed25519 AAAA me".into())),
        user_data: Some(b"#!/bin/sh\n\xff".to_vec()),
        tags: vec![("Name".into(), "web".into()), ("a/b".into(), "cannot be a path".into())],
        nics: vec![Nic { device_index: 0, mac: [2, 0, 0, 0, 0, 5], ipv4: "172.31.0.5".parse().unwrap(), mtu: 1500 }],
    }
}

fn get(path: &str) -> Option<String> {
    let body = lookup(&instance(), "172.31.0.0/20".parse().unwrap(), path)?;
    Some(String::from_utf8_lossy(&body).into_owned())
}

#[test]
fn what_cloud_init_reads_is_there() {
    assert!(get("/").unwrap().lines().any(|line| line == "2021-03-23"));
    assert_eq!(get("/2021-03-23/meta-data/instance-id").unwrap(), "i-0123456789abcdef0");
    assert_eq!(get("/latest/meta-data/public-keys/").unwrap(), "0=me");
    assert_eq!(get("/latest/meta-data/public-keys/0/").unwrap(), "openssh-key");
    assert_eq!(get("/latest/meta-data/public-keys/0/openssh-key").unwrap(), "ssh-ed25519 AAAA me");
    assert_eq!(get("/latest/meta-data/local-hostname").unwrap(), "ip-172-31-0-5");
    assert_eq!(get("/latest/meta-data/network/interfaces/macs/").unwrap(), "02:00:00:00:00:05/");
    assert_eq!(
        get("/latest/meta-data/network/interfaces/macs/02:00:00:00:00:05/subnet-ipv4-cidr-block").unwrap(),
        "172.31.0.0/20"
    );
    let document: serde_json::Value =
        serde_json::from_str(&get("/latest/dynamic/instance-identity/document").unwrap()).unwrap();
    assert_eq!(document["instanceId"], "i-0123456789abcdef0");
}

#[test]
fn user_data_is_given_byte_by_byte() {
    let body = lookup(&instance(), "172.31.0.0/20".parse().unwrap(), "/latest/user-data").unwrap();
    assert_eq!(body, b"#!/bin/sh\n\xff");
    let without = InstanceMetadata { user_data: None, ..instance() };
    assert!(lookup(&without, "172.31.0.0/20".parse().unwrap(), "/latest/user-data").is_none());
}

#[test]
fn folders_list_their_entries() {
    let listing = get("/latest/meta-data/").unwrap();
    assert!(listing.lines().any(|line| line == "placement/"));
    assert!(listing.lines().any(|line| line == "ami-id"));
    assert_eq!(get("/latest/meta-data/tags/instance").unwrap(), "Name");
    assert_eq!(get("/latest/meta-data").unwrap(), listing);
}

#[test]
fn unknown_paths_are_not_found() {
    for path in
        ["/2001-01-01/meta-data/", "/latestx", "/latest/meta-data/nothing", "/latest/meta-data/ami-id/x", "latest"]
    {
        assert_eq!(get(path), None, "{path}");
    }
}

proptest::proptest! {
    #[test]
    fn any_path_is_survived(path in "[/a-z0-9.%-]{0,60}") {
        let _ = get(&path);
    }
}
