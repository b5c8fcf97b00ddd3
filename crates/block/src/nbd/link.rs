//! One connection: a non-blocking stream socket, what is still to be sent, and the commands in flight.
//!
//! The socket is used by `readv` and `writev` alone, which every thread of a confined process may call that does I/O at all.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::error::NbdError;
use super::handshake::{Export, Handshake};
use super::replies::{Coverage, Expected, Outstanding, ReplyParser};
use super::wire;

const RECEIVE_BYTES: usize = 64 * 1024;
/// Read data at least this long goes from the socket to its place without a stop in our buffer.
const DIRECT_BYTES: u32 = 16 * 1024;
const MAX_IOVECS: usize = 512;
/// System calls in a row for one socket before others get their turn.
const MAX_ROUNDS: usize = 64;

/// Whom a command's outcome concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A part of the task in this slot.
    Part { task: usize },
    /// Makes the write of the task in this slot durable.
    Settle { task: usize },
    /// Makes room in the log.
    Retire { mark: u64 },
    /// A write of the log, on a new connection.
    Repeat,
    /// The flush behind the repeated writes.
    RepeatFlush { mark: u64 },
}

/// What is sent behind a command's header.
#[derive(Debug)]
pub(super) enum Payload {
    None,
    /// The submitter's memory, see `VolumeQueue::submit`.
    Memory(Vec<libc::iovec>),
    /// A piece of the log: data, start, length.
    Log(Arc<[u8]>, usize, usize),
}

/// A command to be sent.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) purpose: Purpose,
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) payload: Payload,
    /// Where read data goes.
    pub(super) into: Vec<libc::iovec>,
}

#[derive(Debug)]
struct Outgoing {
    header: [u8; wire::REQUEST_BYTES],
    slot: usize,
    payload: Payload,
    payload_bytes: usize,
    sent: usize,
}

#[derive(Debug)]
struct InFlight {
    purpose: Purpose,
    expected: Expected,
    coverage: Coverage,
    into: Vec<libc::iovec>,
    /// Wholly sent. Earlier the server cannot know it, and its memory is still needed.
    sent: bool,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    command: Option<InFlight>,
}

/// Commands in flight; a cookie is the slot's index below its generation.
#[derive(Debug, Default)]
struct Commands {
    slots: Vec<Slot>,
    free: Vec<usize>,
    finished: Vec<(Purpose, Result<(), i32>)>,
    count: usize,
}

impl Commands {
    fn insert(&mut self, command: InFlight) -> (usize, u64) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let mut generation = 0;
        if let Some(slot) = self.slots.get_mut(index) {
            slot.generation = slot.generation.wrapping_add(1);
            generation = slot.generation;
            slot.command = Some(command);
            self.count += 1;
        }
        (index, u64::from(generation) << 32 | index as u64)
    }

    fn slot(&self, cookie: u64) -> Option<(usize, &InFlight)> {
        let index = (cookie & u64::from(u32::MAX)) as usize;
        let slot = self.slots.get(index).filter(|slot| u64::from(slot.generation) == cookie >> 32)?;
        slot.command.as_ref().filter(|command| command.sent).map(|command| (index, command))
    }

    fn in_flight(&mut self, index: usize) -> Option<&mut InFlight> {
        self.slots.get_mut(index)?.command.as_mut()
    }
}

impl Outstanding for Commands {
    fn expected(&self, cookie: u64) -> Option<Expected> {
        self.slot(cookie).map(|(_, command)| command.expected)
    }

    fn coverage(&mut self, cookie: u64) -> Option<&mut Coverage> {
        let (index, _) = self.slot(cookie)?;
        self.in_flight(index).map(|command| &mut command.coverage)
    }

