//! Lists: filters, pages, tags, key pairs, instance types.

use std::collections::BTreeSet;

use hearth_proto::v1;
use tonic::Code;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, reason, request};

fn filter(name: &str, values: &[&str]) -> v1::Filter {
    v1::Filter { name: name.into(), values: values.iter().map(|v| (*v).to_owned()).collect() }
}

fn tag(key: &str, value: &str) -> v1::Tag {
    v1::Tag { key: key.into(), value: value.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_and_tags_find_instances() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let mut ids = Vec::new();
    for name in ["web-1", "web-2", "db-1"] {
        let request = v1::RunInstancesRequest { tags: vec![tag("Name", name)], ..request(&image, "t3.nano") };
        let id = user.run(request).await.unwrap().instances[0].instance_id.clone();
        user.wait_state(&id, v1::InstanceState::Running).await;
        ids.push(id);
    }
    let create = v1::CreateTagsRequest { resource_ids: ids[1..].to_vec(), tags: vec![tag("env", "prod")] };
    user.tags.create_tags(create).await.unwrap();
    user.stop(&ids[0]).await.unwrap();
    user.wait_state(&ids[0], v1::InstanceState::Stopped).await;
    let cases: [(Vec<v1::Filter>, &[usize]); 10] = [
        (vec![filter("tag:Name", &["web-*"])], &[0, 1]),
        (vec![filter("tag:Name", &["web-?"]), filter("instance-state-name", &["running"])], &[1]),
        (vec![filter("instance-state-code", &["80", "48"])], &[0]),
        (vec![filter("tag-key", &["env"])], &[1, 2]),
        (vec![filter("tag:env", &["prod"]), filter("tag-value", &["db-1"])], &[2]),
        (vec![filter("image-id", &[&image.image_id])], &[0, 1, 2]),
        (vec![filter("private-ip-address", &["172.30.0.5"])], &[1]),
        (vec![filter("instance-type", &["m5.*"])], &[]),
        (vec![filter("system-status.status", &["ok"])], &[1, 2]),
        (vec![filter("tag:Name", &["web\\-1"])], &[0]),
    ];
    for (filters, expected) in cases {
        let request = v1::ListInstancesRequest { filters: filters.clone(), ..Default::default() };
        let found = user.instances.list_instances(request).await.unwrap().into_inner().instances;
        let found: BTreeSet<_> = found.into_iter().map(|i| i.instance_id).collect();
        let expected: BTreeSet<_> = expected.iter().map(|n| ids[*n].clone()).collect();
        assert_eq!(found, expected, "{filters:?}");
    }
    let request = v1::ListInstancesRequest { filters: vec![filter("colour", &["red"])], ..Default::default() };
    let error = user.instances.list_instances(request).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::InvalidArgument, "InvalidParameterValue"));
    assert!(error.message().contains("'colour'") && error.message().contains("instance-state-name"));

    let all = user.tags.list_tags(v1::ListTagsRequest::default()).await.unwrap().into_inner().tags;
    assert_eq!(all.len(), 5);
    let some = v1::ListTagsRequest { filters: vec![filter("key", &["e?v"])], ..Default::default() };
    assert_eq!(user.tags.list_tags(some).await.unwrap().into_inner().tags.len(), 2);
    let delete = v1::DeleteTagsRequest {
        resource_ids: ids.clone(),
        tags: vec![v1::TagToDelete { key: "Name".into(), value: Some("db-1".into()) }],
    };
    user.tags.delete_tags(delete).await.unwrap();
    assert_eq!(user.tags.list_tags(v1::ListTagsRequest::default()).await.unwrap().into_inner().tags.len(), 4);
    let many = (0..50).map(|n| tag(&format!("k{n}"), "")).collect();
    let too_many = v1::CreateTagsRequest { resource_ids: vec![ids[0].clone()], tags: many };
    assert_eq!(user.tags.create_tags(too_many).await.unwrap_err().code(), Code::InvalidArgument);
    let unknown = v1::CreateTagsRequest {
        resource_ids: vec![ids[0].clone(), "sg-0123456789abcdef0".into()],
        tags: vec![tag("a", "b")],
    };
    assert_eq!(reason(&user.tags.create_tags(unknown).await.unwrap_err()), "InvalidID");
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_hold_every_instance_once() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let ten = v1::RunInstancesRequest { min_count: 10, max_count: 10, ..request(&image, "t3.nano") };
    let stable: BTreeSet<String> = user.run(ten).await.unwrap().instances.into_iter().map(|i| i.instance_id).collect();
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let page = v1::PageRequest { max_results: 3, next_token: token };
        let request = v1::ListInstancesRequest { page: Some(page), ..Default::default() };
        let answer = user.instances.list_instances(request).await.unwrap().into_inner();
        assert!(answer.instances.len() <= 3);
        seen.extend(answer.instances.into_iter().map(|i| i.instance_id));
        user.run(crate::cloud::request(&image, "t3.nano")).await.unwrap();
        token = answer.page.unwrap().next_token;
        if token.is_empty() {
            break;
        }
        let other = v1::ListInstancesRequest {
            filters: vec![filter("image-id", &["*"])],
            page: Some(v1::PageRequest { max_results: 3, next_token: token.clone() }),
            ..Default::default()
        };
        assert_eq!(reason(&user.instances.list_instances(other).await.unwrap_err()), "InvalidNextToken");
    }
    let unique: BTreeSet<String> = seen.iter().cloned().collect();
    assert_eq!(unique.len(), seen.len());
    assert!(unique.is_superset(&stable));
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_checked_and_all_unknown_ones_named() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let get = |id: &str| v1::GetInstanceRequest { instance_id: id.into() };
    for (id, expected) in [
        ("", "InvalidInstanceID.Malformed"),
        ("i-1", "InvalidInstanceID.Malformed"),
        ("../../etc", "InvalidInstanceID.Malformed"),
        ("i-0123456789abcdef0", "InvalidInstanceID.NotFound"),
    ] {
        assert_eq!(reason(&user.instances.get_instance(get(id)).await.unwrap_err()), expected);
    }
    let ids = vec!["i-0123456789abcdef0".to_owned(), "i-0123456789abcdef1".to_owned()];
    let list = v1::ListInstancesRequest { instance_ids: ids, ..Default::default() };
    let error = user.instances.list_instances(list).await.unwrap_err();
    assert!(error.message().contains("def0") && error.message().contains("def1"));
    let many = (0..101).map(|n| format!("i-{n:017x}")).collect();
    let list = v1::ListInstancesRequest { instance_ids: many, ..Default::default() };
    assert_eq!(user.instances.list_instances(list).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(reason(&user.terminate("i-0123456789abcdef0").await.unwrap_err()), "InvalidInstanceID.NotFound");
    let none = v1::StopInstancesRequest::default();
    assert_eq!(reason(&user.instances.stop_instances(none).await.unwrap_err()), "MissingParameter");
}

