//! Instance-store-backed images: bundles, and instances whose root disk is made of one.

use hearth_proto::v1;
use object_store::ObjectStoreExt;
use tonic::Code;
use v1::{BundleTaskState as B, InstanceState as S};

use crate::agent::{FakeAgent, Snapshots};
use crate::cloud::{Cloud, User, reason, request};
use crate::disks::{blank, until};

fn of_image(image: &v1::Image, name: &str) -> v1::CreateBundleRequest {
    v1::CreateBundleRequest { image_id: image.image_id.clone(), name: name.into(), ..Default::default() }
}

fn of_instance(id: &str, name: &str) -> v1::CreateBundleRequest {
    v1::CreateBundleRequest { instance_id: id.into(), name: name.into(), ..Default::default() }
}

impl User {
    async fn bundle(&mut self, request: v1::CreateBundleRequest) -> Result<v1::BundleTask, tonic::Status> {
        Ok(self.images.create_bundle(request).await?.into_inner())
    }

    async fn bundles(&mut self, ids: &[&str]) -> Result<Vec<v1::BundleTask>, tonic::Status> {
        let bundle_ids = ids.iter().map(|id| (*id).to_owned()).collect();
        let request = v1::ListBundleTasksRequest { bundle_ids, ..Default::default() };
        Ok(self.images.list_bundle_tasks(request).await?.into_inner().tasks)
    }

    async fn wait_bundle(&self, id: &str, state: B) -> v1::BundleTask {
        until(state.as_str_name(), || {
            let mut user = self.clone();
            async move { user.bundles(&[id]).await.unwrap().pop().filter(|task| task.state() == state) }
        })
        .await
    }

