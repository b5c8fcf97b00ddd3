//! Modifications of volumes, from the call to what the host makes of them.

use hearth_proto::v1;
use v1::{AttachmentState as A, InstanceState as S};

use crate::agent::{FakeAgent, Session};
use crate::cloud::{Cloud, User, reason, request};
use crate::disks::{GIB, blank, until};

fn grow(volume: &str, gib: u64) -> v1::ModifyVolumeRequest {
    v1::ModifyVolumeRequest { volume_id: volume.into(), size_bytes: Some(gib * GIB), ..Default::default() }
}

fn become_type(volume: &str, kind: &str) -> v1::ModifyVolumeRequest {
    v1::ModifyVolumeRequest { volume_id: volume.into(), volume_type: Some(kind.into()), ..Default::default() }
}

async fn modify(user: &mut User, request: v1::ModifyVolumeRequest) -> v1::VolumeModification {
    user.volumes.modify_volume(request).await.unwrap().into_inner()
}

async fn wait_state(user: &mut User, volume: &str, state: &str) -> v1::VolumeModification {
    let is = |volume: &v1::Volume| volume.modification.as_ref().is_some_and(|m| m.modification_state == state);
    user.wait_volume(volume, state, is).await.modification.unwrap()
}

/// A guest with a root volume of 1 GiB, whose host says nothing by itself from here on.
async fn silent_guest(cloud: &Cloud) -> (FakeAgent, Session, User, String, String) {
    let (agent, session) = FakeAgent::connected(cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(request(&image, "t3.nano")).await;
    agent.memory.lock().manners.silent = true;
    (agent, session, user, id, root)
}

/// Waits until the host knows that the root volume is to have this size.
async fn told(agent: &FakeAgent, id: &str, gib: u64) {
    until("the host is told", || async {
        let spec = agent.memory.lock().has[id].desired.spec.clone().unwrap();
        spec.volumes.iter().any(|slot| slot.volume.as_ref().unwrap().size_bytes == gib * GIB).then_some(())
    })
    .await;
}

/// What the host says of the root volume.
async fn say(agent: &FakeAgent, session: &Session, id: &str, gib: u64, error: &str) {
    agent.memory.lock().manners.silent = false;
    let change = |report: &mut v1::InstanceReport| {
        report.volumes[0].size_bytes = gib * GIB;
        report.volumes[0].error = error.into();
    };
    agent.observe(session, id, change).await;
    agent.memory.lock().manners.silent = true;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_under_its_guest() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, root) = user.run_one(crate::cloud::request(&image, "t3.nano")).await;
    let request = |size: Option<u64>, kind: Option<&str>, iops: Option<u32>| v1::ModifyVolumeRequest {
        volume_id: root.clone(),
        size_bytes: size.map(|gib| gib * GIB),
        volume_type: kind.map(Into::into),
        iops,
        throughput_mibps: None,
    };
    for (wish, expected) in [
        (request(None, None, None), "MissingParameter"),
        (request(Some(0), None, None), "InvalidParameterValue"),
        (request(None, Some("st1"), None), "InvalidParameterValue"),
        (request(None, None, Some(1)), "InvalidParameterValue"),
    ] {
        assert_eq!(reason(&user.volumes.modify_volume(wish).await.unwrap_err()), expected);
    }
    agent.memory.lock().manners.silent = true;
    let change = user.volumes.modify_volume(request(Some(20), None, Some(4000))).await.unwrap().into_inner();
    assert_eq!((change.modification_state.as_str(), change.progress), ("modifying", 0));
    assert_eq!((change.original_size_bytes, change.target_size_bytes, change.target_iops), (GIB, 20 * GIB, 4000));
    let early = user.volumes.modify_volume(request(Some(30), None, None)).await.unwrap_err();
    assert_eq!(reason(&early), "IncorrectModificationState");
    until("the host is told the limits", || async {
        let told = agent.memory.lock().has[&id].desired.spec.clone().unwrap().volumes.remove(0).volume.unwrap();
        ((told.size_bytes, told.iops, told.throughput_mibps) == (20 * GIB, 4000, 125)).then_some(())
    })
    .await;
    agent.memory.lock().manners.silent = false;
    agent.observe(&session, &id, |report| report.volumes[0].size_bytes = 20 * GIB).await;
    let done = |volume: &v1::Volume| volume.modification.as_ref().is_some_and(|m| m.modification_state == "completed");
    let grown = user.wait_volume(&root, "grown", done).await;
    assert_eq!((grown.size_bytes, grown.iops, grown.throughput_mibps), (20 * GIB, 4000, 125));
    assert_eq!(user.get(&id).await.block_devices[0].size_bytes, 20 * GIB);
    let other = user.volumes.modify_volume(request(None, Some("gp2"), None)).await.unwrap().into_inner();
    assert_eq!((other.original_iops, other.target_iops, other.target_throughput_mibps), (4000, 3000, 128));
    let list = v1::ListVolumeModificationsRequest::default();
    let listed = user.volumes.list_volume_modifications(list).await.unwrap().into_inner().modifications;
    assert_eq!(listed.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_goes_through_the_states_that_its_host_reports() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session, mut user, id, root) = silent_guest(&cloud).await;
    let change = modify(&mut user, v1::ModifyVolumeRequest { iops: Some(4000), ..grow(&root, 20) }).await;
    assert_eq!((change.modification_state.as_str(), change.progress, change.end_time.as_str()), ("modifying", 0, ""));
    told(&agent, &id, 20).await;
    say(&agent, &session, &id, 1, "").await;
    let is_told = |volume: &v1::Volume| volume.modification.as_ref().is_some_and(|m| m.progress == 33);
    let known = user.wait_volume(&root, "known to its host", is_told).await.modification.unwrap();
    assert_eq!(known.modification_state, "modifying");
    assert_eq!(reason(&user.volumes.modify_volume(grow(&root, 30)).await.unwrap_err()), "IncorrectModificationState");
    say(&agent, &session, &id, 20, "the speed cannot be changed").await;
    let optimizing = wait_state(&mut user, &root, "optimizing").await;
    assert_eq!((optimizing.status_message.as_str(), optimizing.progress), ("the speed cannot be changed", 66));
    assert_eq!(optimizing.end_time, "");
    say(&agent, &session, &id, 20, "").await;
    let done = wait_state(&mut user, &root, "completed").await;
    assert_eq!((done.progress, done.status_message.as_str()), (100, ""));
    assert_eq!(done.start_time, change.start_time);
    assert!(!done.end_time.is_empty());
    // What the host says later changes nothing of it.
    say(&agent, &session, &id, 20, "something else").await;
    user.wait_volume(&root, "impaired", |volume| volume.status_detail == "something else").await;
    assert_eq!(user.volume(&root).await.unwrap().modification.unwrap(), done);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_the_host_cannot_make_has_failed_until_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session, mut user, id, root) = silent_guest(&cloud).await;
    modify(&mut user, grow(&root, 20)).await;
    told(&agent, &id, 20).await;
    say(&agent, &session, &id, 1, "no space left").await;
    let failed = wait_state(&mut user, &root, "failed").await;
    assert_eq!((failed.status_message.as_str(), failed.progress), ("no space left", 0));
    assert!(!failed.end_time.is_empty());
    // A failure is no reason to wait with the next one.
    modify(&mut user, grow(&root, 30)).await;
    told(&agent, &id, 30).await;
    say(&agent, &session, &id, 1, "still no space left").await;
    wait_state(&mut user, &root, "failed").await;
    say(&agent, &session, &id, 30, "").await;
    let done = wait_state(&mut user, &root, "completed").await;
    assert_eq!((done.original_size_bytes, done.target_size_bytes), (20 * GIB, 30 * GIB));
    assert_eq!(done.status_message, "");
    // Of a change of speed alone nothing is left to be used.
    modify(&mut user, v1::ModifyVolumeRequest { iops: Some(5000), ..grow(&root, 30) }).await;
    until("the host is told", || async {
        let spec = agent.memory.lock().has[&id].desired.spec.clone().unwrap();
        (spec.volumes[0].volume.as_ref().unwrap().iops == 5000).then_some(())
    })
    .await;
    say(&agent, &session, &id, 30, "no such thing").await;
    wait_state(&mut user, &root, "failed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_growth_that_is_over_stays_over_wherever_the_volume_goes() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session, mut user, id, _) = silent_guest(&cloud).await;
    agent.memory.lock().manners.silent = false;
    // Where no guest has it, it is over at once.
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    let done = modify(&mut user, grow(&volume, 2)).await;
    assert_eq!((done.modification_state.as_str(), done.progress), ("completed", 100));
    assert!(!done.end_time.is_empty());
    agent.memory.lock().manners.silent = true;
    user.attach(&volume, &id).await.unwrap();
    let attaching = user.volume(&volume).await.unwrap();
    assert_eq!(attaching.attachments[0].state(), A::Attaching);
    assert_eq!(attaching.modification.unwrap(), done, "attaching it begins nothing anew");
    // A growth that its guest never saw is over when it leaves the guest.
    agent.memory.lock().manners.silent = false;
    let other = user.create_volume(blank(1)).await.unwrap().volume_id;
    user.attach(&other, &id).await.unwrap();
    user.wait_attachment(&other, A::Attached).await;
    agent.memory.lock().manners.silent = true;
    assert_eq!(modify(&mut user, grow(&other, 2)).await.modification_state, "modifying");
    agent.memory.lock().manners.silent = false;
    user.stop(&id).await.unwrap();
    user.wait_state(&id, S::Stopped).await;
    let over = wait_state(&mut user, &other, "completed").await;
    user.detach(&other, false).await.unwrap();
    user.start(&id).await.unwrap();
    user.wait_state(&id, S::Running).await;
    agent.memory.lock().manners.silent = true;
    user.attach(&other, &id).await.unwrap();
    assert_eq!(user.volume(&other).await.unwrap().modification.unwrap(), over);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_type_begins_with_its_own_iops() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let volume = user.create_volume(blank(100)).await.unwrap().volume_id;
    let small = user.create_volume(blank(8)).await.unwrap().volume_id;
    for (kind, iops) in [("io1", 3000), ("gp2", 3000), ("io2", 3000), ("io1", 3000), ("gp3", 3000), ("standard", 200)] {
        let change = modify(&mut user, become_type(&volume, kind)).await;
        assert_eq!((change.target_volume_type.as_str(), change.target_iops), (kind, iops));
    }
    // 50 for each GiB.
    assert_eq!(modify(&mut user, become_type(&small, "io1")).await.target_iops, 400);
    let wish = v1::ModifyVolumeRequest { iops: Some(5000), ..become_type(&small, "io2") };
    assert_eq!(modify(&mut user, wish).await.target_iops, 5000);
    // What was provisioned is kept with the type only.
    assert_eq!(modify(&mut user, grow(&small, 9)).await.target_iops, 5000);
    assert_eq!(modify(&mut user, become_type(&small, "io1")).await.target_iops, 450);
}
