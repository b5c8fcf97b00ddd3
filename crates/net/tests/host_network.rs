//! A real bridge with its rules, DHCP server and taps, in a network namespace of its own. Needs root and nft.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::{Duration, Instant};

use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode};
use dhcproto::{Decodable, Decoder, Encodable};
use hearth_net::{HostNetwork, HostNetworkConfig, InstanceMetadata, Nic, NicConfig, tap_name};
use hearth_types::InstanceId;

const VNET_HEADER: usize = 10;
const GUEST: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 5);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];

/// Runs the test on a thread that has a network namespace of its own.
fn in_own_network<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("this test needs root");
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    })
    .join()
    .unwrap();
}

fn config() -> HostNetworkConfig {
    HostNetworkConfig {
        bridge: "hearth0".into(),
        instance_cidr: "172.31.0.0/20".parse().unwrap(),
        nat: true,
        dns: vec![],
    }
}

fn metadata(id: &InstanceId) -> InstanceMetadata {
    InstanceMetadata {
        instance_id: id.clone(),
        image_id: "ami-0123456789abcdef0".into(),
        instance_type: "t3.micro".into(),
        account_id: "000000000001".into(),
        reservation_id: "r-0123456789abcdef0".into(),
        ami_launch_index: 0,
        availability_zone: "local-1a".into(),
        region: "local-1".into(),
        launch_time: "2026-01-01T00:00:00Z".into(),
        public_key: None,
        user_data: None,
        tags: vec![],
        nics: vec![Nic { device_index: 0, mac: MAC, ipv4: GUEST, mtu: 1500 }],
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    !(((sum & 0xffff) + (sum >> 16)) as u16 + ((((sum & 0xffff) + (sum >> 16)) >> 16) as u16))
}

/// A DHCP DISCOVER as a frame behind a virtio-net header, sent from `mac` for `mac`.
fn discover(mac: [u8; 6]) -> Vec<u8> {
    let mut message = Message::default();
    message.set_opcode(Opcode::BootRequest).set_chaddr(&mac).set_xid(7);
    message.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
    let payload = message.to_vec().unwrap();
    let udp_length = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    ip[2..4].copy_from_slice(&(20 + udp_length).to_be_bytes());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0u8; VNET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend([0, 68, 0, 67]);
    frame.extend(udp_length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// Waits for a DHCP message on the tap.
async fn receive(tap: &mut File, patience: Duration) -> Option<Message> {
    let end = Instant::now() + patience;
    let mut buffer = [0u8; 2048];
    while Instant::now() < end {
        match tap.read(&mut buffer) {
            Ok(length) if length > VNET_HEADER + 42 && buffer[VNET_HEADER + 36..VNET_HEADER + 38] == [0, 68] => {
                return Message::decode(&mut Decoder::new(&buffer[VNET_HEADER + 42..length])).ok();
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => panic!("tap: {error}"),
        }
    }
    None
}

fn nft(arguments: &[&str]) -> String {
    let output = Command::new("nft").args(arguments).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn attached(network: &HostNetwork, id: &InstanceId) -> File {
    let nic = NicConfig { instance_id: id.clone(), device_index: 0, mtu: 1500 };
    let tap: OwnedFd = network.attach(nic).await.unwrap();
    File::from(tap)
}

#[test]
fn a_guest_gets_its_address_and_a_forged_station_gets_nothing() {
    in_own_network(|| async {
        let network = HostNetwork::start(config()).await.unwrap();
        let id = InstanceId::generate().unwrap();
        let mut tap = attached(&network, &id).await;
        network.register(metadata(&id)).await.unwrap();
        tap.write_all(&discover(MAC)).unwrap();
        let offer = receive(&mut tap, Duration::from_secs(5)).await.expect("no offer");
        assert_eq!(offer.yiaddr(), GUEST);
        assert!(!network.has_lease(&id), "an offer is no lease");

        let other = InstanceId::generate().unwrap();
        let mut forger = attached(&network, &other).await;
        forger.write_all(&discover(MAC)).unwrap();
        assert!(receive(&mut forger, Duration::from_millis(300)).await.is_none(), "the forged station was answered");
    });
}

#[test]
fn a_restart_keeps_what_runs_and_forgets_what_is_gone() {
    in_own_network(|| async {
        let network = HostNetwork::start(config()).await.unwrap();
        let (stays, goes) = (InstanceId::generate().unwrap(), InstanceId::generate().unwrap());
        let mut tap = attached(&network, &stays).await;
        let gone = attached(&network, &goes).await;
        network.register(metadata(&stays)).await.unwrap();
        let mut second = metadata(&goes);
        second.nics[0].ipv4 = Ipv4Addr::new(172, 31, 0, 6);
        second.nics[0].mac = [2, 0, 0, 0, 0, 6];
        network.register(second).await.unwrap();
        drop((network, gone));

        let network = HostNetwork::start(config()).await.unwrap();
        let sources = nft(&["list", "set", "bridge", "hearth0", "sources"]);
        assert!(sources.contains(&tap_name(&stays, 0)), "{sources}");
        assert!(!sources.contains(&tap_name(&goes, 0)), "{sources}");
        network.register(metadata(&stays)).await.unwrap();
        tap.write_all(&discover(MAC)).unwrap();
        assert!(receive(&mut tap, Duration::from_secs(5)).await.is_some(), "no offer after the restart");

        network.unregister(&stays).await.unwrap();
        let sources = nft(&["list", "set", "bridge", "hearth0", "sources"]);
        assert!(!sources.contains(&tap_name(&stays, 0)), "{sources}");
    });
}

#[test]
fn removal_leaves_nothing() {
    in_own_network(|| async {
        let network = HostNetwork::start(config()).await.unwrap();
        let id = InstanceId::generate().unwrap();
        let tap = attached(&network, &id).await;
        network.register(metadata(&id)).await.unwrap();
        drop(tap);
        network.remove().await.unwrap();
        assert_eq!(nft(&["list", "ruleset"]), "");
        let links = Command::new("ip").args(["-br", "link"]).output().unwrap();
        let links = String::from_utf8_lossy(&links.stdout).into_owned();
        assert_eq!(links.lines().count(), 1, "{links}");
    });
}

#[test]
fn wrong_settings_are_refused_in_words() {
    in_own_network(|| async {
        let refused = async |config: HostNetworkConfig| HostNetwork::start(config).await.err().unwrap().to_string();
        let bad = HostNetworkConfig { bridge: "bad name; drop".into(), ..config() };
        assert!(refused(bad).await.contains("bridge name"));
        let bad = HostNetworkConfig { instance_cidr: "172.31.0.1/20".parse().unwrap(), ..config() };
        assert!(refused(bad).await.contains("172.31.0.0/20"));
        let bad = HostNetworkConfig { bridge: "lo".into(), ..config() };
        assert!(refused(bad).await.contains("not a bridge"));
    });
}
