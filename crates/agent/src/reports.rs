//! What the control plane is to know of each instance: the newest report of each, and what of it a session has sent.

use std::collections::HashMap;

use hearth_proto::v1::{FullReport, InstanceReport};
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

    /// Forgets instances that are gone and that `wanted` does not name: the control plane knows.
    pub fn forget_gone(&self, wanted: impl Fn(&InstanceId) -> bool) {
        let gone = hearth_proto::v1::ObservedState::Gone;
        self.inner.lock().newest.retain(|id, report| report.state() != gone || wanted(id));
    }

    /// The newest report of an instance.
    pub fn get(&self, instance: &InstanceId) -> Option<InstanceReport> {
        self.inner.lock().newest.get(instance).cloned()
    }

    /// Reports numbered above `sent`, in order.
    pub fn after(&self, sent: u64) -> Vec<InstanceReport> {
        let mut reports: Vec<_> = self.inner.lock().newest.values().filter(|r| r.sequence > sent).cloned().collect();
        reports.sort_by_key(|report| report.sequence);
        reports
    }

    /// All reports. Its number is the newest report's.
    pub fn full(&self) -> FullReport {
        let inner = self.inner.lock();
        let mut instances: Vec<_> = inner.newest.values().cloned().collect();
        instances.sort_by_key(|report| report.sequence);
        FullReport { sequence: inner.sequence, instances }
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
        let after = reports.after(2);
        assert_eq!((after.len(), after[0].instance_id.as_str(), after[0].sequence), (1, a.as_str(), 3));
        let full = reports.full();
        assert_eq!((full.sequence, full.instances.len()), (3, 2));
        reports.publish(&b, report(ObservedState::Gone));
        reports.forget_gone(|_| true);
        assert_eq!(reports.full().instances.len(), 2);
        reports.forget_gone(|_| false);
        assert_eq!(reports.full().instances.len(), 1);
    }
}
