//! The file that keeps a guest's last console output, written by the VMM through a mapping, read by the agent whether the
//! VMM lives or not.
//!
//! Layout, little-endian: 8 bytes magic, 8 bytes capacity, 8 bytes total number of bytes ever written, zeros up to
//! [`HEADER`] bytes, then `capacity` bytes; byte number `n` of the output lies at `HEADER + n % capacity`. The total is
//! stored after the bytes, so a reader that finds a total finds the bytes too, unless newer ones have replaced them
//! meanwhile; reading the total again tells.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes before the ring itself.
pub const HEADER: u64 = 4096;
/// Smallest and largest capacity in bytes.
pub const MIN_CAPACITY: u64 = 4096;
/// See [`MIN_CAPACITY`].
pub const MAX_CAPACITY: u64 = 64 << 20;

const MAGIC: [u8; 8] = *b"hrthcon1";
const CAPACITY_AT: u64 = 8;
const TOTAL_AT: u64 = 16;

/// Why a console ring cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The file is too small, too big, or not a ring.
    #[error("the console ring file is not usable: {0}")]
    Format(String),
    /// The host refused.
    #[error("cannot {action} the console ring file: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> RingError {
    move |source| RingError::Io { action, source }
}

/// Sizes and formats `file` as an empty ring (the agent, before it hands the file to a VMM).
pub fn create(file: &File, capacity: u64) -> Result<(), RingError> {
    check_capacity(capacity)?;
    file.set_len(HEADER + capacity).map_err(io_error("size"))?;
    reserve(file)?;
    file.write_all_at(&0u64.to_le_bytes(), TOTAL_AT).map_err(io_error("write"))?;
    file.write_all_at(&capacity.to_le_bytes(), CAPACITY_AT).map_err(io_error("write"))?;
    file.write_all_at(&MAGIC, 0).map_err(io_error("write"))
}

/// Takes all the room that a ring may need, before it is handed to a VMM: to that it is memory, and a write to memory for which
/// the disk has no room ends a process (SIGBUS).
pub fn reserve(file: &File) -> Result<(), RingError> {
    let length = file.metadata().map_err(io_error("look at"))?.len();
    let length = libc::off_t::try_from(length).map_err(|_| RingError::Format("it is too long".into()))?;
    nix::fcntl::posix_fallocate(file, 0, length).map_err(|errno| io_error("reserve room for")(errno.into()))
}

fn check_capacity(capacity: u64) -> Result<(), RingError> {
    if (MIN_CAPACITY..=MAX_CAPACITY).contains(&capacity) {
        Ok(())
    } else {
        Err(RingError::Format(format!(
            "a capacity of {capacity} bytes is not between {MIN_CAPACITY} and {MAX_CAPACITY}"
        )))
    }
}

/// Reads and checks the header; the capacity and the total.
fn header(file: &File) -> Result<(u64, u64), RingError> {
    let mut bytes = [0u8; 24];
    file.read_exact_at(&mut bytes, 0).map_err(io_error("read"))?;
    let word = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    if !bytes.starts_with(&MAGIC) {
        return Err(RingError::Format("it does not start with a ring's magic bytes".into()));
    }
    let capacity = word(CAPACITY_AT as usize);
    check_capacity(capacity)?;
    let length = file.metadata().map_err(io_error("stat"))?.len();
    if length < HEADER + capacity {
        return Err(RingError::Format(format!("it has {length} bytes but says {}", HEADER + capacity)));
    }
    Ok((capacity, word(TOTAL_AT as usize)))
}

/// What a ring holds at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Number of the first byte of `bytes` in the whole output.
    pub start: u64,
    /// The output kept, oldest first.
    pub bytes: Vec<u8>,
}

/// Reads what the ring holds from byte number `from` on (0 for all there is). Works on the file of a live or dead VMM.
pub fn read(file: &File, from: u64) -> Result<Snapshot, RingError> {
    loop {
        let (capacity, total) = header(file)?;
        let start = from.clamp(total.saturating_sub(capacity), total);
        let mut bytes = vec![0u8; (total - start) as usize];
        let position = start % capacity;
        let until_wrap = ((capacity - position) as usize).min(bytes.len());
        let (first, second) = bytes.split_at_mut(until_wrap);
        file.read_exact_at(first, HEADER + position).map_err(io_error("read"))?;
        file.read_exact_at(second, HEADER).map_err(io_error("read"))?;
        let (_, now) = header(file)?;
        // Bytes below this number may have been replaced while they were read.
        let intact = now.saturating_sub(capacity);
        if intact <= start {
            return Ok(Snapshot { start, bytes });
        }
        if intact < total {
            let lost = (intact - start) as usize;
            return Ok(Snapshot { start: intact, bytes: bytes.split_off(lost) });
        }
    }
}

/// The VMM's side: a mapping of the whole file. One writer at a time.
#[derive(Debug)]
pub struct RingWriter {
    base: NonNull<u8>,
    capacity: u64,
}

