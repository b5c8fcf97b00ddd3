//! WatchInstances: each named instance at once and again whenever what the API shows of it changes.

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

use super::{Api, instance};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::core::Core;

type InstanceStream = Pin<Box<dyn Stream<Item = Result<v1::Instance, Status>> + Send>>;

/// Status checks change with time alone; this often they are looked at again.
const RECHECK_INTERVAL: Duration = Duration::from_secs(5);
const QUEUE: usize = 64;

impl Api {
    pub(crate) fn do_watch(&self, account: String, ids: &[String]) -> ApiResult<InstanceStream> {
        let ids = check::ids("instance_ids", ids)?;
        // Subscribed before the first look, so that nothing falls between.
        let changes = self.core.changes();
        instance::find_all(&self.core.tables(), &account, &ids)?;
        let (sender, stream) = mpsc::channel(QUEUE);
        let watcher = Watcher { core: self.core.clone(), account, ids, shown: BTreeMap::new(), sender };
        self.core.tasks.spawn(watcher.run(changes));
        Ok(Box::pin(ReceiverStream::new(stream)))
    }
}

struct Watcher {
    core: Arc<Core>,
    account: String,
    ids: Vec<String>,
    shown: BTreeMap<String, v1::Instance>,
    sender: mpsc::Sender<Result<v1::Instance, Status>>,
}

impl Watcher {
    async fn run(mut self, mut changes: tokio::sync::broadcast::Receiver<Arc<crate::tables::Touched>>) {
        let mut look_at: BTreeSet<String> = self.ids.iter().cloned().collect();
        loop {
            if !self.show(&look_at).await {
                return;
            }
            look_at.clear();
            tokio::select! {
                change = changes.recv() => match change {
                    Ok(touched) => look_at.extend(self.ids.iter().filter(|id| touched.instances.contains(*id)).cloned()),
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
            let view = {
                let tables = self.core.tables();
                let found = instance::find(&tables, &self.account, id).ok();
                found.map(|(spec, status)| instance::view(&self.core, &spec, status.as_deref()))
            };
            let Some(view) = view else {
                // A terminated instance has been forgotten.
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
