//! The point in time of a snapshot: states of a freeze, and the layout of the `staged` file. Pure.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::BlockError;
use crate::map::{CHUNK_BYTES, SIZE_MAX};

const MAGIC: &[u8; 8] = b"HRTHSTG1";
const VERSION: u32 = 1;
/// Where the header says that copying failed.
pub(crate) const BROKEN_AT: u64 = 12;
const HEADER_BYTES: u64 = 4096;

/// Where a freeze puts chunks as they were.
#[derive(Debug)]
pub struct Stage {
    /// Chunks, each at its offset on the volume, encrypted like `data`. Sparse; need not have any length before.
    pub file: File,
    /// Frozen set and progress (docs/storage.md); at least [`staged_bytes`] long. Belongs on a tmpfs: it must not outlive
    /// the host's boot, as the stage is never made durable.
    pub staged: File,
}

/// Length of the `staged` file of a volume of `size_bytes`.
pub fn staged_bytes(size_bytes: u64) -> u64 {
    let chunks = size_bytes.div_ceil(CHUNK_BYTES);
    HEADER_BYTES + frozen_bytes(chunks) + chunks
}

fn frozen_bytes(chunks: u64) -> u64 {
    chunks.div_ceil(64) * 8
}

/// Where the byte that says "chunk is in the stage" stands.
pub(crate) fn staged_at(chunks: u64, chunk: u64) -> u64 {
    HEADER_BYTES + frozen_bytes(chunks) + chunk
}

/// The DIRTY chunks at the instant of a freeze: what an incremental snapshot has to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrozenSet {
    /// Chunks of the volume.
    pub chunks: u64,
    /// One bit per chunk, the lowest of the first word for chunk 0.
    pub words: Vec<u64>,
}

impl FrozenSet {
    pub(crate) fn of(chunks: u64, members: &[u64]) -> Self {
        let mut set = Self { chunks, words: vec![0; chunks.div_ceil(64) as usize] };
        members.iter().for_each(|chunk| set.insert(*chunk));
        set
    }

    pub(crate) fn insert(&mut self, chunk: u64) {
        if let Some(word) = self.words.get_mut((chunk / 64) as usize) {
            *word |= 1 << (chunk % 64);
        }
    }

    /// Whether the chunk belongs to it.
    pub fn contains(&self, chunk: u64) -> bool {
        self.words.get((chunk / 64) as usize).is_some_and(|word| word >> (chunk % 64) & 1 == 1)
    }

    /// Members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        (0..self.chunks).filter(|chunk| self.contains(*chunk))
    }

    /// Number of members.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// No chunk was written since the last snapshot.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }
}

/// How far a freeze is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FreezeState {
    /// None is under way.
    #[default]
    Idle,
    /// Flushing, then waiting for writes in flight; new ones wait.
    Preparing,
    /// Nothing changes the volume; [`freeze`](crate::LayeredVolume::freeze) may be called.
    Ready,
    /// Chunks of the set are copied to the stage before they change.
    Frozen,
}

/// What the queues need to know of a freeze.
#[derive(Debug, Default)]
pub(crate) struct Freeze {
    pub(crate) state: FreezeState,
    /// Number of the last preparation: one that was called off must not go on as part of the next.
    pub(crate) attempt: u64,
    /// New writes wait, since then.
    pub(crate) gate: Option<Instant>,
    pub(crate) frozen: FrozenSet,
    pub(crate) staged: FrozenSet,
    /// Chunks being copied.
    pub(crate) copies: Vec<u64>,
    /// Queues that have no room to copy what the agent asked for.
    pub(crate) hindered: Vec<usize>,
    /// Copying failed: the snapshot is lost, writes no longer wait for it.
    pub(crate) broken: bool,
    /// Why the last preparation failed.
    pub(crate) error: Option<i32>,
}

impl Freeze {
    /// The freeze that began as this attempt is under way.
    pub(crate) fn is_frozen(&self, attempt: u64) -> bool {
        self.state == FreezeState::Frozen && self.attempt == attempt
    }

    /// The chunk must be in the stage before it may change.
    pub(crate) fn needs_copy(&self, chunk: u64) -> bool {
        self.state == FreezeState::Frozen && !self.broken && self.frozen.contains(chunk) && !self.staged.contains(chunk)
    }

