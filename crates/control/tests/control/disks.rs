//! What tests do with volumes and snapshots.

use std::time::Duration;

use hearth_proto::v1;
use tonic::Status;

use crate::cloud::{PATIENCE, User, reason};

pub const GIB: u64 = 1 << 30;

pub fn blank(gib: u64) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest { size_bytes: gib * GIB, ..Default::default() }
}

pub fn from_snapshot(snapshot: &str) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest { snapshot_id: snapshot.into(), ..Default::default() }
}

/// Looks again until there is an answer.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let found = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    match found.await {
        Ok(found) => found,
        Err(_) => panic!("it never came to that: {what}"),
    }
}

impl User {
    pub async fn create_volume(&mut self, request: v1::CreateVolumeRequest) -> Result<v1::Volume, Status> {
        Ok(self.volumes.create_volume(request).await?.into_inner())
    }

    pub async fn volume(&mut self, id: &str) -> Result<v1::Volume, Status> {
        Ok(self.volumes.get_volume(v1::GetVolumeRequest { volume_id: id.into() }).await?.into_inner())
    }

    pub async fn wait_volume(&mut self, id: &str, what: &str, wanted: impl Fn(&v1::Volume) -> bool) -> v1::Volume {
        let mut last = None;
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                let volume = self.volume(id).await.unwrap();
                if wanted(&volume) {
                    return volume;
                }
                last = Some(volume);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        match found.await {
            Ok(volume) => volume,
            Err(_) => panic!("{id} is never {what}; last seen: {last:?}"),
        }
    }

    pub async fn wait_attachment(&mut self, id: &str, state: v1::AttachmentState) -> v1::Volume {
        let is = move |volume: &v1::Volume| volume.attachments.iter().any(|attachment| attachment.state() == state);
        self.wait_volume(id, state.as_str_name(), is).await
    }

    pub async fn wait_available(&mut self, id: &str) -> v1::Volume {
        self.wait_volume(id, "available", |volume| volume.state() == v1::VolumeState::Available).await
    }

    /// Waits until nobody knows the volume any more.
    pub async fn wait_volume_gone(&mut self, id: &str) {
        let user = self.clone();
        until("the volume is gone", || {
            let mut user = user.clone();
            async move {
                let error = user.volume(id).await.err()?;
                (reason(&error) == "InvalidVolume.NotFound").then_some(())
            }
        })
        .await;
    }

    pub async fn attach(&mut self, volume: &str, instance: &str) -> Result<v1::VolumeAttachment, Status> {
        let request =
            v1::AttachVolumeRequest { volume_id: volume.into(), instance_id: instance.into(), ..Default::default() };
        Ok(self.volumes.attach_volume(request).await?.into_inner())
    }

    pub async fn detach(&mut self, volume: &str, force: bool) -> Result<v1::VolumeAttachment, Status> {
        let request = v1::DetachVolumeRequest { volume_id: volume.into(), force, ..Default::default() };
        Ok(self.volumes.detach_volume(request).await?.into_inner())
    }

    pub async fn delete_volume(&mut self, id: &str) -> Result<(), Status> {
        self.volumes.delete_volume(v1::DeleteVolumeRequest { volume_id: id.into() }).await.map(|_| ())
    }

    pub async fn snapshot(&mut self, volume: &str) -> Result<v1::Snapshot, Status> {
        let request = v1::CreateSnapshotRequest { volume_id: volume.into(), ..Default::default() };
        Ok(self.snapshots.create_snapshot(request).await?.into_inner())
    }

    pub async fn get_snapshot(&mut self, id: &str) -> Result<v1::Snapshot, Status> {
        Ok(self.snapshots.get_snapshot(v1::GetSnapshotRequest { snapshot_id: id.into() }).await?.into_inner())
    }

    pub async fn wait_snapshot(&mut self, id: &str, state: v1::SnapshotState) -> v1::Snapshot {
        let user = self.clone();
        until(state.as_str_name(), || {
            let mut user = user.clone();
            async move { user.get_snapshot(id).await.ok().filter(|snapshot| snapshot.state() == state) }
        })
        .await
    }

    pub async fn delete_snapshot(&mut self, id: &str) -> Result<(), Status> {
        self.snapshots.delete_snapshot(v1::DeleteSnapshotRequest { snapshot_id: id.into() }).await.map(|_| ())
    }

    /// A running instance, and its root volume.
    pub async fn run_one(&mut self, request: v1::RunInstancesRequest) -> (String, String) {
        let id = self.run(request).await.unwrap().instances[0].instance_id.clone();
        let instance = self.wait_state(&id, v1::InstanceState::Running).await;
        (id, instance.block_devices[0].volume_id.clone())
    }

    pub async fn collect_garbage(&mut self) -> v1::CollectGarbageResponse {
        self.storage.collect_garbage(v1::CollectGarbageRequest {}).await.unwrap().into_inner()
    }

    pub async fn usage(&mut self) -> v1::StorageUsage {
        self.storage.get_storage_usage(v1::GetStorageUsageRequest {}).await.unwrap().into_inner()
    }

    /// Problems that reading everything again finds.
    pub async fn findings(&mut self) -> Vec<String> {
        use v1::verify_snapshots_response::Message;
        let mut stream =
            self.storage.verify_snapshots(v1::VerifySnapshotsRequest::default()).await.unwrap().into_inner();
        while let Some(message) = stream.message().await.unwrap() {
            if let Some(Message::Summary(summary)) = message.message {
                return summary.findings;
            }
        }
        panic!("the verification ended without a summary")
    }
}
