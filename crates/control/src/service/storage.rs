//! Operators' calls about the object store: garbage collection, verification, usage.

use std::pin::Pin;
use std::sync::Arc;

use hearth_proto::v1;
use hearth_snapshot::{
    CHUNK_BYTES, CollectOptions, Collected, Gc, KeyDomain, KeyDomainId, KeySource, Ledger, local_path,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Api, detached};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::check;
use crate::core::Core;
use crate::storage::Records;

type Answer<T> = Result<Response<T>, Status>;

/// Runs the collector once.
pub(crate) async fn collect(core: &Arc<Core>, now: bool) -> ApiResult<Collected> {
    let storage = &core.storage;
    let gc = Gc::new(storage.objects.clone(), Arc::new(Records(core.clone())));
    let options = CollectOptions { dry_run: false, now, local_root: local_path(&storage.url) };
    gc.run(&options).await.map_err(|error| ApiError::internal(format!("collect garbage: {error}")))
}

struct Keys(Arc<Core>);

impl KeySource for Keys {
    fn key_domain(&self, id: &KeyDomainId) -> Option<KeyDomain> {
        self.0.storage.chunks(id.as_str()).ok().map(|store| store.domain().clone())
    }
}

impl Api {
    async fn do_verify(
        &self,
        request: v1::VerifySnapshotsRequest,
    ) -> ApiResult<ReceiverStream<Result<v1::VerifySnapshotsResponse, Status>>> {
        use v1::verify_snapshots_response::Message;
        let wanted = check::optional_ids("snapshot_ids", &request.snapshot_ids)?;
        let roots = Records(self.core.clone()).roots().await.map_err(|error| ApiError::internal(error.to_string()))?;
        let mut live = roots.live;
        live.retain(|root| wanted.is_empty() || wanted.iter().any(|id| id == root.id.as_str()));
        let missing: Vec<&str> =
            wanted.iter().map(String::as_str).filter(|id| !live.iter().any(|root| root.id.as_str() == *id)).collect();
        if !missing.is_empty() {
            return Err(super::snapshot::not_found(&missing));
        }
        let (sender, stream) = mpsc::channel(16);
        let core = self.core.clone();
        self.core.tasks.spawn(async move {
            let progress = |done: hearth_snapshot::VerifyProgress| {
                let chunk = CHUNK_BYTES as u64;
                let progress = v1::Progress {
                    done_bytes: done.chunks_done * chunk,
                    total_bytes: done.chunks_total * chunk,
                    step: "verifying".to_owned(),
                };
                // A caller that is slow to read misses some.
                let _ = sender.try_send(Ok(v1::VerifySnapshotsResponse { message: Some(Message::Progress(progress)) }));
            };
            let keys = Keys(core.clone());
            let verified = tokio::select! {
                verified = hearth_snapshot::verify(&core.storage.objects, &live, &keys, &progress) => verified,
                () = core.stop.cancelled() => return,
                () = sender.closed() => return,
            };
            let finding = |finding: &hearth_snapshot::Finding| {
                let users: Vec<&str> = finding.snapshots.iter().map(|id| id.as_str()).collect();
                format!("{}: {} (needed by {})", finding.path, finding.error, users.join(", "))
            };
            let summary = v1::VerifySummary {
                snapshots: verified.snapshots,
                chunks: verified.chunks,
                bytes: verified.chunks * CHUNK_BYTES as u64,
                findings: verified.findings.iter().map(finding).collect(),
            };
            let _ = sender.send(Ok(v1::VerifySnapshotsResponse { message: Some(Message::Summary(summary)) })).await;
        });
        Ok(ReceiverStream::new(stream))
    }

    async fn do_usage(&self) -> ApiResult<v1::StorageUsage> {
        let usage = hearth_snapshot::usage(&*self.core.storage.objects)
            .await
            .map_err(|error| ApiError::unavailable(format!("object store: {error}")))?;
        let logical_bytes = {
            let tables = self.core.tables();
            tables.snapshots.values().filter_map(|entry| entry.status.as_ref()).map(|status| status.full_bytes).sum()
        };
        Ok(v1::StorageUsage {
            url: self.core.storage.url.clone(),
            chunk_objects: usage.chunks.objects,
            chunk_bytes: usage.chunks.bytes,
            manifest_objects: usage.pages.objects + usage.roots.objects,
            manifest_bytes: usage.pages.bytes + usage.roots.bytes,
            other_objects: usage.prefetch.objects + usage.other.objects,
            other_bytes: usage.prefetch.bytes + usage.other.bytes,
            logical_bytes,
        })
    }
}

#[tonic::async_trait]
impl v1::storage_service_server::StorageService for Api {
    async fn collect_garbage(&self, request: Request<v1::CollectGarbageRequest>) -> Answer<v1::CollectGarbageResponse> {
        auth::operator(&request)?;
        let core = self.core.clone();
        let done = detached(&self.core, async move { collect(&core, true).await }).await?;
        let deleted = done.chunks + done.pages + done.roots + done.leftovers;
        Ok(Response::new(v1::CollectGarbageResponse {
            deleted_objects: deleted,
            deleted_bytes: done.bytes,
            kept_objects: done.looked_at.saturating_sub(done.chunks + done.pages),
        }))
    }

    type VerifySnapshotsStream = Pin<Box<dyn Stream<Item = Result<v1::VerifySnapshotsResponse, Status>> + Send>>;

    async fn verify_snapshots(
        &self,
        request: Request<v1::VerifySnapshotsRequest>,
    ) -> Answer<Self::VerifySnapshotsStream> {
        auth::operator(&request)?;
        Ok(Response::new(Box::pin(self.do_verify(request.into_inner()).await?)))
    }

    async fn get_storage_usage(&self, request: Request<v1::GetStorageUsageRequest>) -> Answer<v1::StorageUsage> {
        auth::operator(&request)?;
        Ok(Response::new(self.do_usage().await?))
    }
}
