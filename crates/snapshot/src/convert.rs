//! Import: any format in, a sparse raw file out.

use std::path::Path;

use crate::error::ImageError;
use crate::format::{Format, detect_opened};
use crate::source::Source;
use crate::writer::{DiskSink, SparseWriter};
use crate::{ProgressFn, SECTOR, qcow2, raw, vmdk};

/// Largest disk taken when nothing else is said: 2 TiB.
pub const DEFAULT_MAX_VIRTUAL_BYTES: u64 = 2 << 40;

/// What an import may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest disk, in bytes.
    pub max_virtual_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_virtual_bytes: DEFAULT_MAX_VIRTUAL_BYTES }
    }
}

/// An image that was converted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Format that was read.
    pub format: Format,
    /// Size of the disk in bytes, a multiple of 512.
    pub virtual_bytes: u64,
    /// How many of them are not holes.
    pub data_bytes: u64,
    /// SHA-256 of the raw disk, 64 hex digits.
    pub sha256: String,
}

/// Writes the disk inside `input` to `output` as a sparse raw file, with [`Limits::default`].
///
/// `format` = `None` tells it by content. `output` appears (or is replaced) in one step when it is complete and synced;
/// after an error nothing is left. `input` is never trusted: wrong content ends in a typed error, whatever it is.
pub fn convert(
    input: &Path,
    format: Option<Format>,
    output: &Path,
    progress: ProgressFn<'_>,
) -> Result<Converted, ImageError> {
    convert_with_limits(input, format, output, Limits::default(), progress)
}

/// [`convert`] with other limits.
pub fn convert_with_limits(
    input: &Path,
    format: Option<Format>,
    output: &Path,
    limits: Limits,
    progress: ProgressFn<'_>,
) -> Result<Converted, ImageError> {
    let opened = OpenedImage::open(input, format, limits)?;
    let format = opened.format();
    let mut writer = SparseWriter::create(output)?;
    opened.copy(&mut writer, progress)?;
    let written = writer.finish()?;
    Ok(Converted { format, virtual_bytes: written.bytes, data_bytes: written.data_bytes, sha256: written.sha256 })
}

/// A disk image whose header was checked.
#[derive(Debug)]
pub(crate) struct OpenedImage {
    kind: Kind,
    virtual_bytes: u64,
}

#[derive(Debug)]
enum Kind {
    Raw(Source),
    Qcow2(qcow2::Image),
    Vmdk(vmdk::Image),
}

impl OpenedImage {
    pub fn open(input: &Path, format: Option<Format>, limits: Limits) -> Result<Self, ImageError> {
        let (file, bytes) = Source::open(input)?;
        if bytes == 0 {
            return Err(ImageError::Empty);
        }
        let format = match format {
            Some(Format::Raw) => Format::Raw,
            Some(named) if detect_opened(&file, input).ok() != Some(named) => {
                return Err(ImageError::WrongFormat(named));
            }
            Some(named) => named,
            None => detect_opened(&file, input)?,
        };
        let source = Source { file, path: input.to_owned(), bytes, format };
        let checked = |virtual_bytes: u64| {
            let padded = virtual_bytes.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
            if padded > limits.max_virtual_bytes {
                return Err(ImageError::TooLarge { virtual_bytes, limit: limits.max_virtual_bytes });
            }
            if padded == 0 { Err(ImageError::Empty) } else { Ok(padded) }
        };
        match format {
            Format::Raw => Ok(Self { virtual_bytes: checked(bytes)?, kind: Kind::Raw(source) }),
            Format::Qcow2 => {
                let image = qcow2::Image::open(source)?;
                let virtual_bytes = checked(image.virtual_bytes())?;
                image.check_tables()?;
                Ok(Self { virtual_bytes, kind: Kind::Qcow2(image) })
            }
            Format::Vmdk => {
                let image = vmdk::Image::open(source)?;
                Ok(Self { virtual_bytes: checked(image.virtual_bytes())?, kind: Kind::Vmdk(image) })
            }
        }
    }

    pub fn format(&self) -> Format {
        match self.kind {
            Kind::Raw(_) => Format::Raw,
            Kind::Qcow2(_) => Format::Qcow2,
            Kind::Vmdk(_) => Format::Vmdk,
        }
    }

    /// Size of the disk in bytes, a multiple of 512.
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// Hands the whole disk to `sink`.
    pub fn copy(self, sink: &mut dyn DiskSink, progress: ProgressFn<'_>) -> Result<(), ImageError> {
        match self.kind {
            Kind::Raw(source) => raw::copy(&source, self.virtual_bytes, sink, progress),
            Kind::Qcow2(image) => image.copy(self.virtual_bytes, sink, progress),
            Kind::Vmdk(image) => image.copy(self.virtual_bytes, sink, progress),
        }
    }
}

#[cfg(test)]
#[path = "convert_test.rs"]
mod tests;
