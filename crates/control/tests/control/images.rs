//! Images from upload to deletion.

use hearth_proto::v1;
use tonic::Code;
use v1::import_image_request::Message;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, disk_bytes, header, reason, request};
use crate::disks::until;
use crate::imports::spooled;

#[tokio::test(flavor = "multi_thread")]
async fn an_image_arrives_whole_as_a_snapshot_and_goes_without_harm_to_its_instances() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    assert_eq!((image.size_bytes, image.root_device_type.as_str()), (1 << 20, "ebs"));
    until("the spool is empty", || async { (spooled(dir.path()) == 0).then_some(()) }).await;
    let root = image.block_device_mappings[0].ebs.clone().unwrap();
    let request_snapshot = v1::GetSnapshotRequest { snapshot_id: root.snapshot_id.clone() };
    let snapshot = user.snapshots.get_snapshot(request_snapshot).await.unwrap().into_inner();
    assert_eq!((snapshot.state(), snapshot.volume_size_bytes), (v1::SnapshotState::Completed, 1 << 20));
    assert_eq!(exported(&mut user, &image.image_id).await, disk_bytes());

    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, v1::InstanceState::Running).await;
    let deregister = v1::DeregisterImageRequest { image_id: image.image_id.clone(), delete_associated_snapshots: true };
    user.images.deregister_image(deregister.clone()).await.unwrap();
    assert_eq!(reason(&user.images.deregister_image(deregister).await.unwrap_err()), "InvalidAMIID.NotFound");
    assert_eq!(reason(&user.run(request(&image, "t3.nano")).await.unwrap_err()), "InvalidAMIID.NotFound");
    // The instance's volume stands on the snapshot: its chunks stay until the instance is gone.
    let storage = user.storage.clone();
    let chunks =
        || async { storage.clone().get_storage_usage(v1::GetStorageUsageRequest {}).await.unwrap().into_inner() };
    storage.clone().collect_garbage(v1::CollectGarbageRequest {}).await.unwrap();
    assert_eq!(chunks().await.chunk_objects, 1);
    let base =
        agent.memory.lock().has[&id].desired.spec.clone().unwrap().volumes[0].volume.clone().unwrap().base.unwrap();
    assert_eq!(base.snapshot_id, root.snapshot_id);
    user.terminate(&id).await.unwrap();
    user.wait_state(&id, v1::InstanceState::Terminated).await;
    let gone = tokio::time::timeout(crate::cloud::PATIENCE, async {
        while chunks().await.chunk_objects > 0 {
            storage.clone().collect_garbage(v1::CollectGarbageRequest {}).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    gone.await.expect("the chunks go with the last volume that stands on them");
    user.import("debian").await;
}

/// The root disk of an image, raw.
pub async fn exported(user: &mut crate::cloud::User, id: &str) -> Vec<u8> {
    use v1::export_image_response::Message as Piece;
    let export = v1::ExportImageRequest { image_id: id.into(), format: "raw".into() };
    let mut stream = user.images.export_image(export).await.unwrap().into_inner();
    let mut got = Vec::new();
    let mut size = None;
    while let Some(piece) = stream.message().await.unwrap() {
        match piece.message.unwrap() {
            Piece::FileBytes(bytes) => size = Some(bytes),
            Piece::Data(data) => got.extend_from_slice(&data),
            Piece::Zeros(zeros) => got.resize(got.len() + zeros as usize, 0),
            Piece::Progress(_) => {}
        }
    }
    assert_eq!(size, Some(got.len() as u64));
    got
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_files_fail_with_a_reason_and_free_their_name() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let garbage = b"QFI\xfb and then nothing of use".to_vec();
    let wrong = v1::ImportImageHeader { format: "qcow2".into(), ..header("debian", garbage.len() as u64) };
    let image = user.import_bytes(wrong, vec![garbage]).await.unwrap();
    assert_eq!(image.state(), v1::ImageState::Failed);
    assert!(!image.state_reason.unwrap().message.is_empty());
    let mut launch = v1::RunInstancesRequest::default();
    launch.image_id.clone_from(&image.image_id);
    launch.instance_type = "t3.nano".into();
    assert_eq!(reason(&user.run(launch).await.unwrap_err()), "InvalidAMIID.Unavailable");
    let good = user.import("debian").await;
    user.images
        .deregister_image(v1::DeregisterImageRequest { image_id: image.image_id, ..Default::default() })
        .await
        .unwrap();
    assert_eq!(
        user.import_bytes(header("debian", 3), vec![vec![1, 2, 3]]).await.unwrap_err().code(),
        Code::AlreadyExists
    );
    let listed = user.images.list_images(v1::ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(listed.iter().map(|i| &i.image_id).collect::<Vec<_>>(), [&good.image_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_break_off_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let disk = disk_bytes();
    let size = disk.len() as u64;
    let with_token = v1::ImportImageHeader { client_token: "once".into(), ..header("debian", size) };
    // Too short, too long, a second header, no header, no size.
    let error = user.import_bytes(with_token.clone(), vec![disk[..1000].to_vec()]).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::Aborted, "UploadAborted"));
    let error = user.import_bytes(with_token.clone(), vec![disk.clone(), vec![0]]).await;
    assert!(error.is_ok(), "what follows the announced bytes is not read");
    let error = user.import_bytes(header("other", 10), vec![vec![0; 11]]).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let error = user.import_bytes(header("other", 0), vec![]).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let chunk = v1::ImportImageRequest { message: Some(Message::Chunk(vec![1].into())) };
    let error = user.images.import_image(tokio_stream::iter([chunk])).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    // The token of the one that worked answers with it; other parameters are an error.
    let again = user.import_bytes(with_token.clone(), vec![]).await.unwrap();
    assert_eq!(again.state(), v1::ImageState::Available);
    let other = v1::ImportImageHeader { description: "x".into(), ..with_token };
    assert_eq!(reason(&user.import_bytes(other, vec![]).await.unwrap_err()), "IdempotentParameterMismatch");
    assert_eq!(user.images.list_images(v1::ListImagesRequest::default()).await.unwrap().into_inner().images.len(), 1);
    until("the spool is empty", || async { (spooled(dir.path()) == 0).then_some(()) }).await;
    let snapshots =
        user.snapshots.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().into_inner().snapshots;
    assert_eq!(snapshots.len(), 1, "what broke off has left no snapshot");
}

#[tokio::test(flavor = "multi_thread")]
async fn zeros_travel_as_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let disk = disk_bytes();
    let size = 64 << 20;
    let messages = [
        Message::Header(header("sparse", size)),
        Message::Chunk(disk.clone().into()),
        Message::Zeros(size - disk.len() as u64),
    ];
    let messages = messages.map(|message| v1::ImportImageRequest { message: Some(message) });
    let mut stream = user.images.import_image(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let mut image = None;
    while let Some(answer) = stream.message().await.unwrap() {
        image = answer.image.or(image);
    }
    let image = image.unwrap();
    assert_eq!(image.size_bytes, size);
    let usage = user.storage.get_storage_usage(v1::GetStorageUsageRequest {}).await.unwrap().into_inner();
    assert_eq!(usage.chunk_objects, 1, "holes are not stored");
    assert_eq!(exported(&mut user, &image.image_id).await.len() as u64, size);
}
