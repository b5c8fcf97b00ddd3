//! Volumes from creation to deletion.

use hearth_proto::v1;
use tonic::Code;
use v1::{AttachmentState as A, InstanceState as S, VolumeState as V};

use crate::agent::{FakeAgent, Forget};
use crate::cloud::{Cloud, reason, request};
use crate::disks::{GIB, blank, from_snapshot, until};

fn tag(key: &str, value: &str) -> v1::Tag {
    v1::Tag { key: key.into(), value: value.into() }
}

fn filter(name: &str, value: &str) -> v1::Filter {
    v1::Filter { name: name.into(), values: vec![value.into()] }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_made_found_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    assert_eq!(reason(&user.create_volume(blank(1)).await.unwrap_err()), "IncorrectState", "no zone without a host");
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    type R = v1::CreateVolumeRequest;
    let unknown = "snap-0123456789abcdef0".to_owned();
    let bad = [
        (R::default(), "MissingParameter"),
        (R { size_bytes: 512, ..blank(1) }, "InvalidParameterValue"),
        (R { volume_type: "gp9".into(), ..blank(1) }, "UnknownVolumeType"),
        (R { iops: Some(100), ..blank(1) }, "InvalidParameterValue"),
        (R { volume_type: "io2".into(), ..blank(8) }, "InvalidParameterValue"),
        (R { availability_zone: "moon-1a".into(), ..blank(1) }, "InvalidZone.NotFound"),
        (R { snapshot_id: unknown, ..blank(1) }, "InvalidSnapshot.NotFound"),
        (R { snapshot_id: "snap-1".into(), ..blank(1) }, "InvalidSnapshotID.Malformed"),
        (R { tags: vec![tag("", "x")], ..blank(1) }, "InvalidParameterValue"),
        (R { dry_run: true, ..blank(1) }, "DryRunOperation"),
    ];
    for (request, expected) in bad {
        let error = user.create_volume(request).await.unwrap_err();
        assert_eq!(reason(&error), expected, "{}", error.message());
    }

    let once = R { client_token: "once".into(), tags: vec![tag("Name", "data")], ..blank(2) };
    let calls = futures::future::join_all((0..6).map(|_| {
        let (mut user, request) = (user.clone(), once.clone());
        async move { user.create_volume(request).await.unwrap().volume_id }
    }));
    let ids = calls.await;
    assert!(ids.iter().all(|id| *id == ids[0]), "one token, one volume");
    let other = R { client_token: "once".into(), ..blank(3) };
    assert_eq!(reason(&user.create_volume(other).await.unwrap_err()), "IdempotentParameterMismatch");

    let volume = user.volume(&ids[0]).await.unwrap();
    assert_eq!((volume.state(), volume.status(), volume.size_bytes), (V::Available, v1::VolumeStatus::Ok, 2 * GIB));
    assert_eq!((volume.volume_type.as_str(), volume.iops, volume.throughput_mibps), ("gp3", 3000, 125));
    assert_eq!((volume.availability_zone.as_str(), volume.host_id.as_str()), ("local-1a", ""));
    let io2 = R { volume_type: "io2".into(), iops: Some(500), tags: vec![tag("Name", "log")], ..blank(8) };
    let io2 = user.create_volume(io2).await.unwrap();

    for (filters, expected) in [
        (vec![filter("size", "2")], vec![&volume.volume_id]),
        (vec![filter("volume-type", "io2")], vec![&io2.volume_id]),
        (vec![filter("tag:Name", "l*")], vec![&io2.volume_id]),
        (vec![filter("status", "in-use")], vec![]),
        (vec![filter("status", "available"), filter("tag-key", "Name"), filter("size", "8")], vec![&io2.volume_id]),
    ] {
        let request = v1::ListVolumesRequest { filters, ..Default::default() };
        let found = user.volumes.list_volumes(request).await.unwrap().into_inner().volumes;
        assert_eq!(found.iter().map(|found| &found.volume_id).collect::<Vec<_>>(), expected);
    }
    let unknown = v1::ListVolumesRequest { filters: vec![filter("colour", "red")], ..Default::default() };
    assert_eq!(user.volumes.list_volumes(unknown).await.unwrap_err().code(), Code::InvalidArgument);

    for _ in 0..5 {
        user.create_volume(blank(1)).await.unwrap();
    }
    let mut page = v1::PageRequest { max_results: 5, ..Default::default() };
    let mut seen = std::collections::BTreeSet::new();
    loop {
        let request = v1::ListVolumesRequest { page: Some(page.clone()), ..Default::default() };
        let answer = user.volumes.list_volumes(request).await.unwrap().into_inner();
        assert!(answer.volumes.len() <= 5);
        seen.extend(answer.volumes.into_iter().map(|volume| volume.volume_id));
        match answer.page.unwrap_or_default().next_token {
            token if token.is_empty() => break,
            token => page.next_token = token,
        }
    }
    assert_eq!(seen.len(), 7);

    let tags = v1::CreateTagsRequest { resource_ids: vec![ids[0].clone()], tags: vec![tag("stage", "test")] };
    user.tags.create_tags(tags).await.unwrap();
    assert_eq!(user.volume(&ids[0]).await.unwrap().tags.len(), 2);
    let of_volumes = v1::ListTagsRequest { filters: vec![filter("resource-type", "volume")], ..Default::default() };
    assert_eq!(user.tags.list_tags(of_volumes).await.unwrap().into_inner().tags.len(), 3);

    // Another account sees none of it.
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = user.accounts.create_account(create).await.unwrap().into_inner().token;
    let mut team = cloud.user_with(&token).await;
    assert_eq!(reason(&team.volume(&ids[0]).await.unwrap_err()), "InvalidVolume.NotFound");
    assert_eq!(reason(&team.delete_volume(&ids[0]).await.unwrap_err()), "InvalidVolume.NotFound");

    // No host has anything of it: it is gone at once.
    user.delete_volume(&ids[0]).await.unwrap();
    assert_eq!(reason(&user.delete_volume(&ids[0]).await.unwrap_err()), "InvalidVolume.NotFound");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_comes_to_a_running_guest_and_leaves_it() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;

    agent.memory.lock().manners.slow_volumes = true;
    let attachment = user.attach(&volume, &id).await.unwrap();
    assert_eq!((attachment.state(), attachment.device.as_str()), (A::Attaching, "/dev/sdf"));
    assert_eq!(attachment.serial.len(), 20);
    assert_eq!(user.volume(&volume).await.unwrap().state(), V::InUse);
    assert_eq!(reason(&user.attach(&volume, &id).await.unwrap_err()), "VolumeInUse");
    assert_eq!(reason(&user.delete_volume(&volume).await.unwrap_err()), "VolumeInUse");
    agent.memory.lock().manners.slow_volumes = false;
    agent
        .observe(&session, &id, |report| {
            for volume in &mut report.volumes {
                volume.set_state(v1::ObservedAttachment::Attached);
            }
        })
        .await;
    let there = user.wait_attachment(&volume, A::Attached).await;
    assert_eq!(there.host_id, agent.host_id);
    let devices = user.get(&id).await.block_devices;
    let names: Vec<_> =
        devices.iter().map(|device| (device.device_name.as_str(), device.delete_on_termination)).collect();
    assert_eq!(names, [("/dev/sda1", true), ("/dev/sdf", false)]);

    for (instance_id, device) in [("i-0123456789abcdef0", ""), (id.as_str(), "/dev/sdg"), ("", "/dev/sda1")] {
        let (volume_id, instance_id, device) = (volume.clone(), instance_id.into(), device.into());
        let wrong = v1::DetachVolumeRequest { volume_id, instance_id, device, force: false };
        let error = user.volumes.detach_volume(wrong).await.unwrap_err();
        assert_eq!((error.code(), reason(&error).as_str()), (Code::NotFound, "InvalidAttachment.NotFound"));
    }

    // A guest that waits for the store makes it impaired.
    agent.observe(&session, &id, |report| report.volumes[1].impaired = "the store is away".into()).await;
    let impaired = |volume: &v1::Volume| volume.status() == v1::VolumeStatus::Impaired;
    assert_eq!(user.wait_volume(&volume, "impaired", impaired).await.status_detail, "the store is away");

    // Asked, the guest holds on to it; forced, it is off.
    agent.memory.lock().manners.busy = true;
    assert_eq!(user.detach(&volume, false).await.unwrap().state(), A::Detaching);
    user.wait_attachment(&volume, A::Busy).await;
    assert!(user.detach(&volume, false).await.is_ok(), "asking twice is no error");
    until("the guest is asked once more", || async {
        let slots = agent.memory.lock().has[&id].desired.spec.clone().unwrap().volumes;
        slots.iter().any(|slot| slot.detach() == v1::DetachWish::Ask && slot.detach_attempt == 1).then_some(())
    })
    .await;
    assert_eq!(reason(&user.delete_volume(&volume).await.unwrap_err()), "VolumeInUse");
    user.detach(&volume, true).await.unwrap();
    let free = user.wait_available(&volume).await;
    assert!(free.attachments.is_empty());
    assert_eq!(reason(&user.detach(&volume, false).await.unwrap_err()), "IncorrectState");
    assert_eq!(user.get(&id).await.block_devices.len(), 1);

    // Attached again: what comes late of the earlier attachment says nothing about this one.
    agent.memory.lock().manners.slow_volumes = true;
    user.attach(&volume, &id).await.unwrap();
    agent.memory.lock().manners.busy = false;
    user.detach(&volume, false).await.unwrap();
    until("the host is asked to let go of it", || async {
        let slots = agent.memory.lock().has[&id].desired.spec.clone().unwrap().volumes;
        slots.iter().any(|slot| slot.detach() == v1::DetachWish::Ask).then_some(())
    })
    .await;
    agent
        .observe(&session, &id, |report| {
            let late = v1::AttachedVolumeReport {
                volume_id: volume.clone(),
                attach_generation: 1,
                state: v1::ObservedAttachment::Detached.into(),
                ..Default::default()
            };
            report.volumes.push(late);
        })
        .await;
    // Reports are worked in one after the other.
    agent.observe(&session, &id, |report| report.boot_count += 1).await;
    assert_eq!(user.volume(&volume).await.unwrap().state(), V::InUse);
    agent
        .observe(&session, &id, |report| {
            for volume in &mut report.volumes {
                volume.attach_generation = 2;
                volume.set_state(v1::ObservedAttachment::Detached);
            }
        })
        .await;
    user.wait_available(&volume).await;
    agent.memory.lock().manners.slow_volumes = false;

    // The root volume stays while the instance is not stopped.
    for force in [false, true] {
        assert_eq!(reason(&user.detach(&root, force).await.unwrap_err()), "OperationNotPermitted");
    }
    let wrong = v1::AttachVolumeRequest {
        volume_id: volume.clone(),
        instance_id: id.clone(),
        device: "/dev/sda1".into(),
        ..Default::default()
    };
    assert_eq!(user.volumes.attach_volume(wrong).await.unwrap_err().code(), Code::InvalidArgument);

    user.delete_volume(&volume).await.unwrap();
    user.wait_volume_gone(&volume).await;
    assert!(agent.memory.lock().wishes.iter().any(|wish| wish.wish() == v1::VolumeWish::Deleted));
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_a_stopped_instance_come_and_go_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&volume, &id).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;
    // Asked for while the guest holds on to it, off when the guest is.
    agent.memory.lock().manners.busy = true;
    user.detach(&volume, false).await.unwrap();
    user.wait_attachment(&volume, A::Busy).await;
    user.stop(&id).await.unwrap();
    user.wait_state(&id, S::Stopped).await;
    user.wait_available(&volume).await;
    agent.memory.lock().manners.busy = false;

    assert_eq!(user.attach(&volume, &id).await.unwrap().state(), A::Attached);
    assert_eq!(user.detach(&volume, false).await.unwrap().state(), A::Detached);
    assert_eq!(user.detach(&root, false).await.unwrap().state(), A::Detached);
    let error = user.start(&id).await.unwrap_err();
    assert!(error.message().contains("root device"), "{}", error.message());
    let back = v1::AttachVolumeRequest {
        volume_id: root.clone(),
        instance_id: id.clone(),
        device: "/dev/sda1".into(),
        delete_on_termination: true,
    };
    user.volumes.attach_volume(back).await.unwrap();
    user.attach(&volume, &id).await.unwrap();
    user.start(&id).await.unwrap();
    user.wait_state(&id, S::Running).await;
    user.wait_attachment(&root, A::Attached).await;
    user.wait_attachment(&volume, A::Attached).await;

    // Twenty disks and no more.
    for _ in 0..18 {
        let more = user.create_volume(blank(1)).await.unwrap().volume_id;
        let taken = user.get(&id).await.block_devices.len();
        let device = format!("/dev/xvdb{}", char::from(b'a' + u8::try_from(taken).unwrap()));
        let request =
            v1::AttachVolumeRequest { volume_id: more, instance_id: id.clone(), device, ..Default::default() };
        user.volumes.attach_volume(request).await.unwrap();
    }
    let one_too_many = user.create_volume(blank(1)).await.unwrap().volume_id;
    assert_eq!(reason(&user.attach(&one_too_many, &id).await.unwrap_err()), "AttachmentLimitExceeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_with_an_instance_is_what_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let data = v1::BlockDeviceMapping {
        device_name: "/dev/sdf".into(),
        ebs: Some(v1::EbsBlockDevice { volume_size_bytes: GIB, ..Default::default() }),
        ..Default::default()
    };
    let scratch = v1::BlockDeviceMapping {
        device_name: "/dev/sdg".into(),
        ebs: Some(v1::EbsBlockDevice {
            volume_size_bytes: GIB,
            delete_on_termination: Some(true),
            ..Default::default()
        }),
        ..Default::default()
    };
    let launch = v1::RunInstancesRequest { block_device_mappings: vec![data, scratch], ..request(&image, "t3.nano") };
    let (id, root) = user.run_one(launch).await;
    let devices = user.get(&id).await.block_devices;
    let (data, scratch) = (devices[1].volume_id.clone(), devices[2].volume_id.clone());
    let keep_root = v1::ModifyInstanceAttributeRequest {
        instance_id: id.clone(),
        delete_on_termination: vec![v1::DeleteOnTermination {
            device_name: "/dev/sda1".into(),
            delete_on_termination: false,
        }],
        ..Default::default()
    };
    user.instances.modify_instance_attribute(keep_root.clone()).await.unwrap();
    let wrong = v1::ModifyInstanceAttributeRequest {
        delete_on_termination: vec![v1::DeleteOnTermination { device_name: "/dev/sdz".into(), ..Default::default() }],
        ..keep_root
    };
    assert_eq!(user.instances.modify_instance_attribute(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    user.terminate(&id).await.unwrap();
    user.wait_state(&id, S::Terminated).await;
    user.wait_volume_gone(&scratch).await;
    for kept in [&root, &data] {
        let volume = user.volume(kept).await.unwrap();
        assert_eq!((volume.state(), volume.attachments.len()), (V::Available, 0));
        assert_eq!(volume.host_id, agent.host_id, "its data is where it was");
    }
    // A host with the only data of volumes is not removed by mistake.
    let remove = v1::RemoveHostRequest { host: "host-a".into(), force: false };
    let error = user.hosts.remove_host(remove).await.unwrap_err();
    assert_eq!(reason(&error), "DependencyViolation");
    assert!(error.message().contains(&root), "{}", error.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_goes_to_another_host_with_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (first, _session_a) = FakeAgent::connected(&cloud, "host-a").await;
    let (second, _session_b) = FakeAgent::connected(&cloud, "host-b").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let on = |host: &FakeAgent| v1::RunInstancesRequest {
        placement: Some(v1::Placement { host_id: host.host_id.clone(), ..Default::default() }),
        ..request(&image, "t3.nano")
    };
    let (a, _) = user.run_one(on(&first)).await;
    let (b, _) = user.run_one(on(&second)).await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&volume, &a).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;
    first.write(&volume, 3, 7);
    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;

    // While its host uploads it, it is attaching; changing one's mind does not lose what the upload brings.
    first.memory.lock().manners.keep_volumes = true;
    assert_eq!(user.attach(&volume, &b).await.unwrap().state(), A::Attaching);
    until("the host is told", || async { (!first.memory.lock().wishes.is_empty()).then_some(()) }).await;
    assert_eq!(reason(&user.snapshot(&volume).await.unwrap_err()), "IncorrectState");
    let grow = v1::ModifyVolumeRequest { volume_id: volume.clone(), size_bytes: Some(2 * GIB), ..Default::default() };
    assert_eq!(reason(&user.volumes.modify_volume(grow).await.unwrap_err()), "IncorrectState");
    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;
    // Back to where it was: the upload comes first all the same, for the host may have dropped the files by now.
    assert_eq!(user.attach(&volume, &a).await.unwrap().state(), A::Attaching);
    user.detach(&volume, false).await.unwrap();
    assert_eq!(user.attach(&volume, &b).await.unwrap().state(), A::Attaching);
    first.memory.lock().manners.keep_volumes = false;
    drop(_session_a);
    let _session_a = first.connect(&cloud).await.unwrap();
    let there = user.wait_attachment(&volume, A::Attached).await;
    assert_eq!(there.host_id, second.host_id);
    let wishes: Vec<_> = first.memory.lock().wishes.iter().map(|wish| (wish.generation, wish.wish())).collect();
    assert!(wishes.iter().all(|wish| *wish == (1, v1::VolumeWish::Released)), "one upload: {wishes:?}");
    let told = second.memory.lock().has[&b].desired.spec.clone().unwrap();
    let moved = told.volumes.iter().find_map(|slot| slot.volume.clone().filter(|v| v.volume_id == volume)).unwrap();
    assert_eq!(moved.attach_generation, 2);
    let base = moved.base.unwrap();
    let root = base.root.parse().unwrap();
    let key = hearth_snapshot::SnapshotKey::new(&base.snapshot_id).unwrap();
    let manifest = hearth_snapshot::Manifest::load(&*cloud.objects, &key, Some(&root)).await.unwrap();
    assert_eq!(manifest.chunks().collect::<Vec<_>>(), [3]);
    // Nothing that it needs is garbage.
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    assert_eq!(user.findings().await, Vec::<String>::new());

    // On its way when it is deleted: nobody needs the upload any more.
    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;
    second.memory.lock().manners.keep_volumes = true;
    user.attach(&volume, &a).await.unwrap();
    user.detach(&volume, false).await.unwrap();
    user.delete_volume(&volume).await.unwrap();
    user.delete_volume(&volume).await.unwrap();
    assert_eq!(user.volume(&volume).await.unwrap().state(), V::Deleting);
    second.memory.lock().manners.keep_volumes = false;
    drop(_session_b);
    let _session_b = second.connect(&cloud).await.unwrap();
    user.wait_volume_gone(&volume).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_has_nothing_of_a_volume_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (first, _session_a) = FakeAgent::connected(&cloud, "host-a").await;
    let (second, _session_b) = FakeAgent::connected(&cloud, "host-b").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let on = |host: &FakeAgent| v1::RunInstancesRequest {
        placement: Some(v1::Placement { host_id: host.host_id.clone(), ..Default::default() }),
        ..request(&image, "t3.nano")
    };
    let (a, _) = user.run_one(on(&first)).await;
    let (b, _) = user.run_one(on(&second)).await;
    let written = |user: &crate::cloud::User, content: Option<u8>| {
        let (mut user, first, a) = (user.clone(), first.clone(), a.clone());
        async move {
            let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
            user.attach(&volume, &a).await.unwrap();
            user.wait_attachment(&volume, A::Attached).await;
            if let Some(content) = content {
                first.write(&volume, 2, content);
            }
            user.detach(&volume, false).await.unwrap();
            user.wait_available(&volume).await;
            volume
        }
    };
    // Uploaded whole, then killed before it could say so.
    let moved = written(&user, Some(8)).await;
    first.memory.lock().manners.forget_volumes = Some(Forget::Uploaded);
    user.attach(&moved, &b).await.unwrap();
    user.wait_attachment(&moved, A::Attached).await;
    let told = second.memory.lock().has[&b].desired.spec.clone().unwrap();
    let base = told.volumes.iter().filter_map(|slot| slot.volume.clone()).find(|v| v.volume_id == moved).unwrap().base;
    let base = base.expect("what was written");
    let key = hearth_snapshot::SnapshotKey::new(&base.snapshot_id).unwrap();
    let manifest = hearth_snapshot::Manifest::load(&*cloud.objects, &key, None).await.unwrap();
    assert_eq!(manifest.chunks().collect::<Vec<_>>(), [2]);

    // Lost for good: whoever waits for it is told.
    let lost = written(&user, None).await;
    first.memory.lock().manners.forget_volumes = Some(Forget::Lost);
    user.attach(&lost, &b).await.unwrap();
    let broken = user.wait_volume(&lost, "in error", |volume| volume.state() == V::Error).await;
    assert!(broken.attachments.is_empty() && broken.state_reason.unwrap().message.contains("nothing of it"));
    user.delete_volume(&lost).await.unwrap();
    user.wait_volume_gone(&lost).await;

    // Never opened there: nothing can be missing.
    user.stop(&a).await.unwrap();
    user.wait_state(&a, S::Stopped).await;
    let fresh = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&fresh, &a).await.unwrap();
    user.detach(&fresh, false).await.unwrap();
    user.attach(&fresh, &b).await.unwrap();
    assert_eq!(user.wait_attachment(&fresh, A::Attached).await.host_id, second.host_id);
    // Opened by a start: something can.
    let used = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&used, &a).await.unwrap();
    user.start(&a).await.unwrap();
    user.wait_attachment(&used, A::Attached).await;
    user.detach(&used, false).await.unwrap();
    user.wait_available(&used).await;
    user.attach(&used, &b).await.unwrap();
    user.wait_volume(&used, "in error", |volume| volume.state() == V::Error).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_on_a_removed_host_are_in_error_and_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&volume, &id).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;
    drop(session);
    user.wait_host("host-a", |host| !host.connected).await;
    let remove = v1::RemoveHostRequest { host: "host-a".into(), force: true };
    user.hosts.remove_host(remove).await.unwrap();
    user.wait_volume_gone(&root).await;
    let lost = user.wait_volume(&volume, "in error", |volume| volume.state() == V::Error).await;
    assert!(lost.attachments.is_empty() && lost.state_reason.unwrap().message.contains("was removed"));
    let (_other, _session) = FakeAgent::connected(&cloud, "host-b").await;
    let (other, _) = user.run_one(request(&image, "t3.nano")).await;
    assert_eq!(reason(&user.attach(&volume, &other).await.unwrap_err()), "IncorrectState");
    user.delete_volume(&volume).await.unwrap();
    user.wait_volume_gone(&volume).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_start_does_not_move_an_instance_away_from_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (first, _session_a) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (other, _) = user.run_one(request(&image, "t3.nano")).await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&volume, &other).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;
    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;
    // Stopped before it ever ran, it gets a volume with content.
    first.memory.lock().manners.slow = true;
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.stop(&id).await.unwrap();
    user.wait_state(&id, S::Stopped).await;
    user.attach(&volume, &id).await.unwrap();
    let (second, _session_b) = FakeAgent::connected(&cloud, "host-b").await;
    first.memory.lock().manners.slow = false;
    first.memory.lock().manners.refuse = Some("Server.InsufficientInstanceCapacity".into());
    user.start(&id).await.unwrap();
    user.wait_state(&id, S::Terminated).await;
    let volume = user.wait_available(&volume).await;
    assert_eq!(volume.host_id, first.host_id);
    assert!(second.memory.lock().has.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_made_of_snapshots_are_as_large_as_they_must_be() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let large = user.create_volume(blank(4)).await.unwrap().volume_id;
    let snapshot = user.snapshot(&large).await.unwrap();
    assert_eq!(snapshot.state(), v1::SnapshotState::Completed, "nothing is written to a volume that was nowhere");
    let same = user.create_volume(from_snapshot(&snapshot.snapshot_id)).await.unwrap();
    assert_eq!((same.size_bytes, same.snapshot_id), (4 * GIB, snapshot.snapshot_id.clone()));
    let small = v1::CreateVolumeRequest { size_bytes: GIB, ..from_snapshot(&snapshot.snapshot_id) };
    assert_eq!(reason(&user.create_volume(small).await.unwrap_err()), "InvalidParameterValue");
    let larger = v1::CreateVolumeRequest { size_bytes: 9 * GIB, ..from_snapshot(&snapshot.snapshot_id) };
    assert_eq!(user.create_volume(larger).await.unwrap().size_bytes, 9 * GIB);
}
