//! Writes a sparse raw file: zeros become holes, the target appears only when it is complete and on disk.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::ImageError;

/// Runs of zeros are looked for in pieces of this size, the usual block size of file systems.
const BLOCK: usize = 4096;
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// A file that gets its name when it is finished; dropped before, nothing is left of it.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    pub file: File,
    temporary: PathBuf,
    target: PathBuf,
    persisted: bool,
}

impl TemporaryFile {
    /// Made beside `target` so that the rename stays within one file system.
    pub fn beside(target: &Path) -> Result<Self, ImageError> {
        let name = target.file_name().ok_or_else(|| {
            ImageError::io("create", target)(io::Error::new(io::ErrorKind::InvalidInput, "a path without a file name"))
        })?;
        for attempt in 0u32.. {
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}.{attempt}.partial", std::process::id()));
            let temporary = target.with_file_name(hidden);
            match OpenOptions::new().read(true).write(true).create_new(true).open(&temporary) {
                Ok(file) => return Ok(Self { file, temporary, target: target.to_owned(), persisted: false }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < 10_000 => {}
                Err(error) => return Err(ImageError::io("create", &temporary)(error)),
            }
        }
        Err(ImageError::io("create", target)(io::Error::from(io::ErrorKind::AlreadyExists)))
    }

    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Brings content and name to disk.
    pub fn persist(mut self) -> Result<(), ImageError> {
        self.file.sync_all().map_err(ImageError::io("sync", &self.temporary))?;
        fs::rename(&self.temporary, &self.target).map_err(ImageError::io("rename to", &self.target))?;
        self.persisted = true;
        let parent = self.target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|folder| folder.sync_all()).map_err(ImageError::io("sync", parent))
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.persisted {
            // Best effort: a left-over is hidden and named .partial.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// What was written.
#[derive(Debug)]
pub(crate) struct Written {
    pub bytes: u64,
    pub data_bytes: u64,
    pub sha256: String,
}

/// Takes a disk's content from start to end.
pub(crate) trait DiskSink {
    /// Bytes taken so far.
    fn position(&self) -> u64;

    /// Appends `data`.
    fn data(&mut self, data: &[u8]) -> Result<(), ImageError>;

    /// Appends `length` bytes of zeros; `step` is called now and then with the position.
    fn zeros(&mut self, length: u64, step: &mut dyn FnMut(u64)) -> Result<(), ImageError>;
}

/// Writes a raw file in which zeros are holes.
#[derive(Debug)]
pub(crate) struct SparseWriter {
    output: TemporaryFile,
    hash: Sha256,
    position: u64,
    data_bytes: u64,
}

impl SparseWriter {
    pub fn create(target: &Path) -> Result<Self, ImageError> {
        Ok(Self { output: TemporaryFile::beside(target)?, hash: Sha256::new(), position: 0, data_bytes: 0 })
    }

    fn write_run(&mut self, data: &[u8], (at, start, end): (u64, usize, usize)) -> Result<(), ImageError> {
        let bytes = data.get(start..end).unwrap_or_default();
        self.output.file.write_all_at(bytes, at).map_err(ImageError::io("write", self.output.path()))?;
        self.data_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Ends the file here and gives it its name.
    pub fn finish(self) -> Result<Written, ImageError> {
        self.output.file.set_len(self.position).map_err(ImageError::io("set the size of", self.output.path()))?;
        self.output.persist()?;
        let digest = self.hash.finalize();
        let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Written { bytes: self.position, data_bytes: self.data_bytes, sha256 })
    }
}

impl DiskSink for SparseWriter {
    fn position(&self) -> u64 {
        self.position
    }

    fn data(&mut self, data: &[u8]) -> Result<(), ImageError> {
        self.hash.update(data);
        let mut run: Option<(u64, usize, usize)> = None;
        let mut offset = 0;
        for block in data.chunks(BLOCK) {
            let end = offset + block.len();
            run = match (run, is_zero(block)) {
                (Some(run), true) => {
                    self.write_run(data, run)?;
                    None
                }
                (None, true) => None,
                (Some((at, start, _)), false) => Some((at, start, end)),
                (None, false) => Some((self.position + offset as u64, offset, end)),
            };
            offset = end;
        }
        if let Some(run) = run {
            self.write_run(data, run)?;
        }
        self.position += data.len() as u64;
        Ok(())
    }

    fn zeros(&mut self, length: u64, step: &mut dyn FnMut(u64)) -> Result<(), ImageError> {
        let mut left = length;
        while left > 0 {
            let count = left.min(ZEROS.len() as u64);
            self.hash.update(ZEROS.get(..count as usize).unwrap_or_default());
            self.position += count;
            left -= count;
            if self.position % (64 << 20) < count {
                step(self.position);
            }
        }
        Ok(())
    }
}

/// Word by word: this runs over every byte of every image.
pub(crate) fn is_zero(block: &[u8]) -> bool {
    let (words, tail) = block.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && tail.iter().all(|byte| *byte == 0)
}
