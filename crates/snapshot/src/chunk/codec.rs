//! A chunk as an object: header, compression, encryption, and every check on the way back.
//!
//! | offset | bytes | what (little-endian) |
//! |---|---|---|
//! | 0 | 4 | `HCNK` |
//! | 4 | 1 | version, 1 |
//! | 5 | 1 | codec: 0 = as it is, 1 = zstd |
//! | 6 | 2 | flags, 0 |
//! | 8 | 4 | bytes of the content |
//! | 12 | 4 | bytes behind the header: payload and its 16-byte tag |
//! | 16 | 12 | nonce |
//! | 28 | 4 | CRC-32C of everything else, header first |
//!
//! The payload is encrypted with AES-256-GCM; bytes 0..28 of the header are its additional data.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::CHUNK_BYTES;
use super::domain::KeyDomain;
use super::hash::ChunkHash;
use crate::fields::field;
use crate::objects::Damage;

/// Bytes before the payload.
pub(crate) const HEADER_BYTES: usize = 32;
const MAGIC: &[u8; 4] = b"HCNK";
const VERSION: u8 = 1;
const CODEC_PLAIN: u8 = 0;
const CODEC_ZSTD: u8 = 1;
const TAG_BYTES: usize = 16;
/// End of what the header's checksum and the AEAD cover.
const COVERED: usize = 28;
const ZSTD_LEVEL: i32 = 1;

/// The largest object a chunk can be: one that does not compress is stored as it is.
pub(crate) const MAX_OBJECT_BYTES: usize = HEADER_BYTES + CHUNK_BYTES + TAG_BYTES;

/// The parts of a header that passed all checks which need no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub codec: u8,
    pub content_bytes: usize,
    pub nonce: [u8; NONCE_LEN],
}

fn crc(object: &[u8]) -> u32 {
    let head = crc32c::crc32c(object.get(..COVERED).unwrap_or_default());
    crc32c::crc32c_append(head, object.get(HEADER_BYTES..).unwrap_or_default())
}

fn key(domain: &KeyDomain, name: &ChunkHash) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, &domain.content_key(name)).ok().map(LessSafeKey::new)
}

/// zstd if that saves at least a sixteenth. A sample of what does not compress saves the rest of the work.
fn compress(content: &[u8]) -> Option<Vec<u8>> {
    const SAMPLE: usize = 16 << 10;
    let enough = |packed: usize, plain: usize| packed <= plain - plain / 16;
    if content.len() >= 4 * SAMPLE {
        // From three places: file systems put several files into one chunk.
        let gain = [0, content.len() / 2, content.len() - SAMPLE].into_iter().any(|from| {
            let sample = content.get(from..from + SAMPLE).unwrap_or_default();
            zstd::bulk::compress(sample, ZSTD_LEVEL).is_ok_and(|packed| enough(packed.len(), SAMPLE))
        });
        if !gain {
            return None;
        }
    }
    let packed = zstd::bulk::compress(content, ZSTD_LEVEL).ok()?;
    enough(packed.len(), content.len()).then_some(packed)
}

/// The object for `content`, whose name is `name`. `None` for more than a chunk, or nothing.
pub(crate) fn encode(domain: &KeyDomain, name: &ChunkHash, content: &[u8]) -> Option<Vec<u8>> {
    if content.is_empty() || content.len() > CHUNK_BYTES {
        return None;
    }
    let packed = compress(content);
    let (codec, payload) = match &packed {
        Some(packed) => (CODEC_ZSTD, packed.as_slice()),
        None => (CODEC_PLAIN, content),
    };
    let nonce = domain.nonce(payload);
    let mut object = Vec::with_capacity(HEADER_BYTES + payload.len() + TAG_BYTES);
    object.extend_from_slice(MAGIC);
    object.extend_from_slice(&[VERSION, codec, 0, 0]);
    object.extend_from_slice(&(content.len() as u32).to_le_bytes());
    object.extend_from_slice(&((payload.len() + TAG_BYTES) as u32).to_le_bytes());
    object.extend_from_slice(&nonce);
    let mut covered = [0; COVERED];
    covered.copy_from_slice(object.get(..COVERED)?);
    object.extend_from_slice(&[0; 4]);
    object.extend_from_slice(payload);
    let sealed = object.get_mut(HEADER_BYTES..)?;
    let tag = key(domain, name)?
        .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(covered), sealed)
        .ok()?;
    object.extend_from_slice(tag.as_ref());
    let crc = crc(&object);
    object.get_mut(COVERED..HEADER_BYTES)?.copy_from_slice(&crc.to_le_bytes());
    Some(object)
}