    fn data(&mut self, cookie: u64, at: u32, mut bytes: &[u8]) {
        let Some((_, command)) = self.slot(cookie) else { return };
        for iovec in section(&command.into, u64::from(at), bytes.len() as u64) {
            let (now, later) = bytes.split_at(iovec.iov_len.min(bytes.len()));
            // SAFETY: the iovec is a part of the request's buffers, which the submitter keeps writable until the request is
            // complete, and it is not while its command is in flight; `now` is not longer than it.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), iovec.iov_base.cast::<u8>(), now.len()) };
            bytes = later;
        }
    }

    fn zeros(&mut self, cookie: u64, at: u32, length: u32) {
        let Some((_, command)) = self.slot(cookie) else { return };
        for iovec in section(&command.into, u64::from(at), u64::from(length)) {
            // SAFETY: as in `data`.
            unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), 0, iovec.iov_len) };
        }
    }

    fn finished(&mut self, cookie: u64, result: Result<(), i32>) {
        let Some((index, _)) = self.slot(cookie) else { return };
        if let Some(command) = self.slots.get_mut(index).and_then(|slot| slot.command.take()) {
            self.free.push(index);
            self.count -= 1;
            self.finished.push((command.purpose, result));
        }
    }
}

/// The part of `iovecs` that begins at byte `at` and has `length` bytes (or ends with them).
pub(super) fn section(iovecs: &[libc::iovec], at: u64, length: u64) -> Vec<libc::iovec> {
    let (mut skip, mut left) = (at, length);
    let mut parts = Vec::new();
    for iovec in iovecs {
        let here = iovec.iov_len as u64;
        if left == 0 {
            break;
        }
        if skip >= here {
            skip -= here;
            continue;
        }
        let take = (here - skip).min(left);
        let iov_base = iovec.iov_base.cast::<u8>().wrapping_add(skip as usize).cast();
        parts.push(libc::iovec { iov_base, iov_len: take as usize });
        left -= take;
        skip = 0;
    }
    parts
}

#[derive(Debug)]
enum Stage {
    Negotiating(Box<Handshake>),
    Ready(ReplyParser),
}

#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    /// The queue that waits for its events, when each queue has its own.
    pub(super) owner: Option<usize>,
    stage: Stage,
    commands: Commands,
    /// Bytes of the negotiation to send.
    greeting: VecDeque<u8>,
    outgoing: VecDeque<Outgoing>,
    buffer: Vec<u8>,
    /// Filled part of `buffer`.
    filled: std::ops::Range<usize>,
    /// The socket's buffer is full.
    pub(super) blocked: bool,
    /// There is more to receive than one call took.
    pub(super) unread: bool,
    pub(super) last_received: Instant,
}

// SAFETY: the iovecs point to memory that submitters keep valid on all threads until completion (`VolumeQueue::submit`).
unsafe impl Send for Link {}

