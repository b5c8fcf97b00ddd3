//! Volumes, snapshots and the object store of the fake control plane.

use std::collections::VecDeque;

use hearth_proto::v1::snapshot_service_server::SnapshotService;
use hearth_proto::v1::storage_service_server::StorageService;
use hearth_proto::v1::volume_service_server::VolumeService;
use hearth_proto::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Answer, Fake};

/// What it holds and was asked.
#[derive(Debug, Default)]
pub struct Storage {
    pub volumes: Vec<Volume>,
    pub snapshots: Vec<Snapshot>,
    /// What each call of WatchVolumes sends before it ends.
    pub volume_watches: VecDeque<Vec<Volume>>,
    /// What each call of WatchSnapshots sends before it ends.
    pub snapshot_watches: VecDeque<Vec<Snapshot>>,
    pub volumes_created: Vec<CreateVolumeRequest>,
    pub attached: Vec<AttachVolumeRequest>,
    pub detached: Vec<DetachVolumeRequest>,
    pub modified: Vec<ModifyVolumeRequest>,
    pub deleted: Vec<String>,
    pub sets: Vec<CreateSnapshotsRequest>,
    pub copies: Vec<CopySnapshotRequest>,
    pub fast_restores: Vec<EnableFastSnapshotRestoresRequest>,
    /// How far hosts are, each time somebody looks.
    pub fast_restore_percents: VecDeque<u32>,
    pub verified: Vec<String>,
    pub findings: Vec<String>,
}

pub fn volume_id(number: u32) -> String {
    format!("vol-{number:017x}")
}

pub fn snapshot_id(number: u32) -> String {
    format!("snap-{number:017x}")
}

fn name_tag(name: &str) -> Vec<Tag> {
    vec![Tag { key: "Name".to_owned(), value: name.to_owned() }]
}

pub fn volume(number: u32, name: &str, state: VolumeState) -> Volume {
    let (volume_id, tags) = (volume_id(number), name_tag(name));
    Volume { volume_id, tags, state: state.into(), size_bytes: 10 << 30, ..Volume::default() }
}

/// A volume in use with its attachment to i-…1 in this state.
pub fn attached(number: u32, name: &str, state: AttachmentState) -> Volume {
    let attachment = VolumeAttachment {
        volume_id: volume_id(number),
        instance_id: format!("i-{:017x}", 1),
        device: "/dev/sdf".to_owned(),
        state: state.into(),
        serial: volume_id(number).replace('-', ""),
        ..VolumeAttachment::default()
    };
    Volume { attachments: vec![attachment], ..volume(number, name, VolumeState::InUse) }
}

pub fn snapshot(number: u32, name: &str, state: SnapshotState) -> Snapshot {
    Snapshot { snapshot_id: snapshot_id(number), tags: name_tag(name), state: state.into(), ..Snapshot::default() }
}

fn wanted(id: &str, tags: &[Tag], ids: &[String], filters: &[Filter]) -> bool {
    let one_of =
        |filter: &Filter, value: &str| filter.values.iter().any(|v| value.starts_with(v.trim_end_matches('*')));
    (ids.is_empty() || ids.iter().any(|wanted| wanted == id))
        && filters.iter().all(|filter| match filter.name.as_str() {
            "volume-id" | "snapshot-id" => one_of(filter, id),
            "tag:Name" => tags.iter().any(|tag| filter.values.contains(&tag.value)),
            _ => true,
        })
}

fn stream<T: Send + 'static>(items: Vec<T>) -> ReceiverStream<Result<T, Status>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        for item in items {
            let _ = sender.send(Ok(item)).await;
        }
    });
    ReceiverStream::new(receiver)
}

