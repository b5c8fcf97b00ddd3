//! Several writers that all believe a volume to be theirs.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::map::{self, MapSpec};
use crate::{
    BLOCK_BYTES, BlockError, CHUNK_BYTES, Cause, ChunkFetcher, Engine, LayeredVolume, OfflineVolume, OpenOptions,
    Operation, Request, Volume, VolumeEvents, VolumeFiles, VolumeQueue,
};

const WRITERS: u64 = 4;
const ROUNDS: u64 = 40;

#[derive(Debug)]
struct Nobody;

impl ChunkFetcher for Nobody {
    fn fetch(&self, _chunk: u64) {}
}

impl VolumeEvents for Nobody {
    fn impaired(&self, _cause: Cause) {}
    fn recovered(&self) {}
}

/// As an agent opens them: anew each time.
fn files(folder: &Path) -> VolumeFiles {
    let file = |name: &str| File::options().read(true).write(true).open(folder.join(name)).unwrap();
    VolumeFiles { data: file("data"), map: file("map"), base: None, key: None }
}

fn open(folder: &Path, generation: u64) -> Result<LayeredVolume, BlockError> {
    let (fetcher, events) = (Arc::new(Nobody), Arc::new(Nobody));
    LayeredVolume::open(
        files(folder),
        OpenOptions { generation, fetcher, events, engine: Engine::ThreadPool, direct: false },
    )
}

/// Waits for an acknowledgement.
fn run(queue: &mut dyn VolumeQueue, operation: Operation, block: &mut [u8]) {
    let buffers = [libc::iovec { iov_base: block.as_mut_ptr().cast(), iov_len: block.len() }];
    let buffers = if operation == Operation::Flush { &[][..] } else { &buffers[..] };
    // SAFETY: the buffer outlives the request, which is waited for.
    unsafe { queue.submit(Request { operation, offset: 0, length: 0, buffers, token: 1 }).unwrap() };
    let end = Instant::now() + Duration::from_secs(20);
    let mut done = None;
    while done.is_none() {
        queue.kick().unwrap();
        queue.drain(&mut |completion| done = Some(completion)).unwrap();
        assert!(done.is_some() || Instant::now() < end, "{operation} does not end");
        if done.is_none() {
            let mut fds = [PollFd::new(queue.completion_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(100u16)).unwrap();
        }
    }
    done.unwrap().result.unwrap();
}

#[derive(Default)]
struct History {
    /// How many have it open.
    holders: AtomicU64,
    /// The last write that was acknowledged, and under which generation.
    last: Mutex<(u64, u64)>,
    opened: AtomicU64,
    fenced: AtomicU64,
    in_use: AtomicU64,
}

/// Opens the volume under a generation that may be anybody's, and writes `value` if it gets it.
fn attempt(folder: &Path, history: &History, generation: u64, value: u64) {
    let volume = match open(folder, generation) {
        Ok(volume) => volume,
        Err(BlockError::Fenced { ours, theirs }) => {
            assert!(ours == generation && theirs > ours, "{theirs} keeps out {ours}");
            history.fenced.fetch_add(1, Ordering::Relaxed);
            return;
        }
        Err(BlockError::InUse) => {
            history.in_use.fetch_add(1, Ordering::Relaxed);
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!(history.holders.fetch_add(1, Ordering::SeqCst), 0, "two have it open");
    let mut queue = volume.open_queue(4).unwrap();
    let mut block = vec![0u8; BLOCK_BYTES as usize];
    run(queue.as_mut(), Operation::Read, &mut block);
    let (before, under) = *history.last.lock().unwrap();
    assert_eq!(
        u64::from_le_bytes(block[..8].try_into().unwrap()),
        before,
        "another writer's acknowledged write is lost"
    );
    assert!(generation >= under, "generation {generation} got it after {under}");
    block[..8].copy_from_slice(&value.to_le_bytes());
    run(queue.as_mut(), Operation::Write, &mut block);
    run(queue.as_mut(), Operation::Flush, &mut []);
    *history.last.lock().unwrap() = (value, generation);
    history.opened.fetch_add(1, Ordering::Relaxed);
    history.holders.fetch_sub(1, Ordering::SeqCst);
    drop(queue);
    if value.is_multiple_of(3) {
        volume.close_clean().unwrap();
    }
}

/// Invariant 5: two writers never both get acknowledgements under one generation, and none gets any after a later one.
#[test]
fn two_writers_never_both_get_acknowledgements() {
    let folder = tempfile::tempdir().unwrap();
    let create = |name: &str| File::create_new(folder.path().join(name)).unwrap();
    create("data").set_len(CHUNK_BYTES).unwrap();
    File::options().read(true).write(true).create_new(true).open(folder.path().join("map")).unwrap();
    let spec = MapSpec {
        filled: false,
        volume_id: "vol-0123456789abcdef0".into(),
        size_bytes: CHUNK_BYTES,
        base: None,
        generation: 0,
    };
    map::create(&files(folder.path()).map, spec).unwrap();
    let (history, next) = (History::default(), AtomicU64::new(2));
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (history, next, folder) = (&history, &next, folder.path());
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let chance = RandomState::new().build_hasher().finish();
                    // Each generation is given to two; some come late with theirs.
                    let generation = next.fetch_add(1, Ordering::SeqCst) / 2;
                    std::thread::sleep(Duration::from_micros(if chance.is_multiple_of(4) {
                        3000
                    } else {
                        chance % 200
                    }));
                    attempt(folder, history, generation, 1 + writer * ROUNDS + round);
                }
            });
        }
    });
    let [opened, fenced, in_use] =
        [&history.opened, &history.fenced, &history.in_use].map(|n| n.load(Ordering::Relaxed));
    eprintln!("opened {opened} times, too late {fenced} times, in use {in_use} times");
    assert_eq!(opened + fenced + in_use, WRITERS * ROUNDS);
    assert!(opened > ROUNDS / 2 && fenced > 0, "nobody was in anybody's way");
    let volume = OfflineVolume::open(files(folder.path()), u64::MAX).unwrap();
    let mut chunk = vec![0; CHUNK_BYTES as usize];
    volume.read_chunk(0, &mut chunk).unwrap();
    assert_eq!(u64::from_le_bytes(chunk[..8].try_into().unwrap()), history.last.lock().unwrap().0);
}
