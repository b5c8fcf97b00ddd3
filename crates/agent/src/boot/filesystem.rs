//! Reading files of ext4 file systems, with limits.

use std::error::Error;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Read};

use super::error::BootError;
use super::journal;
use super::partition::Partition;
use super::read_at::{ReadAt, Window, le_u16};

/// Bytes read at once from the disk.
const READ_AHEAD: u64 = 128 * 1024;
/// Entries of a directory that are looked at.
const MAX_DIRECTORY_ENTRIES: usize = 4096;
/// Largest configuration file.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// An ext4 file system and where it lies.
pub struct Filesystem {
    /// Its partition.
    pub partition: Partition,
    /// Its UUID in lower case.
    pub uuid: String,
    /// Its label, may be empty.
    pub label: String,
    ext4: Ext4,
}

struct BufferedReader {
    disk: Arc<dyn ReadAt>,
    buffer: Vec<u8>,
    start: u64,
}

impl Ext4Read for BufferedReader {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        if dst.len() as u64 >= READ_AHEAD {
            return Ok(self.disk.read_exact_at(dst, start_byte)?);
        }
        let skip = start_byte.checked_sub(self.start).and_then(|skip| usize::try_from(skip).ok());
        if let Some(bytes) = skip.and_then(|skip| self.buffer.get(skip..skip.checked_add(dst.len())?)) {
            dst.copy_from_slice(bytes);
            return Ok(());
        }
        let length = READ_AHEAD.min(self.disk.size().saturating_sub(start_byte));
        self.buffer.resize(usize::try_from(length)?, 0);
        self.start = start_byte;
        if let Err(error) = self.disk.read_exact_at(&mut self.buffer, start_byte) {
            self.buffer.clear();
            return Err(error.into());
        }
        dst.copy_from_slice(self.buffer.get(..dst.len()).ok_or("read past the end of the file system")?);
        Ok(())
    }
}

/// What a partition holds, told by its magic numbers, for messages.
pub fn content_name(disk: &Arc<dyn ReadAt>, partition: &Partition) -> &'static str {
    let window = Window::new(disk.clone(), partition.start, partition.size);
    let has = |offset: u64, magic: &[u8]| {
        let mut bytes = vec![0u8; magic.len()];
        window.read_exact_at(&mut bytes, offset).is_ok() && bytes == magic
    };
    if has(1024 + 56, &[0x53, 0xef]) {
        "ext4"
    } else if has(0, b"XFSB") {
        "xfs"
    } else if has(0x10040, b"_BHRfS_M") {
        "btrfs"
    } else if has(512, b"LABELONE") {
        "an LVM volume"
    } else if has(0, b"LUKS\xba\xbe") {
        "encrypted (LUKS)"
    } else if has(0x36, b"FAT") || has(0x52, b"FAT32") {
        "FAT"
    } else if has(4086, b"SWAPSPACE2") {
        "swap"
    } else {
        "no known file system"
    }
}

impl Filesystem {
    /// Opens the file system of a partition; `Ok(None)` when it holds no ext2, ext3 or ext4.
    pub fn open(disk: &Arc<dyn ReadAt>, partition: &Partition) -> Result<Option<Self>, BootError> {
        let window = Window::new(disk.clone(), partition.start, partition.size);
        let mut superblock = [0u8; 1024];
        if window.read_exact_at(&mut superblock, 1024).is_err() || le_u16(&superblock, 56) != Some(0xef53) {
            return Ok(None);
        }
        let disk =
            journal::replayed(window).map_err(|source| BootError::Journal { place: partition.place(), source })?;
        let reader = BufferedReader { disk, buffer: Vec::new(), start: 0 };
        let ext4 = Ext4::load(Box::new(reader)).map_err(|error| BootError::File {
            path: "the ext4 file system".into(),
            place: partition.place(),
            reason: error.to_string(),
        })?;
        let uuid = ext4.uuid().to_string().to_lowercase();
        let label = ext4.label().to_str().map(str::to_owned).unwrap_or_default();
        Ok(Some(Self { partition: partition.clone(), uuid, label, ext4 }))
    }

    /// Whether a regular file (after symbolic links) is there.
    pub fn is_file(&self, path: &str) -> bool {
        self.metadata(path).is_some_and(|metadata| metadata.file_type().is_regular_file())
    }

    /// Whether a directory (after symbolic links) is there.
    pub fn is_directory(&self, path: &str) -> bool {
        self.metadata(path).is_some_and(|metadata| metadata.is_dir())
    }

    /// Size of a file in bytes.
    pub fn file_size(&self, path: &str) -> Option<u64> {
        self.metadata(path).map(|metadata| metadata.len())
    }

    fn metadata(&self, path: &str) -> Option<ext4_view::Metadata> {
        ext4_view::Path::try_from(path).ok().and_then(|path| self.ext4.metadata(path).ok())
    }

    /// Names in a directory, unsorted; empty when it cannot be read. Names that are not UTF-8 are left out.
    pub fn list(&self, path: &str) -> Vec<String> {
        let Ok(path) = ext4_view::Path::try_from(path) else { return Vec::new() };
        let Ok(entries) = self.ext4.read_dir(path) else { return Vec::new() };
        entries
            .take(MAX_DIRECTORY_ENTRIES)
            .map_while(Result::ok)
            .filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned))
            .filter(|name| name != "." && name != "..")
            .collect()
    }

    /// A whole file of at most `limit` bytes.
    pub fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, BootError> {
        let failed = |reason: String| BootError::File { path: path.to_owned(), place: self.partition.place(), reason };
        let parsed = ext4_view::Path::try_from(path).map_err(|error| failed(error.to_string()))?;
        let mut file = self.ext4.open(parsed).map_err(|error| failed(error.to_string()))?;
        let size = file.metadata().len();
        if size > limit {
            return Err(BootError::TooLarge { path: path.to_owned(), place: self.partition.place(), size, limit });
        }
        let size = usize::try_from(size).map_err(|error| failed(error.to_string()))?;
        let mut content = Vec::new();
        content.try_reserve_exact(size).map_err(|error| failed(error.to_string()))?;
        content.resize(size, 0);
        let mut done = 0;
        while let Some(rest) = content.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match file.read_bytes(rest).map_err(|error| failed(error.to_string()))? {
                0 => return Err(failed("ends before its size".into())),
                count => done += count,
            }
        }
        Ok(content)
    }

    /// A configuration file as text; bytes that are not UTF-8 are replaced. `None` when it is missing or too large.
    pub fn read_config(&self, path: &str) -> Option<String> {
        self.read(path, MAX_CONFIG_BYTES).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }
}
