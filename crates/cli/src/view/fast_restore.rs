//! Snapshots that hosts have or fetch whole.

use hearth_proto::v1::{FastSnapshotRestore, FastSnapshotRestoreState};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::enum_name;
use crate::human;
use crate::output::View;

/// EC2's state.
pub fn state(state: FastSnapshotRestoreState) -> String {
    enum_name(state.as_str_name(), "FAST_SNAPSHOT_RESTORE_STATE_")
}

/// With an id that tells it from the same snapshot on other hosts or in other zones.
pub fn key(one: FastSnapshotRestore) -> FastSnapshotRestore {
    let snapshot_id = one.id();
    FastSnapshotRestore { snapshot_id, ..one }
}

impl View for FastSnapshotRestore {
    const COLUMNS: &'static [&'static str] = &["SNAPSHOT", "HOSTS", "STATE", "ZONE", "AGE", "REASON"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        let words = state(self.state());
        vec![
            self.snapshot_id.clone(),
            match self.host_id.as_str() {
                "" => format!("{} of {}", self.enabled_hosts, self.hosts),
                _ => self.host_name.clone(),
            },
            match self.state() {
                FastSnapshotRestoreState::Optimizing => format!("{words} ({} %)", self.progress.min(100)),
                _ => words,
            },
            self.availability_zone.clone(),
            human::age(&self.enabling_time, OffsetDateTime::now_utc()),
            self.reason.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "snapshot_id": self.snapshot_id,
            "host_id": self.host_id,
            "host_name": self.host_name,
            "availability_zone": self.availability_zone,
            "state": state(self.state()),
            "progress": self.progress,
            "reason": self.reason,
            "enabling_time": self.enabling_time,
            "hosts": self.hosts,
            "enabled_hosts": self.enabled_hosts,
        })
    }

    fn id(&self) -> String {
        let place = if self.host_id.is_empty() { &self.availability_zone } else { &self.host_id };
        format!("{}/{place}", self.snapshot_id)
    }
}