    async fn register(&mut self, location: &str, name: &str) -> Result<v1::Image, tonic::Status> {
        let (image_location, name) = (location.into(), name.into());
        let request = v1::RegisterImageRequest { image_location, name, ..Default::default() };
        Ok(self.images.register_image(request).await?.into_inner())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_bundled_and_registered_and_its_instances_live_as_on_ec2() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    type R = v1::CreateBundleRequest;
    for (wrong, expected) in [
        (R { name: "a/b".into(), ..of_image(&image, "") }, "InvalidParameterValue"),
        (R { prefix: "../x".into(), ..of_image(&image, "x") }, "InvalidParameterValue"),
        (R { instance_id: "i-0123456789abcdef0".into(), ..of_image(&image, "x") }, "InvalidParameterValue"),
        (of_instance("i-0123456789abcdef0", "x"), "InvalidInstanceID.NotFound"),
    ] {
        assert_eq!(reason(&user.bundle(wrong).await.unwrap_err()), expected);
    }
    let first = R { prefix: "nightly/".into(), client_token: "once".into(), ..of_image(&image, "debian") };
    let task = user.bundle(first.clone()).await.unwrap();
    assert_eq!((task.image_id.as_str(), task.image_location.as_str()), (image.image_id.as_str(), ""));
    assert_eq!(user.bundle(first.clone()).await.unwrap().bundle_id, task.bundle_id);
    let done = user.wait_bundle(&task.bundle_id, B::Complete).await;
    assert_eq!(done.progress, 100);
    let again = R { client_token: String::new(), ..first };
    assert_eq!(user.bundle(again).await.unwrap_err().code(), Code::AlreadyExists);
    let over = v1::CancelBundleTaskRequest { bundle_id: task.bundle_id.clone() };
    assert_eq!(reason(&user.images.cancel_bundle_task(over).await.unwrap_err()), "IncorrectState");
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = user.accounts.create_account(create).await.unwrap().into_inner().token;
    let mut team = cloud.user_with(&token).await;
    assert!(team.bundles(&[]).await.unwrap().is_empty());
    assert_eq!(reason(&team.bundles(&[&task.bundle_id]).await.unwrap_err()), "InvalidBundleID.NotFound");
    assert_eq!(reason(&team.register(&done.image_location, "x").await.unwrap_err()), "InvalidManifest");

    for wrong in ["debian.manifest.json", "nightly/debian", "nightly/../debian.manifest.json", "/.manifest.json"] {
        let error = user.register(wrong, "x").await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{wrong}: {error:?}");
    }
    let root = v1::BlockDeviceMapping {
        device_name: "/dev/sda1".into(),
        ebs: Some(v1::EbsBlockDevice { volume_size_bytes: 1 << 30, ..Default::default() }),
        ..Default::default()
    };
    let wrong = v1::RegisterImageRequest {
        name: "x".into(),
        image_location: done.image_location.clone(),
        block_device_mappings: vec![root],
        ..Default::default()
    };
    assert_eq!(reason(&user.images.register_image(wrong).await.unwrap_err()), "InvalidBlockDeviceMapping");
    let store = user.register("nightly/debian.manifest.json", "store").await.unwrap();
    assert_eq!((store.root_device_type.as_str(), store.size_bytes), ("instance-store", 1 << 20));
    assert_eq!(
        (store.state(), store.image_location.as_str()),
        (v1::ImageState::Available, done.image_location.as_str())
    );

    // A copy of the record is all that a copy needs.
    let copy =
        v1::CopyImageRequest { source_image_id: store.image_id.clone(), name: "copy".into(), ..Default::default() };
    let copied = user.images.copy_image(copy).await.unwrap().into_inner();
    assert_eq!(copied.state(), v1::ImageState::Available);
    assert_eq!(copied.image_location, done.image_location);

    let launch = request(&store, "m5d.large");
    let keeps = v1::RunInstancesRequest { instance_initiated_shutdown_behavior: "stop".into(), ..launch.clone() };
    assert_eq!(reason(&user.run(keeps).await.unwrap_err()), "UnsupportedOperation");
    let id = user.run(launch.clone()).await.unwrap().instances[0].instance_id.clone();
    let instance = user.wait_state(&id, S::Running).await;
    assert_eq!(instance.root_device_type, "instance-store");
    assert_eq!(instance.instance_initiated_shutdown_behavior, "terminate");
    let devices: Vec<_> = instance.block_devices.iter().map(|device| device.device_name.as_str()).collect();
    assert_eq!(devices, ["/dev/sdb"], "instance store comes along by itself");
    let told = agent.memory.lock().has[&id].desired.spec.clone().unwrap();
    let root = told.bundle_root.unwrap();
    assert_eq!((root.size_bytes, root.serial.len(), root.manifest_sha256.len()), (1 << 20, 20, 64));
    assert!(told.volumes.is_empty() && told.instance_store[0].serial != root.serial);
    let without = v1::BlockDeviceMapping { device_name: "/dev/sdb".into(), no_device: true, ..Default::default() };
    let bare = v1::RunInstancesRequest { block_device_mappings: vec![without], ..launch.clone() };
    let other = user.run(bare).await.unwrap().instances[0].instance_id.clone();
    assert!(user.wait_state(&other, S::Running).await.block_devices.is_empty());

    // The host of such an instance reads the bundle, nobody else does.
    let part = "nightly/debian.part.0000";
    let account = &store.account_id;
    let get =
        |key: &str| v1::GetObjectRequest { key: format!("bundle/{account}/{key}"), head: true, ..Default::default() };
    let mut mine = agent.object_client(&cloud).await;
    mine.get_object(get(part)).await.unwrap();
    mine.get_object(get("nightly/debian.manifest.json")).await.unwrap();
    assert_eq!(mine.get_object(get("nightly/other.part.0000")).await.unwrap_err().code(), Code::PermissionDenied);
    let stranger = FakeAgent::join(&cloud, "host-b").await;
    let mut others = stranger.object_client(&cloud).await;
    assert_eq!(others.get_object(get(part)).await.unwrap_err().code(), Code::PermissionDenied);

    // The bundle stays while an image needs it, and goes whole.
    let delete = |location: &str| v1::DeleteBundleRequest { image_location: location.into() };
    let error = user.images.delete_bundle(delete(&done.image_location)).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidBundle.InUse");
    let theirs = team.images.delete_bundle(delete(&done.image_location)).await.unwrap_err();
    assert_eq!(reason(&theirs), "InvalidBundle.NotFound", "it is looked for among their own");
    for image_id in [&store.image_id, &copied.image_id] {
        let deregister = v1::DeregisterImageRequest { image_id: image_id.clone(), ..Default::default() };
        user.images.deregister_image(deregister).await.unwrap();
    }
    user.images.delete_bundle(delete("nightly/debian.manifest.json")).await.unwrap();
    let again = user.images.delete_bundle(delete("nightly/debian.manifest.json")).await.unwrap_err();
    assert_eq!(reason(&again), "InvalidBundle.NotFound");
    assert!(cloud.objects.head(&format!("bundle/{account}/{part}").as_str().into()).await.is_err());

    // It cannot be stopped.
    let error = user.stop(&id).await.unwrap_err();
    assert_eq!(reason(&error), "UnsupportedOperation");
    assert!(error.message().contains("does not have an 'ebs' root device type"), "{}", error.message());
    let stay = v1::ModifyInstanceAttributeRequest {
        instance_id: id.clone(),
        instance_initiated_shutdown_behavior: Some("stop".into()),
        ..Default::default()
    };
    assert_eq!(reason(&user.instances.modify_instance_attribute(stay).await.unwrap_err()), "UnsupportedOperation");
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    let at_root = v1::AttachVolumeRequest {
        volume_id: volume.clone(),
        instance_id: id.clone(),
        device: "/dev/sda1".into(),
        delete_on_termination: false,
    };
    assert_eq!(user.volumes.attach_volume(at_root).await.unwrap_err().code(), Code::InvalidArgument);
    user.attach(&volume, &id).await.unwrap();
    let make = v1::CreateImageRequest { instance_id: id.clone(), name: "x".into(), ..Default::default() };
    assert_eq!(user.images.create_image(make).await.unwrap_err().code(), Code::InvalidArgument);
    // A guest that powers off ends it; its EBS volumes stay.
    agent
        .observe(&session, &id, |report| {
            report.guest_powered_off = true;
            report.set_state(v1::ObservedState::Stopped);
        })
        .await;
    user.wait_state(&id, S::Terminated).await;
    user.wait_available(&volume).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_bundled_by_its_host_and_nothing_is_left_of_what_failed() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let task = user.bundle(of_image(&image, "base")).await.unwrap();
    let location = user.wait_bundle(&task.bundle_id, B::Complete).await.image_location;
    let boot = Some(v1::BootOverride { extra_cmdline: "quiet".into(), cmdline: String::new() });
    let register =
        v1::RegisterImageRequest { name: "store".into(), image_location: location, boot, ..Default::default() };
    let store = user.images.register_image(register).await.unwrap().into_inner();
    let (backed, _) = user.run_one(request(&image, "t3.nano")).await;
    assert_eq!(reason(&user.bundle(of_instance(&backed, "x")).await.unwrap_err()), "UnsupportedOperation");
    let id = user.run(request(&store, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;

    let task = user.bundle(of_instance(&id, "copy")).await.unwrap();
    let done = user.wait_bundle(&task.bundle_id, B::Complete).await;
    let again = user.register(&done.image_location, "again").await.unwrap();
    assert_eq!(again.boot.unwrap().extra_cmdline, "quiet", "what the instance was started with");

    // Called off: what was stored is gone, and the host does not go on.
    agent.memory.lock().manners.bundles = Snapshots::Freeze;
    let task = user.bundle(of_instance(&id, "half")).await.unwrap();
    let storing = user.wait_bundle(&task.bundle_id, B::Storing).await;
    assert_eq!(storing.progress, 25);
    assert_eq!(reason(&user.bundle(of_instance(&id, "more")).await.unwrap_err()), "BundlingInProgress");
    assert_eq!(user.bundle(of_image(&image, "half")).await.unwrap_err().code(), Code::AlreadyExists);
    let account = store.account_id.clone();
    let part = format!("bundle/{account}/half.part.0000");
    let put = |key: &str| v1::PutObjectRequest { key: key.to_owned(), data: b"x"[..].into(), create_only: false };
    let mut mine = agent.object_client(&cloud).await;
    mine.put_object(put(&part)).await.unwrap();
    for other in [format!("bundle/{account}/base.part.0000"), format!("bundle/{account}/half.txt")] {
        assert_eq!(mine.put_object(put(&other)).await.unwrap_err().code(), Code::PermissionDenied, "{other}");
    }
    let cancel = v1::CancelBundleTaskRequest { bundle_id: task.bundle_id.clone() };
    let cancelled = user.images.cancel_bundle_task(cancel).await.unwrap().into_inner();
    assert_eq!(cancelled.state(), B::Failed);
    assert!(cloud.objects.head(&part.as_str().into()).await.is_err());
    assert_eq!(mine.put_object(put(&part)).await.unwrap_err().code(), Code::PermissionDenied);
    until("the host is told", || async { agent.memory.lock().cancelled.contains(&task.bundle_id).then_some(()) }).await;
    // What a writer tells that has not heard of it is too late.
    let mut late = v1::BundleReport { bundle_id: task.bundle_id.clone(), ..Default::default() };
    late.set_state(v1::ObservedBundle::Complete);
    session.send(v1::agent_message::Message::Bundle(late)).await;

    agent.memory.lock().manners.bundles = Snapshots::Fail;
    let task = user.bundle(of_instance(&id, "half")).await.unwrap();
    let failed = user.wait_bundle(&task.bundle_id, B::Failed).await;
    assert_eq!(failed.state_reason.unwrap().message, "as it was told to");
    // A host says that it is complete, and it is not.
    agent.memory.lock().manners.bundles = Snapshots::Silent;
    let task = user.bundle(of_instance(&id, "half")).await.unwrap();
    let mut lie = v1::BundleReport { bundle_id: task.bundle_id.clone(), ..Default::default() };
    lie.manifest_sha256 = "0".repeat(64);
    lie.set_state(v1::ObservedBundle::Complete);
    session.send(v1::agent_message::Message::Bundle(lie)).await;
    user.wait_bundle(&task.bundle_id, B::Failed).await;
    // The instance ends before it is done.
    let task = user.bundle(of_instance(&id, "half")).await.unwrap();
    user.terminate(&id).await.unwrap();
    let failed = user.wait_bundle(&task.bundle_id, B::Failed).await;
    assert!(failed.state_reason.unwrap().message.contains(&id));

    // Known after a restart, and told to the host again.
    let id = user.run(request(&store, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    let task = user.bundle(of_instance(&id, "half")).await.unwrap();
    drop(session);
    cloud.stop().await.unwrap();
    let mut config = crate::cloud::config(dir.path());
    config.tombstone_ttl = std::time::Duration::from_millis(500);
    let cloud = Cloud::start_with(config).await;
    let mut user = cloud.user().await;
    agent.memory.lock().manners.bundles = Snapshots::Complete;
    let _session = agent.connect(&cloud).await.unwrap();
    until("complete, then forgotten", || {
        let mut user = user.clone();
        async move { user.bundles(&[]).await.unwrap().is_empty().then_some(()) }
    })
    .await;
    assert_eq!(reason(&user.bundles(&[&task.bundle_id]).await.unwrap_err()), "InvalidBundleID.NotFound");
    user.register("half.manifest.json", "half").await.unwrap();
}
