//! The control plane dies at every one of its transactions, before or just after it took effect, and is started again. No
//! acknowledged call is lost, none is done twice.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hearth_proto::v1;
use hearth_store::sqlite::SqliteStore;
use hearth_store::{
    Error, KeyValue, LeaseId, LeaseInfo, RangeRequest, RangeResponse, Result, Revision, Store, Txn, TxnOutcome,
    WatchStream,
};
use v1::InstanceState as S;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, User, config, request};

/// A store that is gone after so many transactions.
pub struct Mortal {
    inner: Arc<SqliteStore>,
    left: AtomicI64,
    /// Whether the last transaction still takes effect, without its answer arriving.
    last_counts: bool,
}

impl Mortal {
    pub fn new(inner: Arc<SqliteStore>, left: i64, last_counts: bool) -> Arc<Self> {
        Arc::new(Self { inner, left: AtomicI64::new(left), last_counts })
    }

    pub fn die(&self) {
        self.left.store(-1, Ordering::SeqCst);
    }

    fn dead(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }
}

#[async_trait]
impl Store for Mortal {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        if self.dead() { Err(Error::Closed) } else { self.inner.get(key).await }
    }
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        if self.dead() { Err(Error::Closed) } else { self.inner.range(request).await }
    }
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            left if left > 0 => self.inner.txn(txn).await,
            0 if self.last_counts => {
                self.inner.txn(txn).await?;
                Err(Error::Closed)
            }
            _ => Err(Error::Closed),
        }
    }
    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        self.inner.watch(prefix, from).await
    }
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        if self.dead() { Err(Error::Closed) } else { self.inner.lease_grant(ttl).await }
    }
    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration> {
        if self.dead() { Err(Error::Closed) } else { self.inner.lease_keep_alive(id).await }
    }
    async fn lease_revoke(&self, id: LeaseId) -> Result<Revision> {
        if self.dead() { Err(Error::Closed) } else { self.inner.lease_revoke(id).await }
    }
    async fn lease_info(&self, id: LeaseId) -> Result<LeaseInfo> {
        self.inner.lease_info(id).await
    }
    async fn compact(&self, at: Revision) -> Result<()> {
        self.inner.compact(at).await
    }
    async fn revision(&self) -> Result<Revision> {
        self.inner.revision().await
    }
    async fn backup(&self, path: &Path) -> Result<Revision> {
        self.inner.backup(path).await
    }
}

/// What the user has been promised.
#[derive(Default)]
struct Promised {
    launched: BTreeMap<u32, Vec<String>>,
    terminated: BTreeSet<String>,
    stopped: BTreeSet<String>,
}

fn numbered(image_id: &str, number: u32) -> v1::RunInstancesRequest {
    let image = v1::Image { image_id: image_id.into(), ..Default::default() };
    v1::RunInstancesRequest {
        client_token: format!("launch-{number}"),
        min_count: 2,
        max_count: 2,
        ..request(&image, "t3.nano")
    }
}

