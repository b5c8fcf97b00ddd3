//! Exports and tasks of one account do not keep others waiting.

use std::time::Duration;

use hearth_proto::v1;
use tonic::{Code, Streaming};

use crate::cloud::{Cloud, User, config, header, reason};
use crate::disks::until;

async fn account(cloud: &Cloud, name: &str) -> User {
    let create = v1::CreateAccountRequest { name: name.into(), is_operator: false };
    let token = cloud.user().await.accounts.create_account(create).await.unwrap().into_inner().token;
    cloud.user_with(&token).await
}

async fn export(user: &mut User, image: &v1::Image) -> Result<Streaming<v1::ExportImageResponse>, tonic::Status> {
    let request = v1::ExportImageRequest { image_id: image.image_id.clone(), format: "raw".into() };
    Ok(user.images.export_image(request).await?.into_inner())
}

/// More than what is on its way to a caller that takes nothing.
async fn large_image(user: &mut User) -> v1::Image {
    let chunks = (0..64u8).map(|n| vec![n + 1; 1 << 20]).collect();
    user.import_bytes(header("large", 64 << 20), chunks).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_takes_nothing_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.max_transfers_per_account = 1;
    config.transfer_timeout = Duration::from_millis(500);
    let spool = config.spool_dir();
    let cloud = Cloud::start_with(config).await;
    let mut user = cloud.user().await;
    let image = large_image(&mut user).await;
    let mut idle = export(&mut user, &image).await.unwrap();
    let is_empty = || std::fs::read_dir(&spool).unwrap().next().is_none();
    until("it is being exported", || async { (!is_empty()).then_some(()) }).await;
    // Its place is free again, and its file is gone.
    until("it is given up", || async { is_empty().then_some(()) }).await;
    let mut again = until("there is room", || {
        let (mut user, image) = (user.clone(), image.clone());
        async move { export(&mut user, &image).await.ok() }
    })
    .await;
    let mut bytes = 0;
    while let Some(answer) = again.message().await.unwrap() {
        if let Some(v1::export_image_response::Message::Data(data)) = answer.message {
            bytes += data.len();
        }
    }
    assert_eq!(bytes, 64 << 20);
    // Whoever reads on at last is told, and does not take it for the whole.
    let error = loop {
        match idle.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if it were whole"),
            Err(status) => break status,
        }
    };
    assert_eq!((error.code(), reason(&error).as_str()), (Code::DeadlineExceeded, "RequestExpired"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_accounts_exports_leave_room_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    (config.max_concurrent_imports, config.max_transfers_per_account) = (3, 2);
    let cloud = Cloud::start_with(config).await;
    let mut operator = cloud.user().await;
    let image = large_image(&mut operator).await;
    let (mut first, mut second) = (account(&cloud, "first").await, account(&cloud, "second").await);
    let mut going_on = Vec::new();
    for _ in 0..2 {
        going_on.push(export(&mut first, &image).await.unwrap());
    }
    let error = export(&mut first, &image).await.unwrap_err();
    assert_eq!(reason(&error), "RequestLimitExceeded");
    assert!(error.message().contains("the account has 2"), "{}", error.message());
    going_on.push(export(&mut second, &image).await.unwrap());
    let error = export(&mut second, &image).await.unwrap_err();
    assert!(error.message().contains("there are 3"), "{}", error.message());
    // A caller that leaves frees its place at once.
    drop(going_on.pop());
    until("there is room", || {
        let (mut second, image) = (second.clone(), image.clone());
        async move { export(&mut second, &image).await.ok() }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_all_accounts_are_done_while_exports_take_every_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    (config.max_concurrent_imports, config.max_transfers_per_account) = (1, 1);
    (config.max_concurrent_tasks, config.max_tasks_per_account) = (1, 1);
    let cloud = Cloud::start_with(config).await;
    let mut operator = cloud.user().await;
    let image = large_image(&mut operator).await;
    let _going_on = export(&mut operator, &image).await.unwrap();
    let mut users = [account(&cloud, "first").await, account(&cloud, "second").await];
    for user in &mut users {
        for number in 0..2 {
            let store = v1::CreateStoreImageTaskRequest {
                image_id: image.image_id.clone(),
                prefix: format!("copy{number}"),
                ..Default::default()
            };
            user.images.create_store_image_task(store).await.unwrap();
        }
    }
    for user in users {
        until("all are stored", || {
            let mut user = user.clone();
            async move {
                let tasks = user
                    .images
                    .list_store_image_tasks(v1::ListStoreImageTasksRequest::default())
                    .await
                    .unwrap()
                    .into_inner()
                    .tasks;
                let done = tasks.iter().filter(|task| task.state() == v1::StoreImageTaskState::Completed).count();
                (done == 2).then_some(())
            }
        })
        .await;
    }
}
