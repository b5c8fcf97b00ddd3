//! Snapshots that this host is to have whole, whoever asks for them first (fast snapshot restore).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1::{BaseSnapshot, FillReport};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::base::Base;
use super::bases::Bases;
use crate::reports::Reports;

/// Least time between two reports of progress.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Pause before a base is opened again.
const PAUSE: Duration = Duration::from_secs(5);

/// One task for each snapshot that is wanted.
pub struct Fills {
    bases: Arc<Bases>,
    reports: Arc<Reports>,
    tasks: Mutex<HashMap<String, JoinHandle<()>>>,
}

impl Fills {
    /// For bases of this host.
    pub fn new(bases: Arc<Bases>, reports: Arc<Reports>) -> Self {
        Self { bases, reports, tasks: Mutex::default() }
    }

    /// All that is wanted, in the place of what was wanted before.
    pub fn want(&self, wanted: Vec<BaseSnapshot>) {
        let mut tasks = self.tasks.lock();
        let named = |id: &str| wanted.iter().any(|base| base.snapshot_id == id);
        tasks.retain(|id, task| {
            if !named(id) {
                task.abort();
            }
            named(id)
        });
        self.reports.forget_fills(named);
        for base in &wanted {
            if !tasks.contains_key(&base.snapshot_id) {
                let work = fill(self.bases.clone(), self.reports.clone(), base.clone());
                tasks.insert(base.snapshot_id.clone(), tokio::spawn(work));
            }
        }
    }
}

async fn fill(bases: Arc<Bases>, reports: Arc<Reports>, wanted: BaseSnapshot) {
    let report = FillReport { snapshot_id: wanted.snapshot_id.clone(), ..FillReport::default() };
    let base = loop {
        match bases.get(&wanted).await {
            Ok(base) => break base,
            Err(error) => {
                tracing::warn!(snapshot = wanted.snapshot_id, %error, "a snapshot cannot be fetched yet");
                reports.publish_fill(FillReport { error: error.to_string(), ..report.clone() });
                sleep(PAUSE).await;
            }
        }
    };
    let tell = |base: &Base| {
        let (present_chunks, total_chunks) = base.progress();
        reports.publish_fill(FillReport { present_chunks, total_chunks, ..report.clone() });
        present_chunks >= total_chunks
    };
    tell(&base);
    base.want_all();
    while !tell(&base) {
        sleep(TELL_EVERY).await;
    }
    tracing::info!(snapshot = wanted.snapshot_id, "the snapshot is here whole");
    // It stays, for as long as it is wanted.
    std::future::pending::<()>().await;
    drop(base);
}
