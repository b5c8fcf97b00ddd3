//! Images made of snapshots, of instances and of other images.

use hearth_proto::v1;
use tonic::Code;
use v1::{AttachmentState as A, InstanceState as S, SnapshotState as N};

use crate::agent::{FakeAgent, Snapshots};
use crate::cloud::{Cloud, User, reason, request};
use crate::disks::{GIB, blank, from_snapshot, until};

async fn image(user: &mut User, id: &str) -> v1::Image {
    user.images.get_image(v1::GetImageRequest { image_id: id.into() }).await.unwrap().into_inner()
}

async fn wait_image(user: &User, id: &str, state: v1::ImageState) -> v1::Image {
    until(state.as_str_name(), || {
        let mut user = user.clone();
        async move { Some(image(&mut user, id).await).filter(|image| image.state() == state) }
    })
    .await
}

fn ebs(device: &str, snapshot: &str, change: impl FnOnce(&mut v1::EbsBlockDevice)) -> v1::BlockDeviceMapping {
    let mut ebs = v1::EbsBlockDevice { snapshot_id: snapshot.into(), ..Default::default() };
    change(&mut ebs);
    v1::BlockDeviceMapping { device_name: device.into(), ebs: Some(ebs), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_snapshot_launches_and_keeps_the_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let imported = user.import("debian").await;
    let (_, root) = user.run_one(request(&imported, "t3.nano")).await;
    agent.write(&root, 1, 1);
    let snapshot = user.snapshot(&root).await.unwrap().snapshot_id;
    user.wait_snapshot(&snapshot, N::Completed).await;
    type R = v1::RegisterImageRequest;
    let fast = ebs("/dev/sdf", &snapshot, |ebs| {
        ebs.volume_type = "io2".into();
        ebs.volume_size_bytes = 8 * GIB;
        ebs.iops = Some(700);
    });
    let good = R {
        name: "mine".into(),
        block_device_mappings: vec![ebs("/dev/sda1", &snapshot, |_| {}), fast],
        client_token: "once".into(),
        ..Default::default()
    };
    let blank_root = ebs("/dev/sda1", "", |ebs| ebs.volume_size_bytes = GIB);
    let long = v1::BootOverride { cmdline: "x".repeat(5000), ..Default::default() };
    for (request, expected) in [
        (R { name: "debian".into(), ..good.clone() }, "IdempotentParameterMismatch"),
        (R { name: "debian".into(), client_token: String::new(), ..good.clone() }, "InvalidAMIName.Duplicate"),
        (R { block_device_mappings: vec![], client_token: String::new(), ..good.clone() }, "InvalidBlockDeviceMapping"),
        (
            R { block_device_mappings: vec![blank_root], client_token: String::new(), ..good.clone() },
            "InvalidBlockDeviceMapping",
        ),
        (R { boot: Some(long), client_token: String::new(), ..good.clone() }, "InvalidParameterValue"),
    ] {
        if expected == "IdempotentParameterMismatch" {
            user.images.register_image(good.clone()).await.unwrap();
        }
        assert_eq!(reason(&user.images.register_image(request).await.unwrap_err()), expected);
    }
    let registered = user.images.register_image(good).await.unwrap().into_inner();
    assert_eq!((registered.state(), registered.name.as_str()), (v1::ImageState::Available, "mine"));
    let error = user.delete_snapshot(&snapshot).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidSnapshot.InUse");
    assert!(error.message().contains(&registered.image_id), "{}", error.message());

    let larger = ebs("/dev/sda1", "", |ebs| ebs.volume_size_bytes = 12 * GIB);
    let small = ebs("/dev/sdf", "", |ebs| ebs.volume_size_bytes = 1);
    let launch = v1::RunInstancesRequest { block_device_mappings: vec![larger], ..request(&registered, "t3.nano") };
    let (id, _) = user.run_one(launch.clone()).await;
    let told = agent.memory.lock().has[&id].desired.spec.clone().unwrap().volumes;
    let shapes: Vec<_> = told.iter().filter_map(|slot| slot.volume.as_ref()).map(|v| (v.size_bytes, v.iops)).collect();
    assert_eq!(shapes, [(12 * GIB, 3000), (8 * GIB, 700)]);
    let wrong = v1::RunInstancesRequest { block_device_mappings: vec![small], ..launch };
    assert_eq!(user.run(wrong).await.unwrap_err().code(), Code::InvalidArgument);

    // A copy stands on its own.
    let copy = v1::CopyImageRequest {
        source_image_id: registered.image_id.clone(),
        name: "copy".into(),
        client_token: "copy".into(),
        ..Default::default()
    };
    let copied = user.images.copy_image(copy.clone()).await.unwrap().into_inner();
    assert_eq!(user.images.copy_image(copy.clone()).await.unwrap().into_inner().image_id, copied.image_id);
    let count = || async {
        let mut user = user.clone();
        user.snapshots.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().into_inner().snapshots.len()
    };
    let before = count().await;
    let again = v1::CopyImageRequest { client_token: String::new(), ..copy };
    assert_eq!(reason(&user.clone().images.copy_image(again).await.unwrap_err()), "InvalidAMIName.Duplicate");
    assert_eq!(count().await, before, "a copy that is refused leaves no snapshots");
    let mut user = user.clone();
    for gone in [&registered, &imported] {
        let deregister =
            v1::DeregisterImageRequest { image_id: gone.image_id.clone(), delete_associated_snapshots: true };
        user.images.deregister_image(deregister).await.unwrap();
    }
    assert_eq!(reason(&user.get_snapshot(&snapshot).await.unwrap_err()), "InvalidSnapshot.NotFound");
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    assert_eq!(user.findings().await, Vec::<String>::new());
    user.run_one(request(&copied, "t3.nano")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_an_instance_restarts_it_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let imported = user.import("debian").await;
    let (id, _root) = user.run_one(request(&imported, "t3.nano")).await;
    let data = user.create_volume(blank(2)).await.unwrap().volume_id;
    user.attach(&data, &id).await.unwrap();
    user.wait_attachment(&data, A::Attached).await;
    agent.write(&data, 2, 2);
    let boots = |agent: &FakeAgent| agent.memory.lock().has[&id].report.boot_count;

    // While the guest runs: the point in time is fixed when the call answers.
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let live = v1::CreateImageRequest {
        instance_id: id.clone(),
        name: "live".into(),
        no_reboot: true,
        client_token: "live".into(),
        ..Default::default()
    };
    let made = user.images.create_image(live.clone()).await.unwrap().into_inner();
    assert_eq!(made.state(), v1::ImageState::Pending);
    assert_eq!(user.images.create_image(live).await.unwrap().into_inner().image_id, made.image_id);
    let set = agent.memory.lock().sets.keys().next().cloned().expect("the host has been asked");
    let deregister = v1::DeregisterImageRequest { image_id: made.image_id.clone(), ..Default::default() };
    assert_eq!(reason(&user.images.deregister_image(deregister).await.unwrap_err()), "IncorrectImageState");
    agent.finish_set(&set, &session.up).await;
    let live = wait_image(&user, &made.image_id, v1::ImageState::Available).await;
    assert_eq!(live.block_device_mappings.len(), 2);
    assert_eq!(boots(&agent), 1);
    agent.memory.lock().manners.snapshots = Snapshots::Complete;

    // At rest: stopped, snapshotted, started again.
    let still = v1::CreateImageRequest {
        instance_id: id.clone(),
        name: "still".into(),
        block_device_mappings: vec![ebs("/dev/sdg", "", |ebs| ebs.volume_size_bytes = GIB)],
        ..Default::default()
    };
    let root_out = v1::BlockDeviceMapping { device_name: "/dev/sda1".into(), no_device: true, ..Default::default() };
    let wrong = v1::CreateImageRequest { block_device_mappings: vec![root_out], ..still.clone() };
    assert_eq!(user.images.create_image(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(user.get(&id).await.state(), S::Running, "a refused call does not stop it");
    let made = user.images.create_image(still).await.unwrap().into_inner();
    let still = wait_image(&user, &made.image_id, v1::ImageState::Available).await;
    user.wait_state(&id, S::Running).await;
    assert_eq!(boots(&agent), 2);
    assert_eq!(still.block_device_mappings.len(), 3);
    for mapping in &still.block_device_mappings {
        let ebs = mapping.ebs.clone().unwrap();
        assert_eq!(ebs.snapshot_id.is_empty(), mapping.device_name == "/dev/sdg");
    }
    let twin = user.run(request(&still, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    let twin = user.wait_state(&twin, S::Running).await;
    assert_eq!(twin.block_devices.iter().map(|device| device.size_bytes / GIB).collect::<Vec<_>>(), [1, 2, 1]);
    // Both stand on what was read: chunks that nobody else has any more.
    user.terminate(&id).await.unwrap();
    user.wait_state(&id, S::Terminated).await;
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    assert_eq!(user.findings().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_fails_gives_its_name_back_and_its_instance_runs_again() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let imported = user.import("debian").await;
    let (id, _) = user.run_one(request(&imported, "t3.nano")).await;
    agent.memory.lock().manners.snapshots = Snapshots::Fail;
    let create = v1::CreateImageRequest { instance_id: id.clone(), name: "mine".into(), ..Default::default() };
    let made = user.images.create_image(create.clone()).await.unwrap().into_inner();
    let failed = wait_image(&user, &made.image_id, v1::ImageState::Failed).await;
    assert!(failed.state_reason.unwrap().message.contains("as it was told to"));
    user.wait_for(&id, |instance| instance.state() == S::Running).await;
    until("it was started again", || async { (agent.memory.lock().has[&id].report.boot_count == 2).then_some(()) })
        .await;
    agent.memory.lock().manners.snapshots = Snapshots::Complete;
    let made = user.images.create_image(create).await.unwrap().into_inner();
    wait_image(&user, &made.image_id, v1::ImageState::Available).await;
    let gone = v1::DeregisterImageRequest { image_id: failed.image_id, ..Default::default() };
    user.images.deregister_image(gone).await.unwrap();
    assert_eq!(image(&mut user, &made.image_id).await.name, "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_on_over_a_restart_of_the_control_plane() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let imported = user.import("debian").await;
    let (id, _) = user.run_one(request(&imported, "t3.nano")).await;
    agent.memory.lock().manners.silent = true;
    let create = v1::CreateImageRequest { instance_id: id.clone(), name: "mine".into(), ..Default::default() };
    let made = user.images.create_image(create).await.unwrap().into_inner();
    assert_eq!(user.get(&id).await.state(), S::Stopping);
    drop(session);
    cloud.stop().await.unwrap();
    agent.memory.lock().manners.silent = false;
    let cloud = Cloud::start(dir.path()).await;
    let _session = agent.connect(&cloud).await.unwrap();
    let mut user = cloud.user().await;
    wait_image(&user, &made.image_id, v1::ImageState::Available).await;
    user.wait_state(&id, S::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_snapshot_of_an_operator_is_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut admin = cloud.user().await;
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = admin.accounts.create_account(create).await.unwrap().into_inner().token;
    let mut team = cloud.user_with(&token).await;
    let shared = admin.import("debian").await;
    let public = shared.block_device_mappings[0].ebs.clone().unwrap().snapshot_id;
    let volume = admin.create_volume(blank(1)).await.unwrap().volume_id;
    let private = admin.snapshot(&volume).await.unwrap().snapshot_id;
    team.create_volume(from_snapshot(&public)).await.unwrap();
    assert_eq!(reason(&team.create_volume(from_snapshot(&private)).await.unwrap_err()), "InvalidSnapshot.NotFound");
    assert_eq!(reason(&team.get_snapshot(&public).await.unwrap_err()), "InvalidSnapshot.NotFound");
    assert_eq!(reason(&team.delete_snapshot(&public).await.unwrap_err()), "InvalidSnapshot.NotFound");
    // Its own copy outlives the original.
    let copy =
        v1::CopyImageRequest { source_image_id: shared.image_id.clone(), name: "own".into(), ..Default::default() };
    let own = team.images.copy_image(copy).await.unwrap().into_inner();
    let deregister = v1::DeregisterImageRequest { image_id: shared.image_id, delete_associated_snapshots: true };
    admin.images.deregister_image(deregister).await.unwrap();
    for _ in 0..4 {
        admin.collect_garbage().await;
    }
    assert_eq!(admin.findings().await, Vec::<String>::new());
    team.run_one(request(&own, "t3.nano")).await;
}
