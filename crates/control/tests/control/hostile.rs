//! Requests that nobody should send.

use hearth_proto::v1;
use proptest::prelude::*;
use prost::Message;
use tokio::io::AsyncWriteExt;
use tonic::Code;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, reason, request};

fn root(volume_size_bytes: u64) -> v1::BlockDeviceMapping {
    let ebs = v1::EbsBlockDevice { volume_size_bytes, ..Default::default() };
    v1::BlockDeviceMapping { device_name: "/dev/sda1".into(), ebs: Some(ebs), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_and_senseless_launches_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let good = request(&image, "t3.nano");
    type R = v1::RunInstancesRequest;
    let tags = |count: usize, length: usize| {
        (0..count).map(|n| v1::Tag { key: format!("{n}"), value: "ä".repeat(length) }).collect::<Vec<_>>()
    };
    let cases: [(R, &str); 17] = [
        (R { image_id: String::new(), ..good.clone() }, "MissingParameter"),
        (R { image_id: "ami-1".into(), ..good.clone() }, "InvalidAMIID.Malformed"),
        (R { image_id: "ami-0123456789abcdef0".into(), ..good.clone() }, "InvalidAMIID.NotFound"),
        (R { instance_type: String::new(), ..good.clone() }, "MissingParameter"),
        (R { instance_type: "z9.huge".into(), ..good.clone() }, "InvalidInstanceType"),
        (R { min_count: 2, max_count: 1, ..good.clone() }, "InvalidParameterValue"),
        (R { min_count: u32::MAX, max_count: u32::MAX, ..good.clone() }, "InvalidParameterValue"),
        (R { user_data: vec![0; 16 * 1024 + 1].into(), ..good.clone() }, "InvalidParameterValue"),
        (R { client_token: "x".repeat(65), ..good.clone() }, "InvalidParameterValue"),
        (R { client_token: "a b".into(), ..good.clone() }, "InvalidParameterValue"),
        (R { tags: tags(51, 1), ..good.clone() }, "InvalidParameterValue"),
        (R { tags: tags(1, 257), ..good.clone() }, "InvalidParameterValue"),
        (R { network_interface_count: 99, ..good.clone() }, "InvalidParameterValue"),
        (R { block_device_mappings: vec![root(512)], ..good.clone() }, "InvalidBlockDeviceMapping"),
        (R { block_device_mappings: vec![root(u64::MAX)], ..good.clone() }, "InvalidBlockDeviceMapping"),
        (R { instance_initiated_shutdown_behavior: "explode".into(), ..good.clone() }, "InvalidParameterValue"),
        (R { key_name: "nobody".into(), ..good.clone() }, "InvalidKeyPair.NotFound"),
    ];
    for (request, expected) in cases {
        let error = user.run(request.clone()).await.unwrap_err();
        assert_eq!(reason(&error), expected, "{}: {}", expected, error.message());
    }
    // As much as one call may carry, and more than one transaction can.
    let heavy =
        R { min_count: 40, max_count: 40, user_data: vec![7; 16 * 1024].into(), tags: tags(50, 256), ..good.clone() };
    assert_eq!(reason(&user.run(heavy).await.unwrap_err()), "InvalidParameterValue");
    let dry = R { dry_run: true, ..good.clone() };
    assert_eq!(reason(&user.run(dry).await.unwrap_err()), "DryRunOperation");
    assert!(user.list().await.is_empty());
    let hosts = user.hosts.list_hosts(v1::ListHostsRequest::default()).await.unwrap().into_inner().hosts;
    assert_eq!(hosts[0].allocated.unwrap(), v1::Resources::default(), "refused calls leave nothing reserved");

    let monster = R { user_data: vec![0; 5 << 20].into(), ..good };
    let error = user.run(monster).await.unwrap_err();
    assert!(matches!(error.code(), Code::OutOfRange | Code::ResourceExhausted), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0u8; 4096], &[0x16, 3, 1, 0xff, 0xff], b""] {
        let mut stream = tokio::net::TcpStream::connect(cloud.address).await.unwrap();
        let _ = stream.write_all(garbage).await;
    }
    user.accounts.get_caller_identity(v1::GetCallerIdentityRequest {}).await.unwrap();
    let mut health = tonic_health_check(&cloud).await;
    assert!(health.remove(0));
}

