//! Why nothing can be booted.

use thiserror::Error;

/// Why a root disk yields no kernel. The text goes to the instance's owner as its state reason.
#[derive(Debug, Error)]
pub enum BootError {
    /// The disk itself cannot be read.
    #[error("reading the root disk ({what}): {source}")]
    Read {
        /// Which part.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither partitions nor a file system.
    #[error("the root disk has neither a GPT or MBR partition table nor an ext4 file system")]
    NotPartitioned,
    /// A partition table whose copies are all damaged.
    #[error("the root disk's partition table is damaged: {0}")]
    PartitionTable(String),
    /// Partitions, but none of them can be read.
    #[error("no readable ext4 file system on the root disk: {0}")]
    NoFilesystem(String),
    /// File systems, but no kernel.
    #[error("no kernel in {places}{notes}")]
    NoKernel {
        /// Where was looked, e.g. "/boot of partition 1".
        places: String,
        /// What was found and why it did not do, or nothing.
        notes: String,
    },
    /// A file inside the image cannot be read.
    #[error("{path} of {place}: {reason}")]
    File {
        /// Path in its file system.
        path: String,
        /// Which partition.
        place: String,
        /// Why.
        reason: String,
    },
    /// The power was cut, and what the file system's journal holds cannot be had.
    #[error("the ext4 file system of {place} was not unmounted, and its journal cannot be replayed: {source}")]
    Journal {
        /// Which partition.
        place: String,
        /// Why.
        source: super::JournalError,
    },
    /// A file is larger than anything that boots.
    #[error("{path} of {place} has {size} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Path in its file system.
        path: String,
        /// Which partition.
        place: String,
        /// Its size.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Neither bzImage nor vmlinux.
    #[error("{path} of {place} is not a Linux kernel for x86-64 (neither a bzImage nor an ELF vmlinux)")]
    NotAKernel {
        /// Path in its file system.
        path: String,
        /// Which partition.
        place: String,
    },
    /// x86 Linux takes 2047 bytes.
    #[error("the kernel command line has {0} bytes, at most {max} are allowed", max = super::MAX_CMDLINE)]
    CommandLine(usize),
}
