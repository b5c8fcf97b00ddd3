//! Watches: each named resource at once and again whenever what the API shows of it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Api, instance, snapshot, volume};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::core::Core;
use crate::tables::Touched;
use crate::volumes;

type Views<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Status checks change with time alone; this often they are looked at again.
const RECHECK_INTERVAL: Duration = Duration::from_secs(5);
const QUEUE: usize = 64;

/// A kind of resource that can be watched.
pub(crate) trait Watched: 'static {
    type View: Clone + PartialEq + Send + Sync;

    /// What the API shows of it now.
    fn view(core: &Core, account: &str, id: &str) -> ApiResult<Self::View>;

    /// Those that may look different now.
    fn touched(touched: &Touched) -> &BTreeSet<String>;
}

pub(crate) struct Instances;

impl Watched for Instances {
    type View = v1::Instance;

    fn view(core: &Core, account: &str, id: &str) -> ApiResult<v1::Instance> {
        let (spec, status) = instance::find(&core.tables(), account, id)?;
        Ok(instance::view(core, &spec, status.as_deref()))
    }

    fn touched(touched: &Touched) -> &BTreeSet<String> {
        &touched.instances
    }
}

pub(crate) struct Volumes;

impl Watched for Volumes {
    type View = v1::Volume;

    fn view(core: &Core, account: &str, id: &str) -> ApiResult<v1::Volume> {
        let tables = core.tables();
        Ok(volumes::view(core, &tables, volume::find(&tables, account, id)?))
    }

    fn touched(touched: &Touched) -> &BTreeSet<String> {
        &touched.volumes
    }
}

pub(crate) struct Snapshots;

impl Watched for Snapshots {
    type View = v1::Snapshot;

    fn view(core: &Core, account: &str, id: &str) -> ApiResult<v1::Snapshot> {
        let tables = core.tables();
        let (spec, status) = snapshot::find(&tables, account, id)?;
        Ok(snapshot::view(core, spec, status.map(|status| &*status.value)))
    }

    fn touched(touched: &Touched) -> &BTreeSet<String> {
        &touched.snapshots
    }
}

impl Api {
    pub(crate) fn do_watch(&self, account: String, ids: &[String]) -> ApiResult<Views<v1::Instance>> {
        self.watch::<Instances>(account, check::ids("instance_ids", ids)?)
    }

    /// Watches resources that are there now; an unknown one is an error.
    pub(crate) fn watch<W: Watched>(&self, account: String, ids: Vec<String>) -> ApiResult<Views<W::View>> {
        // Subscribed before the first look, so that nothing falls between.
        let changes = self.core.changes();
        ids.iter().try_for_each(|id| W::view(&self.core, &account, id).map(|_| ()))?;
        let (sender, stream) = mpsc::channel(QUEUE);
        let watcher = Watcher::<W> { core: self.core.clone(), account, ids, shown: BTreeMap::new(), sender };
        self.core.tasks.spawn(watcher.run(changes));
        Ok(Box::pin(ReceiverStream::new(stream)))
    }
}

struct Watcher<W: Watched> {
    core: Arc<Core>,
    account: String,
    ids: Vec<String>,
    shown: BTreeMap<String, W::View>,
    sender: mpsc::Sender<Result<W::View, Status>>,
}

impl<W: Watched> Watcher<W> {
    async fn run(mut self, mut changes: tokio::sync::broadcast::Receiver<Arc<Touched>>) {
        let mut look_at: BTreeSet<String> = self.ids.iter().cloned().collect();
        loop {
            if !self.show(&look_at).await {
                return;
            }
            look_at.clear();
            tokio::select! {
                change = changes.recv() => match change {
                    Ok(touched) => {
                        let touched = W::touched(&touched);
                        look_at.extend(self.ids.iter().filter(|id| touched.contains(*id)).cloned());
                    }
                    Err(RecvError::Lagged(_)) => look_at.extend(self.ids.iter().cloned()),
                    Err(RecvError::Closed) => return,
                },
                () = tokio::time::sleep(RECHECK_INTERVAL) => look_at.extend(self.ids.iter().cloned()),
                () = self.sender.closed() => return,
                () = self.core.stop.cancelled() => {
                    let error = ApiError::unavailable("the control plane is stopping");
                    let _ = self.sender.try_send(Err(error.into()));
                    return;
                }
            }
        }
    }

    /// Sends what looks different now; `false` when nobody listens or nothing is left to watch.
    async fn show(&mut self, ids: &BTreeSet<String>) -> bool {
        for id in ids {
            let Ok(view) = W::view(&self.core, &self.account, id) else {
                // It is gone and has been forgotten.
                self.ids.retain(|known| known != id);
                continue;
            };
            if self.shown.get(id) == Some(&view) {
                continue;
            }
            self.shown.insert(id.clone(), view.clone());
            if self.sender.send(Ok(view)).await.is_err() {
                return false;
            }
        }
        !self.ids.is_empty()
    }
}
