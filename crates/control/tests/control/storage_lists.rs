//! Filters and pages of what belongs to storage: modifications, tasks, snapshots, images, fast restores.

use std::collections::BTreeSet;

use hearth_proto::v1;
use tonic::Status;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, reason};
use crate::disks::{GIB, blank, until};

fn filter(name: &str, value: &str) -> Vec<v1::Filter> {
    vec![v1::Filter { name: name.into(), values: vec![value.into()] }]
}

/// Reads a list in pages of `size`; each thing is in one of them.
async fn pages<T, F>(size: u32, mut list: impl FnMut(Option<v1::PageRequest>) -> F) -> Vec<Vec<T>>
where
    F: Future<Output = Result<(Vec<T>, Option<v1::PageResponse>), Status>>,
{
    let mut pages = Vec::new();
    let mut page = v1::PageRequest { max_results: size, ..Default::default() };
    loop {
        let (found, next) = list(Some(page.clone())).await.unwrap();
        pages.push(found);
        page.next_token = next.unwrap_or_default().next_token;
        if page.next_token.is_empty() {
            return pages;
        }
    }
}

fn once<'a, T>(pages: &'a [Vec<T>], id: impl Fn(&'a T) -> &'a str) -> BTreeSet<&'a str> {
    let all: Vec<&str> = pages.iter().flatten().map(id).collect();
    let each: BTreeSet<&str> = all.iter().copied().collect();
    assert_eq!(all.len(), each.len(), "each thing once: {all:?}");
    each
}