    /// Nothing is under way, but for copies that still run.
    pub(crate) fn reset(&mut self) {
        let (attempt, copies) = (self.attempt, std::mem::take(&mut self.copies));
        *self = Self { attempt, copies, ..Self::default() };
    }

    /// Calls a preparation off.
    pub(crate) fn abandon(&mut self, errno: i32) {
        if self.state != FreezeState::Frozen {
            self.state = FreezeState::Idle;
            self.gate = None;
            self.error = Some(errno);
        }
    }

    /// First byte at or after `from`, up to `to`, of a chunk that must be copied first; `to` when there is none.
    pub(crate) fn free_until(&self, from: u64, to: u64) -> u64 {
        if self.state != FreezeState::Frozen || self.broken {
            return to;
        }
        let mut at = from;
        while at < to {
            let chunk = at / CHUNK_BYTES;
            if self.needs_copy(chunk) {
                return at;
            }
            at = (chunk + 1) * CHUNK_BYTES;
        }
        to
    }
}

/// Header and frozen set as they stand in the `staged` file.
pub(crate) fn encode_staged(size_bytes: u64, set: &FrozenSet) -> Vec<u8> {
    let mut bytes = vec![0u8; HEADER_BYTES as usize];
    let fields: [&[u8]; 5] =
        [MAGIC, &VERSION.to_le_bytes(), &0u32.to_le_bytes(), &size_bytes.to_le_bytes(), &set.chunks.to_le_bytes()];
    let head = fields.concat();
    if let Some(to) = bytes.get_mut(..head.len()) {
        to.copy_from_slice(&head);
    }
    bytes.extend(set.words.iter().flat_map(|word| word.to_le_bytes()));
    bytes.resize(bytes.len() + set.chunks as usize, 0);
    bytes
}

/// The agent's view of a `staged` file.
#[derive(Debug)]
pub struct StagedView {
    file: File,
    frozen: FrozenSet,
}

impl StagedView {
    /// Reads header and frozen set of a file that `freeze` has filled.
    pub fn open(file: File) -> Result<Self, BlockError> {
        let read = |buffer: &mut [u8], at| file.read_exact_at(buffer, at).map_err(BlockError::Stage);
        let mut head = [0u8; 32];
        read(&mut head, 0)?;
        let field = |at: usize| head.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
        let (size, chunks) = (field(16), field(24));
        let invalid =
            || BlockError::Stage(io::Error::new(io::ErrorKind::InvalidData, "not a staged file of version 1"));
        if !head.starts_with(MAGIC) || field(8) as u32 != VERSION || chunks != size.div_ceil(CHUNK_BYTES) {
            return Err(invalid());
        }
        let length = file.metadata().map_err(BlockError::Stage)?.len();
        if size > SIZE_MAX || length < staged_bytes(size) {
            return Err(invalid());
        }
        let mut words = vec![0u8; frozen_bytes(chunks) as usize];
        read(&mut words, HEADER_BYTES)?;
        let words: Vec<u64> = words.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_le_bytes)).collect();
        let spare = chunks % 64;
        if spare > 0 && words.last().is_some_and(|word| word >> spare != 0) {
            return Err(invalid());
        }
        Ok(Self { frozen: FrozenSet { chunks, words }, file })
    }

    /// The set.
    pub fn frozen(&self) -> &FrozenSet {
        &self.frozen
    }

    /// The chunk as it was is complete in the stage file.
    pub fn is_staged(&self, chunk: u64) -> Result<bool, BlockError> {
        let mut byte = [0u8];
        let at = staged_at(self.frozen.chunks, chunk.min(self.frozen.chunks.saturating_sub(1)));
        self.file.read_exact_at(&mut byte, at).map_err(BlockError::Stage)?;
        Ok(byte == [1])
    }

    /// Copying failed at some time: chunks that are not staged may have changed since. The snapshot is lost.
    pub fn is_broken(&self) -> Result<bool, BlockError> {
        let mut flags = [0u8; 4];
        self.file.read_exact_at(&mut flags, BROKEN_AT).map_err(BlockError::Stage)?;
        Ok(flags != [0; 4])
    }
}
