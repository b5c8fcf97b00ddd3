//! Snapshots of one instant: all complete together, or none does.

use hearth_proto::v1;
use v1::agent_message::Message as Up;
use v1::{AttachmentState as A, SnapshotState as N};

use crate::agent::{FakeAgent, Session, Snapshots};
use crate::cloud::{Cloud, User, reason, request};
use crate::disks::{GIB, blank, until};

/// An instance with a root volume and another one; its host fixes points in time and uploads nothing by itself.
async fn two_volumes(cloud: &Cloud) -> (FakeAgent, Session, User, String) {
    let (agent, session) = FakeAgent::connected(cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, _) = user.run_one(request(&image, "t3.nano")).await;
    let data = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&data, &id).await.unwrap();
    user.wait_attachment(&data, A::Attached).await;
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    (agent, session, user, id)
}

async fn both(user: &mut User, instance: &str) -> [v1::Snapshot; 2] {
    let request = v1::CreateSnapshotsRequest { instance_id: instance.into(), ..Default::default() };
    let made = user.snapshots.create_snapshots(request).await.unwrap().into_inner().snapshots;
    made.try_into().unwrap()
}

/// The host has uploaded this one and says so.
async fn upload(agent: &FakeAgent, session: &Session, id: &str) {
    let id_of_manifest = hearth_snapshot::SnapshotKey::new(id).unwrap();
    let epoch = hearth_snapshot::Epoch(0);
    agent.publish_empty(hearth_snapshot::ManifestSpec { id: id_of_manifest, size_bytes: GIB, epoch }).await;
    let root = agent.root_of(id).await;
    agent.memory.lock().snapshots.remove(id);
    let mut report = v1::SnapshotReport { snapshot_id: id.into(), root, ..Default::default() };
    report.set_state(v1::ObservedSnapshot::Completed);
    session.send(Up::Snapshot(report)).await;
}

/// Waits until a snapshot is stored; it is pending all the same.
async fn wait_stored(user: &mut User, id: &str) {
    let user = user.clone();
    let stored = until("it is stored", || {
        let mut user = user.clone();
        async move { user.get_snapshot(id).await.ok().filter(|snapshot| snapshot.progress == 100) }
    })
    .await;
    assert_eq!((stored.state(), stored.completion_time.as_str()), (N::Pending, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_stored_fails_with_the_other_of_its_instant() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session, mut user, id) = two_volumes(&cloud).await;
    let [first, second] = both(&mut user, &id).await;
    upload(&agent, &session, &first.snapshot_id).await;
    wait_stored(&mut user, &first.snapshot_id).await;
    let made_of_it = v1::CreateVolumeRequest { snapshot_id: first.snapshot_id.clone(), ..Default::default() };
    assert_eq!(reason(&user.create_volume(made_of_it).await.unwrap_err()), "IncorrectState");
    for _ in 0..3 {
        user.collect_garbage().await;
    }
    let mut report = v1::SnapshotReport { snapshot_id: second.snapshot_id.clone(), ..Default::default() };
    report.set_state(v1::ObservedSnapshot::Failed);
    report.error = "the disk is broken".into();
    session.send(Up::Snapshot(report)).await;
    let failed = user.wait_snapshot(&second.snapshot_id, N::Error).await;
    assert_eq!(failed.state_reason.unwrap().message, "the disk is broken");
    let with_it = user.get_snapshot(&first.snapshot_id).await.unwrap();
    assert_eq!(with_it.state(), N::Error, "both in one transaction");
    let why = with_it.state_reason.unwrap().message;
    assert!(why.contains(&second.snapshot_id) && why.ends_with("the disk is broken"), "{why}");
    // Its host builds the volume's next snapshot on it all the same, so it stays readable.
    user.delete_snapshot(&first.snapshot_id).await.unwrap();
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    assert!(!agent.root_of(&first.snapshot_id).await.is_empty());
    agent.memory.lock().sets.clear();
    user.snapshot(&first.volume_id).await.unwrap();
    let told = agent.memory.lock().sets.values().next().cloned().unwrap().snapshots.remove(0);
    assert_eq!(told.parent.map(|parent| parent.snapshot_id), Some(first.snapshot_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn those_of_one_instant_complete_together_whoever_begins_anew_in_between() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session, mut user, id) = two_volumes(&cloud).await;
    let [first, second] = both(&mut user, &id).await;
    upload(&agent, &session, &first.snapshot_id).await;
    wait_stored(&mut user, &first.snapshot_id).await;
    drop(session);
    cloud.stop().await.unwrap();
    agent.memory.lock().sets.clear();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let session = agent.connect(&cloud).await.unwrap();
    // The host has nothing more to do for the first one, which it does not report any more.
    let told = until("the host is told", || async { agent.memory.lock().sets.values().next().cloned() }).await;
    let wanted: Vec<_> = told.snapshots.iter().map(|snapshot| &snapshot.snapshot_id).collect();
    assert_eq!(wanted, [&second.snapshot_id]);
    wait_stored(&mut user, &first.snapshot_id).await;
    upload(&agent, &session, &second.snapshot_id).await;
    let last = user.wait_snapshot(&second.snapshot_id, N::Completed).await;
    let with_it = user.get_snapshot(&first.snapshot_id).await.unwrap();
    assert_eq!((with_it.state(), with_it.progress), (N::Completed, 100), "both in one transaction");
    assert_eq!(with_it.completion_time, last.completion_time);
}
