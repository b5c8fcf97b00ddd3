//! The volume engine against plain io_uring on the same file: 4 KiB operations with `O_DIRECT`, in interleaved rounds.
//! Prints one line of JSON: medians of operations per second, and the median of the rounds' ratios (engine / raw).
//!
//! `block_bench [FOLDER] [MIB] [ROUNDS]`: FOLDER on a file system with direct I/O (default: the current one), size of the
//! test files (default 256), rounds (default 7).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use hearth_block::map::{self, Extent, MapBase, MapSpec};
use hearth_block::{
    BaseFiles, CHUNK_BYTES, Cause, ChunkFetcher, Engine, LayeredVolume, OpenOptions, Operation, Request, Volume,
    VolumeEvents, VolumeFiles, VolumeQueue, XtsKey, presence_words,
};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};

const BLOCK: usize = 4096;

struct Nobody;

impl ChunkFetcher for Nobody {
    fn fetch(&self, _chunk: u64) {}
}

impl VolumeEvents for Nobody {
    fn impaired(&self, cause: Cause) {
        eprintln!("impaired: {cause:?}");
    }
    fn recovered(&self) {}
}

#[derive(Clone, Copy)]
struct Load {
    write: bool,
    depth: usize,
    /// Each write is followed by a sync; depth 1.
    sync: bool,
}

fn open(path: &Path, direct: bool) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    if direct {
        options.custom_flags(libc::O_DIRECT);
    }
    options.open(path).unwrap()
}

/// Page-aligned buffers, one per request in flight.
fn buffers(depth: usize) -> Vec<&'static mut [u8]> {
    let all = Box::leak(vec![0x5A; (depth + 1) * BLOCK].into_boxed_slice());
    let skip = all.as_ptr().align_offset(BLOCK);
    all[skip..].chunks_exact_mut(BLOCK).take(depth).collect()
}