#[tonic::async_trait]
impl VolumeService for Fake {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Answer<Volume> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        let made = Volume { tags: request.tags.clone(), ..volume(0x77, "", VolumeState::Creating) };
        state.storage.volumes_created.push(request);
        state.storage.volumes.push(Volume { state: VolumeState::Available.into(), ..made.clone() });
        Ok(Response::new(made))
    }

    async fn list_volumes(&self, request: Request<ListVolumesRequest>) -> Answer<ListVolumesResponse> {
        let state = self.begin(&request)?;
        let ListVolumesRequest { volume_ids, filters, .. } = request.into_inner();
        let all = state.storage.volumes.iter();
        let volumes = all.filter(|v| wanted(&v.volume_id, &v.tags, &volume_ids, &filters)).cloned().collect();
        Ok(Response::new(ListVolumesResponse { volumes, page: None }))
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Answer<Volume> {
        let state = self.begin(&request)?;
        let id = &request.get_ref().volume_id;
        let found = state.storage.volumes.iter().find(|volume| volume.volume_id == *id).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(id))
    }

    async fn delete_volume(&self, request: Request<DeleteVolumeRequest>) -> Answer<DeleteVolumeResponse> {
        let mut state = self.begin(&request)?;
        let id = request.into_inner().volume_id;
        state.storage.volumes.retain(|volume| volume.volume_id != id);
        state.storage.deleted.push(id);
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn attach_volume(&self, request: Request<AttachVolumeRequest>) -> Answer<VolumeAttachment> {
        let mut state = self.begin(&request)?;
        state.storage.attached.push(request.into_inner());
        Ok(Response::new(attached(1, "", AttachmentState::Attaching).attachments.remove(0)))
    }

    async fn detach_volume(&self, request: Request<DetachVolumeRequest>) -> Answer<VolumeAttachment> {
        let mut state = self.begin(&request)?;
        state.storage.detached.push(request.into_inner());
        Ok(Response::new(attached(1, "", AttachmentState::Detaching).attachments.remove(0)))
    }

    async fn modify_volume(&self, request: Request<ModifyVolumeRequest>) -> Answer<VolumeModification> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        state.storage.modified.push(request.clone());
        let modification_state = "modifying".to_owned();
        Ok(Response::new(VolumeModification { volume_id: request.volume_id, modification_state, ..Default::default() }))
    }

    async fn list_volume_modifications(
        &self,
        request: Request<ListVolumeModificationsRequest>,
    ) -> Answer<ListVolumeModificationsResponse> {
        let mut state = self.begin(&request)?;
        let modifications = state.storage.volumes.iter().filter_map(|volume| volume.modification.clone()).collect();
        state.filters = request.into_inner().filters;
        Ok(Response::new(ListVolumeModificationsResponse { modifications, page: None }))
    }

    type WatchVolumesStream = ReceiverStream<Result<Volume, Status>>;

    /// As the real one: an unknown volume is an error, and a stream ends when nothing is left to watch.
    async fn watch_volumes(&self, request: Request<WatchVolumesRequest>) -> Answer<Self::WatchVolumesStream> {
        let mut state = self.begin(&request)?;
        let next = state.storage.volume_watches.pop_front();
        next.map(|volumes| Response::new(stream(volumes))).ok_or_else(|| Status::not_found("no such volume"))
    }
}

impl Storage {
    fn fast_restored(&self, progress: u32) -> Vec<FastSnapshotRestore> {
        let state = match progress {
            0 => FastSnapshotRestoreState::Enabling,
            100 => FastSnapshotRestoreState::Enabled,
            _ => FastSnapshotRestoreState::Optimizing,
        };
        let one = |(snapshot_id, host): (&String, &String)| FastSnapshotRestore {
            snapshot_id: snapshot_id.clone(),
            host_id: format!("h-{host}"),
            host_name: host.clone(),
            state: state.into(),
            progress,
            ..FastSnapshotRestore::default()
        };
        let each = |request: &EnableFastSnapshotRestoresRequest| {
            let (ids, hosts) = (&request.snapshot_ids, &request.hosts);
            ids.iter().flat_map(|id| hosts.iter().map(move |host| (id, host))).map(one).collect::<Vec<_>>()
        };
        self.fast_restores.iter().flat_map(each).collect()
    }
}

#[tonic::async_trait]
impl SnapshotService for Fake {
    async fn create_snapshot(&self, request: Request<CreateSnapshotRequest>) -> Answer<Snapshot> {
        let mut state = self.begin(&request)?;
        let made = Snapshot {
            volume_id: request.get_ref().volume_id.clone(),
            tags: request.get_ref().tags.clone(),
            ..snapshot(0x77, "", SnapshotState::Pending)
        };
        state.storage.snapshots.push(Snapshot { state: SnapshotState::Completed.into(), ..made.clone() });
        Ok(Response::new(made))
    }

    async fn create_snapshots(&self, request: Request<CreateSnapshotsRequest>) -> Answer<CreateSnapshotsResponse> {
        let mut state = self.begin(&request)?;
        state.storage.sets.push(request.into_inner());
        let snapshots = vec![snapshot(0x78, "", SnapshotState::Pending), snapshot(0x79, "", SnapshotState::Pending)];
        Ok(Response::new(CreateSnapshotsResponse { snapshots }))
    }

