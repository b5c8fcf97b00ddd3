//! ModifyInstanceAttribute.

use hearth_proto::v1;
use tonic::{Code, Status};
use v1::InstanceState as S;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, User, reason, request};

impl User {
    async fn modify(&mut self, request: v1::ModifyInstanceAttributeRequest) -> Result<v1::Instance, Status> {
        Ok(self.instances.modify_instance_attribute(request).await?.into_inner())
    }
}

fn of(id: &str) -> v1::ModifyInstanceAttributeRequest {
    v1::ModifyInstanceAttributeRequest { instance_id: id.to_owned(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn protection_is_lifted_and_the_shutdown_behaviour_changed_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let launch = v1::RunInstancesRequest { disable_api_termination: true, ..request(&image, "t3.nano") };
    let id = user.run(launch.clone()).await.unwrap().instances[0].instance_id.clone();
    let other = user.run(launch).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    user.wait_state(&other, S::Running).await;
    assert_eq!(reason(&user.terminate(&id).await.unwrap_err()), "OperationNotPermitted");
    let generation = agent.memory.lock().has[&id].desired.generation;

    let both = v1::ModifyInstanceAttributeRequest {
        disable_api_termination: Some(false),
        instance_initiated_shutdown_behavior: Some("terminate".into()),
        ..of(&id)
    };
    let changed = user.modify(both.clone()).await.unwrap();
    assert_eq!(
        (changed.disable_api_termination, changed.instance_initiated_shutdown_behavior.as_str(), changed.state()),
        (false, "terminate", S::Running)
    );
    assert_eq!(user.modify(both).await.unwrap(), user.get(&id).await, "the same again changes nothing");
    assert!(user.get(&other).await.disable_api_termination, "nobody else's attribute changed");
    user.terminate(&id).await.unwrap();
    user.wait_state(&id, S::Terminated).await;
    assert_eq!(reason(&user.modify(of_behaviour(&id, "stop")).await.unwrap_err()), "IncorrectInstanceState");

    // Set again, it protects again; and what a power-off does is decided by what stands at that time.
    user.modify(of_behaviour(&other, "terminate")).await.unwrap();
    assert_eq!(reason(&user.terminate(&other).await.unwrap_err()), "OperationNotPermitted");
    assert_eq!(agent.memory.lock().has[&other].desired.generation, generation, "the host has nothing to do with it");
    agent
        .observe(&session, &other, |report| {
            report.set_state(v1::ObservedState::Stopping);
            report.guest_powered_off = true;
        })
        .await;
    user.wait_state(&other, S::Terminated).await;
}

fn of_behaviour(id: &str, behavior: &str) -> v1::ModifyInstanceAttributeRequest {
    v1::ModifyInstanceAttributeRequest { instance_initiated_shutdown_behavior: Some(behavior.into()), ..of(id) }
}

fn of_type(id: &str, kind: &str) -> v1::ModifyInstanceAttributeRequest {
    v1::ModifyInstanceAttributeRequest { instance_type: Some(kind.into()), ..of(id) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_instance_changes_its_type_and_is_admitted_with_the_new_size() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut agent = FakeAgent::join(&cloud, "host-a").await;
    agent.hello.capacity =
        Some(v1::Resources { vcpus: 4, memory_mib: 8192 + 1024, ecu_milli: 64000, instance_store_bytes: 1 << 40 });
    let _session = agent.connect(&cloud).await.unwrap();
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    let running = user.wait_state(&id, S::Running).await;

    let data = v1::ModifyInstanceAttributeRequest { user_data: Some("new".into()), ..of(&id) };
    for request in [of_type(&id, "m5d.large"), data.clone()] {
        let error = user.modify(request).await.unwrap_err();
        assert_eq!((error.code(), reason(&error).as_str()), (Code::FailedPrecondition, "IncorrectInstanceState"));
        assert!(error.message().contains("while it is stopped"), "{}", error.message());
    }
    // All or none: a change that is allowed does not slip through beside one that is not.
    let mixed = v1::ModifyInstanceAttributeRequest { disable_api_termination: Some(true), ..data.clone() };
    user.modify(mixed).await.unwrap_err();
    assert_eq!(user.get(&id).await, running);

    user.stop(&id).await.unwrap();
    user.wait_state(&id, S::Stopped).await;
    let wide = v1::ModifyInstanceAttributeRequest { user_data: data.user_data, ..of_type(&id, "m5d.large") };
    let changed = user.modify(wide).await.unwrap();
    assert_eq!((changed.instance_type.as_str(), changed.state()), ("m5d.large", S::Stopped));
    assert_eq!(changed.block_devices.len(), 1, "instance-store disks are those that the launch has mapped");
    assert_eq!(user.host(&agent.host_id).await.allocated.unwrap().memory_mib, 0, "stopped instances take no room");
    user.start(&id).await.unwrap();
    user.wait_state(&id, S::Running).await;
    let told = agent.memory.lock().has[&id].desired.spec.clone().unwrap();
    assert_eq!((told.instance_type.as_str(), &told.user_data[..]), ("m5d.large", &b"new"[..]));
    assert_eq!((told.resources.unwrap().memory_mib, told.instance_store.len()), (8192, 0));
    assert_eq!(user.host(&agent.host_id).await.allocated.unwrap().memory_mib, 8192);

    // Two more fit beside each other, but not with the large one running.
    let second = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&second, S::Running).await;
    user.stop(&second).await.unwrap();
    user.wait_state(&second, S::Stopped).await;
    user.modify(of_type(&second, "m5d.large")).await.unwrap();
    let error = user.start(&second).await.unwrap_err();
    assert_eq!(reason(&error), "InsufficientInstanceCapacity");
    assert_eq!(user.get(&second).await.state(), S::Stopped);
    user.modify(of_type(&second, "t3.nano")).await.unwrap();
    user.start(&second).await.unwrap();
    user.wait_state(&second, S::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn senseless_modifications_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let launch = v1::RunInstancesRequest { network_interface_count: 3, ..request(&image, "t3.small") };
    let id = user.run(launch).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    user.stop(&id).await.unwrap();
    let stopped = user.wait_state(&id, S::Stopped).await;
    let huge = v1::ModifyInstanceAttributeRequest { user_data: Some(vec![b'x'; (16 << 10) + 1].into()), ..of(&id) };
    for (request, wanted, said) in [
        (of(&id), "MissingParameter", "attribute"),
        (of_behaviour(&id, ""), "InvalidParameterValue", "'stop' or 'terminate'"),
        (of_behaviour(&id, "reboot"), "InvalidParameterValue", "reboot"),
        (of_type(&id, "z9.mega"), "InvalidInstanceType", "z9.mega"),
        (of_type(&id, "t3.nano"), "InvalidParameterValue", "at most 2 network interfaces, the instance has 3"),
        (huge, "InvalidParameterValue", "at most 16384"),
        (of_type("i-00000000000000000", "t3.nano"), "InvalidInstanceID.NotFound", "does not exist"),
        (of_type("nonsense", "t3.nano"), "InvalidInstanceID.Malformed", "nonsense"),
    ] {
        let error = user.modify(request).await.unwrap_err();
        assert_eq!(reason(&error), wanted, "{error}");
        assert!(error.message().contains(said), "{}", error.message());
    }
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = user.accounts.create_account(create).await.unwrap().into_inner().token;
    let mut stranger = cloud.user_with(&token).await;
    let error = stranger.modify(of_behaviour(&id, "terminate")).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidInstanceID.NotFound");
    assert_eq!(user.get(&id).await, stopped);
}
