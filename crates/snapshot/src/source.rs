//! The file an image is read from: positioned reads that never run past its end unnoticed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::ImageError;
use crate::format::Format;

/// An opened image file of known length.
#[derive(Debug)]
pub(crate) struct Source {
    pub file: File,
    pub path: PathBuf,
    pub bytes: u64,
    pub format: Format,
}

impl Source {
    pub fn open(path: &Path) -> Result<(File, u64), ImageError> {
        let file = File::open(path).map_err(ImageError::io("open", path))?;
        let metadata = file.metadata().map_err(ImageError::io("stat", path))?;
        if !metadata.is_file() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
            return Err(ImageError::io("read", path)(error));
        }
        Ok((file, metadata.len()))
    }

    /// `Ok` when `length` bytes stand at `offset`; `what` names them otherwise.
    pub fn check(&self, what: &'static str, offset: u64, length: u64) -> Result<(), ImageError> {
        let end = offset.checked_add(length).ok_or_else(|| self.corrupt(format!("{what} at byte {offset}")))?;
        if end > self.bytes {
            return Err(ImageError::Truncated { format: self.format, what, offset: end, file_bytes: self.bytes });
        }
        Ok(())
    }

    /// Fills `buffer` from `offset`.
    pub fn read(&self, what: &'static str, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.check(what, offset, buffer.len() as u64)?;
        self.file.read_exact_at(buffer, offset).map_err(ImageError::io("read", &self.path))
    }

    /// `length` bytes from `offset`; the caller bounds `length`.
    pub fn read_vec(&self, what: &'static str, offset: u64, length: usize) -> Result<Vec<u8>, ImageError> {
        self.check(what, offset, length as u64)?;
        let mut buffer = vec![0; length];
        self.file.read_exact_at(&mut buffer, offset).map_err(ImageError::io("read", &self.path))?;
        Ok(buffer)
    }

    pub fn corrupt(&self, what: impl Into<String>) -> ImageError {
        ImageError::Corrupt { format: self.format, what: what.into() }
    }

    pub fn unsupported(&self, what: impl Into<String>) -> ImageError {
        ImageError::Unsupported { format: self.format, what: what.into() }
    }

    pub fn external(&self, what: impl Into<String>) -> ImageError {
        ImageError::ExternalFile { format: self.format, what: what.into() }
    }
}

/// A fixed-size field of a structure that was read whole; short structures read as zeros.
pub(crate) fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut value = [0; N];
    if let Some(found) = bytes.get(offset..offset + N) {
        value.copy_from_slice(found);
    }
    value
}
