//! Volumes that a volume backend keeps.

use hearth_proto::v1;
use tonic::Code;
use v1::{AttachmentState as A, VolumeState as V, VolumeWish as W};

use crate::agent::{FakeAgent, Session};
use crate::cloud::{Cloud, reason, request};
use crate::disks::{GIB, blank, until};

async fn host(cloud: &Cloud, name: &str, backends: &[&str]) -> (FakeAgent, Session) {
    let mut agent = FakeAgent::join(cloud, name).await;
    agent.hello.volume_backends = backends.iter().map(|name| (*name).to_owned()).collect();
    let session = agent.connect(cloud).await.unwrap();
    (agent, session)
}

fn at(backend: &str) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest { backend: backend.into(), ..blank(1) }
}

/// What a host was told of volumes, in order.
fn wishes(agent: &FakeAgent) -> Vec<(String, W)> {
    let memory = agent.memory.lock();
    let id = |wish: &v1::DesiredVolume| wish.volume.as_ref().unwrap().volume_id.clone();
    memory.wishes.iter().map(|wish| (id(wish), wish.wish())).collect()
}

fn on(host: &FakeAgent, image: &v1::Image) -> v1::RunInstancesRequest {
    let placement = v1::Placement { host_id: host.host_id.clone(), ..Default::default() };
    v1::RunInstancesRequest { placement: Some(placement), ..request(image, "t3.nano") }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backends_volume_goes_to_every_host_that_has_the_backend_and_to_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (a, session_a) = host(&cloud, "host-a", &["ceph", "san"]).await;
    let (b, session_b) = host(&cloud, "host-b", &["ceph"]).await;
    let (c, _session_c) = host(&cloud, "host-c", &[]).await;
    let mut sessions = [Some(session_a), Some(session_b)];
    let mut user = cloud.user().await;
    assert_eq!(user.host("host-a").await.volume_backends, ["ceph", "san"]);

    let error = user.create_volume(at("tape")).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidParameterValue");
    assert!(error.message().contains("ceph, local, san"), "{}", error.message());
    let encrypted = v1::CreateVolumeRequest { encrypted: true, ..at("ceph") };
    assert_eq!(reason(&user.create_volume(encrypted).await.unwrap_err()), "UnsupportedOperation");

    a.memory.lock().manners.keep_volumes = true;
    b.memory.lock().manners.keep_volumes = true;
    let made = user.create_volume(at("ceph")).await.unwrap();
    let volume = made.volume_id.clone();
    assert_eq!((made.state(), made.backend.as_str(), made.host_id.as_str()), (V::Creating, "ceph", ""));
    assert_eq!(reason(&user.delete_volume(&volume).await.unwrap_err()), "IncorrectState");
    // The host that is asked to make it goes away; another one is asked.
    let agents = [a.clone(), b.clone()];
    let told = || agents.iter().position(|agent| wishes(agent).contains(&(volume.clone(), W::Created)));
    let asked = until("a host is asked", || std::future::ready(told())).await;
    let other = &agents[1 - asked];
    other.memory.lock().manners.keep_volumes = false;
    drop(sessions[asked].take());
    user.wait_available(&volume).await;
    assert_eq!(wishes(other), [(volume.clone(), W::Created)]);
    agents[asked].memory.lock().manners.keep_volumes = false;
    sessions[asked] = Some(agents[asked].connect(&cloud).await.unwrap());

    let request = v1::ListVolumesRequest {
        filters: vec![v1::Filter { name: "backend".into(), values: vec!["ceph".into()] }],
        ..Default::default()
    };
    let found = user.volumes.list_volumes(request).await.unwrap().into_inner().volumes;
    assert_eq!(found.iter().map(|found| found.volume_id.as_str()).collect::<Vec<_>>(), [volume.as_str()]);

    let image = user.import("debian").await;
    let (at_a, _) = user.run_one(on(&a, &image)).await;
    let (at_b, _) = user.run_one(on(&b, &image)).await;
    let (at_c, _) = user.run_one(on(&c, &image)).await;
    let error = user.attach(&volume, &at_c).await.unwrap_err();
    assert_eq!(reason(&error), "UnsupportedOperation");
    assert!(error.message().contains("'ceph'"), "{}", error.message());

    let mut generations = Vec::new();
    for (agent, instance) in [(&a, &at_a), (&b, &at_b), (&a, &at_a)] {
        user.attach(&volume, instance).await.unwrap();
        user.wait_attachment(&volume, A::Attached).await;
        let told = {
            let memory = agent.memory.lock();
            let spec = memory.has[instance].desired.spec.clone().unwrap();
            spec.volumes.into_iter().filter_map(|slot| slot.volume).find(|told| told.volume_id == volume).unwrap()
        };
        assert_eq!(told.backend, "ceph");
        generations.push(told.attach_generation);
        assert_eq!(user.volume(&volume).await.unwrap().host_id, "", "its data is on no host");
        if generations.len() < 3 {
            user.detach(&volume, false).await.unwrap();
            user.wait_available(&volume).await;
        }
    }
    assert!(generations.is_sorted_by(|earlier, later| earlier < later), "{generations:?}");

    // What only volumes on hosts' disks can.
    assert_eq!(reason(&user.snapshot(&volume).await.unwrap_err()), "UnsupportedOperation");
    let grow = v1::ModifyVolumeRequest { volume_id: volume.clone(), size_bytes: Some(2 * GIB), ..Default::default() };
    user.volumes.modify_volume(grow).await.unwrap();
    user.wait_volume(&volume, "grown", |volume| {
        volume.modification.as_ref().is_some_and(|change| change.modification_state == "completed")
    })
    .await;

    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;
    user.delete_volume(&volume).await.unwrap();
    user.wait_volume_gone(&volume).await;
    let deleted = [&a, &b].into_iter().flat_map(wishes).filter(|(_, wish)| *wish == W::Deleted);
    assert_eq!(deleted.count(), 1);
    assert!(wishes(&c).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_outlives_its_host_and_is_deleted_by_another() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (a, session) = host(&cloud, "host-a", &["ceph"]).await;
    let mut user = cloud.user().await;
    let volume = user.create_volume(at("ceph")).await.unwrap().volume_id;
    user.wait_available(&volume).await;
    let image = user.import("debian").await;
    let (instance, _) = user.run_one(on(&a, &image)).await;
    user.attach(&volume, &instance).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;

    let (b, _session_b) = host(&cloud, "host-b", &["ceph"]).await;
    drop(session);
    user.wait_host("host-a", |host| !host.connected).await;
    let remove = v1::RemoveHostRequest { host: "host-a".into(), force: true };
    user.hosts.remove_host(remove).await.unwrap();
    let left = user.wait_available(&volume).await;
    assert_eq!(left.state_reason, None, "nothing is lost");
    let (instance, _) = user.run_one(on(&b, &image)).await;
    user.attach(&volume, &instance).await.unwrap();
    user.wait_attachment(&volume, A::Attached).await;
    user.detach(&volume, false).await.unwrap();
    user.wait_available(&volume).await;
    user.delete_volume(&volume).await.unwrap();
    user.wait_volume_gone(&volume).await;
    assert_eq!(wishes(&b), [(volume, W::Deleted)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_made_says_why_and_can_be_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = host(&cloud, "host-a", &["ceph"]).await;
    let mut user = cloud.user().await;
    agent.memory.lock().manners.refuse_volumes = Some("pool is full".into());
    let volume = user.create_volume(at("ceph")).await.unwrap().volume_id;
    let failed = user.wait_volume(&volume, "in error", |volume| volume.state() == V::Error).await;
    assert_eq!(failed.state_reason.unwrap().message, "pool is full");
    user.delete_volume(&volume).await.unwrap();
    user.wait_volume_gone(&volume).await;
    assert_eq!(wishes(&agent), [(volume.clone(), W::Created), (volume, W::Deleted)]);

    drop(session);
    user.wait_host("host-a", |host| !host.connected).await;
    let error = until("the host counts as down", || {
        let mut user = user.clone();
        async move { user.create_volume(at("ceph")).await.err().filter(|error| error.code() == Code::Unavailable) }
    });
    let error = error.await;
    assert!(error.message().contains("'ceph'"), "{}", error.message());
}
