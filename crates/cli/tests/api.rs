//! The built program against a control plane in this process: what it asks, prints and ends with.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

mod support;

use std::os::unix::fs::FileExt;

use hearth_proto::v1::{Image, ImageState, InstanceState, ModifyInstanceAttributeRequest, Progress, StateReason};
use support::{Bed, Watch, instance};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

fn refusal(code: Code, reason: &str, message: &str) -> Option<Status> {
    Some(Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, "hearth.v1", [])))
}

#[tokio::test]
async fn lists_gather_all_pages_in_every_form() {
    let bed = Bed::new().await;
    bed.state().instances = vec![
        instance(1, "web", InstanceState::Running),
        instance(2, "db", InstanceState::Stopped),
        instance(3, "old", InstanceState::Terminated),
    ];
    let said = bed.run(&["instance", "list"]).await;
    assert_eq!(said.code, 0, "{said:?}");
    let lines: Vec<_> = said.out.lines().collect();
    assert_eq!(lines.len(), 3, "{}", said.out);
    assert!(
        lines[0].starts_with("INSTANCE") && lines[1].contains("web") && lines[2].contains("stopped"),
        "{}",
        said.out
    );
    assert_eq!(bed.run(&["instance", "list", "--all", "-o", "id"]).await.out.lines().count(), 3);
    let json: serde_json::Value =
        serde_json::from_str(&bed.run(&["instance", "list", "-o", "json"]).await.out).unwrap();
    assert_eq!(json[2]["state"], "terminated");
    assert_eq!(json[0]["name"], "web");
    let yaml = bed.run(&["-o", "yaml", "instance", "list"]).await.out;
    assert!(yaml.contains("instance_id: i-00000000000000001"), "{yaml}");
}

#[tokio::test]
async fn filters_reach_the_server() {
    let bed = Bed::new().await;
    bed.run(&["instance", "list", "-f", "instance-type=t3.*,m5.large", "--tag", "env=test", "-o", "json"]).await;
    let asked = bed.state().listed[0].filters.clone();
    assert_eq!(asked[0].name, "instance-type");
    assert_eq!(asked[0].values, ["t3.*", "m5.large"]);
    assert_eq!((asked[1].name.as_str(), asked[1].values[0].as_str()), ("tag:env", "test"));
}

#[tokio::test]
async fn errors_have_stable_exit_codes_and_say_how_to_go_on() {
    let bed = Bed::new().await;
    let id = "i-0123456789abcdef0";
    for (code, reason, exit, hint) in [
        (Code::NotFound, "InvalidInstanceID.NotFound", 3, "hearth instance list"),
        (Code::FailedPrecondition, "IncorrectInstanceState", 4, "--wait"),
        (Code::InvalidArgument, "InvalidParameterValue", 2, ""),
        (Code::PermissionDenied, "UnauthorizedOperation", 1, "whoami"),
        (Code::Unavailable, "Unavailable", 1, "try again"),
    ] {
        bed.state().failure = refusal(code, reason, "the server's words");
        let said = bed.run(&["instance", "stop", id]).await;
        assert_eq!(said.code, exit, "{said:?}");
        assert!(said.err.starts_with(&format!("error: the server's words ({reason})")), "{}", said.err);
        assert!(said.err.contains(hint) && said.out.is_empty(), "{said:?}");
    }
    let said = bed.run(&["--token", "wrong", "instance", "stop", id]).await;
    assert!(said.code == 1 && said.err.contains("HEARTH_TOKEN"), "{said:?}");
}

#[tokio::test]
async fn a_control_plane_that_is_not_there_is_told_with_its_address() {
    let bed = Bed::new().await;
    let said = bed.run(&["--endpoint", "http://127.0.0.1:1", "instance", "list"]).await;
    assert_eq!(said.code, 1);
    assert!(said.err.contains("http://127.0.0.1:1") && said.err.contains("hearthd up"), "{}", said.err);
}

#[tokio::test]
async fn no_room_names_the_resource_and_ends_with_four() {
    let bed = Bed::new().await;
    bed.state().failure =
        refusal(Code::ResourceExhausted, "InsufficientInstanceCapacity", "no host has 8 GiB of memory free");
    let said = bed.run(&["instance", "run", "ami-0123456789abcdef0"]).await;
    assert_eq!(said.code, 4);
    assert!(
        said.err.contains("no host has 8 GiB of memory free") && said.err.contains("hearth host list"),
        "{}",
        said.err
    );
}

