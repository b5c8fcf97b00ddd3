//! The parts that do no I/O.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::Random;
use crate::nbd::log::{Content, Log};
use crate::nbd::{Coverage, Expected, Handshake, Outstanding, ProtocolError, ReplyParser, wire};

/// Reads in flight, with cookies from 1 on.
#[derive(Default)]
struct Reads {
    expected: HashMap<u64, (Expected, Coverage)>,
    data: HashMap<u64, Vec<u8>>,
    finished: Vec<(u64, Result<(), i32>)>,
}

impl Reads {
    fn new(lengths: &[u32]) -> Self {
        let mut reads = Self::default();
        let mut offset = 0;
        for (cookie, length) in (1..).zip(lengths) {
            let expected = Expected { read: cookie % 4 != 0, offset, length: *length };
            reads.expected.insert(cookie, (expected, Coverage::default()));
            reads.data.insert(cookie, vec![0xee; *length as usize]);
            offset += u64::from(*length);
        }
        reads
    }
}

impl Outstanding for Reads {
    fn expected(&self, cookie: u64) -> Option<Expected> {
        self.expected.get(&cookie).map(|(expected, _)| *expected)
    }

    fn coverage(&mut self, cookie: u64) -> Option<&mut Coverage> {
        self.expected.get_mut(&cookie).map(|(_, coverage)| coverage)
    }

