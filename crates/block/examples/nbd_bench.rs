//! Requests per second of the NBD client against a server on a Unix socket, for comparison with other clients of the same server.
//!
//! `nbd_bench SOCKET EXPORT SECONDS`: 4 KiB requests at random offsets, reads and writes, 32 and 1 in flight. It overwrites the export.

#![allow(clippy::print_stdout, clippy::cast_precision_loss)]

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_block::nbd::{NbdError, NbdEvents, NbdOptions, NbdVolume, UnixConnector};
use hearth_block::{Operation, Request, Volume};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const BYTES: usize = 4096;

struct Nothing;

impl NbdEvents for Nothing {
    fn lost(&self, _error: &NbdError) {}
    fn recovered(&self) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export, seconds] = arguments.as_slice() else {
        return Err("usage: nbd_bench SOCKET EXPORT SECONDS".into());
    };
    let options = NbdOptions { export: export.clone(), ..NbdOptions::default() };
    let volume = NbdVolume::open(Box::new(UnixConnector { path: socket.into() }), Arc::new(Nothing), options)?;
    let duration = Duration::from_secs(seconds.parse()?);
    for (name, operation) in [("randread", Operation::Read), ("randwrite", Operation::Write)] {
        for depth in [32, 1] {
            let rate = measure(&volume, operation, depth, duration)?;
            println!("{name} {depth}: {rate:.0}/s");
        }
    }
    Ok(())
}

/// Completed requests per second with `depth` in flight.
fn measure(volume: &NbdVolume, operation: Operation, depth: usize, duration: Duration) -> Result<f64, Box<dyn Error>> {
    // Declared before the queue, which is dropped first: it waits for requests that use the memory.
    let mut buffers = vec![vec![0x5au8; BYTES]; depth];
    let mut queue = volume.open_queue(depth)?;
    let blocks = volume.size_bytes() / BYTES as u64;
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut free: Vec<u64> = (0..depth as u64).collect();
    let (mut done, begun) = (0u64, Instant::now());
    while begun.elapsed() < duration {
        for token in free.drain(..) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let Some(buffer) = buffers.get_mut(token as usize) else { continue };
            let memory = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: BYTES }];
            let offset = random % blocks * BYTES as u64;
            let request = Request { operation, offset, length: BYTES as u64, buffers: &memory, token };
            // SAFETY: the buffer outlives the queue.
            unsafe { queue.submit(request)? };
        }
        queue.kick()?;
        let mut failed = None;
        queue.drain(&mut |completion| {
            done += 1;
            free.push(completion.token);
            failed = failed.take().or(completion.result.err());
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        if free.is_empty() {
            poll(&mut [PollFd::new(queue.completion_fd(), PollFlags::POLLIN)], PollTimeout::from(1000u16))?;
        }
    }
    Ok(done as f64 / begun.elapsed().as_secs_f64())
}
