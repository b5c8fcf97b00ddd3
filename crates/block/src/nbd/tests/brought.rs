//! Connections that somebody else brings, and rate limits.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::Seen;
use super::servers::{SIZE, Server, disk, nbdkit};
use super::workload::{one, sleep};
use crate::nbd::{Connector, NbdOptions, NbdVolume, UnixConnector};
use crate::{BlockError, Operation, RateLimits, Request, Volume, VolumeQueue};

const PATIENCE: Duration = Duration::from_secs(60);

/// Has what was put into it.
#[derive(Clone, Debug, Default)]
struct Brought(Arc<Mutex<Option<OwnedFd>>>);

impl Connector for Brought {
    fn connect(&self) -> io::Result<OwnedFd> {
        self.0.lock().unwrap().take().ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

impl Brought {
    fn bring(&self, server: &Server) {
        let connector = UnixConnector { path: server.socket.clone() };
        *self.0.lock().unwrap() = Some(connector.connect().unwrap());
    }
}

fn open(server: &Server) -> (NbdVolume, Brought, Arc<Seen>) {
    let (brought, seen) = (Brought::default(), Seen::new());
    brought.bring(server);
    let options = NbdOptions { close_timeout: Duration::from_millis(500), ..NbdOptions::default() };
    (NbdVolume::open(Box::new(brought.clone()), seen.clone(), options).unwrap(), brought, seen)
}

fn submit(queue: &mut dyn VolumeQueue, operation: Operation, offset: u64, buffer: &mut [u8]) {
    let buffers = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    let request = Request { operation, offset, length: buffer.len() as u64, buffers: &buffers, token: offset };
    // SAFETY: the tests' buffers outlive the queues.
    unsafe { queue.submit(request).unwrap() };
    queue.kick().unwrap();
}

/// Drains until so many requests are complete, without an error.
fn complete(queue: &mut dyn VolumeQueue, mut count: usize) {
    let until = Instant::now() + PATIENCE;
    loop {
        queue
            .drain(&mut |completion| {
                completion.result.unwrap();
                count -= 1;
            })
            .unwrap();
        if count == 0 {
            return;
        }
        assert!(Instant::now() < until, "requests hang");
        sleep(&[queue]);
    }
}

#[test]
fn requests_wait_for_a_connection_that_somebody_brings() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let mut server = nbdkit(&folder, &[], &["file", file.to_str().unwrap()]);
    let mut data = [7; 512];
    let (volume, brought, seen) = open(&server);
    let mut queue = volume.open_queue(4).unwrap();
    one(&mut *queue, Operation::Write, 4096, &mut [6; 512]).unwrap();
    server.kill();
    submit(&mut *queue, Operation::Read, 4096, &mut data);
    // As long as it takes to be asked twice: nothing completes, nothing fails.
    let until = Instant::now() + PATIENCE;
    while seen.lost() < 3 {
        assert!(Instant::now() < until, "{seen:?}");
        sleep(&[&*queue]);
        queue.drain(&mut |completion| panic!("{completion:?}")).unwrap();
    }
    // Nobody can wait for a server while the volume closes.
    assert!(matches!(volume.close(), Err(BlockError::Sync(error)) if error.kind() == io::ErrorKind::NotConnected));
    server.restart();
    server.wait_for_socket();
    brought.bring(&server);
    volume.connection_came();
    complete(&mut *queue, 1);
    assert_eq!((data, seen.recovered()), ([6; 512], 1));
    volume.close().unwrap();
}

#[test]
fn a_brought_connection_shows_a_larger_export_and_is_gone_on_with() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let server = nbdkit(&folder, &[], &["file", file.to_str().unwrap()]);
    let (volume, brought, seen) = open(&server);
    let mut queue = volume.open_queue(4).unwrap();
    one(&mut *queue, Operation::Write, 0, &mut [5; 512]).unwrap();
    assert!(volume.grow(2 * SIZE).is_err(), "there is no connection to ask on");
    brought.bring(&server);
    assert!(volume.grow(2 * SIZE).is_err(), "the export is not longer yet");
    File::options().write(true).open(&file).unwrap().set_len(3 * SIZE).unwrap();
    brought.bring(&server);
    volume.grow(2 * SIZE).unwrap();
    // Known from the same negotiation.
    volume.grow(3 * SIZE).unwrap();
    assert_eq!(volume.size_bytes(), 3 * SIZE);
    one(&mut *queue, Operation::Write, 3 * SIZE - 512, &mut [4; 512]).unwrap();
    let mut found = [0; 512];
    one(&mut *queue, Operation::Read, 0, &mut found).unwrap();
    assert_eq!((found, seen.lost()), ([5; 512], 0));
    volume.close().unwrap();
}

#[test]
fn rates_are_limited_and_limits_change_while_requests_wait() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let server = nbdkit(&folder, &[], &["file", file.to_str().unwrap()]);
    let mut data = [[1; 4096]; 40];
    let (volume, _, _) = open(&server);
    let mut queue = volume.open_queue(64).unwrap();
    volume.set_rate_limits(RateLimits { iops: 100, bytes_per_second: 0 });
    let begun = Instant::now();
    for (index, buffer) in data.iter_mut().enumerate() {
        submit(&mut *queue, Operation::Write, index as u64 * 4096, buffer);
    }
    complete(&mut *queue, 40);
    // Less the burst of 50 ms.
    assert!(begun.elapsed() >= Duration::from_millis(340), "{:?}", begun.elapsed());
    volume.set_rate_limits(RateLimits { iops: 0, bytes_per_second: 1 });
    for (index, buffer) in data.iter_mut().take(8).enumerate() {
        submit(&mut *queue, Operation::Write, index as u64 * 4096, buffer);
    }
    // The first overdraws the bucket for more than an hour. A flush is not held up.
    complete(&mut *queue, 1);
    one(&mut *queue, Operation::Flush, 0, &mut []).unwrap();
    assert_eq!(queue.in_flight(), 7);
    volume.set_rate_limits(RateLimits::default());
    complete(&mut *queue, 7);
    volume.close().unwrap();
}
