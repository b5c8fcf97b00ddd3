//! Why a journal cannot be replayed.

use std::io;

use thiserror::Error;

/// Why the journal of a file system that needs recovery cannot be replayed. The text says what to do about it.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The disk cannot be read, or ends too early.
    #[error("reading {what} (block {block}): {source}")]
    Read {
        /// What was to be there.
        what: &'static str,
        /// Which block of the file system.
        block: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file system's own description makes no sense.
    #[error("the super block is damaged ({0}); repair the file system with `e2fsck -f`")]
    Filesystem(String),
    /// The log is not inside the file system.
    #[error(
        "the journal is on another device; replay it there with `e2fsck`, then give the file system an internal one \
         (`tune2fs -O ^has_journal`, `tune2fs -j`)"
    )]
    External,
    /// Features that came after this was written, or were never Linux's.
    #[error(
        "the journal has unknown features (incompat {incompat:#x}, ro_compat {ro_compat:#x}); replay it with the `e2fsck` \
         or the kernel that made it"
    )]
    Features {
        /// Unknown bits of s_feature_incompat.
        incompat: u32,
        /// Unknown bits of s_feature_ro_compat.
        ro_compat: u32,
    },
    /// Such a log does not tell whole transactions from torn ones.
    #[error(
        "the journal commits asynchronously without checksums, so that torn transactions cannot be told; replay it with \
         `e2fsck`, and mount without `journal_async_commit`"
    )]
    AsyncWithoutChecksums,
    /// The journal's inode, block map or superblock makes no sense.
    #[error("the journal is damaged ({0}); repair the file system with `e2fsck -f`")]
    Damaged(String),
    /// More than any real journal holds.
    #[error("the journal is too large to be replayed before boot ({what} beyond {limit}); replay it with `e2fsck`")]
    TooLarge {
        /// Of what there is too much.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
}
