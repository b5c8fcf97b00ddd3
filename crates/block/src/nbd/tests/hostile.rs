//! The driver against servers that answer nonsense: the connection ends, requests wait, and a good server serves them.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cache_loss::{CACHE, Forgetful};
use super::workload::{one, read_all};
use super::{Random, Seen};
use crate::Operation;
use crate::nbd::{Connector, NbdOptions, NbdVolume, wire};

const BAD: usize = 5;

/// Negotiates well once, then sends nonsense `BAD` times, then is good.
#[derive(Debug)]
struct Moody {
    good: Forgetful,
    connections: Arc<AtomicUsize>,
    seed: u64,
}

impl Connector for Moody {
    fn connect(&self) -> io::Result<OwnedFd> {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        if number > BAD {
            return self.good.connect();
        }
        let (mut ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let (good, mut random) = (self.good.clone(), Random::new(self.seed * 100 + number as u64));
        std::thread::spawn(move || -> io::Result<()> {
            if number == 0 || random.chance(2) {
                good.negotiate(&mut ours)?;
            }
            if number == 0 {
                // Whoever opens the volume must find it good; this connection just ends.
                return Ok(());
            }
            let mut noise: Vec<u8> = (0..4096).map(|_| random.next() as u8).collect();
            if random.chance(2) {
                noise[..4].copy_from_slice(&wire::MAGIC_STRUCTURED_REPLY.to_be_bytes());
                noise[4..8].copy_from_slice(&[0, 1, 0, 1]);
                // The cookie of the only request, perhaps.
                noise[8..16].copy_from_slice(&(1u64 << 32).to_be_bytes());
            }
            ours.write_all(&noise)
        });
        Ok(theirs.into())
    }
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    for seed in 1..=6 {
        let good = Forgetful::new(seed, CACHE, true);
        good.disk().dies = 0;
        let connections = Arc::new(AtomicUsize::new(0));
        let moody = Moody { good, connections: Arc::clone(&connections), seed };
        let seen = Seen::new();
        let volume = NbdVolume::open(Box::new(moody), seen.clone(), NbdOptions::default()).unwrap();
        let mut queue = crate::Volume::open_queue(&volume, 4).unwrap();
        one(&mut *queue, Operation::Write, 4096, &mut [9; 4096]).unwrap();
        assert!(connections.load(Ordering::Relaxed) > BAD && seen.lost() >= BAD, "{seen:?}");
        let bytes = read_all(&volume);
        assert!(bytes[4096..8192].iter().all(|byte| *byte == 9) && bytes[8192] == 0);
    }
}
