//! One chunk in an archive.

use crate::chunk::CHUNK_BYTES;
use crate::fields::field;
use crate::objects::Damage;

/// Bytes before a record's payload.
pub(super) const RECORD_BYTES: usize = 20;
const KIND_CHUNK: u8 = 1;
const KIND_END: u8 = 2;
const CODEC_PLAIN: u8 = 0;
const CODEC_ZSTD: u8 = 1;
const ZSTD_LEVEL: i32 = 3;

/// The head of a record.
///
/// | offset | bytes | what (little-endian) |
/// |---|---|---|
/// | 0 | 1 | kind: 1 = chunk, 2 = end |
/// | 1 | 1 | codec: 0 = as it is, 1 = zstd |
/// | 2 | 2 | disk, counted from 0 |
/// | 4 | 8 | chunk |
/// | 12 | 4 | length of the payload |
/// | 16 | 4 | CRC-32C of bytes 0..16 and the payload |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Chunk { disk: u16, chunk: u64, codec: u8 },
    End { records: u64 },
}

fn crc(head: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(head.get(..16).unwrap_or_default()), payload)
}

fn assemble(kind: u8, codec: u8, disk: u16, number: u64, payload: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(RECORD_BYTES + payload.len());
    record.extend_from_slice(&[kind, codec]);
    record.extend_from_slice(&disk.to_le_bytes());
    record.extend_from_slice(&number.to_le_bytes());
    record.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    let crc = crc(&record, payload);
    record.extend_from_slice(&crc.to_le_bytes());
    record.extend_from_slice(payload);
    record
}

/// A chunk with its head.
pub(super) fn encode_chunk(disk: u16, chunk: u64, content: &[u8]) -> Vec<u8> {
    match zstd::bulk::compress(content, ZSTD_LEVEL).ok().filter(|packed| packed.len() < content.len()) {
        Some(packed) => assemble(KIND_CHUNK, CODEC_ZSTD, disk, chunk, &packed),
        None => assemble(KIND_CHUNK, CODEC_PLAIN, disk, chunk, content),
    }
}

/// The end, with the hash of all before.
pub(super) fn encode_end(records: u64, hash: &[u8; 32]) -> Vec<u8> {
    assemble(KIND_END, CODEC_PLAIN, 0, records, hash)
}

/// Length of the payload that a head announces.
pub(super) fn payload_bytes(head: &[u8; RECORD_BYTES]) -> Result<usize, Damage> {
    let length = u32::from_le_bytes(field(head, 12)) as usize;
    if length > CHUNK_BYTES {
        return Err(Damage::Field(format!("a record of {length} bytes")));
    }
    Ok(length)
}

/// Checks a record.
pub(super) fn decode(head: &[u8; RECORD_BYTES], payload: &[u8]) -> Result<Record, Damage> {
    let (expected, found) = (u32::from_le_bytes(field(head, 16)), crc(head, payload));
    if expected != found {
        return Err(Damage::Checksum { expected, found });
    }
    let [kind, codec] = field(head, 0);
    let (disk, number) = (u16::from_le_bytes(field(head, 2)), u64::from_le_bytes(field(head, 4)));
    match (kind, codec) {
        (KIND_CHUNK, CODEC_PLAIN | CODEC_ZSTD) => Ok(Record::Chunk { disk, chunk: number, codec }),
        (KIND_END, CODEC_PLAIN) if payload.len() == 32 => Ok(Record::End { records: number }),
        (KIND_CHUNK, codec) => Err(Damage::Codec(codec)),
        (kind, _) => Err(Damage::Field(format!("a record of kind {kind}"))),
    }
}

/// The content of a chunk record's payload.
pub(super) fn unpack(codec: u8, payload: &[u8]) -> Result<Vec<u8>, Damage> {
    let content = match codec {
        CODEC_ZSTD => zstd::bulk::decompress(payload, CHUNK_BYTES).ok(),
        _ => Some(payload.to_vec()),
    };
    content.filter(|content| content.len() == CHUNK_BYTES).ok_or(Damage::Decompression(CHUNK_BYTES as u64))
}
