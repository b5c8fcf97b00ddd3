//! Instances from launch to oblivion.

use std::time::Duration;

use hearth_proto::v1;
use tonic::Code;
use v1::InstanceState as S;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, config, reason, request};

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_lives_as_on_ec2() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(dir.path());
    settings.tombstone_ttl = Duration::from_secs(2);
    let cloud = Cloud::start_with(settings).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    user.keys.create_key_pair(v1::CreateKeyPairRequest { name: "me".into(), tags: vec![] }).await.unwrap();
    let request = v1::RunInstancesRequest {
        key_name: "me".into(),
        user_data: b"#!/bin/sh\n".to_vec().into(),
        tags: vec![v1::Tag { key: "Name".into(), value: "web".into() }],
        network_interface_count: 2,
        ..request(&image, "t3.micro")
    };
    let answer = user.run(request).await.unwrap();
    let launched = &answer.instances[0];
    let id = launched.instance_id.clone();
    assert_eq!(launched.state(), S::Pending);
    assert_eq!(launched.host_id, agent.host_id);
    assert_eq!(launched.network_interfaces.len(), 2);
    assert_eq!(launched.network_interfaces[0].private_ip_address, "172.30.0.4", "the first four are reserved");
    assert_eq!(launched.block_devices[0].serial.len(), 20);
    assert_eq!(user.get(&id).await.instance_id, id, "a caller reads its own write");

    let running = user.wait_state(&id, S::Running).await;
    let healthy = user.wait_for(&id, |i| i.instance_status() == v1::StatusCheck::Ok).await;
    assert_eq!(healthy.system_status(), v1::StatusCheck::Ok);
    assert_eq!(running.availability_zone, "local-1a");
    let told = agent.memory.lock().has[&id].desired.spec.clone().unwrap();
    assert!(told.public_key.starts_with("ssh-ed25519 "));
    let root = told.volumes[0].volume.clone().unwrap();
    let base = root.base.unwrap();
    assert_eq!((told.volumes.len(), root.size_bytes, base.size_bytes), (1, 1 << 30, 1 << 20));
    assert_eq!(base.key_domain.unwrap().secret.len(), 32, "the host needs it to read the chunks");
    assert_eq!(told.ecu_milli_quota, 500);
    assert_eq!(&told.user_data[..], b"#!/bin/sh\n");

    let before = agent.memory.lock().has[&id].report.boot_count;
    user.instances.reboot_instances(v1::RebootInstancesRequest { instance_ids: vec![id.clone()] }).await.unwrap();
    while agent.memory.lock().has[&id].report.boot_count == before {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let change = user.stop(&id).await.unwrap();
    assert_eq!((change.previous_state(), change.current_state()), (S::Running, S::Stopping));
    let stopped = user.wait_state(&id, S::Stopped).await;
    assert_eq!(stopped.state_reason.unwrap().code, "Client.UserInitiatedShutdown");
    assert!(stopped.state_transition_reason.starts_with("User initiated ("));
    assert_eq!(user.host(&agent.host_id).await.allocated.unwrap().vcpus, 0, "a stopped instance frees its room");
    assert_eq!(user.stop(&id).await.unwrap().current_state(), S::Stopped, "stopping twice is no error");

    assert_eq!(user.start(&id).await.unwrap().current_state(), S::Pending);
    let again = user.wait_state(&id, S::Running).await;
    assert_eq!(again.network_interfaces, running.network_interfaces, "addresses stay over a stop");
    assert!(again.state_reason.is_none());

    agent
        .observe(&session, &id, |report| {
            report.set_state(v1::ObservedState::Stopped);
            report.guest_powered_off = true;
        })
        .await;
    let off = user.wait_state(&id, S::Stopped).await;
    assert_eq!(off.state_reason.unwrap().code, "Client.InstanceInitiatedShutdown");

    let refused = user
        .instances
        .reboot_instances(v1::RebootInstancesRequest { instance_ids: vec![id.clone()] })
        .await
        .unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "IncorrectInstanceState"));
    assert!(refused.metadata().contains_key("x-hearth-request-id"));

    assert_eq!(user.terminate(&id).await.unwrap().current_state(), S::ShuttingDown);
    let gone = user.wait_state(&id, S::Terminated).await;
    assert!(gone.network_interfaces.is_empty());
    assert_eq!(user.terminate(&id).await.unwrap().current_state(), S::Terminated);
    assert_eq!(reason(&user.start(&id).await.unwrap_err()), "IncorrectInstanceState");
    assert!(agent.memory.lock().has.is_empty());
    let forgotten = tokio::time::timeout(crate::cloud::PATIENCE, async {
        while !user.list().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    forgotten.await.expect("a tombstone goes away");
    let error = user.instances.get_instance(v1::GetInstanceRequest { instance_id: id.clone() }).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidInstanceID.NotFound");
    cloud.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_behaviour_and_termination_protection_are_heeded() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let request = v1::RunInstancesRequest {
        instance_initiated_shutdown_behavior: "terminate".into(),
        disable_api_termination: true,
        ..request(&image, "t3.nano")
    };
    let id = user.run(request).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    assert_eq!(reason(&user.terminate(&id).await.unwrap_err()), "OperationNotPermitted");
    agent
        .observe(&session, &id, |report| {
            report.set_state(v1::ObservedState::Stopping);
            report.guest_powered_off = true;
        })
        .await;
    user.wait_state(&id, S::Terminated).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn launches_that_fail_end_as_terminated_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    agent.memory.lock().manners.refuse = Some("Client.InvalidImage".into());
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    let ended = user.wait_state(&id, S::Terminated).await;
    assert_eq!(ended.state_reason.unwrap().code, "Client.InvalidImage");
    assert_eq!(user.host(&agent.host_id).await.allocated.unwrap(), v1::Resources::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_token_makes_one_launch_of_many_calls() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let request = v1::RunInstancesRequest {
        client_token: "once".into(),
        min_count: 2,
        max_count: 2,
        ..request(&image, "t3.nano")
    };
    let calls = (0..20).map(|_| {
        let (mut user, request) = (user.clone(), request.clone());
        tokio::spawn(async move { user.run(request).await.unwrap() })
    });
    let mut answers = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        let answer = call.await.unwrap();
        answers.push((answer.reservation_id, answer.instances.into_iter().map(|i| i.instance_id).collect::<Vec<_>>()));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(user.list().await.len(), 2);
    let other = v1::RunInstancesRequest { max_count: 3, ..request };
    assert_eq!(reason(&user.run(other).await.unwrap_err()), "IdempotentParameterMismatch");
    let hosts = user.hosts.list_hosts(v1::ListHostsRequest::default()).await.unwrap().into_inner().hosts;
    assert_eq!(hosts[0].allocated.unwrap().vcpus, 2, "lost races leave nothing reserved");
}

#[tokio::test(flavor = "multi_thread")]
async fn consoles_reach_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    let output = user
        .instances
        .get_console_output(v1::GetConsoleOutputRequest { instance_id: id.clone() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(output.output, format!("console of {id}\n"));

    use v1::console_input::Message;
    let (input, messages) = tokio::sync::mpsc::channel(4);
    input.send(v1::ConsoleInput { message: Some(Message::InstanceId(id.clone())) }).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut console = user.instances.console(stream).await.unwrap().into_inner();
    let greeting = console.message().await.unwrap().unwrap();
    assert_eq!(greeting.data, format!("{id} login: "));
    input.send(v1::ConsoleInput { message: Some(Message::Data("root\n".into())) }).await.unwrap();
    assert_eq!(console.message().await.unwrap().unwrap().data, "ROOT\n");
    drop(input);
    assert!(console.message().await.unwrap().is_none(), "the console ends with its user");

    // A made-up relay is refused, and so is a real one that another host asks for: secrets work once and for one host.
    let (up, messages) = tokio::sync::mpsc::channel(4);
    up.send(v1::ConsoleRelayUp { session_id: "0".repeat(32), ..Default::default() }).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(messages);
    assert_eq!(agent.client(&cloud).await.console_relay(stream).await.unwrap_err().code(), Code::NotFound);

    drop(session);
    user.wait_host(&agent.host_id, |host| !host.connected).await;
    let error = user.instances.get_console_output(v1::GetConsoleOutputRequest { instance_id: id }).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
}
