use dhcproto::v4::OptionCode;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];

fn config() -> HostNetworkConfig {
    HostNetworkConfig {
        bridge: "hearth0".into(),
        instance_cidr: "172.31.0.0/20".parse().unwrap(),
        nat: true,
        dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
    }
}

fn nic(device_index: u32) -> Nic {
    Nic { device_index, mac: MAC, ipv4: Ipv4Addr::new(172, 31, 0, 5), mtu: 1500 }
}

fn request(kind: MessageType, options: &[DhcpOption]) -> Vec<u8> {
    let mut message = Message::default();
    message.set_opcode(Opcode::BootRequest).set_chaddr(&MAC).set_xid(7);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option.clone());
    }
    message.to_vec().unwrap()
}

fn ask(packet: &[u8]) -> Option<(Message, bool)> {
    answer(&config(), |mac| (*mac == MAC).then(|| nic(0)), packet)
}

#[test]
fn discover_is_offered_the_fixed_address() {
    let (reply, granted) = ask(&request(MessageType::Discover, &[])).unwrap();
    assert!(!granted);
    assert_eq!(reply.xid(), 7);
    assert_eq!(reply.yiaddr(), Ipv4Addr::new(172, 31, 0, 5));
    assert_eq!(reply.opts().msg_type(), Some(MessageType::Offer));
    assert_eq!(reply.opts().get(OptionCode::Router), Some(&DhcpOption::Router(vec![Ipv4Addr::new(172, 31, 0, 1)])));
    assert_eq!(reply.opts().get(OptionCode::Hostname), Some(&DhcpOption::Hostname("ip-172-31-0-5".into())));
}

#[test]
fn request_for_it_is_granted_and_for_another_refused() {
    let right = DhcpOption::RequestedIpAddress(Ipv4Addr::new(172, 31, 0, 5));
    let (reply, granted) = ask(&request(MessageType::Request, &[right])).unwrap();
    assert!(granted);
    assert_eq!(reply.opts().msg_type(), Some(MessageType::Ack));
    let wrong = DhcpOption::RequestedIpAddress(Ipv4Addr::new(172, 31, 0, 6));
    let (reply, granted) = ask(&request(MessageType::Request, &[wrong])).unwrap();
    assert!(!granted);
    assert_eq!(reply.opts().msg_type(), Some(MessageType::Nak));
    assert!(reply.yiaddr().is_unspecified());
}

#[test]
fn only_the_first_nic_gets_the_default_route() {
    let (reply, _) = answer(&config(), |_| Some(nic(1)), &request(MessageType::Discover, &[])).unwrap();
    assert_eq!(reply.opts().get(OptionCode::Router), None);
}

#[test]
fn strangers_and_other_servers_clients_hear_nothing() {
    assert!(answer(&config(), |_| None, &request(MessageType::Discover, &[])).is_none());
    let other = DhcpOption::ServerIdentifier(Ipv4Addr::new(10, 0, 0, 1));
    assert!(ask(&request(MessageType::Request, &[other])).is_none());
    assert!(ask(&request(MessageType::Release, &[])).is_none());
}

#[test]
fn the_client_identifier_is_echoed() {
    let identifier = DhcpOption::ClientIdentifier(vec![255, 1, 2, 3]);
    let (reply, _) = ask(&request(MessageType::Discover, std::slice::from_ref(&identifier))).unwrap();
    assert_eq!(reply.opts().get(OptionCode::ClientIdentifier), Some(&identifier));
}

proptest::proptest! {
    #[test]
    fn any_packet_is_survived(packet in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
        let _ = ask(&packet);
    }

    #[test]
    fn any_change_of_a_good_packet_is_survived(at in 0usize..300, byte: u8, end in 0usize..400) {
        let mut packet = request(MessageType::Discover, &[DhcpOption::Hostname("guest".into())]);
        let length = packet.len();
        packet[at % length] = byte;
        packet.truncate(end);
        let _ = ask(&packet);
    }
}
