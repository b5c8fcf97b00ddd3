//! Volumes of running guests whose agents or object stores come and go.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use hearth_proto::v1::{ObservedAttachment, ObservedState as State, RunState};
use hearth_snapshot::ObjectStore;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result,
};

use super::world::*;
use crate::launch::VmmEnd;

#[tokio::test(start_paused = true)]
async fn growth_that_an_agent_could_not_tell_is_told_by_the_next_one() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    let before = agent.until(&id, State::Running, 1).await.volumes[0].size_bytes;
    // It dies when the new size is in its record, and the VMM does not know of it.
    agent.crash.after(1);
    let grown = before + (1 << 20);
    let grow = |desired: &mut hearth_proto::v1::DesiredInstance| {
        desired.spec.as_mut().unwrap().volumes[0].volume.as_mut().unwrap().size_bytes = grown;
    };
    agent.supervisor.apply(wanted.change(&id, grow).unwrap());
    agent.crash.dead_or(Duration::from_secs(30)).await;
    drop(agent);
    assert!(world.table.lock().sizes.is_empty());
    let agent = Agent::start(&world);
    while agent.report(&id).volumes.first().is_none_or(|volume| volume.size_bytes < grown) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(world.table.lock().sizes.values().copied().collect::<Vec<_>>(), [grown], "what the report says is true");
}

/// Takes calls and answers none.
#[derive(Debug)]
struct Silence;

impl std::fmt::Display for Silence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("silence")
    }
}

#[async_trait]
impl ObjectStore for Silence {
    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        std::future::pending().await
    }
    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        std::future::pending().await
    }
    async fn get_opts(&self, _: &Path, _: GetOptions) -> Result<GetResult> {
        std::future::pending().await
    }
    fn delete_stream(&self, _: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        Box::pin(futures::stream::pending())
    }
    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        Box::pin(futures::stream::pending())
    }
    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        std::future::pending().await
    }
    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn an_object_store_that_does_not_answer_holds_up_nothing_else_of_a_running_guest() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let ids = [id(1), id(2)];
    for id in &ids {
        agent.supervisor.apply(wanted.want(id, RunState::Running));
        agent.until(id, State::Running, 1).await;
    }
    drop(agent);
    let agent = Agent::start_with(&world, Arc::new(Silence));
    // It takes up what runs; what comes after that is new.
    tokio::time::sleep(Duration::from_secs(5)).await;
    // One more volume, whose base does not come.
    let more = spec().volumes.remove(0);
    let attach = |desired: &mut hearth_proto::v1::DesiredInstance| {
        let volumes = &mut desired.spec.as_mut().unwrap().volumes;
        volumes.push(hearth_proto::v1::AttachedVolume { device_name: "/dev/sdf".into(), ..more.clone() });
    };
    agent.supervisor.apply(wanted.change(&ids[0], attach).unwrap());
    let states = || agent.report(&ids[0]).volumes.iter().map(|volume| volume.state()).collect::<Vec<_>>();
    while states() != [ObservedAttachment::Attached, ObservedAttachment::Attaching] {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Thinking better of it.
    let detach = |desired: &mut hearth_proto::v1::DesiredInstance| {
        desired.spec.as_mut().unwrap().volumes[1].set_detach(hearth_proto::v1::DetachWish::Ask);
    };
    agent.supervisor.apply(wanted.change(&ids[0], detach).unwrap());
    while agent.report(&ids[0]).volumes[1].state() != ObservedAttachment::Detached {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    agent.supervisor.apply(wanted.want(&ids[0], RunState::Stopped));
    agent.until(&ids[0], State::Stopped, 4).await;
    // A guest that ends is noticed.
    world.end(&ids[1], VmmEnd::PoweredOff);
    assert!(agent.until(&ids[1], State::Stopped, 1).await.guest_powered_off);
}