impl Link {
    pub(super) fn new(socket: OwnedFd, export: &str, owner: Option<usize>) -> Result<Self, NbdError> {
        Ok(Self {
            socket,
            owner,
            stage: Stage::Negotiating(Box::new(Handshake::new(export)?)),
            commands: Commands::default(),
            greeting: VecDeque::new(),
            outgoing: VecDeque::new(),
            buffer: vec![0; RECEIVE_BYTES],
            filled: 0..0,
            blocked: false,
            unread: false,
            last_received: Instant::now(),
        })
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self.stage, Stage::Ready(_))
    }

    /// Commands not yet answered.
    pub(super) fn in_flight(&self) -> usize {
        self.commands.count
    }

    /// The last command was answered, or one was, after this: outcomes since the last call.
    pub(super) fn take_finished(&mut self) -> Vec<(Purpose, Result<(), i32>)> {
        std::mem::take(&mut self.commands.finished)
    }

    /// Puts a command into the line to be sent.
    pub(super) fn push(&mut self, command: Command) {
        let read = command.command == wire::CMD_READ;
        if self.commands.count == 0 {
            // Silence counts from the first command on.
            self.last_received = Instant::now();
        }
        let (slot, cookie) = self.commands.insert(InFlight {
            purpose: command.purpose,
            expected: Expected { read, offset: command.offset, length: command.length },
            coverage: Coverage::default(),
            into: command.into,
            sent: false,
        });
        let payload_bytes = match &command.payload {
            Payload::None => 0,
            Payload::Memory(_) => command.length as usize,
            Payload::Log(_, _, length) => *length,
        };
        let header = wire::request(command.command, command.flags, cookie, command.offset, command.length);
        self.outgoing.push_back(Outgoing { header, slot, payload: command.payload, payload_bytes, sent: 0 });
    }

    /// Ends the session in order, as far as the socket takes it at once.
    pub(super) fn disconnect(&mut self) {
        if self.is_ready() && self.outgoing.is_empty() {
            let mut header = wire::request(wire::CMD_DISC, 0, 0, 0, 0);
            // The outcome does not matter: the socket is closed next.
            let _ = send(&self.socket, &[libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() }]);
        }
    }

    /// Sends what can be sent.
    pub(super) fn transmit(&mut self) -> Result<(), NbdError> {
        self.blocked = false;
        while !self.greeting.is_empty() {
            let (bytes, _) = self.greeting.as_slices();
            let iovec = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            match send(&self.socket, &[iovec])? {
                Some(count) => drop(self.greeting.drain(..count.min(bytes.len()))),
                None => {
                    self.blocked = true;
                    return Ok(());
                }
            }
        }
        while !self.outgoing.is_empty() {
            let iovecs = self.gather();
            match send(&self.socket, &iovecs)? {
                Some(count) => self.sent(count),
                None => {
                    self.blocked = true;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn gather(&self) -> Vec<libc::iovec> {
        let mut iovecs = Vec::with_capacity(16);
        for outgoing in &self.outgoing {
            let header = outgoing.header.get(outgoing.sent..).unwrap_or_default();
            if !header.is_empty() {
                iovecs.push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() });
            }
            let done = outgoing.sent.saturating_sub(wire::REQUEST_BYTES);
            match &outgoing.payload {
                Payload::None => {}
                Payload::Memory(memory) => {
                    iovecs.extend(section(memory, done as u64, (outgoing.payload_bytes - done) as u64));
                }
                Payload::Log(data, start, length) => {
                    let rest = data.get(start + done..start + length).unwrap_or_default();
                    iovecs.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() });
                }
            }
            if iovecs.len() >= MAX_IOVECS {
                break;
            }
        }
        // One request may have more than fit one call; the rest goes with the next.
        iovecs.truncate(MAX_IOVECS);
        iovecs
    }

    fn sent(&mut self, mut count: usize) {
        while let Some(outgoing) = self.outgoing.front_mut() {
            let left = wire::REQUEST_BYTES + outgoing.payload_bytes - outgoing.sent;
            if count < left {
                outgoing.sent += count;
                return;
            }
            count -= left;
            if let Some(command) = self.commands.in_flight(outgoing.slot) {
                command.sent = true;
            }
            self.outgoing.pop_front();
        }
    }

    /// Receives what is there. Returns the export when the negotiation ends with this.
    pub(super) fn receive(&mut self) -> Result<Option<Export>, NbdError> {
        let mut negotiated = None;
        self.unread = true;
        for _ in 0..MAX_ROUNDS {
            let asked;
            let count = match self.direct_target() {
                Some((mut iovecs, direct)) => {
                    iovecs.push(libc::iovec { iov_base: self.buffer.as_mut_ptr().cast(), iov_len: self.buffer.len() });
                    asked = direct as usize + self.buffer.len();
                    let Some(count) = receive(&self.socket, &mut iovecs)? else { return Ok(self.all_read(negotiated)) };
                    let placed = direct.min(count.try_into().unwrap_or(u32::MAX));
                    if let Stage::Ready(parser) = &mut self.stage {
                        parser.received_data(placed, &mut self.commands)?;
                    }
                    self.filled = 0..count - placed as usize;
                    count
                }
                None => {
                    self.make_room();
                    let space = self.buffer.get_mut(self.filled.end..).unwrap_or_default();
                    asked = space.len();
                    let mut iovec = [libc::iovec { iov_base: space.as_mut_ptr().cast(), iov_len: space.len() }];
                    let Some(count) = receive(&self.socket, &mut iovec)? else { return Ok(self.all_read(negotiated)) };
                    self.filled.end += count;
                    count
                }
            };
            self.last_received = Instant::now();
            if let Some(export) = self.digest()? {
                negotiated = Some(export);
            }
            if count < asked {
                return Ok(self.all_read(negotiated));
            }
        }
        Ok(negotiated)
    }

    fn all_read<T>(&mut self, outcome: T) -> T {
        self.unread = false;
        outcome
    }

    /// Read data that comes next and is worth a system call of its own.
    fn direct_target(&self) -> Option<(Vec<libc::iovec>, u32)> {
        let Stage::Ready(parser) = &self.stage else { return None };
        let (cookie, at, remaining) = parser.pending_data()?;
        if !self.filled.is_empty() || remaining < DIRECT_BYTES {
            return None;
        }
        let (_, command) = self.commands.slot(cookie)?;
        let mut iovecs = section(&command.into, u64::from(at), u64::from(remaining));
        iovecs.truncate(MAX_IOVECS);
        let direct: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        // All of it, or our own buffer would take what belongs behind it.
        (direct == remaining as usize).then_some((iovecs, remaining))
    }

    /// Moves what is left to the front and makes sure that there is room.
    fn make_room(&mut self) {
        if self.filled.start > 0 {
            self.buffer.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        if self.filled.end == self.buffer.len() {
            // Only an option's answer can be that long; its length is bounded by the negotiation.
            self.buffer.resize(self.buffer.len() * 2, 0);
        }
    }

    fn digest(&mut self) -> Result<Option<Export>, NbdError> {
        let mut negotiated = None;
        if let Stage::Negotiating(handshake) = &mut self.stage {
            let used = handshake.receive(self.buffer.get(self.filled.clone()).unwrap_or_default())?;
            self.filled.start += used;
            self.greeting.extend(handshake.take_output());
            negotiated = handshake.export()?;
        }
        if let Some(export) = negotiated {
            self.stage = Stage::Ready(ReplyParser::new(export.structured));
        }
        if let Stage::Ready(parser) = &mut self.stage {
            let input = self.buffer.get(self.filled.clone()).unwrap_or_default();
            self.filled.start += parser.receive(input, &mut self.commands)?;
        }
        Ok(negotiated)
    }
}

