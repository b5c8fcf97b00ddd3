//! Raw disks: holes of the file are skipped, not read.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::ProgressFn;
use crate::error::ImageError;
use crate::source::Source;
use crate::writer::DiskSink;

const BUFFER: usize = 1 << 20;

/// The next stretch of data at or behind `offset` as (start, end); `None` when only holes follow. File systems without
/// holes answer that everything is data.
pub fn next_data(file: impl AsFd, offset: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if offset >= size {
        return Ok(None);
    }
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file.as_fd(), from, whence).map(|found| found as u64)
    };
    let start = match seek(offset, Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL) => return Ok(Some((offset, size))),
        Err(error) => return Err(error.into()),
    };
    let end = seek(start, Whence::SeekHole).unwrap_or(size);
    Ok(if start < size { Some((start, end.clamp(start + 1, size))) } else { None })
}

/// Copies a raw disk of `virtual_bytes`, which may be padded behind the end of the file.
pub(crate) fn copy(
    source: &Source,
    virtual_bytes: u64,
    writer: &mut dyn DiskSink,
    progress: ProgressFn<'_>,
) -> Result<(), ImageError> {
    let mut buffer = vec![0; BUFFER];
    while let Some((start, end)) = next_data(&source.file, writer.position(), source.bytes)
        .map_err(ImageError::io("look for data in", &source.path))?
    {
        writer.zeros(start - writer.position(), &mut |done| progress(done, virtual_bytes))?;
        while writer.position() < end {
            let count = (end - writer.position()).min(BUFFER as u64) as usize;
            let piece = buffer.get_mut(..count).unwrap_or_default();
            source.read("data", piece, writer.position())?;
            writer.data(piece)?;
            progress(writer.position(), virtual_bytes);
        }
    }
    writer.zeros(virtual_bytes - writer.position(), &mut |done| progress(done, virtual_bytes))?;
    Ok(())
}
