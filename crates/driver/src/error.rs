//! Why something with a volume of somebody else's did not work.

use std::io;
use std::time::Duration;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A name that the cluster or a command line would take for something else.
    #[error("{what} {name:?} cannot be used: {why}")]
    Name {
        /// Name of what.
        what: &'static str,
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An address that is not understood.
    #[error("NBD address {address:?}: {why}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        why: String,
    },
    /// What an operator says of a backend cannot be.
    #[error("volume backend {backend}: {why}")]
    Settings {
        /// Its name.
        backend: String,
        /// What is wrong.
        why: String,
    },
    /// TLS with an NBD server.
    #[error("TLS with {server}: {why}")]
    Tls {
        /// Which.
        server: String,
        /// What went wrong.
        why: String,
    },
    /// A program is not installed, or cannot be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// Which.
        program: String,
        /// Cause.
        source: io::Error,
    },
    /// No answer in time: the cluster does not answer, perhaps. Whether it was done is not known.
    #[error("no answer within {patience:?}: {command}")]
    TimedOut {
        /// The command line.
        command: String,
        /// How long was waited.
        patience: Duration,
    },
    /// There is no such image or snapshot (ENOENT).
    #[error("not found: {command}: {text}")]
    NotFound {
        /// The command line.
        command: String,
        /// The program's words.
        text: String,
    },
    /// There is one of this name already (EEXIST).
    #[error("exists already: {command}: {text}")]
    Exists {
        /// The command line.
        command: String,
        /// The program's words.
        text: String,
    },
    /// It is used: an image by a client, by snapshots or by clones (EBUSY, ENOTEMPTY).
    #[error("in use: {command}: {text}")]
    InUse {
        /// The command line.
        command: String,
        /// The program's words.
        text: String,
    },
    /// A program failed for another reason.
    #[error("{command}: {status}: {text}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// Its words.
        text: String,
    },
    /// A program's output is not what it should be.
    #[error("{command}: the output is not understood: {why}")]
    Output {
        /// The command line.
        command: String,
        /// What is wrong with it.
        why: String,
    },
    /// An image can only grow.
    #[error("image {image} has {from} bytes and cannot become {to}: it can only grow")]
    Shrink {
        /// Which.
        image: String,
        /// Its size.
        from: u64,
        /// What was asked for.
        to: u64,
    },
    /// The image has been claimed for another attachment.
    #[error("image {image} is claimed for attachment {theirs}, this is attachment {ours}")]
    Fenced {
        /// Which.
        image: String,
        /// The generation of this attachment.
        ours: u64,
        /// The generation that was found.
        theirs: u64,
    },
    /// The storage daemon does not serve.
    #[error("the storage daemon in {folder} does not serve: {why}")]
    Export {
        /// Its folder.
        folder: String,
        /// Why, with its last words.
        why: String,
    },
    /// A system call.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Cause.
        source: io::Error,
    },
}

impl DriverError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
