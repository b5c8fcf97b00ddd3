//! Three hosts: packing, spreading, draining, running out of things.

use std::collections::BTreeMap;

use hearth_proto::v1;
use v1::InstanceState as S;

use crate::agent::{FakeAgent, Session};
use crate::cloud::{Cloud, User, config, reason, request};

async fn three(cloud: &Cloud) -> (Vec<FakeAgent>, Vec<Session>) {
    let mut agents = Vec::new();
    let mut sessions = Vec::new();
    for name in ["host-a", "host-b", "host-c"] {
        let (agent, session) = FakeAgent::connected(cloud, name).await;
        agents.push(agent);
        sessions.push(session);
    }
    (agents, sessions)
}

fn wish(placement: v1::Placement, count: u32, image: &v1::Image) -> v1::RunInstancesRequest {
    v1::RunInstancesRequest {
        placement: Some(placement),
        min_count: count,
        max_count: count,
        ..request(image, "t3.nano")
    }
}

fn per_host(answer: &v1::RunInstancesResponse) -> BTreeMap<String, usize> {
    let mut hosts = BTreeMap::new();
    answer.instances.iter().for_each(|instance| *hosts.entry(instance.host_id.clone()).or_default() += 1);
    hosts
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_shows_the_room_that_the_scheduler_uses() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut agent = FakeAgent::join(&cloud, "host-a").await;
    agent.hello.capacity =
        Some(v1::Resources { vcpus: 2, memory_mib: 32768, ecu_milli: 64000, instance_store_bytes: 0 });
    agent.hello.vcpu_overcommit_percent = 350;
    let _session = agent.connect(&cloud).await.unwrap();
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    user.run(wish(v1::Placement::default(), 7, &image)).await.unwrap();
    let host = user.host("host-a").await;
    assert_eq!((host.capacity.unwrap().vcpus, host.vcpu_overcommit_percent), (2, 350));
    let (allocatable, allocated) = (host.allocatable.unwrap(), host.allocated.unwrap());
    assert_eq!((allocatable.vcpus, allocated.vcpus), (7, 7), "two threads, three and a half vCPUs each");
    assert_eq!((allocatable.memory_mib, allocated.memory_mib), (32768, 7 * 512));
    let error = user.run(wish(v1::Placement::default(), 1, &image)).await.unwrap_err();
    assert_eq!(reason(&error), "InsufficientInstanceCapacity");
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_pack_and_spread_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agents, _sessions) = three(&cloud).await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let packed = user.run(wish(v1::Placement::default(), 6, &image)).await.unwrap();
    assert_eq!(per_host(&packed).len(), 1, "packing is the default");
    let spread = v1::Placement { strategy: v1::PlacementStrategy::Spread.into(), ..Default::default() };
    let answer = user.run(wish(spread, 8, &image)).await.unwrap();
    let counts = per_host(&answer);
    assert!(counts.len() >= 2, "{counts:?}");
    let group = v1::Placement { spread_group: "quorum".into(), ..Default::default() };
    let quorum = user.run(wish(group.clone(), 3, &image)).await.unwrap();
    assert_eq!(per_host(&quorum).len(), 3);
    let error = user.run(wish(group.clone(), 1, &image)).await.unwrap_err();
    assert_eq!(reason(&error), "InsufficientInstanceCapacity");
    assert!(error.message().contains("placement group"), "{}", error.message());
    // A stopped member keeps its place; a terminated one gives it back.
    let member = quorum.instances[0].instance_id.clone();
    user.wait_state(&member, S::Running).await;
    user.stop(&member).await.unwrap();
    user.wait_state(&member, S::Stopped).await;
    assert!(user.run(wish(group.clone(), 1, &image)).await.is_err());
    user.terminate(&member).await.unwrap();
    user.wait_state(&member, S::Terminated).await;
    let next = user.run(wish(group, 1, &image)).await.unwrap();
    assert_eq!(next.instances[0].host_id, quorum.instances[0].host_id);
    let here = v1::Placement { host_id: agents[2].host_id.clone(), ..Default::default() };
    assert_eq!(user.run(wish(here, 1, &image)).await.unwrap().instances[0].host_id, agents[2].host_id);
    let nowhere = v1::Placement { availability_zone: "local-1z".into(), ..Default::default() };
    assert_eq!(reason(&user.run(wish(nowhere, 1, &image)).await.unwrap_err()), "InsufficientInstanceCapacity");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_host_keeps_what_it_has_and_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agents, _sessions) = three(&cloud).await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let on = |agent: &FakeAgent| v1::Placement { host_id: agent.host_id.clone(), ..Default::default() };
    let id = user.run(wish(on(&agents[0]), 1, &image)).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    let drained = user.hosts.drain_host(v1::DrainHostRequest { host: "host-a".into() }).await.unwrap().into_inner();
    assert_eq!((drained.state(), drained.instance_count), (v1::HostState::Draining, 1));
    assert!(user.run(wish(on(&agents[0]), 1, &image)).await.is_err());
    let elsewhere = user.run(wish(v1::Placement::default(), 5, &image)).await.unwrap();
    assert!(!per_host(&elsewhere).contains_key(&agents[0].host_id));
    assert_eq!(user.get(&id).await.state(), S::Running);
    user.stop(&id).await.unwrap();
    user.wait_state(&id, S::Stopped).await;
    let error = user.start(&id).await.unwrap_err();
    assert_eq!(reason(&error), "InsufficientInstanceCapacity");
    user.hosts.activate_host(v1::ActivateHostRequest { host: "host-a".into() }).await.unwrap();
    user.start(&id).await.unwrap();
    user.wait_state(&id, S::Running).await;
}