    async fn list_snapshots(&self, request: Request<ListSnapshotsRequest>) -> Answer<ListSnapshotsResponse> {
        let state = self.begin(&request)?;
        let ListSnapshotsRequest { snapshot_ids, filters, .. } = request.into_inner();
        let all = state.storage.snapshots.iter();
        let snapshots = all.filter(|s| wanted(&s.snapshot_id, &s.tags, &snapshot_ids, &filters)).cloned().collect();
        Ok(Response::new(ListSnapshotsResponse { snapshots, page: None }))
    }

    async fn get_snapshot(&self, request: Request<GetSnapshotRequest>) -> Answer<Snapshot> {
        let state = self.begin(&request)?;
        let id = &request.get_ref().snapshot_id;
        let found = state.storage.snapshots.iter().find(|snapshot| snapshot.snapshot_id == *id).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(id))
    }

    async fn delete_snapshot(&self, request: Request<DeleteSnapshotRequest>) -> Answer<DeleteSnapshotResponse> {
        let mut state = self.begin(&request)?;
        state.storage.deleted.push(request.into_inner().snapshot_id);
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn copy_snapshot(&self, request: Request<CopySnapshotRequest>) -> Answer<Snapshot> {
        self.begin(&request)?.storage.copies.push(request.into_inner());
        Ok(Response::new(snapshot(0x7a, "", SnapshotState::Completed)))
    }

    async fn enable_fast_snapshot_restores(
        &self,
        request: Request<EnableFastSnapshotRestoresRequest>,
    ) -> Answer<EnableFastSnapshotRestoresResponse> {
        let mut state = self.begin(&request)?;
        state.storage.fast_restores.push(request.into_inner());
        Ok(Response::new(EnableFastSnapshotRestoresResponse { fast_snapshot_restores: state.storage.fast_restored(0) }))
    }

    async fn disable_fast_snapshot_restores(
        &self,
        request: Request<DisableFastSnapshotRestoresRequest>,
    ) -> Answer<DisableFastSnapshotRestoresResponse> {
        self.begin(&request)?.storage.fast_restores.clear();
        Ok(Response::new(DisableFastSnapshotRestoresResponse {}))
    }

    async fn list_fast_snapshot_restores(
        &self,
        request: Request<ListFastSnapshotRestoresRequest>,
    ) -> Answer<ListFastSnapshotRestoresResponse> {
        let mut state = self.begin(&request)?;
        let percent = state.storage.fast_restore_percents.pop_front().unwrap_or(100);
        let fast_snapshot_restores = state.storage.fast_restored(percent);
        state.filters = request.into_inner().filters;
        Ok(Response::new(ListFastSnapshotRestoresResponse { fast_snapshot_restores, page: None }))
    }

    type WatchSnapshotsStream = ReceiverStream<Result<Snapshot, Status>>;

    async fn watch_snapshots(&self, request: Request<WatchSnapshotsRequest>) -> Answer<Self::WatchSnapshotsStream> {
        let mut state = self.begin(&request)?;
        let next = state.storage.snapshot_watches.pop_front();
        next.map(|snapshots| Response::new(stream(snapshots))).ok_or_else(|| Status::not_found("no such snapshot"))
    }
}

#[tonic::async_trait]
impl StorageService for Fake {
    async fn collect_garbage(&self, request: Request<CollectGarbageRequest>) -> Answer<CollectGarbageResponse> {
        let _state = self.begin(&request)?;
        let deleted_bytes = 3 << 20;
        Ok(Response::new(CollectGarbageResponse { deleted_objects: 3, deleted_bytes, kept_objects: 7 }))
    }

    type VerifySnapshotsStream = ReceiverStream<Result<VerifySnapshotsResponse, Status>>;

    async fn verify_snapshots(&self, request: Request<VerifySnapshotsRequest>) -> Answer<Self::VerifySnapshotsStream> {
        use verify_snapshots_response::Message;
        let mut state = self.begin(&request)?;
        state.storage.verified = request.into_inner().snapshot_ids;
        let progress = Progress { done_bytes: 1, total_bytes: 2, step: "verifying".to_owned() };
        let findings = state.storage.findings.clone();
        let summary = VerifySummary { snapshots: 1, chunks: 4, bytes: 2 << 20, findings };
        let messages = [Message::Progress(progress), Message::Summary(summary)];
        let answers = messages.map(|message| VerifySnapshotsResponse { message: Some(message) });
        Ok(Response::new(stream(answers.into())))
    }

    async fn get_storage_usage(&self, request: Request<GetStorageUsageRequest>) -> Answer<StorageUsage> {
        let _state = self.begin(&request)?;
        let url = "file:///var/lib/hearth/store".to_owned();
        Ok(Response::new(StorageUsage { url, chunk_objects: 5, chunk_bytes: 1 << 20, ..StorageUsage::default() }))
    }
}
