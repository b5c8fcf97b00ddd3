//! Which chunks a base has.

use std::ops::Range;

/// Chunks that are present in the manifest of a base; all others are zeros. One bit per chunk, the lowest of the first word
/// for chunk 0; trailing words of zeros make no difference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    words: Vec<u64>,
}

impl Extent {
    /// Of chunk numbers in any order.
    pub fn of(chunks: impl IntoIterator<Item = u64>) -> Self {
        let mut words = Vec::new();
        for chunk in chunks {
            let at = (chunk / 64) as usize;
            if at >= words.len() {
                words.resize(at + 1, 0);
            }
            if let Some(word) = words.get_mut(at) {
                *word |= 1u64 << (chunk % 64);
            }
        }
        Self { words }
    }

    /// Of little-endian words; an incomplete one at the end does not count.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self { words: bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect() }
    }

    /// The words, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Whether the base has the chunk.
    pub fn has(&self, chunk: u64) -> bool {
        self.words.get((chunk / 64) as usize).is_some_and(|word| word >> (chunk % 64) & 1 == 1)
    }

    /// Whether the base has any of these chunks.
    pub(crate) fn has_any(&self, chunks: Range<u64>) -> bool {
        let mut chunk = chunks.start;
        while chunk < chunks.end {
            let Some(word) = self.words.get((chunk / 64) as usize) else { return false };
            let left = word >> (chunk % 64);
            if left != 0 {
                return u64::from(left.trailing_zeros()) < chunks.end - chunk;
            }
            chunk = (chunk / 64 + 1) * 64;
        }
        false
    }

    /// Its part below chunk number `chunks`, without words of zeros at the end.
    pub(crate) fn cut(mut self, chunks: u64) -> Self {
        self.words.truncate(chunks.div_ceil(64) as usize);
        if !chunks.is_multiple_of(64)
            && let Some(last) = self.words.get_mut((chunks / 64) as usize)
        {
            *last &= !(u64::MAX << (chunks % 64));
        }
        let used = self.words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        self.words.truncate(used);
        self
    }

    /// crc32c of its words.
    pub(crate) fn checksum(&self) -> u32 {
        self.words.iter().fold(0, |crc, word| crc32c::crc32c_append(crc, &word.to_le_bytes()))
    }
}
