//! Encrypted volumes, snapshots and images.

use hearth_proto::v1;
use v1::{AttachmentState as A, InstanceState as S, SnapshotState as N};

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, User, reason, request};
use crate::disks::{GIB, blank, from_snapshot, until};
use crate::images::exported;

fn encrypted(request: v1::CreateVolumeRequest) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest { encrypted: true, ..request }
}

/// What the host was told of an instance's volume.
fn told(agent: &FakeAgent, instance: &str, volume: &str) -> v1::HostVolume {
    let memory = agent.memory.lock();
    let volumes = memory.has[instance].desired.spec.clone().unwrap().volumes;
    volumes.into_iter().filter_map(|slot| slot.volume).find(|told| told.volume_id == volume).unwrap()
}

fn copy(snapshot: &str, encrypted: bool) -> v1::CopySnapshotRequest {
    v1::CopySnapshotRequest { source_snapshot_id: snapshot.into(), encrypted, ..Default::default() }
}

async fn copied(user: &mut User, snapshot: &str, encrypted: bool) -> v1::Snapshot {
    let made = user.snapshots.copy_snapshot(copy(snapshot, encrypted)).await.unwrap().into_inner();
    user.wait_snapshot(&made.snapshot_id, N::Completed).await
}

async fn wait_image(user: &User, id: &str) -> v1::Image {
    until("the image is available", || {
        let (mut user, id) = (user.clone(), id.to_owned());
        async move {
            let image = user.images.get_image(v1::GetImageRequest { image_id: id }).await.unwrap().into_inner();
            (image.state() == v1::ImageState::Available).then_some(image)
        }
    })
    .await
}

fn snapshot_of(image: &v1::Image) -> String {
    image.block_device_mappings[0].ebs.clone().unwrap().snapshot_id
}