#[tokio::test(flavor = "multi_thread")]
async fn key_pairs_are_made_imported_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let create = v1::CreateKeyPairRequest { name: "me".into(), tags: vec![tag("a", "b")] };
    let made = user.keys.create_key_pair(create.clone()).await.unwrap().into_inner();
    let pair = made.key_pair.unwrap();
    assert!(made.private_key.starts_with("-----BEGIN OPENSSH PRIVATE KEY-----\n"));
    assert!(pair.fingerprint.starts_with("SHA256:"));
    assert_eq!(reason(&user.keys.create_key_pair(create).await.unwrap_err()), "InvalidKeyPair.Duplicate");
    let import = v1::ImportKeyPairRequest { name: "same".into(), public_key: pair.public_key.clone(), tags: vec![] };
    let same = user.keys.import_key_pair(import.clone()).await.unwrap().into_inner();
    assert_eq!(same.fingerprint, pair.fingerprint);
    let bad = v1::ImportKeyPairRequest { name: "bad".into(), public_key: "ssh-rsa AAAA".into(), ..import };
    assert_eq!(reason(&user.keys.import_key_pair(bad).await.unwrap_err()), "InvalidKey.Format");
    let list = |filters| v1::ListKeyPairsRequest { filters, ..Default::default() };
    let found = user.keys.list_key_pairs(list(vec![filter("tag:a", &["*"])])).await.unwrap().into_inner().key_pairs;
    assert_eq!(found, std::slice::from_ref(&pair));
    for name in [pair.key_pair_id.as_str(), "same", "never was"] {
        user.keys.delete_key_pair(v1::DeleteKeyPairRequest { key_pair: name.into() }).await.unwrap();
    }
    assert!(user.keys.list_key_pairs(list(vec![])).await.unwrap().into_inner().key_pairs.is_empty());
    user.keys.create_key_pair(v1::CreateKeyPairRequest { name: "me".into(), tags: vec![] }).await.unwrap();
    let unknown = v1::ListKeyPairsRequest { names: vec!["you".into()], ..Default::default() };
    assert_eq!(reason(&user.keys.list_key_pairs(unknown).await.unwrap_err()), "InvalidKeyPair.NotFound");
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_types_come_from_the_catalogue_and_the_operators_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("types.toml");
    std::fs::write(&file, "[[instance_type]]\nname = \"x1.own\"\nvcpus = 3\nmemory_mib = 3000\n").unwrap();
    let mut settings = crate::cloud::config(&dir.path().join("state"));
    settings.instance_types = Some(file.clone());
    let cloud = Cloud::start_with(settings.clone()).await;
    let mut user = cloud.user().await;
    let list = |names: &[&str], filters| v1::ListInstanceTypesRequest {
        names: names.iter().map(|n| (*n).to_owned()).collect(),
        filters,
        page: None,
    };
    let own = user.types.list_instance_types(list(&["x1.own"], vec![])).await.unwrap().into_inner().instance_types;
    assert_eq!(own[0].resources.unwrap().vcpus, 3);
    assert!(!own[0].burstable_quota);
    let three = vec![filter("vcpu-info.default-vcpus", &["3"])];
    assert_eq!(user.types.list_instance_types(list(&[], three)).await.unwrap().into_inner().instance_types.len(), 1);
    let error = user.types.list_instance_types(list(&["nope.nope"], vec![])).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidInstanceType");
    cloud.stop().await.unwrap();
    std::fs::write(&file, "[[instance_type]]\nname = \"x1.own\"\nvcpus = 0\nmemory_mib = 3000\n").unwrap();
    let error = hearth_control::Control::start(settings).await.err().unwrap();
    assert!(error.to_string().contains("types.toml") && error.to_string().contains("vcpus"), "{error}");
}
