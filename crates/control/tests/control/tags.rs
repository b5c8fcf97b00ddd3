//! Tags of what calls make beside the resource that they are named after.

use hearth_proto::v1;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, User, reason, request};
use crate::disks::until;

fn tag(key: &str, value: &str) -> Vec<v1::Tag> {
    vec![v1::Tag { key: key.into(), value: value.into() }]
}

async fn wait_available(user: &User, image: &str) -> v1::Image {
    until("the image is available", || {
        let (mut user, image_id) = (user.clone(), image.to_owned());
        async move {
            let image = user.images.get_image(v1::GetImageRequest { image_id }).await.unwrap().into_inner();
            (image.state() == v1::ImageState::Available).then_some(image)
        }
    })
    .await
}

/// Tags of the image's snapshots, all of which have the same.
async fn snapshot_tags(user: &mut User, image: &v1::Image) -> Vec<v1::Tag> {
    let mut all = Vec::new();
    for ebs in image.block_device_mappings.iter().filter_map(|mapping| mapping.ebs.as_ref()) {
        all.push(user.get_snapshot(&ebs.snapshot_id).await.unwrap().tags);
    }
    all.dedup();
    let [tags] = &all[..] else { panic!("{all:?}") };
    tags.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_launches_and_snapshots_of_images_get_their_tags() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let launch = v1::RunInstancesRequest {
        tags: tag("Name", "web"),
        volume_tags: tag("team", "shop"),
        ..request(&image, "t3.nano")
    };
    let bad = v1::RunInstancesRequest { volume_tags: tag("", "x"), ..launch.clone() };
    let error = user.run(bad).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidParameterValue");
    assert!(error.message().contains("volume_tags"), "{}", error.message());
    let (id, root) = user.run_one(launch).await;
    assert_eq!(user.volume(&root).await.unwrap().tags, tag("team", "shop"));
    assert_eq!(user.get(&id).await.tags, tag("Name", "web"));

    let create = v1::CreateImageRequest {
        instance_id: id,
        name: "of-web".into(),
        no_reboot: true,
        tags: tag("stage", "test"),
        snapshot_tags: tag("made-of", "web"),
        ..Default::default()
    };
    let bad = v1::CreateImageRequest { snapshot_tags: tag("", "x"), ..create.clone() };
    assert_eq!(reason(&user.images.create_image(bad).await.unwrap_err()), "InvalidParameterValue");
    let made = user.images.create_image(create).await.unwrap().into_inner();
    let made = wait_available(&user, &made.image_id).await;
    assert_eq!(made.tags, tag("stage", "test"));
    assert_eq!(snapshot_tags(&mut user, &made).await, tag("made-of", "web"));

    let copy = v1::CopyImageRequest {
        source_image_id: made.image_id.clone(),
        name: "copy".into(),
        tags: tag("stage", "golden"),
        snapshot_tags: tag("copy-of", "of-web"),
        ..Default::default()
    };
    let bad = v1::CopyImageRequest { tags: tag("", "x"), ..copy.clone() };
    assert_eq!(reason(&user.images.copy_image(bad).await.unwrap_err()), "InvalidParameterValue");
    let copied = user.images.copy_image(copy).await.unwrap().into_inner();
    let copied = wait_available(&user, &copied.image_id).await;
    assert_eq!(copied.tags, tag("stage", "golden"));
    assert_eq!(snapshot_tags(&mut user, &copied).await, tag("copy-of", "of-web"));

    let store = v1::CreateStoreImageTaskRequest { image_id: made.image_id, ..Default::default() };
    let object_key = user.images.create_store_image_task(store).await.unwrap().into_inner().object_key;
    let restore = v1::CreateRestoreImageTaskRequest {
        object_key,
        name: "restored".into(),
        tags: tag("stage", "rescue"),
        snapshot_tags: tag("restored-of", "of-web"),
        ..Default::default()
    };
    let restored = until("it is stored, and can be restored", || {
        let (mut user, restore) = (user.clone(), restore.clone());
        async move { user.images.create_restore_image_task(restore).await.ok() }
    })
    .await
    .into_inner();
    let restored = wait_available(&user, &restored.image_id).await;
    assert_eq!(restored.tags, tag("stage", "rescue"));
    assert_eq!(snapshot_tags(&mut user, &restored).await, tag("restored-of", "of-web"));
}
