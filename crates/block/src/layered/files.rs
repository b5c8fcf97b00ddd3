//! The files behind a volume: locking, direct I/O, presence bits.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::freeze::Stage;
use super::op::FileId;
use super::shared::{Alignment, Presence};
use crate::BlockError;
use crate::map::Extent;
use crate::xts::XtsKey;

const LOCK_TRIES: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

/// The shared base of a volume's snapshot.
#[derive(Debug)]
pub struct BaseFiles {
    /// Content; each present chunk is complete (a last chunk is padded).
    pub data: File,
    /// A memfd sealed against shrinking, or a file that is never shortened. Its first half has one bit per chunk in little-endian u64
    /// words; the agent sets a bit, with release ordering, after the chunk was written to `data`. The second half has the
    /// same for chunks that the base has at all ([`Extent`]) and never changes. Both have [`presence_words`] words.
    pub presence: File,
    /// Key of `data`, when the base is stored encrypted.
    pub key: Option<XtsKey>,
}

/// A volume's files.
#[derive(Debug)]
pub struct VolumeFiles {
    /// The volume's own blocks.
    pub data: File,
    /// Its map. Locked while the volume is open; the lock belongs to the open file description, so an opener that passes
    /// this descriptor to another process must close its own copy.
    pub map: File,
    /// Where the other blocks are read from.
    pub base: Option<BaseFiles>,
    /// Key of `data`, when the volume is encrypted.
    pub key: Option<XtsKey>,
}

/// Descriptors that executors use.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pub(crate) data: File,
    pub(crate) map: File,
    pub(crate) base: Option<File>,
    stage: Mutex<(u64, Option<Arc<Stage>>)>,
}

impl Descriptors {
    pub(crate) fn new(data: File, map: File, base: Option<File>) -> Self {
        Self { data, map, base, stage: Mutex::new((0, None)) }
    }

    /// A new stage; calls for the one before have ended.
    pub(crate) fn set_stage(&self, stage: Option<Stage>) {
        let mut slot = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = (slot.0 + 1, stage.map(Arc::new));
    }

    /// The stage, and a number that changes with it.
    pub(crate) fn stage(&self) -> (u64, Option<Arc<Stage>>) {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The descriptor of a file; -1 when there is none.
    pub(crate) fn raw(&self, file: FileId) -> RawFd {
        let stage = || self.stage().1;
        match file {
            FileId::Data => self.data.as_raw_fd(),
            FileId::Map => self.map.as_raw_fd(),
            FileId::Base => self.base.as_ref().map_or(-1, AsRawFd::as_raw_fd),
            FileId::Stage => stage().map_or(-1, |stage| stage.file.as_raw_fd()),
            FileId::Staged => stage().map_or(-1, |stage| stage.staged.as_raw_fd()),
        }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // A ring lets go of its registered files some time after it is closed.
        unlock(&self.map);
    }
}

/// Takes the exclusive lock on a map. The kernel takes down the rings of a killed process a moment after the process is
/// gone, and until then they hold the lock: waits for that, blocking.
pub(crate) fn lock(map: &File) -> Result<(), BlockError> {
    for _ in 0..LOCK_TRIES {
        match try_lock(map) {
            Err(BlockError::InUse) => std::thread::sleep(LOCK_PAUSE),
            other => return other,
        }
    }
    try_lock(map)
}

fn try_lock(map: &File) -> Result<(), BlockError> {
    // SAFETY: flock is plain data, for which zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    match fcntl(map, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Err(BlockError::InUse),
        Err(errno) => Err(BlockError::Data(errno.into())),
    }
}

/// Releases it for all holders of the open file description.
pub(crate) fn unlock(map: &File) {
    // SAFETY: as in `lock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_UNLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // Fails only for descriptors that cannot be locked at all.
    let _ = fcntl(map, FcntlArg::F_OFD_SETLK(&lock));
}

/// Switches `O_DIRECT` on or off, and tells what it was.
pub(crate) fn set_direct(file: &File, on: bool) -> io::Result<bool> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    let before = flags.contains(OFlag::O_DIRECT);
    if before != on {
        flags.set(OFlag::O_DIRECT, on);
        fcntl(file, FcntlArg::F_SETFL(flags))?;
    }
    Ok(before)
}