/// Health and reflection need no token.
async fn tonic_health_check(cloud: &Cloud) -> Vec<bool> {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let mut client = HealthClient::new(cloud.channel().await);
    let mut answers = Vec::new();
    for service in ["", "hearth.v1.InstanceService"] {
        let answer = client.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        answers.push(answer.status == 1);
    }
    answers
}

macro_rules! decode_all {
    ($bytes:expr, $($name:ident),* $(,)?) => { $( let _ = v1::$name::decode($bytes); )* };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// What arrives is decoded before anything is known about its sender.
    #[test]
    fn random_bytes_decode_or_fail_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let bytes = &bytes[..];
        decode_all!(
            bytes, RunInstancesRequest, ListInstancesRequest, GetInstanceRequest, StartInstancesRequest, StopInstancesRequest,
            RebootInstancesRequest, TerminateInstancesRequest, WatchInstancesRequest, GetConsoleOutputRequest, ConsoleInput,
            ListInstanceTypesRequest, ImportImageRequest, ListImagesRequest, GetImageRequest, DeregisterImageRequest,
            ListHostsRequest, GetHostRequest, DrainHostRequest, ActivateHostRequest, RemoveHostRequest, CreateJoinTokenRequest,
            GetCallerIdentityRequest, CreateAccountRequest, ListAccountsRequest, CreateKeyPairRequest, ImportKeyPairRequest,
            ListKeyPairsRequest, DeleteKeyPairRequest, CreateTagsRequest, DeleteTagsRequest, ListTagsRequest, EnrollRequest,
            RenewCertificateRequest, AgentMessage, CreateVolumeRequest, AttachVolumeRequest,
            ModifyVolumeRequest, ListVolumesRequest, CreateSnapshotsRequest, RegisterImageRequest, CreateImageRequest,
            DesiredHost, ConsoleRelayUp,
        );
    }
}

/// Bytes that are almost messages, sent to every unary method over the wire: each gets an answer or an error, and the service
/// lives on.
#[tokio::test(flavor = "multi_thread")]
async fn mutilated_messages_over_the_wire_get_errors() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let model = v1::RunInstancesRequest {
        tags: vec![v1::Tag { key: "k".into(), value: "v".into() }],
        placement: Some(v1::Placement { spread_group: "g".into(), ..Default::default() }),
        client_token: "token".into(),
        dry_run: true,
        ..request(&image, "t3.nano")
    };
    let bytes = model.encode_to_vec();
    // A short run by default, minutes with `HEARTH_FUZZ_SECONDS=n`.
    let seconds = std::env::var("HEARTH_FUZZ_SECONDS").ok().map(|text| text.parse().expect("a number of seconds"));
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds.unwrap_or(0));
    let mut rounds = 0u64;
    while rounds < 300 || std::time::Instant::now() < end {
        rounds += 1;
        let mut damaged = bytes.clone();
        for _ in 0..=random() % 4 {
            let at = (random() % damaged.len() as u64) as usize;
            damaged[at] ^= 1 << (random() % 8);
        }
        damaged.truncate((random() % (damaged.len() as u64 + 1)) as usize);
        if let Ok(request) = v1::RunInstancesRequest::decode(&damaged[..]) {
            let request = v1::RunInstancesRequest { dry_run: true, ..request };
            user.run(request).await.unwrap_err();
        }
        if let Ok(request) = v1::ListInstancesRequest::decode(&damaged[..]) {
            let _ = user.instances.list_instances(request).await;
        }
        if let Ok(request) = v1::CreateTagsRequest::decode(&damaged[..]) {
            let _ = user.tags.create_tags(request).await;
        }
    }
    user.accounts.get_caller_identity(v1::GetCallerIdentityRequest {}).await.unwrap();
    println!("{rounds} rounds");
}
