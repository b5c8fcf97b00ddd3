//! Replies of an NBD server, without I/O: bytes in, events out. Memory is bounded whatever the server sends.

use super::error::ProtocolError;
use super::wire;

/// Separate pieces of one read that are not yet joined. Servers send pieces in order, or a few out of order.
const MAX_PIECES: usize = 1024;
/// Longest text of an error chunk that is skipped.
const MAX_ERROR_BYTES: u32 = 64 * 1024;

/// What a request in flight expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// A read; others have no data in their replies.
    pub read: bool,
    /// First byte of the request on the export.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u32,
}

/// The requests in flight, as the parser needs them. Positions are bytes from the start of the request's range and are inside
/// of it.
pub trait Outstanding {
    /// The request with this cookie, if it is in flight.
    fn expected(&self, cookie: u64) -> Option<Expected>;
    /// What was received of it.
    fn coverage(&mut self, cookie: u64) -> Option<&mut Coverage>;
    /// These bytes were read.
    fn data(&mut self, cookie: u64, at: u32, bytes: &[u8]);
    /// These bytes read as zeros.
    fn zeros(&mut self, cookie: u64, at: u32, length: u32);
    /// The request is done; the error is one of the protocol's, as errno.
    fn finished(&mut self, cookie: u64, result: Result<(), i32>);
}

/// Which bytes of a read arrived.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Disjoint, not touching, in order.
    pieces: Vec<(u32, u32)>,
    error: Option<i32>,
}

impl Coverage {
    fn add(&mut self, start: u32, length: u32) -> Result<(), ProtocolError> {
        let end = start.saturating_add(length);
        let index = self.pieces.partition_point(|(_, piece_end)| *piece_end < start);
        let mut merged = (start, end);
        let mut last = index;
        while let Some((piece_start, piece_end)) = self.pieces.get(last).copied() {
            if piece_start > end {
                break;
            }
            if piece_start < end && start < piece_end {
                return Err(ProtocolError::Range { offset: u64::from(start), length: u64::from(length) });
            }
            merged = (merged.0.min(piece_start), merged.1.max(piece_end));
            last += 1;
        }
        self.pieces.splice(index..last, [merged]);
        if self.pieces.len() > MAX_PIECES {
            return Err(ProtocolError::Fragmented(MAX_PIECES));
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.pieces.iter().map(|(start, end)| u64::from(end - start)).sum()
    }
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    /// Data for a request goes on; `done` when the reply ends with it.
    Data {
        cookie: u64,
        at: u32,
        remaining: u32,
        done: bool,
    },
    /// The text of an error chunk.
    Skip {
        cookie: u64,
        remaining: u32,
        done: bool,
    },
}

/// Cuts the server's bytes into replies.
#[derive(Debug)]
pub struct ReplyParser {
    structured: bool,
    state: State,
}

impl ReplyParser {
    /// `structured` as negotiated.
    pub fn new(structured: bool) -> Self {
        Self { structured, state: State::Header }
    }

    /// Read data that is to come next: cookie, position in the request, bytes. It may be put in place by other means than
    /// [`receive`](Self::receive) and told with [`received_data`](Self::received_data).
    pub fn pending_data(&self) -> Option<(u64, u32, u32)> {
        match self.state {
            State::Data { cookie, at, remaining, .. } => Some((cookie, at, remaining)),
            _ => None,
        }
    }

    /// `length` bytes of [`pending_data`](Self::pending_data), at most all, were put in place.
    ///
    /// # Errors
    /// The reply was the last and bytes are missing.
    pub fn received_data(&mut self, length: u32, requests: &mut impl Outstanding) -> Result<(), ProtocolError> {
        if let State::Data { cookie, at, remaining, done } = self.state {
            let length = length.min(remaining);
            let remaining = remaining - length;
            self.state = State::Data { cookie, at: at.saturating_add(length), remaining, done };
            if remaining == 0 {
                self.state = State::Header;
                if done {
                    finish(cookie, requests)?;
                }
            }
        }
        Ok(())
    }

    /// Digests bytes from the front of `input`; returns how many. What it did not use is to be given again with more behind it.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub fn receive(&mut self, input: &[u8], requests: &mut impl Outstanding) -> Result<usize, ProtocolError> {
        let mut rest = input;
        loop {
            let used = match self.state {
                State::Header => self.header(rest, requests)?,
                State::Data { cookie, at, remaining, .. } => {
                    let length = remaining.min(rest.len().try_into().unwrap_or(u32::MAX));
                    requests.data(cookie, at, rest.get(..length as usize).unwrap_or_default());
                    self.received_data(length, requests)?;
                    length as usize
                }
                State::Skip { cookie, remaining, done } => {
                    let length = remaining.min(rest.len().try_into().unwrap_or(u32::MAX));
                    self.skipped(cookie, remaining - length, done, requests)?;
                    length as usize
                }
            };
            if used == 0 {
                return Ok(input.len() - rest.len());
            }
            rest = rest.get(used..).unwrap_or_default();
        }
    }

    fn skipped(
        &mut self,
        cookie: u64,
        remaining: u32,
        done: bool,
        requests: &mut impl Outstanding,
    ) -> Result<(), ProtocolError> {
        if remaining > 0 {
            self.state = State::Skip { cookie, remaining, done };
            return Ok(());
        }
        self.state = State::Header;
        if done { finish(cookie, requests) } else { Ok(()) }
    }