// SAFETY: the mapping belongs to the process, not to a thread, and all access goes through `&self`/`&mut self` methods
// that use atomics for what the other side reads.
unsafe impl Send for RingWriter {}
// SAFETY: `&self` methods only load the atomic total and the capacity.
unsafe impl Sync for RingWriter {}

impl RingWriter {
    /// Maps an existing ring; output goes on where it ended.
    pub fn open(file: &File) -> Result<Self, RingError> {
        let (capacity, _) = header(file)?;
        let length = (HEADER + capacity) as usize;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(RingError::Io { action: "map", source: io::Error::last_os_error() });
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| RingError::Format("it was mapped at address 0".into()))?;
        Ok(Self { base, capacity })
    }

    /// Bytes the ring keeps.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    fn total_word(&self) -> &AtomicU64 {
        // SAFETY: the header is mapped for the life of `self`, the offset is 8-byte aligned, and this process accesses
        // the word only through this reference.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(TOTAL_AT as usize).cast()) }
    }

    /// Number of bytes ever written.
    pub fn total(&self) -> u64 {
        self.total_word().load(Ordering::Acquire)
    }

    /// Appends `bytes`.
    pub fn write(&mut self, bytes: &[u8]) {
        let total = self.total();
        for (i, byte) in bytes.iter().enumerate() {
            let position = HEADER + total.wrapping_add(i as u64) % self.capacity;
            // SAFETY: `position` is below HEADER + capacity, the length of the mapping.
            unsafe { self.base.as_ptr().add(position as usize).write_volatile(*byte) };
        }
        self.total_word().store(total.wrapping_add(bytes.len() as u64), Ordering::Release);
    }

    /// Copies output from byte number `from` on into `buffer`: how many bytes, or `None` if that byte is not kept any more.
    /// The caller keeps writers out.
    pub fn copy_out(&self, from: u64, buffer: &mut [u8]) -> Option<usize> {
        let total = self.total();
        let available = total.checked_sub(from).filter(|n| *n <= self.capacity)?;
        let count = buffer.len().min(available as usize);
        for (i, byte) in buffer.iter_mut().take(count).enumerate() {
            let position = HEADER + from.wrapping_add(i as u64) % self.capacity;
            // SAFETY: `position` is below HEADER + capacity, the length of the mapping.
            *byte = unsafe { self.base.as_ptr().add(position as usize).read_volatile() };
        }
        Some(count)
    }
}

impl Drop for RingWriter {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `open` with this length and nobody can use it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), (HEADER + self.capacity) as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(capacity: u64) -> (File, RingWriter) {
        let file = tempfile::tempfile().unwrap();
        create(&file, capacity).unwrap();
        let writer = RingWriter::open(&file).unwrap();
        (file, writer)
    }

    #[test]
    fn output_survives_its_writer_and_goes_on_in_the_next() {
        let (file, mut writer) = ring(4096);
        writer.write(b"first ");
        drop(writer);
        RingWriter::open(&file).unwrap().write(b"second");
        assert_eq!(read(&file, 0).unwrap(), Snapshot { start: 0, bytes: b"first second".to_vec() });
        assert_eq!(read(&file, 6).unwrap().bytes, b"second");
        assert_eq!(read(&file, 99).unwrap().bytes, b"");
    }

    #[test]
    fn a_ring_has_all_its_room_from_the_beginning() {
        use std::os::unix::fs::MetadataExt;
        let (file, _) = ring(256 << 10);
        assert!(file.metadata().unwrap().blocks() * 512 >= HEADER + (256 << 10));
    }

    #[test]
    fn files_that_are_not_rings_are_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(read(&file, 0).is_err());
        assert!(create(&file, 1).is_err());
        file.write_all_at(&[0xff; 100], 0).unwrap();
        assert!(matches!(RingWriter::open(&file), Err(RingError::Format(_))));
        create(&file, 4096).unwrap();
        file.set_len(5000).unwrap();
        assert!(matches!(RingWriter::open(&file), Err(RingError::Format(_))));
        file.write_all_at(&u64::MAX.to_le_bytes(), CAPACITY_AT).unwrap();
        assert!(matches!(read(&file, 0), Err(RingError::Format(_))));
    }

    proptest! {
        #[test]
        fn the_last_bytes_are_kept(writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5000), 0..8), from in 0u64..20000) {
            let (file, mut writer) = ring(4096);
            let mut all = Vec::new();
            for bytes in &writes {
                writer.write(bytes);
                all.extend_from_slice(bytes);
            }
            let start = (all.len().saturating_sub(4096)).max(from as usize).min(all.len());
            let kept = read(&file, from).unwrap();
            prop_assert_eq!(kept.start, start as u64);
            prop_assert_eq!(&kept.bytes, &all[start..]);
            let mut buffer = [0u8; 100];
            match writer.copy_out(from, &mut buffer) {
                None => prop_assert!(from > all.len() as u64 || from + 4096 < all.len() as u64),
                Some(n) => prop_assert_eq!(&buffer[..n], &all[from as usize..][..n]),
            }
        }
    }
}
