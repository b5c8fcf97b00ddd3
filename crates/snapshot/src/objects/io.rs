//! Whole-object reads and writes with this crate's errors.

use bytes::Bytes;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::error::{Damage, StorageError};

/// What a store tells about an object without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ObjectInfo {
    /// Size in bytes as stored.
    pub bytes: u64,
}

/// The whole object, refused when it is larger than `limit` bytes: a foreign object must not fill the memory.
pub(crate) async fn get_whole(objects: &dyn ObjectStore, path: &Path, limit: u64) -> Result<Bytes, StorageError> {
    let found = objects.get(path).await.map_err(StorageError::reading(path))?;
    let bytes = found.meta.size;
    if bytes > limit {
        return Err(StorageError::damaged(path)(Damage::Size { expected: limit, found: bytes }));
    }
    let content = found.bytes().await.map_err(StorageError::reading(path))?;
    if content.len() as u64 != bytes {
        return Err(StorageError::damaged(path)(Damage::Size { expected: bytes, found: content.len() as u64 }));
    }
    Ok(content)
}

/// `None` when there is no such object.
pub(crate) async fn info(objects: &dyn ObjectStore, path: &Path) -> Result<Option<ObjectInfo>, StorageError> {
    match objects.head(path).await {
        Ok(meta) => Ok(Some(ObjectInfo { bytes: meta.size })),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(StorageError::objects("look for", path)(error)),
    }
}

/// Size of the object and its first bytes (up to `length`) in one request; `None` when there is none, or an empty one.
pub(crate) async fn peek(
    objects: &dyn ObjectStore,
    path: &Path,
    length: u64,
) -> Result<Option<(u64, Bytes)>, StorageError> {
    let options = GetOptions { range: Some(GetRange::Bounded(0..length)), ..GetOptions::default() };
    match objects.get_opts(path, options).await {
        Ok(found) => {
            let bytes = found.meta.size;
            let head = found.bytes().await.map_err(StorageError::objects("look into", path))?;
            Ok(Some((bytes, head)))
        }
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        // There is no range in an empty object.
        Err(error) => match info(objects, path).await? {
            Some(ObjectInfo { bytes: 0 }) | None => Ok(None),
            Some(_) => Err(StorageError::objects("look into", path)(error)),
        },
    }
}

/// Writes the object, whatever was there; only for objects whose name says their content, or that may change.
pub(crate) async fn put_over(objects: &dyn ObjectStore, path: &Path, content: Bytes) -> Result<(), StorageError> {
    objects.put(path, PutPayload::from_bytes(content)).await.map_err(StorageError::objects("write", path))?;
    Ok(())
}

/// Writes the object if there is none. `Ok(false)` when there is one: perhaps another's, perhaps our own whose
/// acknowledgement was lost.
pub(crate) async fn put_if_absent(
    objects: &dyn ObjectStore,
    path: &Path,
    content: Bytes,
) -> Result<bool, StorageError> {
    let options = |mode| PutOptions { mode, ..PutOptions::default() };
    match objects.put_opts(path, PutPayload::from_bytes(content.clone()), options(PutMode::Create)).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
        // A service without conditional writes: the window between look and write is small, and ids are given out once.
        Err(object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. }) => {
            if info(objects, path).await?.is_some() {
                return Ok(false);
            }
            put_over(objects, path, content).await?;
            Ok(true)
        }
        Err(error) => Err(StorageError::objects("write", path)(error)),
    }
}
