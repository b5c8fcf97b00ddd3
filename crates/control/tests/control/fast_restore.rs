//! Fast snapshot restore.

use hearth_proto::v1;
use v1::FastSnapshotRestoreState as F;

use crate::agent::{FakeAgent, Session};
use crate::cloud::{Cloud, User, reason};
use crate::disks::{blank, until};

fn snapshots(agent: &FakeAgent) -> Vec<String> {
    agent.memory.lock().fills.iter().map(|base| base.snapshot_id.clone()).collect()
}

async fn wait_wanted(agent: &FakeAgent, wanted: &[&str]) {
    until("the host is told what it is to have", || async { (snapshots(agent) == wanted).then_some(()) }).await;
}

async fn say(session: &Session, snapshot: &str, present: u64, error: &str) {
    let report =
        v1::FillReport { snapshot_id: snapshot.into(), present_chunks: present, total_chunks: 8, error: error.into() };
    let message = v1::agent_message::Message::Fill(report);
    session.up.send(v1::AgentMessage { message: Some(message) }).await.unwrap();
}

async fn enable(user: &mut User, snapshot: &str, hosts: &[&str], zones: &[&str]) -> Result<(), tonic::Status> {
    let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let request = v1::EnableFastSnapshotRestoresRequest {
        snapshot_ids: vec![snapshot.into()],
        hosts: own(hosts),
        availability_zones: own(zones),
    };
    user.snapshots.enable_fast_snapshot_restores(request).await.map(|_| ())
}

async fn list(user: &User) -> Vec<v1::FastSnapshotRestore> {
    let request = v1::ListFastSnapshotRestoresRequest::default();
    user.clone().snapshots.list_fast_snapshot_restores(request).await.unwrap().into_inner().fast_snapshot_restores
}