/// Whether any file below the folder has these bytes in it.
fn is_written(folder: &std::path::Path, bytes: &[u8]) -> bool {
    std::fs::read_dir(folder).unwrap().flatten().any(|entry| {
        let path = entry.path();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => is_written(&path, bytes),
            kind if kind.is_file() => std::fs::read(&path).unwrap().windows(bytes.len()).any(|part| part == bytes),
            _ => false,
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_volume_has_a_key_that_only_its_hosts_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    assert!(!user.volume(&root).await.unwrap().encrypted);
    let mut keys = Vec::new();
    for _ in 0..2 {
        let made = user.create_volume(encrypted(blank(1))).await.unwrap();
        assert!(made.encrypted);
        user.attach(&made.volume_id, &id).await.unwrap();
        user.wait_attachment(&made.volume_id, A::Attached).await;
        let told = told(&agent, &id, &made.volume_id);
        assert_eq!((told.encrypted, told.data_key.len()), (true, 64));
        keys.push((made.volume_id, told.data_key));
    }
    assert_ne!(keys[0].1, keys[1].1, "each volume has its own key");
    let plain = told(&agent, &id, &root);
    assert!(!plain.encrypted && plain.data_key.is_empty());
    assert!(!plain.base.unwrap().key_domain.unwrap().encrypt_on_hosts);
    for (_, key) in &keys {
        assert!(!is_written(dir.path(), &key[..32]), "a data key is on the disk in clear");
    }
    // The key is the volume's, wherever and whenever it is attached.
    let (volume, key) = &keys[0];
    user.detach(volume, false).await.unwrap();
    user.wait_available(volume).await;
    user.attach(volume, &id).await.unwrap();
    user.wait_attachment(volume, A::Attached).await;
    assert_eq!(told(&agent, &id, volume).data_key, key);
    let filter = v1::Filter { name: "encrypted".into(), values: vec!["true".into()] };
    let list = v1::ListVolumesRequest { filters: vec![filter], ..Default::default() };
    assert_eq!(user.volumes.list_volumes(list).await.unwrap().into_inner().volumes.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_of_something_encrypted_is_encrypted() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let plain = snapshot_of(&image);
    let content = exported(&mut user, &image.image_id).await;

    // A volume that nobody has seen, made of a snapshot in clear: its snapshot is stored anew.
    let volume = user.create_volume(encrypted(from_snapshot(&plain))).await.unwrap();
    let untouched = user.snapshot(&volume.volume_id).await.unwrap().snapshot_id;
    assert!(user.wait_snapshot(&untouched, N::Completed).await.encrypted);

    // One that a guest has written to.
    let (id, _) = user.run_one(request(&image, "t3.nano")).await;
    user.attach(&volume.volume_id, &id).await.unwrap();
    user.wait_attachment(&volume.volume_id, A::Attached).await;
    agent.write(&volume.volume_id, 1, 9);
    let written = user.snapshot(&volume.volume_id).await.unwrap().snapshot_id;
    user.wait_snapshot(&written, N::Completed).await;
    agent.write(&volume.volume_id, 0, 8);
    let next = user.snapshot(&volume.volume_id).await.unwrap().snapshot_id;
    let next = user.wait_snapshot(&next, N::Completed).await;
    assert!(next.encrypted);

    // Volumes and copies of these.
    let child = user.create_volume(from_snapshot(&next.snapshot_id)).await.unwrap();
    assert!(child.encrypted);
    user.attach(&child.volume_id, &id).await.unwrap();
    user.wait_attachment(&child.volume_id, A::Attached).await;
    let base = told(&agent, &id, &child.volume_id).base.unwrap().key_domain.unwrap();
    assert!(base.encrypt_on_hosts, "hosts keep its base encrypted: {}", base.name);
    assert!(copied(&mut user, &next.snapshot_id, false).await.encrypted);
    assert!(copied(&mut user, &plain, true).await.encrypted);
    assert!(!copied(&mut user, &plain, false).await.encrypted);
    assert_eq!(user.findings().await, Vec::<String>::new());

    // A copy of an image, with everything that is launched from it.
    let wish = v1::CopyImageRequest {
        source_image_id: image.image_id.clone(),
        name: "sealed".into(),
        encrypted: true,
        ..Default::default()
    };
    let sealed = user.images.copy_image(wish).await.unwrap().into_inner();
    let sealed = wait_image(&user, &sealed.image_id).await;
    assert_eq!(sealed.block_device_mappings[0].ebs.clone().unwrap().encrypted, Some(true));
    assert_eq!(exported(&mut user, &sealed.image_id).await, content);
    let (launched, root) = user.run_one(request(&sealed, "t3.nano")).await;
    assert!(user.volume(&root).await.unwrap().encrypted);
    assert_eq!(told(&agent, &launched, &root).data_key.len(), 64);
    let mut refused = request(&sealed, "t3.nano");
    let mut mapping = sealed.block_device_mappings[0].clone();
    mapping.ebs.as_mut().unwrap().encrypted = Some(false);
    refused.block_device_mappings = vec![mapping];
    assert_eq!(reason(&user.run(refused).await.unwrap_err()), "InvalidBlockDeviceMapping");
    let wish = v1::CreateImageRequest {
        instance_id: launched.clone(),
        name: "of it".into(),
        no_reboot: true,
        ..Default::default()
    };
    let made = user.images.create_image(wish).await.unwrap().into_inner();
    let made = wait_image(&user, &made.image_id).await;
    assert_eq!(made.block_device_mappings[0].ebs.clone().unwrap().encrypted, Some(true));
    assert!(user.get_snapshot(&snapshot_of(&made)).await.unwrap().encrypted);

    // Nothing puts it into the bucket in clear.
    let store = v1::CreateStoreImageTaskRequest { image_id: made.image_id.clone(), ..Default::default() };
    assert_eq!(reason(&user.images.create_store_image_task(store).await.unwrap_err()), "UnsupportedOperation");
    user.terminate(&launched).await.unwrap();
    user.wait_state(&launched, S::Terminated).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_launch_a_volume_can_be_encrypted_that_its_image_has_in_clear() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let ebs = v1::EbsBlockDevice { encrypted: Some(true), ..Default::default() };
    let root = v1::BlockDeviceMapping {
        device_name: image.block_device_mappings[0].device_name.clone(),
        ebs: Some(ebs.clone()),
        ..Default::default()
    };
    let data = v1::BlockDeviceMapping {
        device_name: "/dev/sdf".into(),
        ebs: Some(v1::EbsBlockDevice { volume_size_bytes: GIB, ..ebs }),
        ..Default::default()
    };
    let launch = v1::RunInstancesRequest { block_device_mappings: vec![root, data], ..request(&image, "t3.nano") };
    let (id, root) = user.run_one(launch).await;
    let told = told(&agent, &id, &root);
    assert_eq!((told.encrypted, told.data_key.len()), (true, 64));
    assert_eq!(told.base.unwrap().key_domain.unwrap().name, "plain", "what it is made of is in clear anyway");
    let list = user.volumes.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner();
    assert!(list.volumes.iter().all(|volume| volume.encrypted), "{list:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_encrypted_image_is_for_operators_alone() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut admin = cloud.user().await;
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = admin.accounts.create_account(create).await.unwrap().into_inner().token;
    let mut team = cloud.user_with(&token).await;
    let image = admin.import("debian").await;
    let wish = v1::CopyImageRequest {
        source_image_id: image.image_id,
        name: "sealed".into(),
        encrypted: true,
        ..Default::default()
    };
    let sealed = admin.images.copy_image(wish).await.unwrap().into_inner();
    let sealed = wait_image(&admin, &sealed.image_id).await;
    assert_eq!(reason(&team.run(request(&sealed, "t3.nano")).await.unwrap_err()), "InvalidSnapshot.NotFound");
    let volume = from_snapshot(&snapshot_of(&sealed));
    assert_eq!(reason(&team.create_volume(volume).await.unwrap_err()), "InvalidSnapshot.NotFound");
}
