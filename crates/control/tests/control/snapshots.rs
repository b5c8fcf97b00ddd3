//! Snapshots, and what the garbage collector leaves alone.

use hearth_proto::v1;
use v1::{AttachmentState as A, InstanceState as S, SnapshotState as N};

use crate::agent::{FakeAgent, Snapshots};
use crate::cloud::{Cloud, config, reason, request};
use crate::disks::{GIB, blank, from_snapshot, until};

fn filter(name: &str, value: &str) -> v1::Filter {
    v1::Filter { name: name.into(), values: vec![value.into()] }
}

/// The sets that a host works on.
fn sets(agent: &FakeAgent) -> Vec<String> {
    agent.memory.lock().sets.keys().cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_pending_when_its_point_in_time_is_fixed_and_complete_when_it_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (_, root) = user.run_one(request(&image, "t3.nano")).await;
    agent.write(&root, 1, 9);
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let request = v1::CreateSnapshotRequest {
        volume_id: root.clone(),
        description: "before".into(),
        tags: vec![v1::Tag { key: "Name".into(), value: "daily".into() }],
        client_token: "once".into(),
    };
    let made = user.snapshots.create_snapshot(request.clone()).await.unwrap().into_inner();
    assert_eq!((made.state(), made.progress, made.volume_size_bytes), (N::Pending, 25, GIB));
    let again = user.snapshots.create_snapshot(request.clone()).await.unwrap().into_inner();
    assert_eq!(again.snapshot_id, made.snapshot_id);
    let other = v1::CreateSnapshotRequest { description: "after".into(), ..request };
    assert_eq!(reason(&user.snapshots.create_snapshot(other).await.unwrap_err()), "IdempotentParameterMismatch");
    assert_eq!(reason(&user.create_volume(from_snapshot(&made.snapshot_id)).await.unwrap_err()), "IncorrectState");

    // Five in the making, not six, even when all ask at once.
    let more = futures::future::join_all((0..8).map(|_| {
        let (mut user, root) = (user.clone(), root.clone());
        async move { user.snapshot(&root).await }
    }));
    let more = more.await;
    assert_eq!(more.iter().filter(|made| made.is_ok()).count(), 4);
    for error in more.iter().filter_map(|made| made.as_ref().err()) {
        assert_eq!(reason(error), "ConcurrentSnapshotLimitExceeded");
    }

    // Deleted while pending: gone for users, the upload ends as if nothing were.
    let victim = more.iter().find_map(|made| made.as_ref().ok()).unwrap().snapshot_id.clone();
    user.delete_snapshot(&victim).await.unwrap();
    assert_eq!(reason(&user.get_snapshot(&victim).await.unwrap_err()), "InvalidSnapshot.NotFound");
    assert_eq!(reason(&user.delete_snapshot(&victim).await.unwrap_err()), "InvalidSnapshot.NotFound");
    assert_eq!(reason(&user.snapshot(&root).await.unwrap_err()), "ConcurrentSnapshotLimitExceeded");
    // None of what goes on is garbage, however often it is collected.
    for _ in 0..5 {
        user.collect_garbage().await;
    }
    let mut order = sets(&agent);
    let first = order.iter().position(|set| agent.memory.lock().sets[set].snapshots[0].snapshot_id == made.snapshot_id);
    let first = order.remove(first.unwrap());
    agent.finish_set(&first, &session.up).await;
    let done = user.wait_snapshot(&made.snapshot_id, N::Completed).await;
    assert_eq!((done.progress, done.incremental_bytes), (100, 512 << 10));
    assert!(!done.completion_time.is_empty());
    for set in order {
        agent.finish_set(&set, &session.up).await;
    }
    for made in more.iter().filter_map(|made| made.as_ref().ok()).filter(|made| made.snapshot_id != victim) {
        user.wait_snapshot(&made.snapshot_id, N::Completed).await;
    }
    agent.memory.lock().manners.snapshots = Snapshots::Complete;
    let next = user.snapshot(&root).await.unwrap();
    user.wait_snapshot(&next.snapshot_id, N::Completed).await;

    for (filters, expected) in [
        (vec![filter("status", "completed"), filter("volume-id", &root)], 5),
        (vec![filter("description", "before")], 1),
        (vec![filter("tag:Name", "daily")], 1),
        (vec![filter("volume-size", "1")], 6),
        (vec![filter("status", "pending")], 0),
    ] {
        let request = v1::ListSnapshotsRequest { filters: filters.clone(), ..Default::default() };
        let found = user.snapshots.list_snapshots(request).await.unwrap().into_inner().snapshots;
        assert_eq!(found.len(), expected, "{filters:?}");
    }
    let page = Some(v1::PageRequest { max_results: 4, ..Default::default() });
    let request = v1::ListSnapshotsRequest { page, ..Default::default() };
    let answer = user.snapshots.list_snapshots(request).await.unwrap().into_inner();
    let rest = Some(v1::PageRequest { max_results: 4, next_token: answer.page.unwrap().next_token });
    let request = v1::ListSnapshotsRequest { page: rest, ..Default::default() };
    let last = user.snapshots.list_snapshots(request).await.unwrap().into_inner();
    assert_eq!((answer.snapshots.len(), last.snapshots.len()), (4, 2));
    assert_eq!(user.findings().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_one_instant_complete_or_fail_together() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    let data = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&data, &id).await.unwrap();
    user.wait_attachment(&data, A::Attached).await;
    let both = v1::CreateSnapshotsRequest { instance_id: id.clone(), ..Default::default() };
    let made = user.snapshots.create_snapshots(both.clone()).await.unwrap().into_inner().snapshots;
    let of: Vec<_> = made.iter().map(|snapshot| snapshot.volume_id.as_str()).collect();
    assert_eq!(of, [root.as_str(), data.as_str()]);
    for snapshot in &made {
        user.wait_snapshot(&snapshot.snapshot_id, N::Completed).await;
    }
    let one = v1::CreateSnapshotsRequest { exclude_boot_volume: true, ..both.clone() };
    let made = user.snapshots.create_snapshots(one.clone()).await.unwrap().into_inner().snapshots;
    assert_eq!(made.iter().map(|snapshot| &snapshot.volume_id).collect::<Vec<_>>(), [&data]);
    let elsewhere = user.create_volume(blank(1)).await.unwrap().volume_id;
    let many = (0..101).map(|n| format!("vol-{n:017x}")).collect();
    for (exclude_data_volume_ids, expected) in [
        (vec!["vol-1".to_owned()], "InvalidVolumeID.Malformed"),
        (vec![data.clone(), "vol-0123456789abcdef0".into()], "InvalidVolume.NotFound"),
        (vec![elsewhere], "InvalidParameterValue"),
        (vec![root.clone()], "InvalidParameterValue"),
        (many, "InvalidParameterValue"),
    ] {
        let wrong = v1::CreateSnapshotsRequest { exclude_data_volume_ids, ..both.clone() };
        assert_eq!(reason(&user.snapshots.create_snapshots(wrong).await.unwrap_err()), expected);
    }
    let none = v1::CreateSnapshotsRequest { exclude_data_volume_ids: vec![data.clone()], ..one };
    assert_eq!(reason(&user.snapshots.create_snapshots(none).await.unwrap_err()), "InvalidParameterValue");

    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let made = user.snapshots.create_snapshots(both.clone()).await.unwrap().into_inner().snapshots;
    let [first, second] = &made[..] else { panic!("{made:?}") };
    let mut report = v1::SnapshotReport { snapshot_id: first.snapshot_id.clone(), ..Default::default() };
    report.set_state(v1::ObservedSnapshot::Failed);
    report.error = "the disk is broken".into();
    session.send(v1::agent_message::Message::Snapshot(report)).await;
    let failed = user.wait_snapshot(&first.snapshot_id, N::Error).await;
    assert_eq!(failed.state_reason.unwrap().message, "the disk is broken");
    user.wait_snapshot(&second.snapshot_id, N::Error).await;
    until("the host is told to forget it", || async { (!agent.memory.lock().cancelled.is_empty()).then_some(()) })
        .await;
    // What comes late does not bring it back.
    let mut late = v1::SnapshotReport { snapshot_id: second.snapshot_id.clone(), ..Default::default() };
    late.set_state(v1::ObservedSnapshot::Completed);
    late.root = "0".repeat(64);
    session.send(v1::agent_message::Message::Snapshot(late)).await;
    agent.memory.lock().manners.snapshots = Snapshots::Fail;
    let error = user.snapshots.create_snapshots(both).await.unwrap_err();
    assert!(error.message().contains("as it was told to"), "{}", error.message());
    assert_eq!(user.get_snapshot(&second.snapshot_id).await.unwrap().state(), N::Error);
    user.delete_snapshot(&second.snapshot_id).await.unwrap();
    user.collect_garbage().await;
    assert_eq!(user.findings().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_point_in_time_is_not_fixed_anew() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (_, root) = user.run_one(request(&image, "t3.nano")).await;
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let kept = user.snapshot(&root).await.unwrap().snapshot_id;
    let lost = user.snapshot(&root).await.unwrap().snapshot_id;
    drop(session);
    agent.memory.lock().snapshots.remove(&lost);
    agent.memory.lock().sets.clear();
    // The control plane may be a new one, too.
    cloud.stop().await.unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let session = agent.connect(&cloud).await.unwrap();
    let failed = user.wait_snapshot(&lost, N::Error).await;
    assert!(failed.state_reason.unwrap().message.contains("lost"));
    until("the other is wanted", || async { (sets(&agent).len() == 1).then_some(()) }).await;
    assert_eq!(user.get_snapshot(&kept).await.unwrap().state(), N::Pending);
    let set = sets(&agent).remove(0);
    agent.finish_set(&set, &session.up).await;
    user.wait_snapshot(&kept, N::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_whole_in_the_store_is_complete_although_its_host_says_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    let data = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&data, &id).await.unwrap();
    user.wait_attachment(&data, A::Attached).await;
    agent.write(&root, 3, 3);
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let alone = user.snapshot(&root).await.unwrap().snapshot_id;
    let set = sets(&agent).remove(0);
    agent.memory.lock().sets.remove(&set);
    let both = v1::CreateSnapshotsRequest { instance_id: id.clone(), ..Default::default() };
    let pair = user.snapshots.create_snapshots(both).await.unwrap().into_inner().snapshots;
    drop(session);
    // Everything is uploaded, but for one of the two of one instant; then the host forgets all of it.
    for snapshot in [&alone, &pair[0].snapshot_id] {
        let spec = hearth_snapshot::ManifestSpec {
            id: hearth_snapshot::SnapshotKey::new(snapshot).unwrap(),
            size_bytes: GIB,
            epoch: hearth_snapshot::Epoch(0),
        };
        agent.publish_empty(spec).await;
    }
    agent.memory.lock().snapshots.clear();
    agent.memory.lock().sets.clear();
    cloud.stop().await.unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let session = agent.connect(&cloud).await.unwrap();
    let done = user.wait_snapshot(&alone, N::Completed).await;
    assert_eq!((done.progress, done.volume_size_bytes), (100, GIB));
    for snapshot in &pair {
        let failed = user.wait_snapshot(&snapshot.snapshot_id, N::Error).await;
        assert!(failed.state_reason.unwrap().message.contains("lost"));
    }
    // The report comes late: the volume's next snapshot builds on it, its user has been told that it failed.
    let root_hash = agent.root_of(&pair[0].snapshot_id).await;
    let mut late =
        v1::SnapshotReport { snapshot_id: pair[0].snapshot_id.clone(), root: root_hash, ..Default::default() };
    late.set_state(v1::ObservedSnapshot::Completed);
    session.send(v1::agent_message::Message::Snapshot(late)).await;
    // Reports are worked in one after the other: what comes behind it shows that it has been.
    agent.observe(&session, &id, |report| report.volumes[0].impaired = "behind it".into()).await;
    user.wait_volume(&root, "impaired", |volume| volume.status_detail == "behind it").await;
    user.delete_snapshot(&pair[0].snapshot_id).await.unwrap();
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    user.snapshot(&root).await.unwrap();
    let told = agent.memory.lock().sets.values().next().cloned().unwrap().snapshots.remove(0);
    assert_eq!(told.parent.map(|parent| parent.snapshot_id), Some(pair[0].snapshot_id.clone()));
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    assert!(!agent.root_of(&pair[0].snapshot_id).await.is_empty(), "the next snapshot needs it");
    assert!(!agent.root_of(&alone).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn data_stays_on_its_host_while_a_snapshot_is_read_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    agent.write(&root, 0, 5);
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let made = user.snapshot(&root).await.unwrap().snapshot_id;
    user.terminate(&id).await.unwrap();
    user.wait_state(&id, S::Terminated).await;
    user.wait_volume(&root, "deleting", |volume| volume.state() == v1::VolumeState::Deleting).await;
    // Something else goes all the way down and up again meanwhile.
    let (other, _) = user.run_one(request(&image, "t3.nano")).await;
    user.stop(&other).await.unwrap();
    user.wait_state(&other, S::Stopped).await;
    assert!(agent.memory.lock().wishes.is_empty(), "the host still needs the volume's files");
    let set = sets(&agent).remove(0);
    agent.finish_set(&set, &session.up).await;
    user.wait_snapshot(&made, N::Completed).await;
    user.wait_volume_gone(&root).await;
    // The snapshot alone is enough, whatever becomes of what it was made from.
    let deregister = v1::DeregisterImageRequest { image_id: image.image_id, delete_associated_snapshots: true };
    user.images.deregister_image(deregister).await.unwrap();
    user.terminate(&other).await.unwrap();
    user.wait_state(&other, S::Terminated).await;
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    assert_eq!(user.findings().await, Vec::<String>::new());
    let copy =
        v1::CopySnapshotRequest { source_snapshot_id: made.clone(), client_token: "copy".into(), ..Default::default() };
    let copied = user.snapshots.copy_snapshot(copy.clone()).await.unwrap().into_inner();
    assert_eq!(copied.state(), N::Completed);
    assert_eq!(user.snapshots.copy_snapshot(copy).await.unwrap().into_inner().snapshot_id, copied.snapshot_id);
    user.delete_snapshot(&made).await.unwrap();
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    assert_eq!(user.findings().await, Vec::<String>::new());
    assert!(user.usage().await.chunk_objects > 0);
    user.delete_snapshot(&copied.snapshot_id).await.unwrap();
    let user = user.clone();
    until("nothing is left", || {
        let mut user = user.clone();
        async move {
            user.collect_garbage().await;
            let usage = user.usage().await;
            (usage.chunk_objects + usage.manifest_objects == 0).then_some(())
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_its_host_never_fixes_fails_when_the_host_goes() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.host_timeout = std::time::Duration::from_millis(300);
    let cloud = Cloud::start_with(config).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (_, root) = user.run_one(request(&image, "t3.nano")).await;
    agent.memory.lock().manners.snapshots = Snapshots::Silent;
    let waiting = {
        let (mut user, root) = (user.clone(), root.clone());
        tokio::spawn(async move { user.snapshot(&root).await })
    };
    until("the host is asked", || async { (!sets(&agent).is_empty()).then_some(()) }).await;
    drop(session);
    user.wait_host("host-a", |host| !host.connected).await;
    let remove = v1::RemoveHostRequest { host: "host-a".into(), force: true };
    user.hosts.remove_host(remove).await.unwrap();
    let error = waiting.await.unwrap().unwrap_err();
    assert!(error.message().contains("removed"), "{}", error.message());
    let mut list = user.snapshots.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    list.snapshots.retain(|snapshot| snapshot.volume_id == root);
    assert_eq!(list.snapshots[0].state(), N::Error);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_volume_has_one_snapshot_in_the_making() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (_, root) = user.run_one(request(&image, "t3.nano")).await;
    let slow =
        v1::ModifyVolumeRequest { volume_id: root.clone(), volume_type: Some("standard".into()), ..Default::default() };
    user.volumes.modify_volume(slow).await.unwrap();
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let first = user.snapshot(&root).await.unwrap().snapshot_id;
    let error = user.snapshot(&root).await.unwrap_err();
    assert_eq!(reason(&error), "ConcurrentSnapshotLimitExceeded");
    assert!(error.message().contains("1 of at most 1"), "{}", error.message());
    let set = sets(&agent).remove(0);
    agent.finish_set(&set, &session.up).await;
    user.wait_snapshot(&first, N::Completed).await;
    user.snapshot(&root).await.unwrap();
}
