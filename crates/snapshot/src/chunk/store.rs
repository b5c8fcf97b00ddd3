//! Chunks in an object store.

use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;
use tokio::task::spawn_blocking;

use super::codec;
use super::domain::KeyDomain;
use super::{CHUNK_BYTES, ChunkRef};
use crate::epoch::Epoch;
use crate::objects::{Damage, StorageError, chunk_path, get_whole, peek, put_over};
use crate::writer::is_zero;

/// Reads and writes the chunks of one key domain. Cheap to clone. Needs a tokio runtime; hashing, compression and encryption
/// run on its blocking threads.
#[derive(Clone, Debug)]
pub struct ChunkStore {
    objects: Arc<dyn ObjectStore>,
    domain: KeyDomain,
}

/// What became of a chunk that was given to [`ChunkStore::put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// All zeros: nothing is stored, the manifest leaves it out.
    Zero,
    /// The same content as the chunk it was compared with.
    Unchanged(ChunkRef),
    /// It was there already, in an epoch that may be referred to.
    Found(ChunkRef),
    /// It was written.
    Written {
        /// Where.
        chunk: ChunkRef,
        /// Size of the object.
        stored_bytes: u64,
    },
}

impl PutOutcome {
    /// The chunk; `None` for zeros.
    pub fn chunk(&self) -> Option<ChunkRef> {
        match *self {
            Self::Zero => None,
            Self::Unchanged(chunk) | Self::Found(chunk) | Self::Written { chunk, .. } => Some(chunk),
        }
    }
}

impl ChunkStore {
    /// Chunks of `domain` in `objects`.
    pub fn new(objects: Arc<dyn ObjectStore>, domain: KeyDomain) -> Self {
        Self { objects, domain }
    }

    /// The store underneath.
    pub fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.objects
    }

    /// The key domain.
    pub fn domain(&self) -> &KeyDomain {
        &self.domain
    }

    /// Stores a chunk of exactly [`CHUNK_BYTES`] for an upload of `epoch`; `None` = all zeros, nothing to store.
    ///
    /// When it returns, the chunk is durable. Calling it again, also after an error or a crash, is harmless.
    pub async fn put_chunk(&self, epoch: Epoch, content: Bytes) -> Result<Option<ChunkRef>, StorageError> {
        Ok(self.put(epoch, content, None).await?.chunk())
    }

    /// [`ChunkStore::put_chunk`] that compares with `before` first (the parent's chunk at the same place) and tells what it did.
    pub async fn put(
        &self,
        epoch: Epoch,
        content: Bytes,
        before: Option<ChunkRef>,
    ) -> Result<PutOutcome, StorageError> {
        if content.len() != CHUNK_BYTES {
            return Err(StorageError::Usage(format!("a chunk has {CHUNK_BYTES} bytes, not {}", content.len())));
        }
        let (domain, hashed) = (self.domain.clone(), content.clone());
        let name = spawn_blocking(move || (!is_zero(&hashed)).then(|| domain.name_of(&hashed))).await?;
        let Some(hash) = name else {
            return Ok(PutOutcome::Zero);
        };
        if let Some(before) = before.filter(|before| before.hash == hash) {
            return Ok(PutOutcome::Unchanged(before));
        }
        let places: Vec<ChunkRef> = epoch.reusable().map(|epoch| ChunkRef { hash, epoch }).collect();
        if let Some(found) = self.find(&places).await? {
            return Ok(PutOutcome::Found(found));
        }
        let domain = self.domain.clone();
        let object = spawn_blocking(move || codec::encode(&domain, &hash, &content))
            .await?
            .ok_or_else(|| StorageError::Worker(format!("chunk {hash} could not be encrypted")))?;
        let chunk = ChunkRef { hash, epoch };
        let stored_bytes = object.len() as u64;
        put_over(&*self.objects, &chunk_path(self.domain.id(), &chunk), object.into()).await?;
        Ok(PutOutcome::Written { chunk, stored_bytes })
    }

    /// The first of `places` where the whole chunk stands. A stump does not count and is written again.
    async fn find(&self, places: &[ChunkRef]) -> Result<Option<ChunkRef>, StorageError> {
        let looks = places.iter().map(|place| async move {
            let path = chunk_path(self.domain.id(), place);
            let found = peek(&*self.objects, &path, codec::HEADER_BYTES as u64).await?;
            Ok::<_, StorageError>(found.filter(|(bytes, head)| codec::is_whole(head, *bytes)).map(|_| *place))
        });
        Ok(futures::future::try_join_all(looks).await?.into_iter().flatten().next())
    }

    /// The content of a chunk, checked against its name.
    ///
    /// # Errors
    /// [`StorageError::Missing`], [`StorageError::Damaged`], or the store's own.
    pub async fn get_chunk(&self, chunk: &ChunkRef) -> Result<Bytes, StorageError> {
        let path = chunk_path(self.domain.id(), chunk);
        let object = get_whole(&*self.objects, &path, codec::MAX_OBJECT_BYTES as u64).await?;
        let (domain, hash) = (self.domain.clone(), chunk.hash);
        let content = spawn_blocking(move || codec::decode(&domain, &hash, object.into()))
            .await?
            .map_err(StorageError::damaged(&path))?;
        if content.len() != CHUNK_BYTES {
            let damage = Damage::Size { expected: CHUNK_BYTES as u64, found: content.len() as u64 };
            return Err(StorageError::damaged(&path)(damage));
        }
        Ok(content.into())
    }
}

#[cfg(test)]
#[path = "store_test.rs"]
mod tests;