#[tokio::test]
async fn instances_are_named_by_id_beginning_or_name() {
    let bed = Bed::new().await;
    bed.state().instances = vec![
        instance(0x10, "web", InstanceState::Terminated),
        instance(0x11, "web", InstanceState::Running),
        instance(0x12, "twin", InstanceState::Running),
        instance(0x13, "twin", InstanceState::Stopped),
    ];
    let stop = async |what: &str| bed.run(&["instance", "stop", what, "-o", "id"]).await;
    assert_eq!(stop("i-00000000000000012").await.out, "i-00000000000000012\n");
    assert_eq!(stop("i-0000000000000001").await.code, 4);
    assert_eq!(stop("web").await.out, "i-00000000000000011\n");
    let said = stop("twin").await;
    assert_eq!(said.code, 4);
    assert!(said.err.contains("i-00000000000000012 (running, twin)"), "{}", said.err);
    let said = stop("nobody").await;
    assert_eq!(said.code, 3);
    assert!(said.err.contains("no instance has the name 'nobody'"), "{}", said.err);
}

#[tokio::test]
async fn a_launch_carries_what_was_asked_and_a_client_token() {
    let bed = Bed::new().await;
    bed.state().images = vec![Image {
        image_id: "ami-00000000000000abc".into(),
        name: "debian-12".into(),
        state: ImageState::Available.into(),
        ..Image::default()
    }];
    std::fs::write(bed.path("user-data"), "#cloud-config\n").unwrap();
    let user_data = bed.path("user-data");
    let line = "instance run debian-12 --type m5.large -c 2 --min-count 1 -n web --tag env=test --root-size 20G --spread -o id --user-data";
    let mut args: Vec<_> = line.split(' ').collect();
    args.push(user_data.to_str().unwrap());
    let said = bed.run(&args).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.out.lines().count(), 2);
    let asked = bed.state().launched[0].clone();
    assert_eq!((asked.image_id.as_str(), asked.instance_type.as_str()), ("ami-00000000000000abc", "m5.large"));
    assert_eq!((asked.min_count, asked.max_count), (1, 2));
    let root = asked.block_device_mappings[0].clone();
    assert_eq!((root.device_name.as_str(), root.ebs.unwrap().volume_size_bytes), ("/dev/sda1", 20 << 30));
    assert_eq!(asked.tags.len(), 2);
    assert_eq!(&asked.user_data[..], b"#cloud-config\n");
    assert_eq!(asked.placement.unwrap().strategy, 2);
    bed.run(&["instance", "run", "debian-12"]).await;
    let again = bed.state().launched[1].client_token.clone();
    assert!(asked.client_token.len() == 32 && again.len() == 32 && asked.client_token != again);
    std::fs::write(&user_data, vec![b'x'; (16 << 10) + 1]).unwrap();
    assert_eq!(bed.run(&args).await.code, 2);
}

#[tokio::test]
async fn only_the_attributes_that_are_named_are_modified() {
    let bed = Bed::new().await;
    bed.state().instances = vec![instance(0x11, "web", InstanceState::Stopped)];
    let modify = async |flags: &[&str]| bed.run(&[&["instance", "modify", "web", "-o", "id"], flags].concat()).await;
    assert_eq!(modify(&["--termination-protection", "off"]).await.out, "i-00000000000000011\n");
    std::fs::write(bed.path("empty"), "").unwrap();
    let file = bed.path("empty");
    let many = ["--termination-protection", "on", "--shutdown-behavior", "terminate", "--type", "m5.large"];
    let said = modify(&[&many[..], &["--user-data", file.to_str().unwrap()]].concat()).await;
    assert_eq!(said.code, 0, "{said:?}");
    let instance_id = "i-00000000000000011".to_owned();
    let first = ModifyInstanceAttributeRequest {
        instance_id: instance_id.clone(),
        disable_api_termination: Some(false),
        ..Default::default()
    };
    let second = ModifyInstanceAttributeRequest {
        instance_id,
        disable_api_termination: Some(true),
        instance_initiated_shutdown_behavior: Some("terminate".into()),
        instance_type: Some("m5.large".into()),
        user_data: Some(Vec::new().into()),
        delete_on_termination: Vec::new(),
    };
    assert_eq!(bed.state().modified, [first, second]);
    assert_eq!(modify(&[]).await.code, 2, "nothing to modify is a mistake");
    assert_eq!(modify(&["--termination-protection", "maybe"]).await.code, 2);
}

