//! The same 4 KiB operations through plain io_uring and through a volume's queue.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

use hearth_block::{Operation, Request, VolumeQueue};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};

pub const BLOCK: usize = 4096;

#[derive(Clone, Copy)]
pub struct Load {
    pub write: bool,
    pub depth: usize,
    /// Each write is followed by a sync; depth 1.
    pub sync: bool,
}

/// Page-aligned buffers, one per request in flight.
fn buffers(depth: usize) -> Vec<&'static mut [u8]> {
    let all = Box::leak(vec![0x5A; (depth + 1) * BLOCK].into_boxed_slice());
    let skip = all.as_ptr().align_offset(BLOCK);
    all[skip..].chunks_exact_mut(BLOCK).take(depth).collect()
}

/// Seconds that plain io_uring takes for these blocks.
pub fn raw(file: &File, load: Load, blocks: &[u64]) -> f64 {
    let mut ring: IoUring =
        IoUring::builder().setup_single_issuer().setup_coop_taskrun().build(load.depth.max(8) as u32).unwrap();
    ring.submitter().register_files(&[file.as_raw_fd()]).unwrap();
    let mut memory = buffers(load.depth);
    let mut free: Vec<usize> = (0..load.depth).collect();
    let mut next = blocks.iter();
    let (mut flying, file) = (0, Fixed(0));
    let began = Instant::now();
    loop {
        while let Some(slot) = free.pop() {
            let Some(block) = next.next() else {
                free.push(slot);
                break;
            };
            let (memory, offset) = (memory[slot].as_mut_ptr(), block * BLOCK as u64);
            let entry = if load.write {
                opcode::Write::new(file, memory, BLOCK as u32).offset(offset).build()
            } else {
                opcode::Read::new(file, memory, BLOCK as u32).offset(offset).build()
            };
            // SAFETY: the buffers are never freed.
            unsafe { ring.submission().push(&entry.user_data(slot as u64)).unwrap() };
            flying += 1;
        }
        if flying == 0 {
            return began.elapsed().as_secs_f64();
        }
        ring.submit_and_wait(1).unwrap();
        let mut sync = None;
        for entry in ring.completion() {
            let slot = entry.user_data();
            if slot < u64::MAX {
                assert_eq!(entry.result(), BLOCK as i32);
                if load.sync {
                    sync = Some(slot as usize);
                    continue;
                }
                free.push(slot as usize);
            } else {
                assert_eq!(entry.result(), 0);
                free.push(0);
            }
            flying -= 1;
        }
        if sync.is_some() {
            let entry = opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build().user_data(u64::MAX);
            // SAFETY: no memory is involved.
            unsafe { ring.submission().push(&entry).unwrap() };
        }
    }
}

/// Seconds that the engine takes for these blocks.
pub fn engine(queue: &mut dyn VolumeQueue, load: Load, blocks: &[u64]) -> f64 {
    let mut memory = buffers(load.depth);
    let mut free: Vec<usize> = (0..load.depth).collect();
    let mut next = blocks.iter();
    let mut flying = 0;
    let operation = if load.write { Operation::Write } else { Operation::Read };
    let began = Instant::now();
    loop {
        while let Some(slot) = free.pop() {
            let Some(block) = next.next() else {
                free.push(slot);
                break;
            };
            let buffers = [libc::iovec { iov_base: memory[slot].as_mut_ptr().cast(), iov_len: BLOCK }];
            let offset = block * BLOCK as u64;
            let request = Request { operation, offset, length: 0, buffers: &buffers, token: slot as u64 };
            // SAFETY: the buffers are never freed.
            unsafe { queue.submit(request).unwrap() };
            flying += 1;
        }
        if flying == 0 {
            return began.elapsed().as_secs_f64();
        }
        queue.kick().unwrap();
        loop {
            let mut sync = false;
            let before = free.len();
            queue
                .drain(&mut |completion| {
                    completion.result.unwrap();
                    if load.sync && completion.token < u64::MAX {
                        sync = true;
                    } else {
                        free.push(completion.token.min(load.depth as u64 - 1) as usize);
                        flying -= 1;
                    }
                })
                .unwrap();
            if sync {
                let request =
                    Request { operation: Operation::Flush, offset: 0, length: 0, buffers: &[], token: u64::MAX };
                // SAFETY: no buffers.
                unsafe { queue.submit(request).unwrap() };
                queue.kick().unwrap();
            }
            if free.len() > before {
                break;
            }
            let mut fd = libc::pollfd { fd: queue.completion_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd.
            unsafe { libc::poll(&raw mut fd, 1, -1) };
        }
    }
}

/// Blocks in random order, each once, repeated as needed.
pub fn shuffled(blocks: u64, count: usize, seed: u64) -> Vec<u64> {
    let mut state = seed | 1;
    let mut order: Vec<u64> = (0..blocks).collect();
    for at in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(at, (state % (at as u64 + 1)) as usize);
    }
    order.into_iter().cycle().take(count).collect()
}

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
