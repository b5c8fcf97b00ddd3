//! A volume in real files, and requests to it from their start to their end.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::map::{self, Extent, MapBase, MapSpec};
use crate::{
    BaseFiles, BlockError, CHUNK_BYTES, Cause, ChunkFetcher, Completion, Engine, LayeredVolume, OpenOptions, Operation,
    Request, Stage, StagedView, VolumeEvents, VolumeFiles, VolumeQueue, XtsKey, staged_bytes,
};

pub(super) const CHUNKS: u64 = 6;
pub(super) const SIZE: u64 = CHUNKS * CHUNK_BYTES;
pub(super) const BASE: [u64; 3] = [0, 1, 4];

#[derive(Debug, Default)]
pub(super) struct Agent {
    pub(super) asked: Mutex<Vec<u64>>,
    pub(super) impaired: AtomicBool,
    pub(super) causes: Mutex<Vec<Cause>>,
}

impl ChunkFetcher for Agent {
    fn fetch(&self, chunk: u64) {
        self.asked.lock().unwrap().push(chunk);
    }
}

impl VolumeEvents for Agent {
    fn impaired(&self, cause: Cause) {
        self.causes.lock().unwrap().push(cause);
        self.impaired.store(true, Ordering::Relaxed);
    }

    fn recovered(&self) {
        self.impaired.store(false, Ordering::Relaxed);
    }
}

/// A volume's files in a folder; chunks 0, 1 and 4 come from a base that holds 0xB0 + chunk.
pub(super) struct Files {
    pub(super) folder: tempfile::TempDir,
    pub(super) presence: File,
    pub(super) agent: Arc<Agent>,
    pub(super) keys: bool,
}

pub(super) fn key(seed: u8) -> XtsKey {
    let mut bytes = [seed; 64];
    bytes[0] ^= 1;
    XtsKey::new(bytes).unwrap()
}

pub(super) fn memfd() -> File {
    let memfd = File::from(memfd_create(c"presence", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap());
    memfd.set_len(4096).unwrap();
    memfd.write_all_at(&Extent::of(BASE).to_bytes(), 2048).unwrap();
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    memfd
}

impl Files {
    pub(super) fn new(keys: bool) -> Self {
        // Not under /tmp, which may be a tmpfs without direct I/O.
        Self::new_in(&std::env::current_dir().unwrap().join("../../target"), keys)
    }

    pub(super) fn new_in(parent: &Path, keys: bool) -> Self {
        let folder = tempfile::tempdir_in(parent).unwrap();
        let files = Self { folder, presence: memfd(), agent: Arc::default(), keys };
        files.file("data").set_len(SIZE).unwrap();
        files.file("base").set_len(SIZE).unwrap();
        let spec = MapSpec {
            filled: false,
            volume_id: "vol-0123456789abcdef0".into(),
            size_bytes: SIZE,
            base: Some(MapBase { root: [9; 32], extent: Extent::of(BASE) }),
            generation: 3,
        };
        map::create(&files.file("map"), spec).unwrap();
        files
    }

    pub(super) fn file(&self, name: &str) -> File {
        let path = self.folder.path().join(name);
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    pub(super) fn files(&self) -> VolumeFiles {
        let base = BaseFiles {
            data: self.file("base"),
            presence: self.presence.try_clone().unwrap(),
            key: self.keys.then(|| key(2)),
        };
        let (data, map) = (self.file("data"), self.file("map"));
        VolumeFiles { data, map, base: Some(base), key: self.keys.then(|| key(1)) }
    }

    pub(super) fn try_open(&self, engine: Engine, generation: u64) -> Result<LayeredVolume, BlockError> {
        let fetcher = Arc::clone(&self.agent) as Arc<dyn ChunkFetcher>;
        let events = Arc::clone(&self.agent) as Arc<dyn VolumeEvents>;
        LayeredVolume::open(self.files(), OpenOptions { generation, fetcher, events, engine, direct: true })
    }

    pub(super) fn open(&self, engine: Engine) -> LayeredVolume {
        self.try_open(engine, 3).unwrap()
    }

    /// What the agent does when a chunk is asked for.
    pub(super) fn bring(&self, chunk: u64) {
        let mut content = vec![0xB0 + chunk as u8; CHUNK_BYTES as usize];
        if self.keys {
            crate::xts::Xts::new(&key(2)).encrypt(&mut content, chunk * CHUNK_BYTES);
        }
        self.file("base").write_all_at(&content, chunk * CHUNK_BYTES).unwrap();
        let mut word = [0; 8];
        self.presence.read_exact_at(&mut word, chunk / 64 * 8).unwrap();
        let word = u64::from_le_bytes(word) | 1 << (chunk % 64);
        self.presence.write_all_at(&word.to_le_bytes(), chunk / 64 * 8).unwrap();
    }

    pub(super) fn stage(&self) -> (Stage, StagedFile) {
        let staged = self.file("staged");
        staged.set_len(0).unwrap();
        staged.set_len(staged_bytes(SIZE)).unwrap();
        (Stage { file: self.file("stage"), staged }, StagedFile(self.file("staged")))
    }
}

pub(super) struct StagedFile(pub(super) File);

impl StagedFile {
    pub(super) fn view(&self) -> StagedView {
        StagedView::open(self.0.try_clone().unwrap()).unwrap()
    }
}

pub(super) fn each(test: impl Fn(Engine, bool)) {
    let allowed = io_uring::IoUring::new(2).is_ok();
    for engine in [Engine::IoUring, Engine::ThreadPool] {
        if engine == Engine::IoUring && !allowed {
            eprintln!("io_uring is forbidden here: testing the thread pool alone");
            continue;
        }
        each_key(|keys| test(engine, keys));
    }
}

/// Without keys, and with them.
pub(super) fn each_key(test: impl Fn(bool)) {
    [false, true].into_iter().for_each(test);
}

pub(super) fn wait(queue: &mut dyn VolumeQueue, what: &str) -> Completion {
    queue.kick().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut done = None;
        queue.drain(&mut |completion| assert!(done.replace(completion).is_none())).unwrap();
        if let Some(done) = done {
            return done;
        }
        assert!(Instant::now() < deadline, "{what} does not end");
        let mut fds = [PollFd::new(queue.completion_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(1000u16)).unwrap();
    }
}

pub(super) fn submit(
    queue: &mut dyn VolumeQueue,
    operation: Operation,
    offset: u64,
    length: u64,
    buffers: &[libc::iovec],
) {
    let request = Request { operation, offset, length, buffers, token: offset };
    // SAFETY: every caller keeps the buffers until the request is complete.
    unsafe { queue.submit(request).unwrap() };
}

pub(super) fn run(queue: &mut dyn VolumeQueue, operation: Operation, offset: u64, length: u64, bytes: &mut [u8]) {
    let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    submit(queue, operation, offset, length, if bytes.is_empty() { &[] } else { &buffers });
    wait(queue, &operation.to_string()).result.unwrap();
}

pub(super) fn write(queue: &mut dyn VolumeQueue, offset: u64, length: usize, byte: u8) {
    run(queue, Operation::Write, offset, 0, &mut vec![byte; length]);
}

pub(super) fn read(queue: &mut dyn VolumeQueue, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; length];
    run(queue, Operation::Read, offset, 0, &mut bytes);
    bytes
}

pub(super) fn all(bytes: &[u8], byte: u8) -> bool {
    bytes.iter().all(|each| *each == byte)
}
