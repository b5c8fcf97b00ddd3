//! The agent's end of the control socket. Blocking, with time-outs: call it from a thread that may block.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::protocol::{Command, Event, MachineState, Message, Outcome, PROTOCOL_VERSION, Request};
use super::socket;

/// Why a request got no useful answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VMM cannot be reached or is gone.
    #[error("the VMM does not answer on its control socket: {0}")]
    Socket(#[from] io::Error),
    /// The VMM closed the connection: it has ended, or serves a newer connection.
    #[error("the VMM has closed the control connection")]
    Closed,
    /// No answer in time.
    #[error("the VMM has not answered within {0:?}")]
    TimedOut(Duration),
    /// The VMM answered with an error.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// What it sent makes no sense.
    #[error("the VMM sent something that is not understood: {0}")]
    Protocol(String),
}

/// Who answered [`Client::hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Instance id, empty before `Create`.
    pub instance_id: String,
    /// Where the machine stands.
    pub state: MachineState,
}

/// A connection to one VMM.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    next_id: u64,
    /// Events that came while an answer was awaited.
    events: VecDeque<Event>,
}

impl AsFd for Client {
    /// Readable when an event waits (see [`Client::next_event`]).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Client {
    /// Connects to the socket at `path` and greets. A connection that another agent had is replaced.
    pub fn connect(path: &Path, timeout: Duration) -> Result<(Self, Peer), ClientError> {
        Self::from_socket(socket::connect_to(path)?, timeout)
    }

    /// Greets over a connected socket.
    pub fn from_socket(socket: OwnedFd, timeout: Duration) -> Result<(Self, Peer), ClientError> {
        let mut client = Self { socket, next_id: 1, events: VecDeque::new() };
        match client.call(Command::Hello { version: PROTOCOL_VERSION }, &[], timeout)? {
            Outcome::Hello { instance_id, state, .. } => Ok((client, Peer { instance_id, state })),
            other => Err(ClientError::Protocol(format!("{other:?} in answer to a greeting"))),
        }
    }

    /// Sends `command` with its descriptors and waits for the answer.
    pub fn call(
        &mut self,
        command: Command,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Outcome, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let bytes =
            postcard::to_allocvec(&Request { id, command }).map_err(|e| ClientError::Protocol(e.to_string()))?;
        socket::send(self.socket.as_fd(), &bytes, fds)?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.receive(deadline)? {
                None => return Err(ClientError::TimedOut(timeout)),
                Some(Message::Event(event)) => self.events.push_back(event),
                Some(Message::Reply(reply)) if reply.id == id => return reply.outcome.map_err(ClientError::Refused),
                // The answer to a request that was given up.
                Some(Message::Reply(_)) => {}
            }
        }
    }

    /// The next event, waiting for it at most `timeout`.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + timeout;
        loop {
            match self.receive(deadline)? {
                Some(Message::Event(event)) => return Ok(Some(event)),
                Some(Message::Reply(_)) => {}
                None => return Ok(None),
            }
        }
    }

    /// One message, or `None` at the deadline.
    fn receive(&self, deadline: Instant) -> Result<Option<Message>, ClientError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the last fraction of a millisecond does not spin.
            let left_ms = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
            match socket::wait_readable(self.socket.as_fd(), left_ms) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            }
            return match socket::receive(self.socket.as_fd()) {
                Ok(Some(packet)) => {
                    postcard::from_bytes(&packet.bytes).map(Some).map_err(|e| ClientError::Protocol(e.to_string()))
                }
                Ok(None) => Err(ClientError::Closed),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Err(ClientError::Closed),
                Err(e) => Err(e.into()),
            };
        }
    }
}
