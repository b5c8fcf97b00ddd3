//! What can go wrong with an image.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::format::Format;

/// Why an image cannot be read, converted or copied.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A system call on a file failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, e.g. "read".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file has no bytes.
    #[error("the image is empty")]
    Empty,
    /// The file is of a kind that is not a disk image hearth reads.
    #[error("this is {what}, not a raw, qcow2 or vmdk disk image: {advice}")]
    Foreign {
        /// What it is, with its article.
        what: &'static str,
        /// What to do about it.
        advice: &'static str,
    },
    /// The content is not of the format that was named.
    #[error("this is not a {0} image: it does not start with that format's signature")]
    WrongFormat(Format),
    /// The image uses something of its format that hearth does not read.
    #[error("{format} image not supported: {what}")]
    Unsupported {
        /// Its format.
        format: Format,
        /// What it uses and how to get rid of it.
        what: String,
    },
    /// The image points at other files, which an upload does not bring along.
    #[error("the {format} image needs another file ({what}); merge them first: qemu-img convert -O qcow2 IN OUT")]
    ExternalFile {
        /// Its format.
        format: Format,
        /// Which file, for what.
        what: String,
    },
    /// The content contradicts itself.
    #[error("{format} image is damaged: {what}")]
    Corrupt {
        /// Its format.
        format: Format,
        /// What is wrong.
        what: String,
    },
    /// Something that the image refers to lies behind the end of the file.
    #[error("{format} image is truncated: {what} at byte {offset}, but the file has {file_bytes} bytes")]
    Truncated {
        /// Its format.
        format: Format,
        /// What is missing.
        what: &'static str,
        /// Where it should end.
        offset: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// The disk inside is larger than allowed.
    #[error("the disk is {virtual_bytes} bytes large, at most {limit} are allowed")]
    TooLarge {
        /// Its size.
        virtual_bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A copy was asked to be smaller than its source.
    #[error("a copy of {source_bytes} bytes cannot be {wanted_bytes} bytes small")]
    WouldShrink {
        /// Size of the source.
        source_bytes: u64,
        /// Size asked for.
        wanted_bytes: u64,
    },
}

impl ImageError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Whether the image is to blame (and not the machine that reads it): the caller's mistake, not worth a retry.
    pub fn is_invalid_input(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }
}
