//! What the control plane is to know of each instance: the newest report of each, and what of it a session has sent.

use std::collections::HashMap;

use hearth_proto::v1::{BundleReport, FillReport, FullReport, InstanceReport, Progress, SnapshotReport, VolumeReport};
use hearth_types::InstanceId;
use parking_lot::Mutex;
use tokio::sync::watch;

/// The newest report of every instance. Reports are numbered over all instances, growing.
pub struct Reports {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    sequence: u64,
    newest: HashMap<InstanceId, InstanceReport>,
    /// The newest of each volume that is to leave, and of each snapshot that is made here, with its number.
    volumes: HashMap<String, (u64, VolumeReport)>,
    snapshots: HashMap<String, (u64, SnapshotReport)>,
    bundles: HashMap<String, (u64, BundleReport)>,
    /// The newest of each snapshot that this host is to have whole.
    fills: HashMap<String, (u64, FillReport)>,
}

/// A report of any kind.
pub enum AnyReport {
    /// Of an instance.
    Instance(InstanceReport),
    /// Of a volume that is to leave the host.
    Volume(VolumeReport),
    /// Of a snapshot that is made here.
    Snapshot(SnapshotReport),
    /// Of a bundle that is made here.
    Bundle(BundleReport),
    /// Of a snapshot that this host is to have whole.
    Fill(FillReport),
}

impl Default for Reports {
    fn default() -> Self {
        Self { inner: Mutex::new(Inner::default()), changed: watch::Sender::new(0) }
    }
}

impl Reports {
    /// Puts a report in the place of the instance's older one, if it says anything new. Sets its id and number.
    pub fn publish(&self, instance: &InstanceId, mut report: InstanceReport) {
        let mut inner = self.inner.lock();
        report.instance_id = instance.to_string();
        if let Some(old) = inner.newest.get(instance) {
            report.sequence = old.sequence;
            if *old == report {
                return;
            }
        }
        inner.sequence += 1;
        report.sequence = inner.sequence;
        inner.newest.insert(instance.clone(), report);
        self.changed.send_replace(inner.sequence);
    }

    /// Tells how far the making of an instance is.
    pub fn progress(&self, instance: &InstanceId, progress: Progress) {
        if let Some(report) = self.get(instance) {
            self.publish(instance, InstanceReport { progress: Some(progress), ..report });
        }
    }

    /// Forgets instances that are gone and that `wanted` does not name: the control plane knows.
    pub fn forget_gone(&self, wanted: impl Fn(&InstanceId) -> bool) {
        let gone = hearth_proto::v1::ObservedState::Gone;
        self.inner.lock().newest.retain(|id, report| report.state() != gone || wanted(id));
    }

    /// The newest report of an instance.
    pub fn get(&self, instance: &InstanceId) -> Option<InstanceReport> {
        self.inner.lock().newest.get(instance).cloned()
    }

    /// Puts a report in the place of the volume's older one.
    pub fn publish_volume(&self, report: VolumeReport) {
        let mut inner = self.inner.lock();
        inner.sequence += 1;
        let number = inner.sequence;
        inner.volumes.insert(report.volume_id.clone(), (number, report));
        self.changed.send_replace(number);
    }

    /// Puts a report in the place of the snapshot's older one.
    pub fn publish_snapshot(&self, report: SnapshotReport) {
        let mut inner = self.inner.lock();
        inner.sequence += 1;
        let number = inner.sequence;
        inner.snapshots.insert(report.snapshot_id.clone(), (number, report));
        self.changed.send_replace(number);
    }

    /// The newest report of a snapshot.
    pub fn snapshot(&self, id: &str) -> Option<SnapshotReport> {
        self.inner.lock().snapshots.get(id).map(|(_, report)| report.clone())
    }

    /// Puts a report in the place of the bundle's older one.
    pub fn publish_bundle(&self, report: BundleReport) {
        let mut inner = self.inner.lock();
        inner.sequence += 1;
        let number = inner.sequence;
        inner.bundles.insert(report.bundle_id.clone(), (number, report));
        self.changed.send_replace(number);
    }

    /// The newest report of a bundle.
    pub fn bundle(&self, id: &str) -> Option<BundleReport> {
        self.inner.lock().bundles.get(id).map(|(_, report)| report.clone())
    }

    /// Forgets bundles that the control plane does not ask about any more.
    pub fn forget_bundles(&self, wanted: impl Fn(&str) -> bool) {
        self.inner.lock().bundles.retain(|id, _| wanted(id));
    }

