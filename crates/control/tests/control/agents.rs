//! Hosts that come, go, reboot, lose things and lie.

use hearth_proto::v1;
use tonic::Code;
use v1::agent_message::Message as Up;
use v1::{InstanceState as S, ObservedState};

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, config, reason, request};

async fn launch(user: &mut crate::cloud::User, image: &v1::Image) -> String {
    let id = user.run(request(image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_host_is_told_and_its_instances_start_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (a, session_a) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let id = launch(&mut user, &image).await;
    let (b, _session_b) = FakeAgent::connected(&cloud, "host-b").await;
    drop(session_a);
    user.wait_host(&a.host_id, |host| !host.connected).await;
    let lost = user.wait_for(&id, |i| i.system_status() == v1::StatusCheck::Impaired).await;
    assert_eq!((lost.state(), lost.instance_status()), (S::Running, v1::StatusCheck::InsufficientData));
    assert_eq!(lost.host_id, a.host_id);
    // Nothing new goes there.
    let pinned = v1::RunInstancesRequest {
        placement: Some(v1::Placement { host_id: a.host_id.clone(), ..Default::default() }),
        ..request(&image, "t3.nano")
    };
    let error = user.run(pinned).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::ResourceExhausted, "InsufficientInstanceCapacity"));
    assert!(error.message().contains("down"), "{}", error.message());
    // A terminate is acknowledged and waits for the host.
    let other = launch(&mut user, &image).await;
    assert_eq!(user.get(&other).await.host_id, b.host_id);
    user.terminate(&id).await.unwrap();
    assert_eq!(user.get(&id).await.state(), S::ShuttingDown);
    assert!(!b.memory.lock().ever_ran.contains(&id), "started twice");
    // It comes back, with another kernel: the instance is still its own to end.
    let mut rebooted = a.clone();
    rebooted.hello.boot_id = "another boot".into();
    let _session = rebooted.connect(&cloud).await.unwrap();
    user.wait_state(&id, S::Terminated).await;
    let host = user.wait_host(&a.host_id, |host| host.connected).await;
    assert_eq!(host.boot_id, "another boot");
    assert!(!b.memory.lock().ever_ran.contains(&id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_off_for_good_can_be_given_up_by_its_operator() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (a, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let id = launch(&mut user, &image).await;
    let remove = |force| v1::RemoveHostRequest { host: a.host_id.clone(), force };
    let error = user.hosts.remove_host(remove(false)).await.unwrap_err();
    assert_eq!(reason(&error), "DependencyViolation");
    assert!(error.message().contains(&id));
    assert_eq!(reason(&user.hosts.remove_host(remove(true)).await.unwrap_err()), "IncorrectHostState");
    drop(session);
    user.wait_host(&a.host_id, |host| !host.connected).await;
    user.hosts.remove_host(remove(true)).await.unwrap();
    let gone = user.wait_state(&id, S::Terminated).await;
    assert_eq!(gone.state_reason.unwrap().code, "Server.HostFailure");
    assert_eq!(a.connect(&cloud).await.err().unwrap().code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_session_wins_and_older_leaders_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, first) = FakeAgent::connected(&cloud, "host-a").await;
    let second = agent.connect(&cloud).await.unwrap();
    assert_eq!(first.ended().await.code(), Code::Unavailable);
    let mut user = cloud.user().await;
    assert!(user.host(&agent.host_id).await.connected);
    drop(second);
    agent.memory.lock().highest_term = u64::MAX;
    let error = agent.connect(&cloud).await.err().unwrap();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::FailedPrecondition, "OutdatedLeader"));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_disks_unknown_instances_and_leftovers_are_sorted_out() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let lost = launch(&mut user, &image).await;
    let left = launch(&mut user, &image).await;
    let kept = agent.memory.lock().has[&left].clone();
    user.terminate(&left).await.unwrap();
    user.wait_state(&left, S::Terminated).await;
    drop(session);
    user.wait_host(&agent.host_id, |host| !host.connected).await;
    // A backup of the host's state is put back: `lost` is missing, `left` is there again, and somebody's instance too.
    let stranger = "i-0123456789abcdef0".to_owned();
    {
        let mut memory = agent.memory.lock();
        memory.has.remove(&lost);
        memory.has.insert(left.clone(), kept.clone());
        let mut foreign = kept.clone();
        foreign.report.instance_id = stranger.clone();
        memory.has.insert(stranger.clone(), foreign);
    }
    let _session = agent.connect(&cloud).await.unwrap();
    let again = user
        .wait_for(&lost, |i| i.system_status() == v1::StatusCheck::Ok && agent.memory.lock().has.contains_key(&lost))
        .await;
    assert_eq!(again.state(), S::Running);
    let told = tokio::time::timeout(crate::cloud::PATIENCE, async {
        while agent.memory.lock().has.contains_key(&left) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    });
    told.await.expect("a terminated instance that is still there is terminated again");
    assert_eq!(user.get(&left).await.state(), S::Terminated);
    assert!(agent.memory.lock().has.contains_key(&stranger), "what nobody knows is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_launch_goes_to_another_host_and_never_to_both() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (a, _session_a) = FakeAgent::connected(&cloud, "host-a").await;
    a.memory.lock().manners.refuse = Some("Server.InsufficientInstanceCapacity".into());
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    // Nowhere else to go.
    let alone = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    let ended = user.wait_state(&alone, S::Terminated).await;
    assert_eq!(ended.state_reason.unwrap().code, "Server.InsufficientInstanceCapacity");

    a.memory.lock().manners.slow = true;
    a.memory.lock().manners.refuse = None;
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    assert_eq!(user.get(&id).await.host_id, a.host_id);
    let (b, _session_b) = FakeAgent::connected(&cloud, "host-b").await;
    a.memory.lock().manners.refuse = Some("Server.InsufficientInstanceCapacity".into());
    a.observe(&_session_a, &id, |report| {
        report.set_state(ObservedState::Failed);
        report.reason =
            Some(v1::StateReason { code: "Server.InsufficientInstanceCapacity".into(), message: "full".into() });
    })
    .await;
    let running = user.wait_state(&id, S::Running).await;
    assert_eq!(running.host_id, b.host_id);
    let gone = tokio::time::timeout(crate::cloud::PATIENCE, async {
        while a.memory.lock().has.contains_key(&id) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    });
    gone.await.expect("the first host forgets it");
    assert!(!a.memory.lock().ever_ran.contains(&id));
    assert_eq!(user.host(&a.host_id).await.allocated.unwrap(), v1::Resources::default());
    assert_eq!(user.host(&b.host_id).await.allocated.unwrap().vcpus, 1);
    // A late word from the first host changes nothing.
    let late = v1::InstanceReport {
        instance_id: id.clone(),
        sequence: 1_000_000,
        observed_generation: 1_000_000,
        state: ObservedState::Gone.into(),
        ..Default::default()
    };
    _session_a.send(Up::Report(late)).await;
    user.terminate(&alone).await.unwrap();
    assert_eq!(user.get(&id).await.state(), S::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_hosts_are_cut_off_and_greetings_checked() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(dir.path());
    settings.session_timeout = std::time::Duration::from_secs(1);
    let cloud = Cloud::start_with(settings).await;
    let agent = FakeAgent::join(&cloud, "host-a").await;
    let mut client = agent.client(&cloud).await;
    let (up, messages) = tokio::sync::mpsc::channel(4);
    up.send(v1::AgentMessage { message: Some(Up::Hello(agent.hello.clone())) }).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut down = client.session(stream).await.unwrap().into_inner();
    let ended = tokio::time::timeout(crate::cloud::PATIENCE, async {
        loop {
            match down.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(status) => {
                    assert_eq!(status.code(), Code::Unavailable);
                    return;
                }
            }
        }
    });
    ended.await.expect("silence ends a session");
    let hello = agent.hello.clone();
    let no_hello = Up::Heartbeat(v1::Heartbeat { sequence: 1 });
    let bad = [
        no_hello,
        Up::Hello(v1::AgentHello { instance_cidr: "10.0.0.0/33".into(), ..hello.clone() }),
        Up::Hello(v1::AgentHello { boot_id: String::new(), ..hello.clone() }),
        Up::Hello(v1::AgentHello { capacity: None, ..hello.clone() }),
        Up::Hello(v1::AgentHello { availability_zone: "z".repeat(300), ..hello }),
    ];
    for message in bad {
        let stream = tokio_stream::iter([v1::AgentMessage { message: Some(message) }]);
        assert_eq!(client.session(stream).await.unwrap_err().code(), Code::InvalidArgument);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_connected_hosts_get_time_and_dead_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(dir.path());
    settings.host_timeout = std::time::Duration::from_secs(1);
    let cloud = Cloud::start_with(settings.clone()).await;
    let (dead, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    drop(session);
    user.wait_host(&dead.host_id, |host| !host.connected).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let (_alive, session) = FakeAgent::connected(&cloud, "host-b").await;
    cloud.stop().await.unwrap();
    drop(session);
    settings.host_timeout = std::time::Duration::from_secs(3600);
    // With an hour's patience only what the store says decides.
    let cloud = Cloud::start_with(settings.clone()).await;
    let mut user = cloud.user().await;
    let answer = user.run(request(&image, "t3.nano")).await.unwrap();
    let first = answer.instances[0].clone();
    assert_eq!(first.state(), S::Pending);
    cloud.stop().await.unwrap();
    settings.host_timeout = std::time::Duration::from_millis(1);
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    let cloud = Cloud::start_with(settings).await;
    let mut user = cloud.user().await;
    let error = user.run(request(&image, "t3.nano")).await.unwrap_err();
    assert!(error.message().contains("down"), "{}", error.message());
    assert_eq!(user.get(&first.instance_id).await.state(), S::Pending, "what was acknowledged stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_supersedes_its_earlier_life_and_not_the_other_way_round() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(dir.path());
    // A wait for the old session to fall silent would outlast every test.
    settings.session_timeout = std::time::Duration::from_secs(3600);
    let cloud = Cloud::start_with(settings).await;
    let (agent, old) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    // The old connection stays open, as one does whose host has lost its power.
    let new = agent.connect(&cloud).await.unwrap();
    assert_eq!(old.ended().await.code(), Code::Unavailable);
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;

    // A hello of the life before, late.
    agent.memory.lock().epoch = 0;
    let error = agent.connect(&cloud).await.err().unwrap();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::FailedPrecondition, "OutdatedAgent"));
    assert!(user.host("host-a").await.connected);
    user.stop(&id).await.unwrap();
    user.wait_state(&id, S::Stopped).await;

    // Where the later life is gone, an agent with an older copy of its state is let in, as before.
    drop(new);
    user.wait_host("host-a", |host| !host.connected).await;
    agent.memory.lock().epoch = 0;
    let _back = agent.connect(&cloud).await.unwrap();
    user.wait_host("host-a", |host| host.connected).await;

    // Of many sessions that begin at once, one is left, and it works.
    let connects = (0..16).map(|_| async { agent.connect(&cloud).await });
    let sessions: Vec<_> = futures::future::join_all(connects).await.into_iter().flatten().collect();
    assert!(!sessions.is_empty());
    user.start(&id).await.unwrap();
    user.wait_state(&id, S::Running).await;
}
