use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use super::driver::*;
use super::machine::*;
use crate::virtio::net::Link;

const MRG_RXBUF: u64 = 1 << 15;
const GUEST_CSUM: u64 = 1 << 1;
const TSO: u64 = 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];

/// A datagram socket as a wire: one packet with virtio header per datagram.
pub struct Wire {
    socket: UnixDatagram,
    features: Arc<Mutex<Vec<u64>>>,
}

impl Link for Wire {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
    fn set_guest_features(&self, features: u64) -> io::Result<()> {
        self.features.lock().unwrap().push(features);
        Ok(())
    }
}

/// The device's end and the far end.
pub fn wire() -> (Wire, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    (Wire { socket: near, features: Arc::default() }, far)
}

struct Setup {
    machine: Machine,
    driver: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    far: UnixDatagram,
    features: Arc<Mutex<Vec<u64>>>,
}

fn setup(wanted: u64) -> Setup {
    let (near, far) = wire();
    let features = Arc::clone(&near.features);
    let mut machine = Machine::new(|builder| builder.add_nic(0, MAC, 1400, Box::new(near)).unwrap());
    let (driver, mut queues) = Driver::start(&mut machine, 1, wanted, 256);
    let tx = queues.pop().unwrap();
    let rx = queues.pop().unwrap();
    Setup { machine, driver, rx, tx, far, features }
}

/// Header and a frame of `length` bytes that tells its number.
fn packet(number: usize, length: usize) -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet.extend((0..length).map(|index| (index + number) as u8));
    packet
}

#[test]
fn tells_mac_mtu_and_link() {
    let setup = setup(u64::MAX);
    let mut config = [0; 12];
    setup.machine.read(setup.driver.device, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..8], [1, 0]);
    assert_eq!(u16::from_le_bytes([config[10], config[11]]), 1400);
    assert_eq!(setup.machine.config_read32(1, 0), 0x1041_1af4);
    assert_eq!(*setup.features.lock().unwrap(), [setup.driver.features]);
}

#[test]
fn segmentation_without_checksums_is_refused() {
    let (near, _far) = wire();
    let machine = Machine::new(|builder| builder.add_nic(0, MAC, 1500, Box::new(near)).unwrap());
    let mut driver = Driver::probe(&machine, 1);
    assert!(!driver.negotiate(&machine, VERSION_1 | TSO));
    driver.set_status(&machine, 0);
    assert!(!driver.negotiate(&machine, VERSION_1 | 1 << 11 | GUEST_CSUM));
    driver.set_status(&machine, 0);
    assert!(driver.negotiate(&machine, VERSION_1 | TSO | GUEST_CSUM | 1));
}

#[test]
fn transmits_scattered_packets_in_order() {
    let mut setup = setup(u64::MAX);
    let buffer = setup.machine.allocate(64 * 2048);
    for number in 0..20u64 {
        let at = buffer + number * 2048;
        setup.machine.fill(at, &packet(number as usize, 1000));
        // Header alone, header split, or all in one.
        let pieces: &[Buffer] = match number % 3 {
            0 => &[(at, 12), (at + 12, 1000)],
            1 => &[(at, 5), (at + 5, 400), (at + 405, 607)],
            _ => &[(at, 1012)],
        };
        setup.tx.add(&setup.machine, pieces, &[]);
    }
    setup.tx.kick(&setup.machine);
    let mut received = 0;
    setup.machine.turn_until(|machine| {
        let mut data = [0; 2048];
        while let Ok(length) = setup.far.recv(&mut data) {
            assert_eq!(data[..length], packet(received, 1000));
            received += 1;
        }
        while setup.tx.take_used(machine).is_some() {}
        received == 20
    });
    let stats = setup.machine.io.device_stats().nics[0].clone();
    assert_eq!((stats.tx_packets, stats.tx_bytes), (20, 20_000));
}

