//! The object store for agents that have no way of their own to it.
//!
//! What one host writes others rely on, so a host gets no further than its own work: content must be what its name says, the root
//! of a manifest is written once by the host that was asked to make it, nothing else exists for it and nothing can be deleted.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use hearth_proto::v1;
use hearth_snapshot::{ChunkStore, ObjectKind, SnapshotKey, classify};
use hearth_types::SnapshotState;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStoreExt, PutMode, PutOptions};
use tonic::{Code, Request, Response, Status};

use super::{Api, bundle, snapshot};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::core::Core;
use crate::storage;
use crate::tables::Tables;

/// Most objects in one answer.
const PAGE: usize = 1000;
/// Folders whose objects tell by their names what they are.
const FOLDERS: [&str; 3] = ["chunk", "page", "snap"];

type Answer<T> = Result<Response<T>, Status>;

fn path(key: &str) -> ApiResult<Path> {
    Path::parse(key).map_err(|error| ApiError::invalid("key", error.to_string()))
}

fn exists(path: &str) -> ApiError {
    ApiError::new(Code::AlreadyExists, "PreconditionFailed", format!("object {path} exists"))
}

fn failed(error: Error) -> ApiError {
    match error {
        Error::NotFound { path, .. } => {
            ApiError::new(Code::NotFound, "NoSuchKey", format!("there is no object {path}"))
        }
        Error::AlreadyExists { path, .. } => exists(&path),
        error => ApiError::unavailable(format!("object store: {error}")),
    }
}

fn denied(path: &Path, what: &str) -> ApiError {
    ApiError::new(Code::PermissionDenied, "AccessDenied", format!("{path} {what}"))
}

/// Whether the host was asked to publish this manifest.
fn makes_manifest(tables: &Tables, host: &str, id: &SnapshotKey) -> bool {
    let id = id.as_str();
    let snapshot = tables.snapshot(id).is_some_and(|(spec, status)| {
        spec.host_id == host && snapshot::state_of(status.as_deref()) == SnapshotState::Pending
    });
    let here = tables.volumes_on.get(host).into_iter().flatten().filter_map(|volume| tables.volumes.get(volume));
    snapshot || here.into_iter().any(|volume| volume.releasing && storage::release_manifest_id(volume) == id)
}

/// Whether the host has a volume that began as this snapshot.
fn reads_snapshot(tables: &Tables, host: &str, id: &SnapshotKey) -> bool {
    let mut here = tables.volumes_on.get(host).into_iter().flatten().filter_map(|volume| tables.volumes.get(volume));
    here.any(|volume| {
        let base = volume.volume.as_ref().and_then(|volume| volume.base.as_ref());
        base.is_some_and(|base| base.snapshot_id == id.as_str())
    })
}

/// Whether the host works on something in the key domain.
fn works_in(tables: &Tables, host: &str, domain: &str) -> bool {
    if domain == storage::PLAIN_DOMAIN {
        return true;
    }
    let mut here = tables.volumes_on.get(host).into_iter().flatten().filter_map(|volume| tables.volumes.get(volume));
    here.any(|volume| storage::domain_of(volume) == domain)
}

/// How an object may be written.
enum Rule {
    /// Whatever was there: the content has been checked, or nothing depends on it.
    Replace,
    /// Once; the same again is fine.
    Once,
}

/// Whether the host may write this.
async fn check(core: &Core, host: &str, path: &Path, data: &Bytes) -> ApiResult<Rule> {
    let wrong = |why: String| ApiError::invalid("data", format!("{path}: {why}"));
    match classify(path) {
        ObjectKind::Chunk(domain, chunk) if works_in(&core.tables(), host, domain.as_str()) => {
            // Read back as everybody else will read it. What is there may be the stump of a write, and is replaced.
            let alone = Arc::new(InMemory::new());
            alone.put(path, data.clone().into()).await.map_err(failed)?;
            let keys = core.storage.chunks(domain.as_str())?.domain().clone();
            let read = ChunkStore::new(alone, keys).get_chunk(&chunk).await;
            read.map(|_| Rule::Replace).map_err(|error| wrong(error.to_string()))
        }
        ObjectKind::Page(domain, page) if works_in(&core.tables(), host, domain.as_str()) => {
            let found = blake3::hash(data).to_hex();
            match *found == page.hash.to_string() {
                true => Ok(Rule::Replace),
                false => Err(wrong(format!("its BLAKE3 is {found}"))),
            }
        }
        ObjectKind::Root(id) if makes_manifest(&core.tables(), host, &id) => Ok(Rule::Once),
        ObjectKind::Prefetch(id) if reads_snapshot(&core.tables(), host, &id) => Ok(Rule::Replace),
        ObjectKind::Other if bundle::is_written_by(&core.tables(), host, path.as_ref()) => Ok(Rule::Replace),
        _ => Err(denied(path, "is not this host's to write")),
    }
}

