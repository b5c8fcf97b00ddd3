//! Which chunks of a base are on this host: bits in a file that VMMs map. Its second half tells them which chunks the base has
//! at all.
//!
//! The file belongs to one boot of the host. After another boot nothing is known: the page cache may have lost what the bits
//! promised, so each chunk is looked at again (or fetched again) before its bit is set in the new boot's file.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use hearth_block::map::Extent;
use hearth_block::presence_words;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The bits, writable.
pub struct Presence {
    file: File,
    memory: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is shared memory that is only used through atomics.
unsafe impl Send for Presence {}
// SAFETY: as above.
unsafe impl Sync for Presence {}

/// Name of this boot's file in the folder of a base.
pub fn file_of(folder: &Path, boot_id: &str) -> PathBuf {
    folder.join(format!("presence.{boot_id}"))
}

impl Presence {
    /// Opens or makes this boot's file for `chunks` chunks, of which the base has those of `extent`, and removes those of other
    /// boots.
    pub fn open(folder: &Path, boot_id: &str, chunks: u64, extent: &Extent) -> io::Result<Self> {
        let path = file_of(folder, boot_id);
        for entry in std::fs::read_dir(folder)?.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with("presence.")) && entry.path() != path {
                std::fs::remove_file(entry.path())?;
            }
        }
        let words = usize::try_from(presence_words(chunks)).map_err(io::Error::other)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        // Never shorter: VMMs that run may have it mapped.
        if file.metadata()?.len() < words as u64 * 16 {
            file.set_len(words as u64 * 16)?;
        }
        // A write to mapped memory for which the disk has no room would end this process (SIGBUS).
        let length = libc::off_t::try_from(words as u64 * 16).map_err(io::Error::other)?;
        nix::fcntl::posix_fallocate(&file, 0, length)?;
        // The same bytes each time.
        file.write_all_at(&extent.to_bytes(), words as u64 * 8)?;
        let length = NonZeroUsize::new(words * 8).ok_or_else(|| io::Error::other("an empty mapping"))?;
        // SAFETY: a new shared mapping of a file that is at least this long and is never shortened.
        let memory = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &file, 0)?
        };
        Ok(Self { file, memory: memory.cast(), words })
    }

    /// For a VMM.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn word(&self, chunk: u64) -> Option<&AtomicU64> {
        let index = usize::try_from(chunk / 64).ok().filter(|index| *index < self.words)?;
        // SAFETY: inside the mapping, which lives as long as `self` and is aligned to pages.
        Some(unsafe { self.memory.add(index).as_ref() })
    }

    /// Whether a chunk is here.
    pub fn has(&self, chunk: u64) -> bool {
        self.word(chunk).is_some_and(|word| word.load(Ordering::Acquire) >> (chunk % 64) & 1 == 1)
    }

    /// A chunk has been written to the base's data.
    pub fn set(&self, chunk: u64) {
        if let Some(word) = self.word(chunk) {
            word.fetch_or(1 << (chunk % 64), Ordering::Release);
        }
    }

    /// How many are here.
    pub fn count(&self) -> u64 {
        let words = (0..self.words as u64).filter_map(|index| self.word(index * 64));
        words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `open`, which nobody can use any more.
        let _ = unsafe { munmap(self.memory.cast(), self.words * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bits_have_room_on_the_disk_from_the_beginning() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        drop(Presence::open(folder.path(), "a", 10 << 20, &Extent::of([0])).unwrap());
        let about = std::fs::metadata(file_of(folder.path(), "a")).unwrap();
        assert!(about.blocks() * 512 >= about.len(), "{about:?}");
    }

    #[test]
    fn bits_live_as_long_as_the_boot() {
        let folder = tempfile::tempdir().unwrap();
        let extent = Extent::of([0, 64, 129]);
        let first = Presence::open(folder.path(), "a", 130, &extent).unwrap();
        first.set(0);
        first.set(129);
        first.set(10_000);
        assert!(first.has(0) && first.has(129) && !first.has(64) && !first.has(10_000));
        drop(first);
        let again = Presence::open(folder.path(), "a", 130, &extent).unwrap();
        assert_eq!((again.has(129), again.count()), (true, 2));
        let later = Presence::open(folder.path(), "b", 130, &extent).unwrap();
        assert_eq!(later.count(), 0);
        let content = std::fs::read(file_of(folder.path(), "b")).unwrap();
        assert_eq!((content.len(), &content[24..]), (48, &extent.to_bytes()[..]));
        assert!(!file_of(folder.path(), "a").exists());
    }
}
