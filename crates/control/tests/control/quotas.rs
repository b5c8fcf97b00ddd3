//! What one account may have of the storage system.

use hearth_control::ControlConfig;
use hearth_proto::v1;
use tonic::Code;

use crate::agent::{FakeAgent, Session};
use crate::cloud::{Cloud, User, config, reason, request};
use crate::disks::{GIB, blank};

/// A cloud with one host and these limits.
async fn limited(dir: &std::path::Path, limit: impl FnOnce(&mut ControlConfig)) -> (Cloud, FakeAgent, Session, User) {
    let mut config = config(dir);
    limit(&mut config);
    let cloud = Cloud::start_with(config).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let user = cloud.user().await;
    (cloud, agent, session, user)
}

/// Asserts that a call is refused for this limit.
fn refused<T: std::fmt::Debug>(answer: Result<T, tonic::Status>, expected: &str, words: &str) {
    let error = answer.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::ResourceExhausted, expected), "{}", error.message());
    assert!(error.message().contains(words), "{}", error.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_has_so_many_volumes_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (cloud, _agent, _session, mut user) = limited(dir.path(), |config| config.max_volumes_per_account = 4).await;
    let image = user.import("debian").await;
    // As many at once as there are callers: the limit holds.
    let calls = (0..12).map(|_| {
        let mut user = user.clone();
        async move { user.create_volume(blank(1)).await }
    });
    let made = futures::future::join_all(calls).await;
    let ids: Vec<String> = made.iter().filter_map(|made| made.as_ref().ok()).map(|v| v.volume_id.clone()).collect();
    assert_eq!(ids.len(), 4);
    for answer in made.into_iter().filter(Result::is_err) {
        refused(answer, "VolumeLimitExceeded", "4 volumes of at most 4");
    }
    refused(user.run(request(&image, "t3.nano")).await, "VolumeLimitExceeded", "1 more were asked for");
    // Another account has its own.
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = user.accounts.create_account(create).await.unwrap().into_inner().token;
    cloud.user_with(&token).await.create_volume(blank(1)).await.unwrap();

    for id in &ids[..2] {
        user.delete_volume(id).await.unwrap();
    }
    // As many instances as there is room for.
    let five = v1::RunInstancesRequest { min_count: 1, max_count: 5, ..request(&image, "t3.nano") };
    let run = user.run(five.clone()).await.unwrap();
    assert_eq!(run.instances.len(), 2);
    refused(user.run(five).await, "VolumeLimitExceeded", "4 volumes of at most 4");
    // A root volume is replaced by one more.
    let id = run.instances[0].instance_id.clone();
    user.wait_state(&id, v1::InstanceState::Running).await;
    let replace = v1::CreateReplaceRootVolumeTaskRequest { instance_id: id, ..Default::default() };
    let answer = user.instances.create_replace_root_volume_task(replace).await;
    refused(answer, "VolumeLimitExceeded", "4 volumes of at most 4");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accounts_volumes_have_so_many_gib_together() {
    let dir = tempfile::tempdir().unwrap();
    let (_cloud, _agent, _session, mut user) = limited(dir.path(), |config| {
        config.max_volume_gib_per_account = 10;
        config.max_volumes_per_account = 0;
    })
    .await;
    let image = user.import("debian").await;
    let volume = user.create_volume(blank(6)).await.unwrap().volume_id;
    refused(user.create_volume(blank(5)).await, "VolumeLimitExceeded", "6 GiB of volumes of at most 10, 5 more");
    let grow = |gib: u64| v1::ModifyVolumeRequest {
        volume_id: volume.clone(),
        size_bytes: Some(gib * GIB),
        ..Default::default()
    };
    refused(user.volumes.modify_volume(grow(11)).await, "VolumeLimitExceeded", "5 more were asked for");
    user.volumes.modify_volume(grow(8)).await.unwrap();
    // The image's root disk has 1 GiB.
    let five = v1::RunInstancesRequest { min_count: 1, max_count: 5, ..request(&image, "t3.nano") };
    assert_eq!(user.run(five).await.unwrap().instances.len(), 2);
    refused(user.run(request(&image, "t3.nano")).await, "VolumeLimitExceeded", "10 GiB");
    // What needs no more is not refused.
    let faster = v1::ModifyVolumeRequest { iops: Some(3500), ..grow(8) };
    user.volumes.modify_volume(faster).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_has_so_many_snapshots_and_images() {
    let dir = tempfile::tempdir().unwrap();
    let (_cloud, _agent, _session, mut user) = limited(dir.path(), |config| {
        config.max_snapshots_per_account = 3;
        config.max_images_per_account = 2;
    })
    .await;
    // An image has a snapshot.
    let image = user.import("debian").await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    let first = user.snapshot(&volume).await.unwrap().snapshot_id;
    let calls = (0..6).map(|_| {
        let (mut user, volume) = (user.clone(), volume.clone());
        async move { user.snapshot(&volume).await }
    });
    let made = futures::future::join_all(calls).await;
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1);
    for answer in made.into_iter().filter(Result::is_err) {
        refused(answer, "SnapshotLimitExceeded", "3 snapshots of at most 3");
    }
    let copy = v1::CopySnapshotRequest { source_snapshot_id: first.clone(), ..Default::default() };
    refused(user.snapshots.copy_snapshot(copy.clone()).await, "SnapshotLimitExceeded", "1 more");
    let (id, _) = user.run_one(request(&image, "t3.nano")).await;
    let both = v1::CreateSnapshotsRequest { instance_id: id, ..Default::default() };
    refused(user.snapshots.create_snapshots(both).await, "SnapshotLimitExceeded", "1 more");
    user.delete_snapshot(&first).await.unwrap();
    let of_image = image.block_device_mappings[0].ebs.clone().unwrap().snapshot_id;
    let copy = v1::CopySnapshotRequest { source_snapshot_id: of_image.clone(), ..copy };
    user.snapshots.copy_snapshot(copy).await.unwrap();

    let register = |name: &str| v1::RegisterImageRequest {
        name: name.into(),
        block_device_mappings: vec![v1::BlockDeviceMapping {
            device_name: "/dev/sda1".into(),
            ebs: Some(v1::EbsBlockDevice { snapshot_id: of_image.clone(), ..Default::default() }),
            ..Default::default()
        }],
        ..Default::default()
    };
    let second = user.images.register_image(register("second")).await.unwrap().into_inner().image_id;
    refused(user.images.register_image(register("third")).await, "ResourceLimitExceeded", "2 images of at most 2");
    let deregister = v1::DeregisterImageRequest { image_id: second, delete_associated_snapshots: false };
    user.images.deregister_image(deregister).await.unwrap();
    user.images.register_image(register("third")).await.unwrap();
}