    /// Puts a report in the place of the older one of the same snapshot, if it says anything new.
    pub fn publish_fill(&self, report: FillReport) {
        let mut inner = self.inner.lock();
        if inner.fills.get(&report.snapshot_id).is_some_and(|(_, old)| *old == report) {
            return;
        }
        inner.sequence += 1;
        let number = inner.sequence;
        inner.fills.insert(report.snapshot_id.clone(), (number, report));
        self.changed.send_replace(number);
    }

    /// Forgets snapshots that this host need not have any more.
    pub fn forget_fills(&self, wanted: impl Fn(&str) -> bool) {
        self.inner.lock().fills.retain(|id, _| wanted(id));
    }

    /// Forgets volumes and snapshots that the control plane does not ask about any more.
    pub fn forget_others(&self, volumes: impl Fn(&str) -> bool, snapshots: impl Fn(&str) -> bool) {
        let mut inner = self.inner.lock();
        inner.volumes.retain(|id, _| volumes(id));
        inner.snapshots.retain(|id, _| snapshots(id));
    }

    /// Reports numbered above `sent`, in order, and the number of the last one.
    pub fn after(&self, sent: u64) -> (u64, Vec<AnyReport>) {
        let inner = self.inner.lock();
        let mut reports: Vec<(u64, AnyReport)> = Vec::new();
        let new = |number: &u64| *number > sent;
        reports.extend(
            inner.newest.values().filter(|r| new(&r.sequence)).map(|r| (r.sequence, AnyReport::Instance(r.clone()))),
        );
        reports.extend(inner.volumes.values().filter(|(n, _)| new(n)).map(|(n, r)| (*n, AnyReport::Volume(r.clone()))));
        reports.extend(
            inner.snapshots.values().filter(|(n, _)| new(n)).map(|(n, r)| (*n, AnyReport::Snapshot(r.clone()))),
        );
        reports.extend(inner.bundles.values().filter(|(n, _)| new(n)).map(|(n, r)| (*n, AnyReport::Bundle(r.clone()))));
        reports.extend(inner.fills.values().filter(|(n, _)| new(n)).map(|(n, r)| (*n, AnyReport::Fill(r.clone()))));
        reports.sort_by_key(|(number, _)| *number);
        let last = reports.last().map_or(sent, |(number, _)| *number);
        (last, reports.into_iter().map(|(_, report)| report).collect())
    }

    /// All reports. Its number is the newest report's.
    pub fn full(&self) -> FullReport {
        let inner = self.inner.lock();
        let mut instances: Vec<_> = inner.newest.values().cloned().collect();
        instances.sort_by_key(|report| report.sequence);
        let volumes = inner.volumes.values().map(|(_, report)| report.clone()).collect();
        let snapshots = inner.snapshots.values().map(|(_, report)| report.clone()).collect();
        let fills = inner.fills.values().map(|(_, report)| report.clone()).collect();
        FullReport { sequence: inner.sequence, instances, volumes, snapshots, fills }
    }

    /// Tells of new reports: the number of the newest.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hearth_proto::v1::ObservedState;

    #[test]
    fn only_news_is_numbered_and_sent() {
        let reports = Reports::default();
        let watch = reports.watch();
        let (a, b): (InstanceId, InstanceId) = (InstanceId::generate().unwrap(), InstanceId::generate().unwrap());
        let report = |state: ObservedState| InstanceReport { state: state.into(), ..InstanceReport::default() };
        reports.publish(&a, report(ObservedState::Preparing));
        reports.publish(&b, report(ObservedState::Preparing));
        reports.publish(&a, report(ObservedState::Preparing));
        assert_eq!(*watch.borrow(), 2);
        reports.publish(&a, report(ObservedState::Running));
        let (last, after) = reports.after(2);
        let AnyReport::Instance(only) = &after[0] else { panic!("not an instance") };
        assert_eq!((last, after.len(), only.instance_id.as_str(), only.sequence), (3, 1, a.as_str(), 3));
        let full = reports.full();
        assert_eq!((full.sequence, full.instances.len()), (3, 2));
        reports.publish(&b, report(ObservedState::Gone));
        reports.forget_gone(|_| true);
        assert_eq!(reports.full().instances.len(), 2);
        reports.forget_gone(|_| false);
        assert_eq!(reports.full().instances.len(), 1);
    }
}
