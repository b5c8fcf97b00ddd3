//! Copies of raw disks: shared blocks where the file system can, else a sparse copy.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;

use crate::ProgressFn;
use crate::error::ImageError;
use crate::raw::next_data;
use crate::source::Source;
use crate::writer::TemporaryFile;

// FICLONE of linux/fs.h: make the destination share all blocks of the source.
nix::ioctl_write_int_bad!(ficlone, nix::request_code_write!(0x94, 9, size_of::<nix::libc::c_int>()));

/// How much is copied between two calls of the progress function.
const PIECE: u64 = 32 << 20;

/// How a copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneMethod {
    /// The file system shares the blocks (FICLONE: XFS, Btrfs, bcachefs): done at once.
    Reflink,
    /// The data was copied, holes were left out.
    SparseCopy,
}

/// A finished copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cloned {
    /// Size of the copy.
    pub bytes: u64,
    /// Bytes that were copied; 0 for a reflink.
    pub copied_bytes: u64,
    /// How.
    pub method: CloneMethod,
}

/// Copies the raw disk `src` to `dst`, grown with zeros to `size` bytes if given. `dst` appears (or is replaced) in one step
/// when it is complete and synced; after an error nothing is left. `progress` counts the bytes of `src`.
pub fn clone_file(src: &Path, dst: &Path, size: Option<u64>, progress: ProgressFn<'_>) -> Result<Cloned, ImageError> {
    let (source, source_bytes) = Source::open(src)?;
    let bytes = size.unwrap_or(source_bytes);
    if bytes < source_bytes {
        return Err(ImageError::WouldShrink { source_bytes, wanted_bytes: bytes });
    }
    let output = TemporaryFile::beside(dst)?;
    // SAFETY: both descriptors are open for the whole call and the kernel takes no pointer.
    let (method, copied_bytes) = match unsafe { ficlone(output.file.as_raw_fd(), source.as_raw_fd()) } {
        Ok(_) => (CloneMethod::Reflink, 0),
        Err(Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL | Errno::ENOTTY | Errno::ENOSYS) => {
            (CloneMethod::SparseCopy, sparse_copy(&source, src, &output, source_bytes, progress)?)
        }
        Err(error) => return Err(ImageError::io("clone to", dst)(error.into())),
    };
    output.file.set_len(bytes).map_err(ImageError::io("set the size of", dst))?;
    output.persist()?;
    progress(source_bytes, source_bytes);
    Ok(Cloned { bytes, copied_bytes, method })
}

fn sparse_copy(
    source: &File,
    path: &Path,
    output: &TemporaryFile,
    size: u64,
    progress: ProgressFn<'_>,
) -> Result<u64, ImageError> {
    let mut copied = 0;
    let mut position = 0;
    let mut in_kernel = true;
    let mut buffer = Vec::new();
    while let Some((start, end)) =
        next_data(source, position, size).map_err(ImageError::io("look for data in", path))?
    {
        position = start;
        while position < end {
            let want = (end - position).min(PIECE) as usize;
            let count = if in_kernel {
                match copy_in_kernel(source, &output.file, position, want) {
                    Ok(count) => count,
                    Err(Errno::EINTR) => continue,
                    // Not between these two file systems.
                    Err(Errno::EXDEV | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EPERM) => {
                        in_kernel = false;
                        continue;
                    }
                    Err(error) => return Err(ImageError::io("copy to", output.path())(error.into())),
                }
            } else {
                buffer.resize(want.min(1 << 20), 0);
                let count = source.read_at(&mut buffer, position).map_err(ImageError::io("read", path))?;
                let data = buffer.get(..count).unwrap_or_default();
                output.file.write_all_at(data, position).map_err(ImageError::io("write", output.path()))?;
                count
            };
            if count == 0 {
                let error =
                    std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it became shorter while being read");
                return Err(ImageError::io("read", path)(error));
            }
            position += count as u64;
            copied += count as u64;
            progress(position, size);
        }
    }
    Ok(copied)
}

fn copy_in_kernel(source: &File, output: &File, position: u64, length: usize) -> Result<usize, Errno> {
    let position = i64::try_from(position).map_err(|_| Errno::EOVERFLOW)?;
    let (mut from, mut to) = (position, position);
    nix::fcntl::copy_file_range(source.as_fd(), Some(&mut from), output.as_fd(), Some(&mut to), length)
}

#[cfg(test)]
#[path = "clone_test.rs"]
mod tests;
