//! What can go wrong between this client and an NBD server.

use std::io;

/// The server said something that the protocol, or this client's use of it, does not allow. The connection ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not those of an NBD server.
    #[error("the peer is not an NBD server with fixed newstyle negotiation ({0})")]
    NotNbd(&'static str),
    /// A magic number is wrong.
    #[error("wrong magic number {found:#x} where {place} begins")]
    Magic {
        /// What should have begun.
        place: &'static str,
        /// The number found.
        found: u64,
    },
    /// The server answers an option that was not sent.
    #[error("answer to option {found} instead of option {expected}")]
    WrongOption {
        /// Option sent.
        expected: u32,
        /// Option answered.
        found: u32,
    },
    /// An option's answer has a type that does not fit.
    #[error("option {option}: unexpected answer of type {kind:#x}")]
    UnexpectedAnswer {
        /// Option sent.
        option: u32,
        /// Answer's type.
        kind: u32,
    },
    /// The server refuses the export.
    #[error("the server refuses export {name:?} (answer {kind:#x}): {message}")]
    Refused {
        /// Export asked for.
        name: String,
        /// Error type, `NBD_REP_ERR_…`.
        kind: u32,
        /// The server's words.
        message: String,
    },
    /// A length field that cannot be.
    #[error("{place}: length {length} is not possible there")]
    Length {
        /// Where.
        place: &'static str,
        /// The length.
        length: u64,
    },
    /// The negotiation went on for too long.
    #[error("the server's negotiation has more than {0} messages")]
    Endless(usize),
    /// The export's description makes no sense, or cannot be used.
    #[error("the export cannot be used: {0}")]
    Export(String),
    /// An answer to a request that is not in flight.
    #[error("answer to request {0:#x}, which is not in flight")]
    UnknownCookie(u64),
    /// A structured reply that was not negotiated, or of a kind that was not asked for.
    #[error("a reply chunk of type {0:#x} was not asked for")]
    UnexpectedChunk(u16),
    /// Data outside the range of its request, or twice.
    #[error("reply with {length} bytes at byte {offset}, outside of its request or already received")]
    Range {
        /// Start.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// The last chunk came and bytes are missing.
    #[error("a read of {expected} bytes was answered with {found}")]
    Short {
        /// Bytes asked for.
        expected: u64,
        /// Bytes received.
        found: u64,
    },
    /// A read in absurdly many pieces.
    #[error("a read was answered in more than {0} separate pieces")]
    Fragmented(usize),
}

/// An NBD volume cannot be opened, or its connection ended.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// No connection to be had.
    #[error("cannot connect to the NBD server: {0}")]
    Connect(#[source] io::Error),
    /// The socket failed.
    #[error("the connection to the NBD server failed: {0}")]
    Socket(#[source] io::Error),
    /// The server closed the connection.
    #[error("the NBD server closed the connection")]
    Closed,
    /// The server shuts down (`NBD_ESHUTDOWN`).
    #[error("the NBD server is shutting down")]
    ShuttingDown,
    /// Nothing came for too long.
    #[error("the NBD server did not answer in time ({0})")]
    Silent(&'static str),
    /// The server breaks the protocol.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// A new connection leads to something else than the first one did.
    #[error("the NBD server's export changed: {0}")]
    Changed(String),
    /// Writes from before a reconnection could not be repeated.
    #[error("the NBD server did not take repeated writes: {0}")]
    Replay(#[source] io::Error),
    /// Epoll, eventfd or timerfd could not be made or used.
    #[error("cannot set up the NBD queue's events: {0}")]
    Events(#[source] io::Error),
    /// The volume was told to connect anew.
    #[error("the export is negotiated anew")]
    Renegotiate,
}

impl NbdError {
    /// Somebody else has to bring a connection.
    pub(super) fn would_block(&self) -> bool {
        matches!(self, Self::Connect(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}
