//! Where boot discovery reads from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use parking_lot::Mutex;

/// A disk, or a part of one, that can be read at any byte.
pub trait ReadAt: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` from byte `offset` on; reading past [`ReadAt::size`] is an error.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A raw disk file.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    size: u64,
    failure: Mutex<Option<io::Error>>,
}

impl FileDisk {
    /// A regular file; its size is asked once.
    pub fn new(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self { file, size, failure: Mutex::new(None) })
    }

    /// The first error of the host's storage since the last call. Content that points past the end of the disk is none.
    pub fn take_failure(&self) -> Option<io::Error> {
        self.failure.lock().take()
    }
}

impl ReadAt for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                return error;
            }
            let told = error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
            self.failure.lock().get_or_insert(error);
            told
        })
    }
}

impl ReadAt for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let range = usize::try_from(offset)
            .ok()
            .and_then(|start| Some(start..start.checked_add(buffer.len())?))
            .and_then(|range| self.get(range))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(range);
        Ok(())
    }
}

/// A range of a larger disk.
#[derive(Clone)]
pub struct Window {
    disk: Arc<dyn ReadAt>,
    start: u64,
    size: u64,
}

impl Window {
    /// `size` bytes from `start` on, cut off where the disk ends.
    pub fn new(disk: Arc<dyn ReadAt>, start: u64, size: u64) -> Self {
        let size = size.min(disk.size().saturating_sub(start));
        Self { disk, start, size }
    }
}

impl ReadAt for Window {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        match (end, self.start.checked_add(offset)) {
            (Some(end), Some(start)) if end <= self.size => self.disk.read_exact_at(buffer, start),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

pub(crate) fn le_u16(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(offset..offset.checked_add(2)?)?.try_into().ok()?))
}

pub(crate) fn le_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

pub(crate) fn le_u64(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?))
}