    fn header(&mut self, mut input: &[u8], requests: &mut impl Outstanding) -> Result<usize, ProtocolError> {
        let whole = input;
        match wire::take_u32(&mut input) {
            None => Ok(0),
            Some(wire::MAGIC_SIMPLE_REPLY) => self.simple(input, requests),
            Some(wire::MAGIC_STRUCTURED_REPLY) if self.structured => self.chunk(whole, input, requests),
            Some(found) => Err(ProtocolError::Magic { place: "a reply", found: u64::from(found) }),
        }
    }

    fn simple(&mut self, mut input: &[u8], requests: &mut impl Outstanding) -> Result<usize, ProtocolError> {
        let (Some(error), Some(cookie)) = (wire::take_u32(&mut input), wire::take_u64(&mut input)) else {
            return Ok(0);
        };
        let expected = requests.expected(cookie).ok_or(ProtocolError::UnknownCookie(cookie))?;
        let coverage = requests.coverage(cookie).ok_or(ProtocolError::UnknownCookie(cookie))?;
        if error != 0 {
            coverage.error.get_or_insert(wire::errno(error));
            finish(cookie, requests)?;
        } else if !expected.read {
            finish(cookie, requests)?;
        } else if self.structured {
            // The protocol: a negotiated server answers reads with chunks only.
            return Err(ProtocolError::Magic { place: "a read's reply", found: u64::from(wire::MAGIC_SIMPLE_REPLY) });
        } else {
            coverage.add(0, expected.length)?;
            self.state = State::Data { cookie, at: 0, remaining: expected.length, done: true };
        }
        Ok(wire::SIMPLE_REPLY_BYTES)
    }

    /// `input` follows the magic number, `whole` begins with it.
    fn chunk(
        &mut self,
        whole: &[u8],
        mut input: &[u8],
        requests: &mut impl Outstanding,
    ) -> Result<usize, ProtocolError> {
        let (Some(flags), Some(kind), Some(cookie), Some(length)) = (
            wire::take_u16(&mut input),
            wire::take_u16(&mut input),
            wire::take_u64(&mut input),
            wire::take_u32(&mut input),
        ) else {
            return Ok(0);
        };
        let expected = requests.expected(cookie).ok_or(ProtocolError::UnknownCookie(cookie))?;
        let done = flags & wire::CHUNK_FLAG_DONE != 0;
        let wrong = |place| Err(ProtocolError::Length { place, length: u64::from(length) });
        let header = wire::STRUCTURED_REPLY_BYTES;
        match kind {
            wire::CHUNK_NONE => {
                if length != 0 || !done {
                    return wrong("NBD_REPLY_TYPE_NONE");
                }
                finish(cookie, requests)?;
                Ok(header)
            }
            wire::CHUNK_OFFSET_DATA if expected.read => {
                let Some(data) = length.checked_sub(8).filter(|data| *data > 0) else {
                    return wrong("NBD_REPLY_TYPE_OFFSET_DATA");
                };
                let Some(offset) = wire::take_u64(&mut input) else { return Ok(0) };
                let at = cover(cookie, expected, offset, data, requests)?;
                self.state = State::Data { cookie, at, remaining: data, done };
                Ok(header + 8)
            }
            wire::CHUNK_OFFSET_HOLE if expected.read => {
                if length != 12 {
                    return wrong("NBD_REPLY_TYPE_OFFSET_HOLE");
                }
                let (Some(offset), Some(hole)) = (wire::take_u64(&mut input), wire::take_u32(&mut input)) else {
                    return Ok(0);
                };
                let at = cover(cookie, expected, offset, hole, requests)?;
                requests.zeros(cookie, at, hole);
                if done {
                    finish(cookie, requests)?;
                }
                Ok(header + 12)
            }
            _ if kind & wire::CHUNK_ERROR != 0 => {
                if !(6..=MAX_ERROR_BYTES).contains(&length) {
                    return wrong("an error chunk");
                }
                let (Some(error), Some(text)) = (wire::take_u32(&mut input), wire::take_u16(&mut input)) else {
                    return Ok(0);
                };
                if error == 0 || u32::from(text) > length - 6 {
                    return wrong("an error chunk's text");
                }
                let coverage = requests.coverage(cookie).ok_or(ProtocolError::UnknownCookie(cookie))?;
                coverage.error.get_or_insert(wire::errno(error));
                self.skipped(cookie, length - 6, done, requests)?;
                Ok(whole.len() - input.len())
            }
            _ => Err(ProtocolError::UnexpectedChunk(kind)),
        }
    }
}

/// Notes a piece of a read; returns where in the request it begins.
fn cover(
    cookie: u64,
    expected: Expected,
    offset: u64,
    length: u32,
    requests: &mut impl Outstanding,
) -> Result<u32, ProtocolError> {
    let outside = ProtocolError::Range { offset, length: u64::from(length) };
    let at = offset.checked_sub(expected.offset).and_then(|at| u32::try_from(at).ok());
    let at = at.filter(|at| length > 0 && at.checked_add(length).is_some_and(|end| end <= expected.length));
    let at = at.ok_or(outside)?;
    requests.coverage(cookie).ok_or(ProtocolError::UnknownCookie(cookie))?.add(at, length)?;
    Ok(at)
}

fn finish(cookie: u64, requests: &mut impl Outstanding) -> Result<(), ProtocolError> {
    let expected = requests.expected(cookie).ok_or(ProtocolError::UnknownCookie(cookie))?;
    let coverage = requests.coverage(cookie).ok_or(ProtocolError::UnknownCookie(cookie))?;
    let result = match coverage.error {
        Some(errno) => Err(errno),
        None if expected.read && coverage.bytes() != u64::from(expected.length) => {
            return Err(ProtocolError::Short { expected: u64::from(expected.length), found: coverage.bytes() });
        }
        None => Ok(()),
    };
    requests.finished(cookie, result);
    Ok(())
}
