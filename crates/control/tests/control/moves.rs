//! What users see of volumes whose host is busy with them, cannot do what is wanted, or is away.

use hearth_proto::v1;
use v1::agent_message::Message as Up;
use v1::{AttachmentState as A, VolumeOutcome, VolumeStatus};

use crate::agent::{FakeAgent, Session};
use crate::cloud::{Cloud, User, request};
use crate::disks::{blank, until};

/// Says something of the volume that the host was told of last.
async fn say(agent: &FakeAgent, session: &Session, outcome: VolumeOutcome, chunks: (u64, u64), error: &str) {
    let wish = agent.memory.lock().wishes.last().cloned().unwrap();
    let report = v1::VolumeReport {
        volume_id: wish.volume.unwrap().volume_id,
        observed_generation: wish.generation,
        outcome: outcome.into(),
        done_chunks: chunks.0,
        total_chunks: chunks.1,
        error: error.into(),
        ..Default::default()
    };
    session.send(Up::Volume(report)).await;
}

async fn instance_on(user: &mut User, image: &v1::Image, agent: &FakeAgent) -> String {
    let placement = v1::Placement { host_id: agent.host_id.clone(), ..Default::default() };
    user.run_one(v1::RunInstancesRequest { placement: Some(placement), ..request(image, "t3.nano") }).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_shows_how_far_it_is_and_why_it_does_not_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (first, session) = FakeAgent::connected(&cloud, "host-a").await;
    let (second, _session) = FakeAgent::connected(&cloud, "host-b").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (a, b) = (instance_on(&mut user, &image, &first).await, instance_on(&mut user, &image, &second).await);
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&volume, &a).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;
    first.write(&volume, 3, 7);
    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;

    first.memory.lock().manners.keep_volumes = true;
    let attaching = user.attach(&volume, &b).await.unwrap();
    assert_eq!((attaching.state(), attaching.progress), (A::Attaching, 0));
    assert!(attaching.detail.contains("comes from host"), "{}", attaching.detail);
    until("the host is told", || async { (!first.memory.lock().wishes.is_empty()).then_some(()) }).await;
    // A watcher is told of what no record holds.
    let watch = v1::WatchVolumesRequest { volume_ids: vec![volume.clone()] };
    let mut watched = user.volumes.watch_volumes(watch).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().attachments[0].progress, 0);
    say(&first, &session, VolumeOutcome::Working, (1, 4), "").await;
    let shown = watched.message().await.unwrap().unwrap();
    assert_eq!((shown.status(), shown.attachments[0].progress), (VolumeStatus::Ok, 25));
    assert!(shown.status_detail.ends_with("25 %") && shown.attachments[0].detail == shown.status_detail);

    say(&first, &session, VolumeOutcome::Failed, (2, 4), "the object store does not answer").await;
    let shown = watched.message().await.unwrap().unwrap();
    assert_eq!((shown.status(), shown.attachments[0].progress), (VolumeStatus::Impaired, 50));
    assert_eq!(shown.attachments[0].state(), A::Attaching);
    assert!(shown.status_detail.ends_with("yet: the object store does not answer"), "{}", shown.status_detail);
    assert_eq!(shown.attachments[0].detail, shown.status_detail);
    say(&first, &session, VolumeOutcome::Working, (3, 4), "").await;
    let shown = watched.message().await.unwrap().unwrap();
    assert_eq!((shown.status(), shown.attachments[0].progress), (VolumeStatus::Ok, 75));

    drop(session);
    let away = |volume: &v1::Volume| volume.status() == VolumeStatus::InsufficientData;
    let shown = user.wait_volume(&volume, "without data", away).await;
    assert!(shown.attachments[0].detail.contains("not connected"), "{}", shown.attachments[0].detail);
    first.memory.lock().manners.keep_volumes = false;
    let _session = first.connect(&cloud).await.unwrap();
    let there = user.wait_attachment(&volume, A::Attached).await;
    assert_eq!((there.status(), there.status_detail.as_str()), (VolumeStatus::Ok, ""));
    assert_eq!((there.attachments[0].progress, there.attachments[0].detail.as_str()), (0, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_host_cannot_delete_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let id = instance_on(&mut user, &image, &agent).await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&volume, &id).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;
    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;
    agent.memory.lock().manners.keep_volumes = true;
    user.delete_volume(&volume).await.unwrap();
    until("the host is told", || async { (!agent.memory.lock().wishes.is_empty()).then_some(()) }).await;
    say(&agent, &session, VolumeOutcome::Failed, (0, 0), "the folder is busy").await;
    let is_impaired = |volume: &v1::Volume| volume.status() == VolumeStatus::Impaired;
    let shown = user.wait_volume(&volume, "impaired", is_impaired).await;
    assert!(shown.status_detail.ends_with("yet: the folder is busy"), "{}", shown.status_detail);
    assert_eq!(shown.state(), v1::VolumeState::Deleting);
    say(&agent, &session, VolumeOutcome::Gone, (0, 0), "").await;
    user.wait_volume_gone(&volume).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_known_of_volumes_on_a_host_that_is_not_connected() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (_, root) = user.run_one(request(&image, "t3.nano")).await;
    let nowhere = user.create_volume(blank(1)).await.unwrap().volume_id;
    assert_eq!(user.wait_attachment(&root, A::Attached).await.status(), VolumeStatus::Ok);
    let watch = v1::WatchVolumesRequest { volume_ids: vec![root.clone()] };
    let mut watched = user.volumes.watch_volumes(watch).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().status(), VolumeStatus::Ok);
    drop(session);
    let shown = watched.message().await.unwrap().unwrap();
    assert_eq!((shown.status(), shown.state()), (VolumeStatus::InsufficientData, v1::VolumeState::InUse));
    assert!(shown.status_detail.contains(&agent.host_id), "{}", shown.status_detail);
    assert_eq!(user.volume(&nowhere).await.unwrap().status(), VolumeStatus::Ok);
    let _session = agent.connect(&cloud).await.unwrap();
    assert_eq!(watched.message().await.unwrap().unwrap().status(), VolumeStatus::Ok);
}
