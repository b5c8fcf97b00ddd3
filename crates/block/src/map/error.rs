//! Errors of map files.

use std::io;

/// A map file cannot be made, read or trusted.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// A system call on the map failed.
    #[error("cannot {action} the volume's map: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// No valid header copy.
    #[error("the volume's map has no valid header ({0}); it is damaged, or was never completely created")]
    Header(&'static str),
    /// Written by another version.
    #[error("the volume's map has format version {0}; this program knows version 2 alone")]
    Version(u32),
    /// A sector of a page fails its checksum or stands in the wrong place.
    #[error("the volume's map is damaged in page {page}, slot {slot}, sector {sector}: {problem}")]
    Page {
        /// Page number.
        page: u64,
        /// 0 = A, 1 = B.
        slot: u8,
        /// 512-byte sector of the page.
        sector: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// Zero, not a multiple of 4 KiB, or beyond 64 TiB.
    #[error("a volume of {0} bytes is impossible: it must be a multiple of 4096 from 4096 to 2^46")]
    Size(u64),
    /// Longer than 32 bytes or empty.
    #[error("the volume id '{0:.40}' does not fit the map: it must have 1 to 32 bytes")]
    VolumeId(String),
    /// Not the base it was made from.
    #[error("the base does not fit the volume's map: it has other chunks than the one the volume was made from")]
    Extent,
    /// A record of the log is damaged.
    #[error("the log in the volume's map is damaged before byte {0}: a record that is needed is not whole")]
    Log(u64),
    /// Volumes only grow.
    #[error("a volume cannot shrink from {from} to {to} bytes")]
    Shrink {
        /// Bytes now.
        from: u64,
        /// Bytes asked for.
        to: u64,
    },
}

impl MapError {
    pub(crate) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}