async fn wait_seen(user: &User, host: &str, state: F, progress: u32) -> v1::FastSnapshotRestore {
    until(state.as_str_name(), || async {
        let found = list(user).await.into_iter().find(|one| one.host_name == host)?;
        ((found.state(), found.progress) == (state, progress)).then_some(found)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_told_what_to_fetch_and_their_progress_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (one, session) = FakeAgent::connected(&cloud, "host-a").await;
    let (other, _other_session) = FakeAgent::connected(&cloud, "host-b").await;
    let mut user = cloud.user().await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    let id = user.snapshot(&volume).await.unwrap().snapshot_id;

    assert_eq!(reason(&enable(&mut user, &id, &[], &[]).await.unwrap_err()), "MissingParameter");
    assert_eq!(reason(&enable(&mut user, &id, &["host-x"], &[]).await.unwrap_err()), "InvalidHostID.NotFound");
    assert_eq!(reason(&enable(&mut user, &id, &[], &["moon-1a"]).await.unwrap_err()), "InvalidZone.NotFound");
    let unknown = "snap-0123456789abcdef0";
    assert_eq!(reason(&enable(&mut user, unknown, &["host-a"], &[]).await.unwrap_err()), "InvalidSnapshot.NotFound");

    enable(&mut user, &id, &["host-a"], &[]).await.unwrap();
    enable(&mut user, &id, &["host-a"], &[]).await.unwrap();
    wait_wanted(&one, &[&id]).await;
    assert!(!one.memory.lock().fills[0].key_domain.as_ref().unwrap().secret.is_empty());
    assert_eq!(list(&user).await.len(), 1);
    wait_seen(&user, "host-a", F::Enabling, 0).await;
    say(&session, &id, 2, "").await;
    wait_seen(&user, "host-a", F::Optimizing, 25).await;
    say(&session, &id, 3, "no connection").await;
    assert_eq!(wait_seen(&user, "host-a", F::Optimizing, 37).await.reason, "no connection");
    say(&session, &id, 8, "").await;
    wait_seen(&user, "host-a", F::Enabled, 100).await;
    assert_eq!(snapshots(&other), Vec::<String>::new());

    // The whole zone, which is the same host and another one.
    let zone = list(&user).await[0].availability_zone.clone();
    enable(&mut user, &id, &[], &[&zone]).await.unwrap();
    wait_wanted(&other, &[&id]).await;
    assert_eq!(list(&user).await.len(), 2);

    // A host that is gone has nothing for sure; when it comes back it is told again.
    drop(session);
    wait_seen(&user, "host-a", F::Enabling, 0).await;
    one.memory.lock().fills.clear();
    let session = one.connect(&cloud).await.unwrap();
    wait_wanted(&one, &[&id]).await;
    say(&session, &id, 8, "").await;
    wait_seen(&user, "host-a", F::Enabled, 100).await;

    let not_there = v1::DisableFastSnapshotRestoresRequest {
        snapshot_ids: vec![id.clone()],
        availability_zones: vec![zone],
        ..Default::default()
    };
    user.snapshots.disable_fast_snapshot_restores(not_there).await.unwrap();
    wait_wanted(&other, &[]).await;
    assert_eq!(snapshots(&one), std::slice::from_ref(&id));
    user.delete_snapshot(&id).await.unwrap();
    assert_eq!(list(&user).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn fast_restore_is_for_few_snapshots_of_an_account() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    let mut ids = Vec::new();
    for _ in 0..6 {
        ids.push(user.snapshot(&volume).await.unwrap().snapshot_id);
    }
    for id in &ids[..5] {
        enable(&mut user, id, &["host-a"], &[]).await.unwrap();
    }
    let error = enable(&mut user, &ids[5], &["host-a"], &[]).await.unwrap_err();
    assert_eq!(reason(&error), "FastSnapshotRestoreLimitExceeded");
    let first = v1::DisableFastSnapshotRestoresRequest { snapshot_ids: vec![ids[0].clone()], ..Default::default() };
    user.snapshots.disable_fast_snapshot_restores(first).await.unwrap();
    enable(&mut user, &ids[5], &["host-a"], &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_that_are_no_operators_name_zones_and_see_no_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (one, session) = FakeAgent::connected(&cloud, "host-a").await;
    let (_other, other_session) = FakeAgent::connected(&cloud, "host-b").await;
    let mut operator = cloud.user().await;
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = operator.accounts.create_account(create).await.unwrap().into_inner().token;
    let mut team = cloud.user_with(&token).await;
    let volume = team.create_volume(blank(1)).await.unwrap().volume_id;
    let id = team.snapshot(&volume).await.unwrap().snapshot_id;

    // Whether there is such a host or not.
    for host in ["host-a", &one.host_id, "host-x"] {
        assert_eq!(reason(&enable(&mut team, &id, &[host], &[]).await.unwrap_err()), "UnauthorizedOperation");
        let off = v1::DisableFastSnapshotRestoresRequest {
            snapshot_ids: vec![id.clone()],
            hosts: vec![host.into()],
            ..Default::default()
        };
        let error = team.snapshots.disable_fast_snapshot_restores(off).await.unwrap_err();
        assert_eq!(reason(&error), "UnauthorizedOperation");
    }
    let request = v1::EnableFastSnapshotRestoresRequest {
        snapshot_ids: vec![id.clone()],
        availability_zones: vec!["local-1a".into()],
        ..Default::default()
    };
    let made = team.snapshots.enable_fast_snapshot_restores(request).await.unwrap().into_inner();
    let zone = async |state: F, progress: u32, enabled: u32| {
        let team = team.clone();
        let found = until(state.as_str_name(), || async {
            let found = list(&team).await;
            assert_eq!(found.len(), 1, "one zone");
            let fits = (found[0].state(), found[0].progress, found[0].enabled_hosts) == (state, progress, enabled);
            fits.then(|| found[0].clone())
        })
        .await;
        assert_eq!((found.availability_zone.as_str(), found.hosts), ("local-1a", 2));
        assert_eq!((found.host_id.as_str(), found.host_name.as_str()), ("", ""));
        found
    };
    assert_eq!(made.fast_snapshot_restores, [zone(F::Enabling, 0, 0).await]);
    wait_wanted(&one, &[&id]).await;
    say(&session, &id, 8, "").await;
    zone(F::Optimizing, 50, 1).await;
    say(&other_session, &id, 4, "/var/lib/hearth of host-b is full").await;
    let waiting = zone(F::Optimizing, 75, 1).await;
    assert!(!waiting.reason.is_empty() && !waiting.reason.contains("host-b"), "{}", waiting.reason);
    say(&other_session, &id, 8, "").await;
    assert_eq!(zone(F::Enabled, 100, 2).await.reason, "");
}
