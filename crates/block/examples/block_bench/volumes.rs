//! Volumes and files to measure.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use hearth_block::map::{self, Extent, MapBase, MapSpec};
use hearth_block::{
    BaseFiles, CHUNK_BYTES, Cause, ChunkFetcher, Engine, LayeredVolume, OpenOptions, VolumeEvents, VolumeFiles, XtsKey,
    presence_words,
};

use crate::loads::median;

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

pub fn open(path: &Path, direct: bool) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    if direct {
        options.custom_flags(libc::O_DIRECT);
    }
    options.open(path).unwrap()
}

/// Where the benchmark's files are, and their size.
pub struct Folder {
    pub path: PathBuf,
    pub bytes: u64,
}

impl Folder {
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("block-bench-{name}"))
    }

    /// A fresh volume, over a complete base or blank.
    pub fn volume(&self, name: &str, over_base: bool, key: Option<XtsKey>) -> LayeredVolume {
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
        let volumes = ["steady", "secret", "first", "steady-nbd", "first-nbd", "clone"];
        let volumes = volumes.into_iter().flat_map(|name| ["data", "map"].map(|kind| format!("{name}-{kind}")));
        let others = ["raw", "sparse", "steady-qcow2", "first-qcow2"].map(str::to_owned);
        for name in volumes.chain(others) {
            let _ = std::fs::remove_file(self.file(&name));
        }
    }
}

pub fn fill(path: &Path, bytes: u64) -> File {
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
pub fn clone_cost(folder: &Folder, bytes: u64) -> (f64, u64) {
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
