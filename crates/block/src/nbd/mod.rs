//! A volume served by somebody else over NBD, the network block device protocol
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>): fixed newstyle negotiation with `NBD_OPT_GO`, simple and
//! structured replies, FLUSH, FUA, TRIM, WRITE_ZEROES, several connections, reconnection.
//!
//! [`NbdVolume`] works over connected stream sockets that a [`Connector`] hands out. It knows no TLS: who wants TLS ends it in another
//! process (or thread) and hands out one end of a socket pair. No thread is started: the threads of the volume's queues do the work
//! when [`VolumeQueue::completion_fd`](crate::VolumeQueue::completion_fd) tells them to.
//!
//! **Connections.** With `NBD_FLAG_CAN_MULTI_CONN` every queue has its own (a queue whose further connection the server refuses uses
//! another queue's); otherwise all queues share one. When one connection ends, all are given up and made anew: a server that lost
//! one may have lost what all of them wrote.
//!
//! **Reconnection.** A request that is not answered when its connection ends is sent again on the next one, until it is answered.
//! Attempts are made at once, then after 40 ms, twice that, … up to 5 s apart. The guest sees a slow disk, never an error.
//!
//! **Flushes.** A server that dies may lose writes that it answered and that no FLUSH covered. Guests do not expect that from a disk
//! that stays attached: they never write such data again, and a later flush that succeeds would be a lie. So the client keeps a copy
//! of what was written and not yet flushed (a log of at most [`NbdOptions::log_bytes`]) and repeats it on the new connection, followed
//! by a FLUSH, before anything else is sent. When the log is half full the client flushes on its own; a write for which
//! there is no room is sent with FUA, or answered only after a FLUSH of its own. The log belongs to the volume, not to a connection, because a
//! flush on one of several connections covers what all of them wrote. A server without `NBD_FLAG_SEND_FLUSH` says that it has no volatile
//! cache: nothing is kept, and guests' flushes are answered at once.
//!
//! **What the server has to do.** It must not go on with requests of an ended connection after it accepted a new one from the same client;
//! the protocol has no means to ask for that. (A server that was killed does not.)

mod error;
mod handshake;
mod link;
mod log;
mod replies;
mod session;
mod task;
mod volume;
mod wire;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

pub use error::{NbdError, ProtocolError};
pub use handshake::{Export, Handshake};
pub use replies::{Coverage, Expected, Outstanding, ReplyParser};
pub use volume::{NbdQueue, NbdVolume};

/// Hands out connections to the volume's server.
pub trait Connector: Send + fmt::Debug {
    /// A new, connected, non-blocking (`O_NONBLOCK`) stream socket; its other end is a server that begins the negotiation. Called
    /// from I/O threads, so it must not block for long; it may fail and is then called again later. The process must ignore
    /// SIGPIPE, as Rust programs do.
    ///
    /// # Errors
    /// There is no connection to be had now. [`io::ErrorKind::WouldBlock`]: nothing was tried, because someone else has to bring a
    /// connection; [`NbdVolume::connection_came`] tells that it is there. It is not counted as a failed attempt.
    fn connect(&self) -> io::Result<OwnedFd>;
}

/// Learns about the volume's connection. Called from I/O threads; must not block and must not call back into the volume.
pub trait NbdEvents: Send + Sync {
    /// The connection ended, or could not be made again; called for every attempt. Requests wait.
    fn lost(&self, error: &NbdError);
    /// Requests go on.
    fn recovered(&self);
}

/// How to use a server.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Name of the export; the empty one is the server's default.
    pub export: String,
    /// Refuse writes even if the server takes them.
    pub read_only: bool,
    /// Memory for writes that are not flushed yet, in bytes.
    pub log_bytes: usize,
    /// Longest negotiation.
    pub handshake_timeout: Duration,
    /// A connection on which requests wait and nothing came for so long is given up.
    pub reply_timeout: Duration,
    /// Longest that closing a queue waits for its requests (not at all while the connection is lost), and
    /// [`Volume::sync`](crate::Volume::sync) for its flush.
    pub close_timeout: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            read_only: false,
            log_bytes: 16 << 20,
            handshake_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_secs(60),
            close_timeout: Duration::from_secs(10),
        }
    }
}

/// Connects to a Unix socket.
#[derive(Clone, Debug)]
pub struct UnixConnector {
    /// Where the server listens.
    pub path: PathBuf,
}

impl Connector for UnixConnector {
    fn connect(&self) -> io::Result<OwnedFd> {
        // A server that does not accept must not stop the thread: a full backlog is EAGAIN.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(&self.path)?)?;
        Ok(fd)
    }
}
