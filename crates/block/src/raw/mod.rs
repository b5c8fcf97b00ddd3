//! A volume that is one raw file or block device.

mod pool;
mod ring;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::task::Task;
use crate::volume::SECTOR_BYTES;
use crate::{BlockError, IoError, Limits, Volume, VolumeQueue};

pub(crate) use pool::{execute, signal};

/// How requests reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where the kernel allows it, else the thread pool.
    Auto,
    /// io_uring or an error.
    IoUring,
    /// A few threads with preadv/pwritev.
    ThreadPool,
}

/// A raw file or block device, through the page cache.
///
/// The cache is a decision: guests issue FLUSH where they need durability, buffered I/O has no alignment rules, and many
/// instances of one image share pages. `O_DIRECT` on the descriptor is therefore cleared.
#[derive(Debug)]
pub struct RawFile {
    shared: Arc<Shared>,
    engine: Engine,
}

/// What all queues of one file share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) file: File,
    size: AtomicU64,
    read_only: bool,
    /// fdatasync failed once. The kernel then forgets which pages were dirty, so a later fdatasync may succeed without
    /// the lost pages; the only honest answer from then on is an error.
    sync_failed: AtomicBool,
}

impl Shared {
    /// Refuses requests that must not reach the file.
    pub(crate) fn gate(&self, task: &Task) -> Result<(), IoError> {
        if self.read_only && task.modifies() {
            return Err(task.error(libc::EROFS));
        }
        if self.sync_failed.load(Ordering::Relaxed) && (task.modifies() || task.is_sync()) {
            return Err(task.error(libc::EIO));
        }
        Ok(())
    }

    pub(crate) fn note_sync_failure(&self) {
        self.sync_failed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
}

impl RawFile {
    /// Wraps an open file; `read_only` refuses writes even if the descriptor could.
    pub fn new(file: File, read_only: bool, engine: Engine) -> Result<Self, BlockError> {
        let size = file_size(&file)?;
        if size < SECTOR_BYTES {
            return Err(BlockError::TooSmall { bytes: size });
        }
        clear_o_direct(&file).map_err(BlockError::Size)?;
        let shared = Shared { file, size: AtomicU64::new(size), read_only, sync_failed: AtomicBool::new(false) };
        Ok(Self { shared: Arc::new(shared), engine })
    }
}

impl Volume for RawFile {
    fn size_bytes(&self) -> u64 {
        self.shared.size()
    }

    fn read_only(&self) -> bool {
        self.shared.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            optimal_io_bytes: 0,
            max_discard_bytes: 1 << 30,
            discard_granularity_bytes: 4096,
            max_write_zeroes_bytes: 1 << 30,
        }
    }

    fn open_queue(&self, capacity: usize) -> Result<Box<dyn VolumeQueue>, BlockError> {
        let capacity = capacity.clamp(1, 4096);
        match self.engine {
            Engine::IoUring => Ok(Box::new(ring::RingQueue::open(Arc::clone(&self.shared), capacity)?)),
            Engine::ThreadPool => Ok(Box::new(pool::PoolQueue::open(Arc::clone(&self.shared), capacity)?)),
            Engine::Auto => match ring::RingQueue::open(Arc::clone(&self.shared), capacity) {
                Ok(queue) => Ok(Box::new(queue)),
                // Forbidden by sysctl or seccomp, or a kernel without it: the pool does the same, slower.
                Err(_) => Ok(Box::new(pool::PoolQueue::open(Arc::clone(&self.shared), capacity)?)),
            },
        }
    }

    /// A regular file that is shorter is extended by a hole; a block device has to have grown already.
    fn grow(&self, bytes: u64) -> Result<(), BlockError> {
        let from = self.shared.size();
        let refuse = |source| BlockError::Grow { from, to: bytes, source };
        if bytes < from {
            return Err(refuse(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        if file_size(&self.shared.file)? < bytes {
            if self.shared.read_only || !self.shared.file.metadata().map_err(refuse)?.is_file() {
                return Err(refuse(io::Error::from_raw_os_error(libc::ENOSPC)));
            }
            self.shared.file.set_len(bytes).map_err(refuse)?;
        }
        self.shared.size.store(bytes, Ordering::Release);
        Ok(())
    }

    fn sync(&self) -> Result<(), BlockError> {
        if self.shared.read_only {
            return Ok(());
        }
        if self.shared.sync_failed.load(Ordering::Relaxed) {
            return Err(BlockError::Sync(io::Error::from_raw_os_error(libc::EIO)));
        }
        self.shared.file.sync_data().map_err(|error| {
            self.shared.note_sync_failure();
            BlockError::Sync(error)
        })
    }
}

fn file_size(file: &File) -> Result<u64, BlockError> {
    let metadata = file.metadata().map_err(BlockError::Size)?;
    if metadata.file_type().is_file() {
        Ok(metadata.size())
    } else if metadata.file_type().is_block_device() {
        block_device_size(file).map_err(BlockError::Size)
    } else {
        Err(BlockError::NotAFile)
    }
}

fn block_device_size(file: &File) -> io::Result<u64> {
    // _IOR(0x12, 114, size_t), linux/fs.h.
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer, which is valid for that.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

fn clear_o_direct(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL has no pointer argument.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::O_DIRECT == 0 {
        return Ok(());
    }
    // SAFETY: F_SETFL has no pointer argument.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_DIRECT) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