async fn fill(user: &mut User, image: &v1::Image, kind: &str) -> Vec<String> {
    let mut ids = Vec::new();
    loop {
        match user.run(request(image, kind)).await {
            Ok(answer) => ids.push(answer.instances[0].instance_id.clone()),
            Err(error) => {
                assert_eq!(reason(&error), "InsufficientInstanceCapacity");
                assert!(error.message().contains("short"), "{}", error.message());
                return ids;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_hosts_say_what_is_short_and_a_start_needs_room_again() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    // 32 GiB of memory: three m5.large of 8 GiB leave room for the fourth.
    let first = user.run(request(&image, "m5.large")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&first, S::Running).await;
    let rest = fill(&mut user, &image, "m5.large").await;
    assert_eq!(rest.len(), 3);
    // All or nothing below the minimum, as many as there is room for up to the maximum.
    user.terminate(&rest[0]).await.unwrap();
    user.wait_state(&rest[0], S::Terminated).await;
    let two = v1::RunInstancesRequest { min_count: 2, max_count: 2, ..request(&image, "m5.large") };
    assert_eq!(reason(&user.run(two).await.unwrap_err()), "InsufficientInstanceCapacity");
    let up_to = v1::RunInstancesRequest { min_count: 1, max_count: 5, ..request(&image, "m5.large") };
    assert_eq!(user.run(up_to).await.unwrap().instances.len(), 1);
    user.stop(&first).await.unwrap();
    user.wait_state(&first, S::Stopped).await;
    assert_eq!(fill(&mut user, &image, "m5.large").await.len(), 1);
    let error = user.start(&first).await.unwrap_err();
    assert_eq!(reason(&error), "InsufficientInstanceCapacity");
    assert!(error.message().contains("memory"), "{}", error.message());
    assert_eq!(user.get(&first).await.state(), S::Stopped);
    let host = user.host(&agent.host_id).await;
    assert_eq!(host.allocated.unwrap().memory_mib, host.capacity.unwrap().memory_mib);
    assert_eq!(host.instance_count, 5, "four and a stopped one");
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_and_instances_are_limited() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(dir.path());
    settings.max_instances_per_account = 5;
    let cloud = Cloud::start_with(settings).await;
    let mut agent = FakeAgent::join(&cloud, "host-a").await;
    // Eight addresses, five of them reserved.
    agent.hello.instance_cidr = "10.1.2.0/29".into();
    let _session = agent.connect(&cloud).await.unwrap();
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let three = v1::RunInstancesRequest { min_count: 3, max_count: 3, ..request(&image, "h1.nano") };
    let kinds = user.types.list_instance_types(v1::ListInstanceTypesRequest::default()).await.unwrap().into_inner();
    let three = match kinds.instance_types.iter().any(|kind| kind.name == "h1.nano") {
        true => three,
        false => v1::RunInstancesRequest { instance_type: "t3.nano".into(), ..three },
    };
    let answer = user.run(three.clone()).await.unwrap();
    let mut addresses: Vec<_> =
        answer.instances.iter().map(|i| i.network_interfaces[0].private_ip_address.clone()).collect();
    addresses.sort();
    assert_eq!(addresses, ["10.1.2.4", "10.1.2.5", "10.1.2.6"]);
    let one = v1::RunInstancesRequest { min_count: 1, max_count: 1, ..three.clone() };
    assert_eq!(reason(&user.run(one.clone()).await.unwrap_err()), "InsufficientFreeAddressesInSubnet");
    let id = answer.instances[1].instance_id.clone();
    user.terminate(&id).await.unwrap();
    user.wait_state(&id, S::Terminated).await;
    let again = user.run(one.clone()).await.unwrap();
    assert_eq!(again.instances[0].network_interfaces[0].private_ip_address, "10.1.2.5");
    // Another host has the same network: addresses are per host.
    let mut other = FakeAgent::join(&cloud, "host-b").await;
    other.hello.instance_cidr = "10.1.2.0/29".into();
    let _other = other.connect(&cloud).await.unwrap();
    let error = user.run(three).await.unwrap_err();
    assert_eq!(reason(&error), "InstanceLimitExceeded");
    assert_eq!(user.run(one).await.unwrap().instances[0].host_id, other.host_id);
}