    fn data(&mut self, cookie: u64, at: u32, bytes: &[u8]) {
        // Panics when the parser goes out of bounds.
        self.data.get_mut(&cookie).unwrap()[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn zeros(&mut self, cookie: u64, at: u32, length: u32) {
        self.data.get_mut(&cookie).unwrap()[at as usize..][..length as usize].fill(0);
    }

    fn finished(&mut self, cookie: u64, result: Result<(), i32>) {
        assert!(self.expected.remove(&cookie).is_some(), "finished twice");
        self.finished.push((cookie, result));
    }
}

fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = wire::MAGIC_STRUCTURED_REPLY.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    bytes
}

fn data_chunk(done: bool, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    chunk(u16::from(done), wire::CHUNK_OFFSET_DATA, cookie, &[&offset.to_be_bytes(), data].concat())
}

fn hole_chunk(done: bool, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    chunk(
        u16::from(done),
        wire::CHUNK_OFFSET_HOLE,
        cookie,
        &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat(),
    )
}

fn error_chunk(done: bool, cookie: u64, error: u32, text: &[u8]) -> Vec<u8> {
    let body = [&error.to_be_bytes()[..], &(text.len() as u16).to_be_bytes(), text].concat();
    chunk(u16::from(done), wire::CHUNK_ERROR | 1, cookie, &body)
}

fn simple(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
    [&wire::MAGIC_SIMPLE_REPLY.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
}

/// Feeds the bytes in pieces, as a socket would.
fn feed(parser: &mut ReplyParser, reads: &mut Reads, bytes: &[u8], cuts: &[usize]) -> Result<(), ProtocolError> {
    let mut buffer = Vec::new();
    let mut rest = bytes;
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let (now, later) = rest.split_at((*cuts.next().unwrap()).clamp(1, rest.len()));
        rest = later;
        buffer.extend_from_slice(now);
        let used = parser.receive(&buffer, reads)?;
        buffer.drain(..used);
        // What it leaves is less than a header: memory stays bounded.
        assert!(buffer.len() < 64, "{} bytes left", buffer.len());
    }
    Ok(())
}

fn refused(structured: bool, bytes: &[u8]) -> ProtocolError {
    let mut reads = Reads::new(&[1024, 1024, 1024, 1024]);
    feed(&mut ReplyParser::new(structured), &mut reads, bytes, &[usize::MAX]).unwrap_err()
}

#[test]
fn broken_replies_are_told_apart() {
    use ProtocolError::*;
    assert_eq!(refused(true, &simple(0, 99, &[])), UnknownCookie(99));
    assert!(matches!(refused(false, &data_chunk(true, 1, 0, &[1; 1024])), Magic { .. }));
    assert!(matches!(refused(true, &simple(0, 1, &[])), Magic { .. }));
    assert!(matches!(refused(true, &data_chunk(true, 1, 0, &[1; 1000])), Short { expected: 1024, found: 1000 }));
    assert!(matches!(refused(true, &data_chunk(true, 1, 0, &[1; 1025])), Range { .. }));
    assert!(matches!(refused(true, &data_chunk(true, 2, 1023, &[1; 8])), Range { .. }));
    assert!(matches!(refused(true, &hole_chunk(true, 1, 0, 0)), Range { .. }));
    assert!(matches!(refused(true, &data_chunk(true, 1, 0, &[])), Length { .. }));
    assert!(matches!(refused(true, &chunk(0, wire::CHUNK_NONE, 1, &[])), Length { .. }));
    assert_eq!(refused(true, &chunk(1, 5, 1, &[])), UnexpectedChunk(5));
    // Request 4 is a write.
    assert_eq!(refused(true, &data_chunk(true, 4, 3072, &[1; 8])), UnexpectedChunk(1));
    let twice = [data_chunk(false, 1, 0, &[1; 512]), hole_chunk(true, 1, 511, 513)].concat();
    assert!(matches!(refused(true, &twice), Range { .. }));
    let again = [simple(5, 1, &[]), simple(5, 1, &[])].concat();
    assert_eq!(refused(true, &again), UnknownCookie(1));
    assert!(matches!(refused(true, &error_chunk(true, 1, 0, b"fine")), Length { .. }));
}

#[test]
fn errors_become_errnos() {
    let numbers = [(1, libc::EPERM), (5, libc::EIO), (12, libc::ENOMEM), (22, libc::EINVAL), (28, libc::ENOSPC)];
    for (error, errno) in
        numbers.into_iter().chain([(95, libc::EOPNOTSUPP), (108, libc::ESHUTDOWN), (77, libc::EINVAL)])
    {
        let mut reads = Reads::new(&[512, 512]);
        let bytes = [simple(error, 1, &[]), error_chunk(false, 2, error, b"why"), chunk(1, wire::CHUNK_NONE, 2, &[])];
        feed(&mut ReplyParser::new(true), &mut reads, &bytes.concat(), &[1]).unwrap();
        assert_eq!(reads.finished, [(1, Err(errno)), (2, Err(errno))]);
    }
}

fn greeting() -> Vec<u8> {
    [&wire::MAGIC_SERVER.to_be_bytes()[..], &wire::MAGIC_OPTION.to_be_bytes(), &3u16.to_be_bytes()].concat()
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::MAGIC_OPTION_REPLY.to_be_bytes().to_vec();
    [option, kind, data.len() as u32].iter().for_each(|number| bytes.extend(number.to_be_bytes()));
    bytes.extend(data);
    bytes
}

fn negotiation(size: u64, flags: u16) -> Vec<u8> {
    let info = [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    [
        greeting(),
        option_reply(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]),
        option_reply(wire::OPT_GO, wire::REP_INFO, &info),
        option_reply(wire::OPT_GO, wire::REP_ACK, &[]),
    ]
    .concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn replies_in_any_pieces_give_the_same_data(
        lengths in prop::collection::vec(1u32..5000, 1..6),
        cuts in prop::collection::vec(1usize..3000, 1..6),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let mut bytes = Vec::new();
        let mut wanted: HashMap<u64, Vec<u8>> = HashMap::new();
        let mut offset = 0;
        for (cookie, length) in (1u64..).zip(&lengths) {
            let mut content = vec![0xee; *length as usize];
            let mut at = 0;
            while cookie % 4 != 0 && at < *length {
                let part = (1 + random.below(2000) as u32).min(length - at);
                let range = at as usize..(at + part) as usize;
                let done = at + part == *length;
                if random.chance(3) {
                    content[range].fill(0);
                    bytes.extend(hole_chunk(done, cookie, offset + u64::from(at), part));
                } else {
                    content[range.clone()].fill_with(|| random.next() as u8);
                    bytes.extend(data_chunk(done, cookie, offset + u64::from(at), &content[range]));
                }
                at += part;
            }
            if cookie % 4 == 0 {
                bytes.extend(simple(0, cookie, &[]));
            }
            wanted.insert(cookie, content);
            offset += u64::from(*length);
        }
        let mut reads = Reads::new(&lengths);
        feed(&mut ReplyParser::new(true), &mut reads, &bytes, &cuts).unwrap();
        prop_assert_eq!(reads.finished.len(), lengths.len());
        prop_assert_eq!(reads.data, wanted);
    }

    #[test]
    fn no_reply_bytes_do_harm(
        structured in any::<bool>(),
        parts in prop::collection::vec((any::<u16>(), 0u16..8, 0u64..6, 0u64..5000, 0u32..6000, any::<[u8; 4]>()), 1..12),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cuts in prop::collection::vec(1usize..100, 1..6),
    ) {
        let mut bytes = Vec::new();
        for (flags, kind, cookie, offset, length, noise) in parts {
            bytes.extend(match kind {
                0 => simple(u32::from(flags % 3), cookie, &vec![1; length as usize]),
                1 | 2 => data_chunk(flags & 1 == 1, cookie, offset, &vec![2; length as usize]),
                3 | 4 => hole_chunk(flags & 1 == 1, cookie, offset, length),
                5 => error_chunk(flags & 1 == 1, cookie, u32::from(flags), &noise),
                6 => chunk(flags, flags, cookie, &noise),
                _ => noise.to_vec(),
            });
        }
        for (index, byte) in flips {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        let mut reads = Reads::new(&[1024, 512, 5000, 4096]);
        let _ = feed(&mut ReplyParser::new(structured), &mut reads, &bytes, &cuts);
    }

    #[test]
    fn no_negotiation_does_harm(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        size in any::<u64>(),
        flags in any::<u16>(),
    ) {
        let mut bytes = negotiation(size, flags);
        for (index, byte) in flips {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.extend(noise);
        let mut handshake = Handshake::new("export").unwrap();
        let first = cut.index(bytes.len());
        if let Ok(used) = handshake.receive(&bytes[..first]) {
            let _ = handshake.receive(&bytes[used..]);
        }
        if let Ok(Some(export)) = handshake.export() {
            prop_assert!(export.size_bytes > 0 && export.size_bytes % u64::from(export.min_block_bytes) == 0);
            prop_assert!(export.max_payload_bytes >= export.min_block_bytes);
        }
    }

    #[test]
    fn the_log_repeats_what_was_written_last(
        writes in prop::collection::vec((0u64..64, 1u64..16, 0u8..4, any::<bool>()), 1..60),
    ) {
        let mut log = Log::new(usize::MAX / 2);
        let mut newest: Vec<Option<u8>> = vec![None; 80];
        let mut marks = Vec::new();
        for (value, (offset, length, kind, flushed)) in (1u8..).zip(writes) {
            let range = offset as usize..(offset + length) as usize;
            let content = match kind {
                0 => Content::Durable,
                1 => Content::Zeros { no_hole: true },
                _ => Content::Data(vec![value; length as usize].into()),
            };
            if kind > 0 {
                let bytes = if kind > 1 { length as usize } else { 0 };
                prop_assert!(log.reserve(bytes));
            }
            newest[range].fill(match kind {
                0 => None,
                1 => Some(0),
                _ => Some(value),
            });
            log.push(offset, length, content);
            marks.push(log.mark());
            if flushed && value % 16 == 0 {
                log.retire(log.mark());
                newest.fill(None);
            }
        }
        let mut repeated: Vec<Option<u8>> = vec![None; 80];
        for repeat in log.repeats() {
            for at in 0..repeat.length as usize {
                let place = &mut repeated[repeat.offset as usize + at];
                prop_assert!(place.is_none(), "two repeats overlap");
                *place = match &repeat.content {
                    Content::Data(data) => Some(Arc::clone(data)[repeat.start + at]),
                    _ => Some(0),
                };
            }
        }
        prop_assert_eq!(repeated, newest);
        log.retire(u64::MAX);
        prop_assert!(log.repeats().is_empty());
        prop_assert!(!log.pressing());
    }
}