#[tokio::test(flavor = "multi_thread")]
async fn modifications_are_found_and_paged() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let mut ids = Vec::new();
    for gib in 2..7 {
        let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
        let kind = if gib == 6 { "gp2" } else { "gp3" };
        let change = v1::ModifyVolumeRequest {
            volume_id: volume.clone(),
            size_bytes: Some(gib * GIB),
            volume_type: Some(kind.into()),
            ..Default::default()
        };
        user.volumes.modify_volume(change).await.unwrap();
        ids.push(volume);
    }
    let untouched = user.create_volume(blank(1)).await.unwrap().volume_id;
    let list = |request: v1::ListVolumeModificationsRequest| {
        let mut user = user.clone();
        async move {
            let answer = user.volumes.list_volume_modifications(request).await?.into_inner();
            Ok::<_, Status>((answer.modifications, answer.page))
        }
    };
    type R = v1::ListVolumeModificationsRequest;
    let found = pages(2, |page| list(R { page, ..Default::default() })).await;
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    assert_eq!(once(&found, |one| &one.volume_id), ids.iter().map(String::as_str).collect());
    for (filters, expected) in [
        (filter("modification-state", "completed"), 5),
        (filter("modification-state", "modifying"), 0),
        (filter("target-size", "4"), 1),
        (filter("target-volume-type", "gp2"), 1),
        (filter("original-size", "1"), 5),
        (filter("original-volume-type", "gp?"), 5),
        (filter("target-iops", "3000"), 5),
        (filter("volume-id", &ids[0]), 1),
    ] {
        let (found, _) = list(R { filters: filters.clone(), ..Default::default() }).await.unwrap();
        assert_eq!(found.len(), expected, "{filters:?}");
    }
    let (some, _) = list(R { volume_ids: vec![ids[1].clone(), untouched], ..Default::default() }).await.unwrap();
    assert_eq!(some.len(), 1, "one that was never modified has none");
    for (volume_ids, filters, expected) in [
        (vec!["vol-0123456789abcdef0".to_owned()], vec![], "InvalidVolume.NotFound"),
        (vec!["vol-1".to_owned()], vec![], "InvalidVolumeID.Malformed"),
        (vec![], filter("colour", "red"), "InvalidParameterValue"),
    ] {
        let error = list(R { volume_ids, filters, page: None }).await.unwrap_err();
        assert_eq!(reason(&error), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_are_found_and_paged() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await.image_id;
    for number in 0..5 {
        let bundle =
            v1::CreateBundleRequest { image_id: image.clone(), name: format!("bundle{number}"), ..Default::default() };
        user.images.create_bundle(bundle).await.unwrap();
        let (image_id, prefix) = (image.clone(), format!("copy{number}"));
        let store = v1::CreateStoreImageTaskRequest { image_id, prefix, ..Default::default() };
        user.images.create_store_image_task(store).await.unwrap();
    }
    let bundles = |request: v1::ListBundleTasksRequest| {
        let mut user = user.clone();
        async move {
            let answer = user.images.list_bundle_tasks(request).await?.into_inner();
            Ok::<_, Status>((answer.tasks, answer.page))
        }
    };
    let stored = |request: v1::ListStoreImageTasksRequest| {
        let mut user = user.clone();
        async move {
            let answer = user.images.list_store_image_tasks(request).await?.into_inner();
            Ok::<_, Status>((answer.tasks, answer.page))
        }
    };
    type B = v1::ListBundleTasksRequest;
    type S = v1::ListStoreImageTasksRequest;
    until("all are done", || async {
        let complete = bundles(B { filters: filter("state", "complete"), ..Default::default() }).await.unwrap().0;
        let done = stored(S { filters: filter("task-state", "completed"), ..Default::default() }).await.unwrap().0;
        (complete.len() == 5 && done.len() == 5).then_some(())
    })
    .await;
    let found = pages(2, |page| bundles(B { page, ..Default::default() })).await;
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    let first = once(&found, |task| &task.bundle_id).first().map(|id| (*id).to_owned()).unwrap();
    let found = pages(3, |page| stored(S { page, image_ids: vec![image.clone()], ..Default::default() })).await;
    assert_eq!((found.len(), once(&found, |task| &task.task_id).len()), (2, 5));
    for (filters, expected) in [
        (filter("state", "failed"), 0),
        (filter("image-id", &image), 5),
        (filter("instance-id", "i-*"), 0),
        (filter("bundle-id", &first), 1),
    ] {
        let (found, _) = bundles(B { filters: filters.clone(), ..Default::default() }).await.unwrap();
        assert_eq!(found.len(), expected, "{filters:?}");
    }
    for (filters, expected) in [
        (filter("task-state", "in-progress"), 0),
        (filter("object-key", "*/copy3/*"), 1),
        (filter("image-id", "ami-0000*"), 0),
    ] {
        let (found, _) = stored(S { filters: filters.clone(), ..Default::default() }).await.unwrap();
        assert_eq!(found.len(), expected, "{filters:?}");
    }
    // A page's token is good for its own list alone.
    let page = Some(v1::PageRequest { max_results: 2, ..Default::default() });
    let next = bundles(B { page, ..Default::default() }).await.unwrap().1.unwrap().next_token;
    let page = Some(v1::PageRequest { max_results: 2, next_token: next });
    assert_eq!(reason(&stored(S { page, ..Default::default() }).await.unwrap_err()), "InvalidNextToken");
    let unknown = B { bundle_ids: vec!["bun-0123456789abcdef0".into()], ..Default::default() };
    assert_eq!(reason(&bundles(unknown).await.unwrap_err()), "InvalidBundleID.NotFound");
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_and_images_are_found_by_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let of_image = image.block_device_mappings[0].ebs.clone().unwrap().snapshot_id;
    let sealed = user.create_volume(v1::CreateVolumeRequest { encrypted: true, ..blank(1) }).await.unwrap().volume_id;
    let sealed = user.snapshot(&sealed).await.unwrap().snapshot_id;
    for (filters, expected) in [
        (filter("encrypted", "true"), vec![&sealed]),
        (filter("encrypted", "false"), vec![&of_image]),
        (filter("owner-id", &image.account_id), vec![&of_image, &sealed]),
        (filter("owner-id", "nobody"), vec![]),
    ] {
        let request = v1::ListSnapshotsRequest { filters: filters.clone(), ..Default::default() };
        let found = user.snapshots.list_snapshots(request).await.unwrap().into_inner().snapshots;
        let found: BTreeSet<&String> = found.iter().map(|snapshot| &snapshot.snapshot_id).collect();
        assert_eq!(found, expected.into_iter().collect(), "{filters:?}");
    }
    for (filters, expected) in [
        (filter("root-device-type", "ebs"), 1),
        (filter("root-device-type", "instance-store"), 0),
        (filter("image-type", "machine"), 1),
        (filter("image-type", "kernel"), 0),
        (filter("block-device-mapping.snapshot-id", &of_image), 1),
        (filter("block-device-mapping.snapshot-id", &sealed), 0),
        (filter("block-device-mapping.volume-type", "gp3"), 1),
        (filter("block-device-mapping.volume-type", "io2"), 0),
        (filter("block-device-mapping.delete-on-termination", "true"), 1),
        (filter("block-device-mapping.delete-on-termination", "false"), 0),
        (filter("block-device-mapping.device-name", "/dev/sda?"), 1),
        (filter("block-device-mapping.volume-size", "1"), 1),
        (filter("block-device-mapping.encrypted", "true"), 0),
    ] {
        let request = v1::ListImagesRequest { filters: filters.clone(), ..Default::default() };
        let found = user.images.list_images(request).await.unwrap().into_inner().images;
        assert_eq!(found.len(), expected, "{filters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fast_restores_are_found_and_paged() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_a, _session_a) = FakeAgent::connected(&cloud, "host-a").await;
    let (_b, _session_b) = FakeAgent::connected(&cloud, "host-b").await;
    let mut user = cloud.user().await;
    let volume = user.create_volume(blank(1)).await.unwrap().volume_id;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(user.snapshot(&volume).await.unwrap().snapshot_id);
    }
    let enable = v1::EnableFastSnapshotRestoresRequest {
        snapshot_ids: ids.clone(),
        availability_zones: vec!["local-1a".into()],
        ..Default::default()
    };
    user.snapshots.enable_fast_snapshot_restores(enable).await.unwrap();
    let list = |request: v1::ListFastSnapshotRestoresRequest| {
        let mut user = user.clone();
        async move {
            let answer = user.snapshots.list_fast_snapshot_restores(request).await?.into_inner();
            Ok::<_, Status>((answer.fast_snapshot_restores, answer.page))
        }
    };
    type R = v1::ListFastSnapshotRestoresRequest;
    let found = pages(4, |page| list(R { page, ..Default::default() })).await;
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [4, 2]);
    let of: BTreeSet<_> = found.iter().flatten().map(|one| (&one.snapshot_id, &one.host_id)).collect();
    assert_eq!(of.len(), 6, "each snapshot on each host once");
    for (filters, expected) in [
        (filter("snapshot-id", &ids[0]), 2),
        (filter("state", "enabling"), 6),
        (filter("state", "enabled"), 0),
        (filter("availability-zone", "local-1a"), 6),
    ] {
        let (found, _) = list(R { filters: filters.clone(), ..Default::default() }).await.unwrap();
        assert_eq!(found.len(), expected, "{filters:?}");
    }
    let (some, _) = list(R { snapshot_ids: vec![ids[1].clone()], ..Default::default() }).await.unwrap();
    assert_eq!(some.len(), 2);
}