/// Everything that can be checked without a key.
pub(crate) fn check(object: &[u8]) -> Result<Header, Damage> {
    if object.len() < HEADER_BYTES {
        return Err(Damage::Size { expected: HEADER_BYTES as u64, found: object.len() as u64 });
    }
    if !object.starts_with(MAGIC) {
        return Err(Damage::Signature("a chunk"));
    }
    let [version, codec] = field(object, 4);
    if version != VERSION {
        return Err(Damage::Version(version.into()));
    }
    let payload_bytes = u32::from_le_bytes(field(object, 12));
    let expected = HEADER_BYTES as u64 + u64::from(payload_bytes);
    if object.len() as u64 != expected {
        return Err(Damage::Size { expected, found: object.len() as u64 });
    }
    let (expected, found) = (u32::from_le_bytes(field(object, COVERED)), crc(object));
    if expected != found {
        return Err(Damage::Checksum { expected, found });
    }
    let flags = u16::from_le_bytes(field(object, 6));
    if flags != 0 {
        return Err(Damage::Flags(flags.into()));
    }
    if codec != CODEC_PLAIN && codec != CODEC_ZSTD {
        return Err(Damage::Codec(codec));
    }
    let content_bytes = u32::from_le_bytes(field(object, 8)) as usize;
    if content_bytes == 0 || content_bytes > CHUNK_BYTES {
        return Err(Damage::Field(format!("its content is said to have {content_bytes} bytes")));
    }
    if (payload_bytes as usize) < TAG_BYTES {
        return Err(Damage::Field(format!("a payload of {payload_bytes} bytes has no room for its tag")));
    }
    if codec == CODEC_PLAIN && payload_bytes as usize != content_bytes + TAG_BYTES {
        return Err(Damage::Field(format!("{payload_bytes} bytes of payload for {content_bytes} bytes as they are")));
    }
    Ok(Header { codec, content_bytes, nonce: field(object, 16) })
}

/// Whether an object of `bytes` that starts with `head` is a whole chunk of this version, as far as that can be told without the
/// rest: one whose writing was cut short is not.
pub(crate) fn is_whole(head: &[u8], bytes: u64) -> bool {
    head.len() == HEADER_BYTES
        && head.starts_with(MAGIC)
        && head.get(4) == Some(&VERSION)
        && HEADER_BYTES as u64 + u64::from(u32::from_le_bytes(field(head, 12))) == bytes
}

/// The content of `object`, if it is the one called `name`.
pub(crate) fn decode(domain: &KeyDomain, name: &ChunkHash, mut object: Vec<u8>) -> Result<Vec<u8>, Damage> {
    let header = check(&object)?;
    let (head, sealed) = object.split_at_mut_checked(HEADER_BYTES).ok_or(Damage::Decryption)?;
    let covered: [u8; COVERED] = field(head, 0);
    let payload = key(domain, name)
        .ok_or(Damage::Decryption)?
        .open_in_place(Nonce::assume_unique_for_key(header.nonce), Aad::from(covered), sealed)
        .map_err(|_| Damage::Decryption)?;
    let content = if header.codec == CODEC_ZSTD {
        zstd::bulk::decompress(payload, header.content_bytes)
            .ok()
            .filter(|content| content.len() == header.content_bytes)
            .ok_or(Damage::Decompression(header.content_bytes as u64))?
    } else {
        let length = payload.len();
        object.drain(..HEADER_BYTES);
        object.truncate(length);
        object
    };
    let found = domain.name_of(&content);
    if found != *name {
        return Err(Damage::Content(format!("it is that of {found}")));
    }
    Ok(content)
}

#[cfg(test)]
#[path = "codec_test.rs"]
mod tests;