/// What a call on a socket has done: nothing when it was interrupted, no bytes when it would have to wait.
fn moved(count: isize) -> Option<Result<Option<usize>, NbdError>> {
    if let Ok(count) = usize::try_from(count) {
        return Some(Ok(Some(count)));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock => Some(Ok(None)),
        io::ErrorKind::Interrupted => None,
        _ => Some(Err(NbdError::Socket(error))),
    }
}

/// `None` when the socket's buffer is full.
fn send(socket: &OwnedFd, iovecs: &[libc::iovec]) -> Result<Option<usize>, NbdError> {
    loop {
        // SAFETY: the iovecs are readable: ours, or the submitter's until completion. At most `MAX_IOVECS`.
        let count = unsafe { libc::writev(socket.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        if let Some(result) = moved(count) {
            return result;
        }
    }
}

/// `None` when nothing is there.
fn receive(socket: &OwnedFd, iovecs: &mut [libc::iovec]) -> Result<Option<usize>, NbdError> {
    loop {
        // SAFETY: the iovecs are writable: ours, or the submitter's until completion. At most `MAX_IOVECS` and one.
        let count = unsafe { libc::readv(socket.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        match moved(count) {
            Some(Ok(Some(0))) => return Err(NbdError::Closed),
            Some(result) => return result,
            None => {}
        }
    }
}