/// Seconds that plain io_uring takes for these blocks.
fn raw(file: &File, load: Load, blocks: &[u64]) -> f64 {
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
fn engine(queue: &mut dyn VolumeQueue, load: Load, blocks: &[u64]) -> f64 {
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

struct Folder {
    path: PathBuf,
    bytes: u64,
}

impl Folder {
    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("block-bench-{name}"))
    }

    /// A fresh volume, over a complete base or blank.
    fn volume(&self, name: &str, over_base: bool, key: Option<XtsKey>) -> LayeredVolume {
        let (data, map) = (self.file(&format!("{name}-data")), self.file(&format!("{name}-map")));
        let _ = std::fs::remove_file(&map);
        if over_base {
            let _ = std::fs::remove_file(&data);
        }
        let (data, map) = (open(&data, false), open(&map, false));
        data.set_len(self.bytes).unwrap();
        let extent = Extent::of(0..self.bytes / CHUNK_BYTES);
        let spec = MapSpec {
            filled: false,
            volume_id: "vol-bench".into(),
            size_bytes: self.bytes,
            base: over_base.then(|| MapBase { root: [1; 32], extent: extent.clone() }),
            generation: 1,
        };
        map::create(&map, spec).unwrap();
        let base = over_base.then(|| {
            // SAFETY: a new memfd with a constant name, owned by the File alone.
            let presence = unsafe {
                File::from_raw_fd(libc::memfd_create(c"presence".as_ptr(), libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC))
            };
            let half = presence_words(self.bytes / CHUNK_BYTES) * 8;
            presence.set_len(2 * half).unwrap();
            presence.write_all_at(&vec![0xFF; half as usize], 0).unwrap();
            presence.write_all_at(&extent.to_bytes(), half).unwrap();
            // SAFETY: no memory is involved.
            unsafe { libc::fcntl(presence.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
            BaseFiles { data: open(&self.file("raw"), false), presence, key: None }
        });
        let options = OpenOptions {
            generation: 1,
            fetcher: Arc::new(Nobody),
            events: Arc::new(Nobody),
            engine: Engine::IoUring,
            direct: true,
        };
        LayeredVolume::open(VolumeFiles { data, map, base, key }, options).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for name in
            ["raw", "sparse", "steady-data", "steady-map", "first-data", "first-map", "secret-data", "secret-map"]
        {
            let _ = std::fs::remove_file(self.file(name));
        }
    }
}

/// Blocks in random order, each once, repeated as needed.
fn shuffled(blocks: u64, count: usize, seed: u64) -> Vec<u64> {
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

fn fill(path: &Path, bytes: u64) -> File {
    let file = open(path, false);
    let chunk: Vec<u8> = (0..CHUNK_BYTES).map(|at| (at * 31 % 251) as u8).collect();
    for at in (0..bytes).step_by(chunk.len()) {
        file.write_all_at(&chunk, at).unwrap();
    }
    file.sync_all().unwrap();
    open(path, true)
}

/// Milliseconds to make a volume of this size from a snapshot that holds an eighth of it (durable map and empty data file), and
/// KiB that it takes on the disk.
fn clone_cost(folder: &Folder, bytes: u64) -> (f64, u64) {
    let extent = Extent::of((0..bytes / CHUNK_BYTES).step_by(8));
    let mut taken = 0;
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let paths = [folder.file("clone-data"), folder.file("clone-map")];
            let began = Instant::now();
            let files = [open(&paths[0], false), open(&paths[1], false)];
            files[0].set_len(bytes).unwrap();
            let spec = MapSpec {
                filled: false,
                volume_id: "vol-clone".into(),
                size_bytes: bytes,
                base: Some(MapBase { root: [1; 32], extent: extent.clone() }),
                generation: 1,
            };
            map::create(&files[1], spec).unwrap();
            let took = began.elapsed().as_secs_f64() * 1000.0;
            taken = files.iter().map(|file| file.metadata().unwrap().blocks() / 2).sum();
            paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
            took
        })
        .collect();
    (median(&mut times), taken)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().map_or_else(|| std::env::current_dir().unwrap(), PathBuf::from);
    let mib: u64 = arguments.next().map_or(256, |text| text.parse().unwrap());
    let rounds: u64 = arguments.next().map_or(7, |text| text.parse().unwrap());
    let only_synced = arguments.next().is_some();
    let folder = Folder { path, bytes: mib << 20 };
    let blocks = folder.bytes / BLOCK as u64;
    let base = fill(&folder.file("raw"), folder.bytes);
    let data = fill(&folder.file("steady-data"), folder.bytes);
    let steady = folder.volume("steady", false, None);
    let mut queue = steady.open_queue(64).unwrap();

    fill(&folder.file("secret-data"), folder.bytes);
    let mut key = [3; 64];
    key[0] = 4;
    let secret = folder.volume("secret", false, XtsKey::new(key));
    let mut encrypted_queue = secret.open_queue(64).unwrap();
    let clones = [clone_cost(&folder, 4 << 30), clone_cost(&folder, 1 << 40)];

    let mut figures: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    let load = |write, depth, sync| Load { write, depth, sync };
    for round in 0..rounds {
        let mut note = |name, count: usize, raw: f64, engine: f64| {
            figures.entry(name).or_default().push((count as f64 / raw, count as f64 / engine));
        };
        let cases = [
            ("random_read_qd32", load(false, 32, false), 24_000),
            ("random_read_qd1", load(false, 1, false), 3000),
            ("random_write_qd32", load(true, 32, false), 24_000),
            ("random_write_qd1", load(true, 1, false), 3000),
            ("synced_overwrite", load(true, 1, true), 800),
        ];
        let encrypted = [
            ("encrypted_random_read_qd32", load(false, 32, false), 24_000),
            ("encrypted_random_write_qd32", load(true, 32, false), 24_000),
        ];
        for (name, load, count) in cases.into_iter().chain(encrypted) {
            if only_synced && !load.sync { continue; }
            let queue = if name.starts_with("encrypted") { &mut encrypted_queue } else { &mut queue };
            let order = shuffled(blocks, count, round * 2 + 1);
            // Whoever goes second may find the device warmer.
            let (by_raw, by_engine) = if round % 2 == 0 {
                let by_raw = raw(&data, load, &order);
                (by_raw, engine(queue.as_mut(), load, &order))
            } else {
                let by_engine = engine(queue.as_mut(), load, &order);
                (raw(&data, load, &order), by_engine)
            };
            note(name, count, by_raw, by_engine);
        }
        if !only_synced {
        // First writes are compared with overwrites of a file that has all its blocks, and with first writes to a hole.
        let count = blocks.min(24_000) as usize;
        let order = shuffled(blocks, count, round * 2 + 77);
        let fresh = folder.volume("first", true, None);
        let first = engine(fresh.open_queue(64).unwrap().as_mut(), load(true, 32, false), &order);
        note("first_write_qd32", count, raw(&base, load(true, 32, false), &order), first);
        let _ = std::fs::remove_file(folder.file("sparse"));
        let sparse = open(&folder.file("sparse"), true);
        sparse.set_len(folder.bytes).unwrap();
        note("first_write_qd32_against_hole", count, raw(&sparse, load(true, 32, false), &order), first);
        drop(fresh);
        }
        let order = shuffled(blocks, 800, round * 2 + 77);
        let order = &order[..];
        let fresh = folder.volume("first", true, None);
        let first = engine(fresh.open_queue(64).unwrap().as_mut(), load(true, 1, true), order);
        note("synced_first_write", 800, raw(&base, load(true, 1, true), order), first);
        drop(fresh);
        let _ = std::fs::remove_file(folder.file("sparse"));
        let sparse = open(&folder.file("sparse"), true);
        sparse.set_len(folder.bytes).unwrap();
        note("synced_first_write_against_hole", 800, raw(&sparse, load(true, 1, true), order), first);
    }
    let lines: Vec<String> = figures
        .iter_mut()
        .map(|(name, rounds)| {
            let raw = median(&mut rounds.iter().map(|(raw, _)| *raw).collect::<Vec<_>>());
            let engine = median(&mut rounds.iter().map(|(_, engine)| *engine).collect::<Vec<_>>());
            let ratio = median(&mut rounds.iter().map(|(raw, engine)| engine / raw).collect::<Vec<_>>());
            format!("\"{name}\":{{\"raw_per_s\":{raw:.0},\"engine_per_s\":{engine:.0},\"ratio\":{ratio:.3}}}")
        })
        .collect();
    let [(small, small_kib), (large, large_kib)] = clones;
    println!(
        "{{\"clone_4_gib_ms\":{small:.2},\"clone_4_gib_kib\":{small_kib},\"clone_1_tib_ms\":{large:.2},\"clone_1_tib_kib\":{large_kib},{}}}",
        lines.join(",")
    );
}