/// Switches `data` to direct I/O where its file system has it, and tells what that asks for.
pub(crate) fn go_direct(data: &File) -> Alignment {
    const BUFFERED: Alignment = Alignment { memory: 1, offset: 1 };
    // SAFETY: statx is plain data, for which zeros are valid.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: the path is an empty C string (AT_EMPTY_PATH: the descriptor itself) and `found` can take one statx.
    let result = unsafe { libc::statx(data.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut found) };
    let told = result == 0 && found.stx_mask & mask != 0;
    let alignment = if told {
        Alignment { memory: found.stx_dio_mem_align as usize, offset: u64::from(found.stx_dio_offset_align) }
    } else {
        // Linux before 6.1 does not tell: the strictest that a disk asks for.
        Alignment { memory: 4096, offset: 4096 }
    };
    let usable = |x: u64| x.is_power_of_two() && x <= 4096;
    if !usable(alignment.memory as u64) || !usable(alignment.offset) || set_direct(data, true).is_err() {
        // No direct I/O here (tmpfs and others).
        let _ = set_direct(data, false);
        return BUFFERED;
    }
    // Lengths follow the offset's alignment; buffers are checked once for both.
    Alignment { memory: alignment.memory.max(alignment.offset.min(512) as usize), offset: alignment.offset }
}

/// Words in each half of the presence file of a base with this many chunks.
pub fn presence_words(chunks: u64) -> u64 {
    chunks.div_ceil(64).max(1)
}

/// Which chunks the base has, from the second half of its presence file.
pub(crate) fn read_extent(presence: &File) -> Result<Extent, BlockError> {
    let half = presence.metadata().map_err(BlockError::Presence)?.len() / 16 * 8;
    let mut bytes = vec![0; half as usize];
    presence.read_exact_at(&mut bytes, half).map_err(BlockError::Presence)?;
    Ok(Extent::from_bytes(&bytes))
}

/// Presence bits in a mapped memfd.
#[derive(Debug)]
pub(crate) struct PresenceMap {
    memory: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is shared memory that is only read, through atomics.
unsafe impl Send for PresenceMap {}
// SAFETY: as above.
unsafe impl Sync for PresenceMap {}

impl PresenceMap {
    pub(crate) fn new(memfd: &File) -> Result<Self, BlockError> {
        let failed = |errno: nix::Error| BlockError::Presence(errno.into());
        let sealed = match fcntl(memfd, FcntlArg::F_GET_SEALS) {
            Ok(seals) => SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK),
            // A file of a disk's file system knows no seals: whoever passed it never shortens it.
            Err(nix::Error::EINVAL) => true,
            Err(errno) => return Err(failed(errno)),
        };
        if !sealed {
            // Reading beyond a shrunken file would kill this process.
            let text = "the memfd is not sealed against shrinking (F_SEAL_SHRINK)";
            return Err(BlockError::Presence(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        let words = (memfd.metadata().map_err(BlockError::Presence)?.len() / 16) as usize;
        let Some(length) = NonZeroUsize::new(words * 8) else {
            return Ok(Self { memory: NonNull::dangling(), words: 0 });
        };
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else is affected.
        let memory = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, memfd, 0) };
        Ok(Self { memory: memory.map_err(failed)?.cast(), words })
    }
}

impl Presence for PresenceMap {
    fn has(&self, chunk: u64) -> bool {
        let word = (chunk / 64) as usize;
        // SAFETY: `word` is inside the mapping, which lives as long as self and cannot shrink (sealed).
        let load = || unsafe { self.memory.add(word).as_ref() }.load(Ordering::Acquire);
        word < self.words && u64::from_le(load()) >> (chunk % 64) & 1 == 1
    }
}

impl Drop for PresenceMap {
    fn drop(&mut self) {
        if self.words > 0 {
            // SAFETY: mapped by `new` with this length; nobody borrows it beyond self.
            let _ = unsafe { munmap(self.memory.cast(), self.words * 8) };
        }
    }
}
