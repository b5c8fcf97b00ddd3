//! All instances of the host.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use hearth_proto::v1::{DesiredHost, DesiredInstance, InstanceReport, ObservedState, RunState};
use hearth_types::{InstanceId, StateReason};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::error::AgentError;
use crate::instance::{Host, InstanceTask, report_gone};
use crate::state::{InstanceRecord, Layout};

/// Makes, finds again and tells the instances of this host.
pub struct Supervisor {
    host: Arc<Host>,
    slots: u32,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    instances: HashMap<InstanceId, Entry>,
    tasks: JoinSet<InstanceId>,
}

struct Entry {
    wishes: watch::Sender<DesiredInstance>,
    slot: u32,
}

impl Supervisor {
    /// Takes up every instance that has a record, after sweeping away what was being deleted. `slots` uids may be used.
    pub fn start(host: Arc<Host>, slots: u32) -> Result<Arc<Self>, AgentError> {
        let folder = host.layout.instances();
        std::fs::create_dir_all(&folder).map_err(AgentError::file("creating", &folder))?;
        let ids = sweep(&host.layout).map_err(AgentError::file("reading", &folder))?;
        let supervisor = Arc::new(Self { host, slots, inner: Mutex::new(Inner::default()) });
        for id in ids {
            match InstanceRecord::load(&supervisor.host.layout, &id) {
                Ok(Some(record)) => supervisor.spawn(&mut supervisor.inner.lock(), record),
                // Nothing was done for it before its first record was there.
                Ok(None) => {
                    let folder = supervisor.host.layout.instance(&id);
                    std::fs::remove_dir_all(&folder).map_err(AgentError::file("removing", &folder))?;
                }
                // Its disks may be all there is of somebody's data: left as they are, for the operator.
                Err(error) => {
                    tracing::error!(instance = %id, %error, "the instance is left alone");
                    let reason = StateReason::new(StateReason::INTERNAL_ERROR, error.to_string());
                    supervisor.report_failed(&id, 0, reason);
                }
            }
        }
        Ok(supervisor)
    }

    /// Whether an instance has a task.
    pub fn knows(&self, id: &InstanceId) -> bool {
        self.inner.lock().instances.contains_key(id)
    }

    /// Instances that have a task.
    pub fn instances(&self) -> Vec<InstanceId> {
        self.inner.lock().instances.keys().cloned().collect()
    }

    /// Ids of the volumes that instances here have.
    pub fn volumes(&self) -> HashSet<String> {
        let inner = self.inner.lock();
        let wishes: Vec<_> = inner.instances.values().map(|entry| entry.wishes.borrow().clone()).collect();
        let attached = wishes.iter().filter_map(|wish| wish.spec.as_ref()).flat_map(|spec| &spec.volumes);
        attached.filter_map(|slot| slot.volume.as_ref()).map(|volume| volume.volume_id.clone()).collect()
    }

    /// Takes over everything that the control plane wants here. What it does not name is left alone.
    pub fn apply_host(&self, desired: DesiredHost) {
        let named: HashSet<String> = desired.instances.iter().map(|desired| desired.instance_id.clone()).collect();
        self.host.reports.forget_gone(|id| named.contains(id.as_str()));
        for instance in desired.instances {
            self.apply(instance);
        }
    }

    /// Takes over one wish, unless a newer one is known.
    pub fn apply(&self, desired: DesiredInstance) {
        let id: InstanceId = match desired.instance_id.parse() {
            Ok(id) => id,
            Err(error) => return tracing::error!(%error, "the control plane wants an instance without a proper id"),
        };
        let mut inner = self.inner.lock();
        self.collect(&mut inner);
        if let Some(entry) = inner.instances.get_mut(&id) {
            entry.wishes.send_if_modified(|newest| {
                let newer = desired.generation > newest.generation;
                if newer {
                    *newest = desired;
                }
                newer
            });
            return;
        }
        let folder = self.host.layout.instance(&id);
        let was_there = folder.exists();
        match (was_there, desired.run()) {
            (false, RunState::Terminated) => return report_gone(&self.host, &id, &desired, 0),
            // Its record cannot be read; deleting it all is the one thing that can be done without knowing more.
            (true, RunState::Terminated) | (false, _) => {}
            (true, _) => {
                let text = format!(
                    "its record in {} cannot be read; terminate it, or mend it and restart the agent",
                    folder.display()
                );
                let reason = StateReason::new(StateReason::INTERNAL_ERROR, text);
                return self.report_failed(&id, desired.generation, reason);
            }
        }
        let taken: HashSet<u32> = inner.instances.values().map(|entry| entry.slot).collect();
        let Some(slot) = (0..self.slots).find(|slot| !taken.contains(slot)) else {
            let text = format!("all {} user ids for instances are taken on this host", self.slots);
            let reason = StateReason::new(StateReason::INSUFFICIENT_CAPACITY, text);
            return self.report_failed(&id, desired.generation, reason);
        };
        let generation = desired.generation;
        let record = InstanceRecord::new(id.clone(), desired, slot);
        // On disk before anything is done for it: what is done must be found again.
        match record.save(&self.host.layout) {
            Ok(()) => self.spawn(&mut inner, record),
            Err(error) => {
                if !was_there {
                    // A folder without a record would look like somebody's data. If it cannot be removed either, it does.
                    let _ = std::fs::remove_dir_all(&folder);
                }
                self.report_failed(&id, generation, StateReason::new(StateReason::INTERNAL_ERROR, error.to_string()));
            }
        }
    }

    fn report_failed(&self, id: &InstanceId, generation: u64, reason: StateReason) {
        let reason = hearth_proto::v1::StateReason { code: reason.code, message: reason.message };
        self.host.reports.publish(
            id,
            InstanceReport {
                observed_generation: generation,
                state: ObservedState::Failed.into(),
                reason: Some(reason),
                ..InstanceReport::default()
            },
        );
    }

    fn spawn(&self, inner: &mut Inner, record: InstanceRecord) {
        let id = record.instance_id.clone();
        let (wishes, receiver) = watch::channel(record.desired.clone());
        inner.instances.insert(id.clone(), Entry { wishes, slot: record.slot });
        let task = InstanceTask::new(self.host.clone(), record, receiver);
        inner.tasks.spawn(async move {
            task.run().await;
            id
        });
    }

    /// Forgets instances whose tasks are done: they are gone.
    fn collect(&self, inner: &mut Inner) {
        while let Some(done) = inner.tasks.try_join_next() {
            match done {
                Ok(id) => {
                    inner.instances.remove(&id);
                }
                Err(error) => tracing::error!(%error, "an instance's task has failed; the agent must be restarted"),
            }
        }
    }
}

/// Finishes deletions that were interrupted; the instances that are there.
fn sweep(layout: &Layout) -> io::Result<Vec<InstanceId>> {
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(layout.instances())?.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if Layout::is_gone_name(name) {
            std::fs::remove_dir_all(entry.path())?;
        } else if let Ok(id) = name.parse() {
            ids.push(id);
        }
    }
    Ok(ids)
}
