//! Root volumes that are replaced, and images that are stored and restored as one object.

use hearth_proto::v1;
use tonic::Code;
use v1::{InstanceState as S, ReplaceRootVolumeTaskState as R, StoreImageTaskState as T, VolumeState as V};

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, User, reason, request};
use crate::disks::{GIB, until};

impl User {
    async fn replace(
        &mut self,
        request: v1::CreateReplaceRootVolumeTaskRequest,
    ) -> Result<v1::ReplaceRootVolumeTask, tonic::Status> {
        Ok(self.instances.create_replace_root_volume_task(request).await?.into_inner())
    }

    async fn wait_replaced(&self, id: &str, state: R) -> v1::ReplaceRootVolumeTask {
        until(state.as_str_name(), || {
            let mut user = self.clone();
            async move {
                let request = v1::ListReplaceRootVolumeTasksRequest { task_ids: vec![id.to_owned()], page: None };
                let tasks = user.instances.list_replace_root_volume_tasks(request).await.unwrap().into_inner().tasks;
                tasks.into_iter().find(|task| task.state() == state)
            }
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_instance_gets_another_root_volume() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let (id, first) = user.run_one(request(&image, "t3.nano")).await;
    agent.write(&first, 1, 4);
    let snapshot = user.snapshot(&first).await.unwrap().snapshot_id;
    user.wait_snapshot(&snapshot, v1::SnapshotState::Completed).await;
    let of = |id: &str| v1::CreateReplaceRootVolumeTaskRequest { instance_id: id.into(), ..Default::default() };
    let both = v1::CreateReplaceRootVolumeTaskRequest {
        snapshot_id: snapshot.clone(),
        image_id: image.image_id.clone(),
        ..of(&id)
    };
    assert_eq!(reason(&user.replace(both).await.unwrap_err()), "InvalidParameterValue");

    // The host takes its time: nothing is lost meanwhile.
    agent.memory.lock().manners.silent = true;
    let started = v1::CreateReplaceRootVolumeTaskRequest { client_token: "once".into(), ..of(&id) };
    let task = user.replace(started.clone()).await.unwrap();
    assert_eq!((task.state(), task.replaced_volume_id.as_str()), (R::Pending, first.as_str()));
    assert_eq!(user.replace(started).await.unwrap().task_id, task.task_id);
    assert_eq!(reason(&user.replace(of(&id)).await.unwrap_err()), "IncorrectInstanceState");
    let old = user.volume(&first).await.unwrap();
    assert_eq!((old.state(), old.attachments[0].state()), (V::InUse, v1::AttachmentState::Detaching));
    assert_eq!(reason(&user.detach(&first, true).await.unwrap_err()), "IncorrectState");
    assert_eq!(reason(&user.delete_volume(&first).await.unwrap_err()), "VolumeInUse");
    until("the host is told", || async {
        let told = agent.memory.lock().has[&id].desired.clone();
        let roots: Vec<_> = told.spec.iter().flat_map(|spec| &spec.volumes).collect();
        let ids: Vec<_> = roots.iter().filter_map(|slot| slot.volume.as_ref()).map(|v| v.volume_id.clone()).collect();
        (ids == [task.volume_id.clone()] && told.reboot_generation == 1).then_some(())
    })
    .await;
    agent.memory.lock().manners.silent = false;
    drop(_session);
    let _session = agent.connect(&cloud).await.unwrap();
    let done = user.wait_replaced(&task.task_id, R::Succeeded).await;
    assert!(!done.complete_time.is_empty() && done.volume_id != first);
    user.wait_available(&first).await;
    let devices = user.get(&id).await.block_devices;
    assert_eq!((devices.len(), devices[0].volume_id.as_str()), (1, done.volume_id.as_str()));
    assert!(devices[0].delete_on_termination, "as the one before");
    let base = agent.memory.lock().has[&id].desired.spec.clone().unwrap().volumes[0].volume.clone().unwrap().base;
    assert_eq!(base.unwrap().snapshot_id, image.block_device_mappings[0].ebs.clone().unwrap().snapshot_id);

    // From a snapshot; the one before goes.
    let request_snapshot = v1::CreateReplaceRootVolumeTaskRequest {
        snapshot_id: snapshot.clone(),
        delete_replaced_root_volume: true,
        ..of(&id)
    };
    let task = user.replace(request_snapshot).await.unwrap();
    let done = user.wait_replaced(&task.task_id, R::Succeeded).await;
    assert_eq!(done.snapshot_id, snapshot);
    user.wait_volume_gone(&task.replaced_volume_id).await;
    assert_eq!(user.volume(&done.volume_id).await.unwrap().size_bytes, GIB);

    // The instance ends before the host has done it: both volumes go with it.
    agent.memory.lock().manners.slow_volumes = true;
    let task = user.replace(of(&id)).await.unwrap();
    user.wait_replaced(&task.task_id, R::InProgress).await;
    user.terminate(&id).await.unwrap();
    user.wait_replaced(&task.task_id, R::Failed).await;
    user.wait_state(&id, S::Terminated).await;
    user.wait_volume_gone(&task.replaced_volume_id).await;
    user.wait_volume_gone(&task.volume_id).await;
    assert_eq!(reason(&user.replace(of(&id)).await.unwrap_err()), "IncorrectInstanceState");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_stored_as_one_object_and_restored_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let store = v1::CreateStoreImageTaskRequest {
        image_id: image.image_id.clone(),
        prefix: "backup".into(),
        client_token: "once".into(),
    };
    let task = user.images.create_store_image_task(store.clone()).await.unwrap().into_inner();
    assert_eq!(user.images.create_store_image_task(store.clone()).await.unwrap().into_inner().task_id, task.task_id);
    let done = until("stored", || {
        let (mut user, image) = (user.clone(), image.image_id.clone());
        async move {
            let request = v1::ListStoreImageTasksRequest { image_ids: vec![image], ..Default::default() };
            let tasks = user.images.list_store_image_tasks(request).await.unwrap().into_inner().tasks;
            tasks.into_iter().find(|task| task.state() == T::Completed)
        }
    })
    .await;
    assert_eq!((done.progress, done.object_key.as_str()), (100, task.object_key.as_str()));
    let again = v1::CreateStoreImageTaskRequest { client_token: String::new(), ..store };
    assert_eq!(user.images.create_store_image_task(again).await.unwrap_err().code(), Code::AlreadyExists);

    type Q = v1::CreateRestoreImageTaskRequest;
    let restore = Q { object_key: done.object_key.clone(), client_token: "once".into(), ..Default::default() };
    let taken = user.images.create_restore_image_task(restore.clone()).await.unwrap_err();
    assert_eq!(reason(&taken), "InvalidAMIName.Duplicate");
    for key in ["nothing.bin", "ami-0123456789abcdef1.bin", "backup/x", "../x.bin"] {
        let wrong = Q { object_key: key.into(), name: "x".into(), ..Default::default() };
        assert_eq!(
            user.images.create_restore_image_task(wrong).await.unwrap_err().code(),
            Code::InvalidArgument,
            "{key}"
        );
    }
    let account = image.account_id.clone();
    let garbage = format!("archive/{account}/ami-0123456789abcdef0.bin");
    use object_store::ObjectStoreExt;
    cloud.objects.put(&garbage.as_str().into(), vec![7u8; 1000].into()).await.unwrap();
    let wrong = Q { object_key: garbage, name: "x".into(), ..Default::default() };
    assert_eq!(reason(&user.images.create_restore_image_task(wrong).await.unwrap_err()), "InvalidImageObject");

    // The image and everything of it may be gone by then.
    let deregister = v1::DeregisterImageRequest { image_id: image.image_id.clone(), delete_associated_snapshots: true };
    user.images.deregister_image(deregister).await.unwrap();
    for _ in 0..4 {
        user.collect_garbage().await;
    }
    let restored = user.images.create_restore_image_task(restore.clone()).await.unwrap().into_inner();
    assert_eq!(user.images.create_restore_image_task(restore).await.unwrap().into_inner().image_id, restored.image_id);
    let restored = until("restored", || {
        let (mut user, id) = (user.clone(), restored.image_id.clone());
        async move {
            let image = user.images.get_image(v1::GetImageRequest { image_id: id }).await.unwrap().into_inner();
            (image.state() == v1::ImageState::Available).then_some(image)
        }
    })
    .await;
    assert_eq!((restored.name.as_str(), restored.size_bytes), ("debian", 1 << 20));
    assert_eq!(restored.root_device_name, image.root_device_name);
    let exported = crate::images::exported(&mut user, &restored.image_id).await;
    assert_eq!(exported, crate::cloud::disk_bytes());
    assert_eq!(user.findings().await, Vec::<String>::new());
    user.run_one(request(&restored, "t3.nano")).await;
    let gone = v1::DeleteStoredImageRequest { object_key: done.object_key };
    user.images.delete_stored_image(gone.clone()).await.unwrap();
    assert_eq!(reason(&user.images.delete_stored_image(gone).await.unwrap_err()), "NoSuchKey");
    let outside = v1::DeleteStoredImageRequest { object_key: "../chunk.bin".into() };
    assert_eq!(user.images.delete_stored_image(outside).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_tells_how_far_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    // Each chunk is another one.
    let chunks: Vec<Vec<u8>> = (0..64u8).map(|n| vec![n + 1; 512 << 10]).collect();
    let image = user.import_bytes(crate::cloud::header("large", 32 << 20), chunks).await.unwrap();
    let store = v1::CreateStoreImageTaskRequest { image_id: image.image_id, ..Default::default() };
    let key = user.images.create_store_image_task(store).await.unwrap().into_inner().object_key;
    until("stored", || {
        let mut user = user.clone();
        async move {
            let tasks = user
                .images
                .list_store_image_tasks(v1::ListStoreImageTasksRequest::default())
                .await
                .unwrap()
                .into_inner()
                .tasks;
            tasks.into_iter().find(|task| task.state() == T::Completed)
        }
    })
    .await;
    let restore =
        v1::CreateRestoreImageTaskRequest { object_key: key.clone(), name: "again".into(), ..Default::default() };
    let made = user.images.create_restore_image_task(restore).await.unwrap().into_inner();
    let snapshot = made.block_device_mappings[0].ebs.clone().unwrap().snapshot_id;
    let watch = v1::WatchSnapshotsRequest { snapshot_ids: vec![snapshot.clone()] };
    let mut watched = user.snapshots.watch_snapshots(watch).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while let Some(shown) = watched.message().await.unwrap() {
        seen.push(shown.progress);
        if shown.state() == v1::SnapshotState::Completed {
            break;
        }
    }
    assert!(seen.iter().any(|progress| (1..100).contains(progress)) && seen.is_sorted(), "{seen:?}");
    let list = |image: &str| v1::ListRestoreImageTasksRequest { image_ids: vec![image.into()], ..Default::default() };
    let tasks = user.images.list_restore_image_tasks(list(&made.image_id)).await.unwrap().into_inner().tasks;
    let [task] = &tasks[..] else { panic!("{tasks:?}") };
    assert_eq!((task.state(), task.progress, task.object_key.as_str()), (T::Completed, 100, key.as_str()));
    assert_eq!((&task.image_id, &task.snapshot_ids), (&made.image_id, &vec![snapshot]));
    let none = user.images.list_restore_image_tasks(list("ami-0123456789abcdef0")).await.unwrap().into_inner().tasks;
    assert_eq!(none, []);
}