#[tokio::test]
async fn waiting_survives_a_restart_of_the_control_plane() {
    let bed = Bed::new().await;
    let mut pending = instance(900, "new", InstanceState::Pending);
    pending.progress = Some(Progress { done_bytes: 1, total_bytes: 2, step: "copying the image".into() });
    bed.state().watches.extend([
        Watch { instances: vec![pending], ends: true },
        Watch { instances: vec![], ends: true },
        Watch { instances: vec![instance(900, "new", InstanceState::Running)], ends: false },
    ]);
    let said = bed.run(&["instance", "run", "ami-00000000000000abc", "--wait", "-o", "id"]).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.out, "i-00000000000000384\n");
    assert!(said.err.contains("pending: copying the image") && said.err.contains("running"), "{}", said.err);
    assert!(bed.state().watches.is_empty());
}

#[tokio::test]
async fn waiting_ends_when_the_goal_is_missed_or_time_is_up() {
    let bed = Bed::new().await;
    let mut failed = instance(900, "new", InstanceState::Terminated);
    failed.state_reason = Some(StateReason { code: "Client.InvalidImage".into(), message: "no kernel inside".into() });
    bed.state().watches.push_back(Watch { instances: vec![failed], ends: false });
    let said = bed.run(&["instance", "run", "ami-00000000000000abc", "--wait", "-o", "id"]).await;
    assert_eq!(said.code, 1);
    assert!(said.err.contains("no kernel inside (Client.InvalidImage)"), "{}", said.err);
    assert_eq!(said.out, "i-00000000000000384\n");
    let stays = instance(0x384, "new", InstanceState::Stopping);
    bed.state().watches.push_back(Watch { instances: vec![stays], ends: false });
    let said = bed.run(&["instance", "stop", "i-00000000000000384", "--wait", "--timeout", "300ms"]).await;
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.err.contains("i-00000000000000384 is stopping"), "{}", said.err);
}

#[tokio::test]
async fn uploads_send_holes_and_zeros_as_numbers() {
    let bed = Bed::new().await;
    let path = bed.path("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(&[0; 4 << 20], 8 << 20).unwrap();
    file.write_all_at(&[7; 3 << 20], (20 << 20) + 5).unwrap();
    file.write_all_at(b"end", (64 << 20) - 3).unwrap();
    let said = bed.run(&["image", "import", path.to_str().unwrap(), "-o", "id", "--tag", "a=b"]).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.out, "ami-00000000000000007\n");
    let state = bed.state();
    assert!(state.upload == std::fs::read(&path).unwrap());
    assert!(state.upload_messages < 20, "{} messages", state.upload_messages);
    let header = state.upload_headers[0].clone();
    assert!(header.resumable);
    assert_eq!((header.name.as_str(), header.file_bytes, header.client_token.len()), ("disk", 64 << 20, 32));
}

#[tokio::test]
async fn what_is_no_image_is_not_uploaded() {
    let bed = Bed::new().await;
    let path = bed.path("disk.qcow2.gz");
    std::fs::write(&path, b"\x1f\x8b\x08\0").unwrap();
    let said = bed.run(&["image", "import", path.to_str().unwrap()]).await;
    assert_eq!(said.code, 1);
    assert!(said.err.contains("gzip archive"), "{}", said.err);
    assert_eq!(bed.state().upload_messages, 0);
}

#[tokio::test]
async fn the_console_works_between_pipes() {
    let bed = Bed::new().await;
    let id = "i-0123456789abcdef0";
    let said = bed.run_with_input(&["instance", "console", id], b"hello\n").await;
    assert_eq!((said.code, said.out.as_str()), (0, "login: HELLO\n"));
    let said =
        bed.run_with_input(&["instance", "console", id, "--until", "OK", "--timeout", "1min"], b"it is ok now").await;
    assert_eq!(said.code, 0);
    assert!(said.out.ends_with("IT IS OK"), "{}", said.out);
    let said = bed.run(&["instance", "console", id, "--until", "never", "--timeout", "300ms"]).await;
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.err.contains("without showing 'never'"), "{}", said.err);
    // Bytes that are no text come through as they are.
    let output = bed.command(&["instance", "console-output", id]).output().await.unwrap();
    assert_eq!(output.stdout, b"boot\xff\n");
}