#[test]
fn runts_are_dropped() {
    let mut setup = setup(u64::MAX);
    let buffer = setup.machine.allocate(4096);
    setup.tx.add(&setup.machine, &[(buffer, 20)], &[]);
    setup.tx.run(&mut setup.machine);
    assert_eq!(setup.far.recv(&mut [0; 100]).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_full_link_holds_packets_back_until_it_has_room() {
    let mut setup = setup(u64::MAX);
    let buffer = setup.machine.allocate(65536);
    setup.machine.fill(buffer, &packet(0, 60_000));
    for _ in 0..200 {
        setup.tx.add(&setup.machine, &[(buffer, 60_012)], &[]);
    }
    setup.tx.kick(&setup.machine);
    setup.machine.turn();
    let mut done = 0;
    while setup.tx.take_used(&setup.machine).is_some() {
        done += 1;
    }
    assert!(done < 200, "the socket took everything at once");
    let (mut received, mut data) = (0, vec![0; 65536]);
    setup.machine.turn_until(|machine| {
        while setup.far.recv(&mut data).is_ok() {
            received += 1;
        }
        while setup.tx.take_used(machine).is_some() {
            done += 1;
        }
        received == 200 && done == 200
    });
}

fn post_rx(setup: &mut Setup, count: u64, bytes: u64) -> Vec<(u16, u64)> {
    let buffer = setup.machine.allocate(count * bytes);
    let posted: Vec<(u16, u64)> = (0..count)
        .map(|index| {
            let at = buffer + index * bytes;
            (setup.rx.add(&setup.machine, &[], &[(at, bytes as u32)]), at)
        })
        .collect();
    setup.rx.kick(&setup.machine);
    posted
}

#[test]
fn receives_one_packet_per_buffer() {
    for features in [u64::MAX, !MRG_RXBUF, !(MRG_RXBUF | TSO | EVENT_IDX)] {
        let mut setup = setup(features);
        let posted = post_rx(&mut setup, 8, 2048);
        setup.machine.turn();
        for number in 0..8 {
            setup.far.send(&packet(number, 600 + number)).unwrap();
        }
        let mut number = 0;
        setup.machine.turn_until(|machine| {
            while let Some((head, length)) = setup.rx.take_used(machine) {
                let (expected_head, at) = posted[number];
                assert_eq!((head, length as usize), (expected_head, 612 + number));
                let mut expected = packet(number, 600 + number);
                expected[10] = 1;
                assert_eq!(machine.bytes(at, length as usize), expected);
                number += 1;
            }
            number == 8
        });
        assert!(setup.machine.msi.take().contains(&0x101));
    }
}

#[test]
fn large_packets_span_merged_buffers() {
    let mut setup = setup(u64::MAX);
    let posted = post_rx(&mut setup, 100, 1536);
    setup.machine.turn();
    for (number, length) in [60_000usize, 100, 3060, 3061].into_iter().enumerate() {
        let frame = packet(number, length);
        setup.far.send(&frame).unwrap();
        let buffers = (length + 12).div_ceil(1536);
        let mut got = Vec::new();
        let mut count = 0;
        setup.machine.turn_until(|machine| {
            while let Some((head, used)) = setup.rx.take_used(machine) {
                let at = posted.iter().find(|(posted, _)| *posted == head).unwrap().1;
                got.extend(machine.bytes(at, used as usize));
                count += 1;
            }
            count == buffers
        });
        assert_eq!(usize::from(u16::from_le_bytes([got[10], got[11]])), buffers);
        assert_eq!(got[12..], frame[12..]);
    }
}

#[test]
fn packets_wait_in_the_link_while_there_are_no_buffers() {
    let mut setup = setup(u64::MAX);
    setup.machine.turn();
    for number in 0..5 {
        setup.far.send(&packet(number, 1000)).unwrap();
    }
    setup.machine.turn();
    assert_eq!(setup.rx.take_used(&setup.machine), None);
    let mut done = 0;
    for _ in 0..5 {
        post_rx(&mut setup, 1, 2048);
        setup.machine.turn();
        while setup.rx.take_used(&setup.machine).is_some() {
            done += 1;
        }
    }
    assert_eq!(done, 5);
    assert_eq!(setup.machine.io.device_stats().nics[0].rx_packets, 5);
}

#[test]
fn a_packet_too_large_for_the_drivers_buffers_is_dropped_whole() {
    let mut setup = setup(!(MRG_RXBUF | TSO));
    post_rx(&mut setup, 2, 600);
    setup.machine.turn();
    setup.far.send(&packet(1, 1000)).unwrap();
    setup.far.send(&packet(2, 500)).unwrap();
    setup.machine.turn();
    assert_eq!(setup.rx.take_used(&setup.machine).map(|(_, length)| length), Some(512));
    assert_eq!(setup.rx.take_used(&setup.machine), None);
}

#[test]
fn flags_are_cleared_for_guests_without_checksum_offload() {
    for (features, expected) in [(u64::MAX, 2), (!(GUEST_CSUM | TSO), 0)] {
        let mut setup = setup(features);
        let posted = post_rx(&mut setup, 64, 2048);
        setup.machine.turn();
        let mut frame = packet(1, 100);
        frame[0] = 2; // DATA_VALID
        setup.far.send(&frame).unwrap();
        setup.machine.turn();
        assert!(setup.rx.take_used(&setup.machine).is_some());
        assert_eq!(setup.machine.bytes(posted[0].1, 1), [expected]);
    }
}
