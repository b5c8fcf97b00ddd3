//! The beginning of a file, as two machines tell each other that they have the same: so that an upload goes on only with the file it
//! began with.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::raw::next_data;

/// Bytes of a piece. An upload is continued at a multiple of it, or where the file ends.
pub const PIECE_BYTES: u64 = 512 << 10;

/// Digest of a file's beginning. It starts as 32 zero bytes; for each piece that is not all zeros, in order, it becomes the BLAKE3 of
/// itself, the piece's offset (u64, little-endian) and the piece. So holes cost nothing, and it can be carried on by whoever knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixDigest([u8; 32]);

impl PrefixDigest {
    /// From its bytes; `None` when there are not 32. No bytes at all are the beginning.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() { Some(Self::default()) } else { bytes.try_into().ok().map(Self) }
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// With the piece at `offset` behind it.
    #[must_use]
    pub fn with(&self, offset: u64, piece: &[u8]) -> Self {
        if is_zero(piece) {
            return *self;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0).update(&offset.to_le_bytes()).update(piece);
        Self(*hasher.finalize().as_bytes())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Follows a file that comes in order, in parts of any size.
#[derive(Clone, Debug)]
pub struct PrefixHasher {
    file_bytes: u64,
    digest: PrefixDigest,
    /// Where the open piece begins.
    begin: u64,
    piece: Vec<u8>,
}

impl PrefixHasher {
    /// For a file of `file_bytes`, of which what is before `offset` (as in [`Self::whole`]) has this digest.
    pub fn new(file_bytes: u64, offset: u64, digest: PrefixDigest) -> Self {
        Self { file_bytes, digest, begin: offset, piece: Vec::new() }
    }

    /// How much has come.
    pub fn position(&self) -> u64 {
        self.begin + self.piece.len() as u64
    }

    /// The last place at which the file can be continued, and the digest of what is before it.
    pub fn whole(&self) -> (u64, PrefixDigest) {
        (self.begin, self.digest)
    }

    fn end_of_piece(&self) -> u64 {
        (self.begin / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES).min(self.file_bytes)
    }

    fn close_piece(&mut self) {
        self.digest = self.digest.with(self.begin, &self.piece);
        self.begin += self.piece.len() as u64;
        self.piece.clear();
    }

    /// Bytes of content have come.
    pub fn data(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let wanted = self.end_of_piece().saturating_sub(self.position()) as usize;
            // Nothing follows the end of the file.
            let Some((now, rest)) = data.split_at_checked(wanted.min(data.len())).filter(|(now, _)| !now.is_empty())
            else {
                return;
            };
            self.piece.extend_from_slice(now);
            data = rest;
            if self.position() == self.end_of_piece() {
                self.close_piece();
            }
        }
    }

    /// So many zeros have come.
    pub fn zeros(&mut self, count: u64) {
        let end = self.position().saturating_add(count).min(self.file_bytes);
        let fill = |hasher: &mut Self| {
            let until = end.min(hasher.end_of_piece());
            let length = until.saturating_sub(hasher.begin) as usize;
            hasher.piece.resize(length, 0);
            if until == hasher.end_of_piece() {
                hasher.close_piece();
            }
        };
        if !self.piece.is_empty() {
            fill(self);
        }
        // Whole pieces of zeros change nothing.
        if self.piece.is_empty() && self.begin < end {
            self.begin = if end == self.file_bytes { end } else { end / PIECE_BYTES * PIECE_BYTES };
        }
        if self.position() < end {
            fill(self);
        }
    }
}

/// Reads the first piece at or behind `offset`, a multiple of [`PIECE_BYTES`], that is not all zeros into `piece`; answers where it
/// begins, `None` when there is none before `end`. Holes are not read. What is zero may be skipped in long steps: `looked_at` hears of
/// each piece read in vain.
///
/// # Errors
/// Those of reading the file.
pub fn next_piece(
    file: &File,
    mut offset: u64,
    end: u64,
    piece: &mut Vec<u8>,
    mut looked_at: impl FnMut(u64),
) -> io::Result<Option<u64>> {
    while let Some((start, _)) = next_data(file, offset, end)? {
        let begin = (start / PIECE_BYTES * PIECE_BYTES).max(offset);
        piece.resize(PIECE_BYTES.min(end - begin) as usize, 0);
        file.read_exact_at(piece, begin)?;
        if !is_zero(piece) {
            return Ok(Some(begin));
        }
        offset = begin + piece.len() as u64;
        looked_at(offset);
    }
    Ok(None)
}

#[cfg(test)]
#[path = "prefix_test.rs"]
mod tests;