/// Calls until one fails.
async fn work(user: &mut User, image: &str, promised: &mut Promised) -> std::result::Result<(), tonic::Status> {
    for number in 0..4 {
        let answer = user.run(numbered(image, number)).await?;
        let ids: Vec<String> = answer.instances.iter().map(|i| i.instance_id.clone()).collect();
        if let Some(before) = promised.launched.get(&number) {
            assert_eq!(before, &ids, "the same token gives the same instances");
        }
        promised.launched.insert(number, ids.clone());
        match number % 2 {
            0 => {
                user.terminate(&ids[0]).await?;
                promised.terminated.insert(ids[0].clone());
            }
            _ => {
                user.stop(&ids[0]).await?;
                promised.stopped.insert(ids[0].clone());
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_transaction_is_a_bad_moment_to_die() {
    let mut died = 0;
    for step in 0..20i64 {
        for last_counts in [false, true] {
            died += u32::from(one_death(step, last_counts).await);
        }
    }
    // The calls alone make eight transactions; how many reports add depends on their pace.
    assert!(died >= 16, "too few of these moments came, {died} did");
}

async fn one_death(after: i64, last_counts: bool) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    let cloud = Cloud::start_on(config(dir.path()), store.clone()).await.unwrap();
    let agent = FakeAgent::join(&cloud, "host-a").await;
    let session = agent.connect(&cloud).await.unwrap();
    let image = cloud.user().await.import("debian").await.image_id;
    drop(session);
    cloud.stop().await.unwrap();

    let mut promised = Promised::default();
    // Starting takes three transactions itself.
    let mortal = Arc::new(Mortal { inner: store.clone(), left: AtomicI64::new(3 + after), last_counts });
    let mut died = true;
    if let Ok(cloud) = Cloud::start_on(config(dir.path()), mortal.clone()).await {
        let session = agent.connect(&cloud).await;
        let mut user = cloud.user().await;
        died = work(&mut user, &image, &mut promised).await.is_err();
        drop(session);
        if died {
            assert!(cloud.ended().await.is_err(), "without its store it must not go on");
        } else {
            cloud.stop().await.ok();
        }
    }
    mortal.left.store(-1, Ordering::SeqCst);
    let cloud = Cloud::start_on(config(dir.path()), store).await.unwrap();
    let mut user = cloud.user().await;
    let known: BTreeSet<String> = user.list().await.into_iter().map(|i| i.instance_id).collect();
    for ids in promised.launched.values() {
        assert!(ids.iter().all(|id| known.contains(id)), "an acknowledged launch is lost");
    }
    let _session = agent.connect(&cloud).await.unwrap();
    work(&mut user, &image, &mut promised).await.unwrap();
    for id in &promised.terminated {
        user.wait_state(id, S::Terminated).await;
    }
    for id in &promised.stopped {
        user.wait_state(id, S::Stopped).await;
    }
    for ids in promised.launched.values() {
        user.wait_state(&ids[1], S::Running).await;
    }
    let all = user.list().await;
    assert_eq!(all.len(), 8, "a launch was done twice: {all:#?}");
    let addresses: Vec<_> = all.iter().flat_map(|i| &i.network_interfaces).map(|n| &n.private_ip_address).collect();
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), addresses.len());
    let macs: BTreeSet<_> = all.iter().flat_map(|i| &i.network_interfaces).map(|n| &n.mac_address).collect();
    assert_eq!(macs.len(), addresses.len());
    let host = user.host(&agent.host_id).await;
    assert_eq!(host.allocated.unwrap().vcpus, 4, "four run, two are stopped, two are gone");
    assert_eq!(agent.running().len(), 4);
    died
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_control_plane_takes_over_and_the_first_one_stops() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    let first = Cloud::start_on(config(dir.path()), store.clone()).await.unwrap();
    let agent = FakeAgent::join(&first, "host-a").await;
    let _session = agent.connect(&first).await.unwrap();
    let mut user = first.user().await;
    let image = user.import("debian").await;
    user.run(request(&image, "t3.nano")).await.unwrap();
    let before = agent.memory.lock().highest_term;
    // The same name: an earlier life of itself, deposed at once.
    let second = Cloud::start_on(config(dir.path()), store).await.unwrap();
    let error = user.run(request(&image, "t3.nano")).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable);
    assert!(first.ended().await.unwrap_err().to_string().contains("lead"));
    let _session = agent.connect(&second).await.unwrap();
    let mut user = second.user().await;
    assert_eq!(user.list().await.len(), 1);
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;
    assert!(agent.memory.lock().highest_term > before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_import_leaves_no_trace_after_the_next_start() {
    use v1::import_image_request::Message;
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    let mortal = Arc::new(Mortal { inner: store.clone(), left: AtomicI64::new(i64::MAX), last_counts: false });
    let cloud = Cloud::start_on(config(dir.path()), mortal.clone()).await.unwrap();
    let mut user = cloud.user().await;
    let (messages, stream) = tokio::sync::mpsc::channel(4);
    let header = v1::ImportImageHeader { client_token: "once".into(), ..crate::cloud::header("debian", 1 << 20) };
    messages.send(v1::ImportImageRequest { message: Some(Message::Header(header.clone())) }).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let _answers = user.images.import_image(stream).await.unwrap();
    messages.send(v1::ImportImageRequest { message: Some(Message::Chunk(vec![1; 1000].into())) }).await.unwrap();
    while std::fs::read_dir(dir.path().join("spool")).unwrap().count() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    mortal.left.store(-1, Ordering::SeqCst);
    cloud.stop().await.ok();
    // Whatever the dying one still managed to remove, a kill would have left.
    std::fs::write(dir.path().join("spool/ami-0123456789abcdef0.upload"), b"half").unwrap();
    let cloud = Cloud::start_on(config(dir.path()), store).await.unwrap();
    let mut user = cloud.user().await;
    assert!(user.images.list_images(v1::ListImagesRequest::default()).await.unwrap().into_inner().images.is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("spool")).unwrap().count(), 0);
    let disk = crate::cloud::disk_bytes();
    let image = user.import_bytes(header, vec![disk]).await.unwrap();
    assert_eq!(image.state(), v1::ImageState::Available, "name and token are free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_an_image_goes_on_after_every_death() {
    let mut died = 0;
    for step in 0..8i64 {
        for last_counts in [false, true] {
            died += u32::from(one_death_of_a_copy(step, last_counts).await);
        }
    }
    // Registering it, the snapshot's two records and the end: four transactions.
    assert!(died >= 6, "too few of these moments came, {died} did");
}

async fn one_death_of_a_copy(after: i64, last_counts: bool) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    let cloud = Cloud::start_on(config(dir.path()), store.clone()).await.unwrap();
    let source = cloud.user().await.import("debian").await.image_id;
    cloud.stop().await.unwrap();
    let copy = v1::CopyImageRequest {
        source_image_id: source,
        name: "copy".into(),
        client_token: "once".into(),
        ..Default::default()
    };
    let mortal = Arc::new(Mortal { inner: store.clone(), left: AtomicI64::new(3 + after), last_counts });
    let mut died = true;
    if let Ok(cloud) = Cloud::start_on(config(dir.path()), mortal.clone()).await {
        let mut user = cloud.user().await;
        let answer = user.images.copy_image(copy.clone()).await;
        died = answer.is_err() || mortal.dead();
        cloud.stop().await.ok();
    }
    mortal.left.store(-1, Ordering::SeqCst);
    let cloud = Cloud::start_on(config(dir.path()), store).await.unwrap();
    let mut user = cloud.user().await;
    let id = user.images.copy_image(copy).await.unwrap().into_inner().image_id;
    let image = crate::disks::until("the copy is there", || {
        let (mut user, id) = (user.clone(), id.clone());
        async move {
            let image = user.images.get_image(v1::GetImageRequest { image_id: id }).await.unwrap().into_inner();
            assert_ne!(image.state(), v1::ImageState::Failed, "{image:?}");
            (image.state() == v1::ImageState::Available).then_some(image)
        }
    })
    .await;
    let images = user.images.list_images(v1::ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(images.len(), 2, "one copy: {images:#?}");
    let list = v1::ListSnapshotsRequest::default();
    let snapshots = user.snapshots.list_snapshots(list).await.unwrap().into_inner().snapshots;
    assert_eq!(snapshots.len(), 2, "nothing is left behind: {snapshots:#?}");
    let own = image.block_device_mappings[0].ebs.clone().unwrap().snapshot_id;
    assert!(snapshots.iter().any(|snapshot| snapshot.snapshot_id == own && snapshot.progress == 100));
    assert_eq!(user.findings().await, Vec::<String>::new());
    died
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_image_goes_on_after_every_death() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    let cloud = Cloud::start_on(config(dir.path()), store.clone()).await.unwrap();
    let mut user = cloud.user().await;
    let image_id = user.import("debian").await.image_id;
    let request = v1::CreateStoreImageTaskRequest { image_id, ..Default::default() };
    let task = user.images.create_store_image_task(request).await.unwrap().into_inner();
    crate::disks::until("stored", || {
        let mut user = user.clone();
        async move {
            let tasks = user.images.list_store_image_tasks(v1::ListStoreImageTasksRequest::default()).await.unwrap();
            let done = |task: &v1::StoreImageTask| task.state() == v1::StoreImageTaskState::Completed;
            tasks.into_inner().tasks.iter().any(done).then_some(())
        }
    })
    .await;
    cloud.stop().await.unwrap();
    let mut wanted = 0;
    for step in 0..4i64 {
        for last_counts in [false, true] {
            let restore = v1::CreateRestoreImageTaskRequest {
                object_key: task.object_key.clone(),
                name: format!("copy-{step}-{last_counts}"),
                client_token: format!("{step}-{last_counts}"),
                ..Default::default()
            };
            let mortal = Arc::new(Mortal { inner: store.clone(), left: AtomicI64::new(3 + step), last_counts });
            if let Ok(cloud) = Cloud::start_on(config(dir.path()), mortal.clone()).await {
                let mut user = cloud.user().await;
                if user.images.create_restore_image_task(restore.clone()).await.is_ok() {
                    // It dies at the task's own transactions, or when it is told to.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                mortal.left.store(-1, Ordering::SeqCst);
                cloud.stop().await.ok();
            }
            mortal.left.store(-1, Ordering::SeqCst);
            let cloud = Cloud::start_on(config(dir.path()), store.clone()).await.unwrap();
            let mut user = cloud.user().await;
            let id = user.images.create_restore_image_task(restore).await.unwrap().into_inner().image_id;
            crate::disks::until("restored", || {
                let (mut user, id) = (user.clone(), id.clone());
                async move {
                    let image = user.images.get_image(v1::GetImageRequest { image_id: id }).await.unwrap().into_inner();
                    assert_ne!(image.state(), v1::ImageState::Failed, "{image:?}");
                    (image.state() == v1::ImageState::Available).then_some(())
                }
            })
            .await;
            wanted += 1;
            let list = v1::ListSnapshotsRequest::default();
            let snapshots = user.snapshots.list_snapshots(list).await.unwrap().into_inner().snapshots;
            assert_eq!(snapshots.len(), 1 + wanted, "one for each image, no more");
            assert_eq!(user.findings().await, Vec::<String>::new());
            cloud.stop().await.unwrap();
        }
    }
}