/// Whether the host may read this.
fn check_read(core: &Core, host: &str, path: &Path) -> ApiResult<()> {
    match classify(path) {
        ObjectKind::Other if bundle::is_read_by(&core.tables(), host, path.as_ref()) => Ok(()),
        ObjectKind::Other => Err(denied(path, "is not this host's to read")),
        // Chunks are of use only to who was told their keys.
        _ => Ok(()),
    }
}

impl Api {
    async fn do_put_object(&self, host: &str, request: v1::PutObjectRequest) -> ApiResult<()> {
        let path = path(&request.key)?;
        let rule = check(&self.core, host, &path, &request.data).await?;
        let objects = &self.core.storage.objects;
        let mode = match rule {
            Rule::Replace if !request.create_only => PutMode::Overwrite,
            _ => PutMode::Create,
        };
        let put =
            |mode| objects.put_opts(&path, request.data.clone().into(), PutOptions { mode, ..PutOptions::default() });
        let mut written = put(mode).await;
        if let Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) = &written {
            // A service without conditional writes: the window between look and write is small, and ids are given out once.
            written = match objects.head(&path).await {
                Err(Error::NotFound { .. }) => put(PutMode::Overwrite).await,
                Ok(_) => return Err(exists(path.as_ref())),
                Err(error) => Err(error),
            };
        }
        match written {
            Ok(_) => Ok(()),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) if !request.create_only => {
                let there = objects.get(&path).await.map_err(failed)?.bytes().await.map_err(failed)?;
                if there == request.data { Ok(()) } else { Err(exists(path.as_ref())) }
            }
            Err(Error::Precondition { .. }) => Err(exists(path.as_ref())),
            Err(error) => Err(failed(error)),
        }
    }
}

#[tonic::async_trait]
impl v1::object_service_server::ObjectService for Api {
    async fn get_object(&self, request: Request<v1::GetObjectRequest>) -> Answer<v1::GetObjectResponse> {
        let host = auth::agent(&request)?;
        let request = request.into_inner();
        let path = path(&request.key)?;
        check_read(&self.core, host.as_str(), &path)?;
        let objects = &self.core.storage.objects;
        if request.head {
            let meta = objects.head(&path).await.map_err(failed)?;
            return Ok(Response::new(v1::GetObjectResponse { size_bytes: meta.size, ..Default::default() }));
        }
        let end = request.offset.saturating_add(request.length);
        let range = (request.length > 0).then_some(GetRange::Bounded(request.offset..end));
        let found = objects.get_opts(&path, GetOptions { range, ..GetOptions::default() }).await.map_err(failed)?;
        let size_bytes = found.meta.size;
        let data = found.bytes().await.map_err(failed)?;
        Ok(Response::new(v1::GetObjectResponse { data, size_bytes }))
    }

    async fn put_object(&self, request: Request<v1::PutObjectRequest>) -> Answer<v1::PutObjectResponse> {
        let host = auth::agent(&request)?;
        self.do_put_object(host.as_str(), request.into_inner()).await?;
        Ok(Response::new(v1::PutObjectResponse {}))
    }

    async fn list_objects(&self, request: Request<v1::ListObjectsRequest>) -> Answer<v1::ListObjectsResponse> {
        auth::agent(&request)?;
        let request = request.into_inner();
        let prefix = path(&request.prefix)?;
        let folder = prefix.parts().next();
        if !folder.is_some_and(|folder| FOLDERS.contains(&folder.as_ref())) {
            return Err(denied(&prefix, "is not this host's to list").into());
        }
        let objects = &self.core.storage.objects;
        let mut listing = match request.after.as_str() {
            "" => objects.list(Some(&prefix)),
            after => objects.list_with_offset(Some(&prefix), &path(after)?),
        };
        let mut found = Vec::new();
        while let Some(meta) = listing.try_next().await.map_err(failed)? {
            found.push(v1::ObjectInfo { key: meta.location.to_string(), size_bytes: meta.size });
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        let truncated = found.len() > PAGE;
        found.truncate(PAGE);
        Ok(Response::new(v1::ListObjectsResponse { objects: found, truncated }))
    }
}
