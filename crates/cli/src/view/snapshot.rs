//! Snapshots.

use hearth_proto::v1::{Snapshot, SnapshotState};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{enum_name, reason, tag_value, tags, tags_cell};
use crate::human;
use crate::output::View;

/// EC2's name of a snapshot state.
pub fn state_name(state: SnapshotState) -> String {
    enum_name(state.as_str_name(), "SNAPSHOT_STATE_")
}

/// The tag Name.
pub fn name(snapshot: &Snapshot) -> &str {
    tag_value(&snapshot.tags, "Name")
}

fn state_cell(snapshot: &Snapshot) -> String {
    let state = state_name(snapshot.state());
    match snapshot.state() {
        SnapshotState::Pending => format!("{state} ({} %)", snapshot.progress.min(100)),
        _ => state,
    }
}

impl View for Snapshot {
    const COLUMNS: &'static [&'static str] = &[
        "SNAPSHOT",
        "NAME",
        "STATE",
        "VOLUME SIZE",
        "ADDED",
        "VOLUME",
        "AGE",
        "CONTENT",
        "ENCRYPTED",
        "TAGS",
        "DESCRIPTION",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        vec![
            self.snapshot_id.clone(),
            name(self).to_owned(),
            state_cell(self),
            human::bytes(self.volume_size_bytes),
            human::bytes(self.incremental_bytes),
            self.volume_id.clone(),
            human::age(&self.start_time, OffsetDateTime::now_utc()),
            human::bytes(self.full_snapshot_bytes),
            if self.encrypted { "yes" } else { "no" }.to_owned(),
            tags_cell(&self.tags, "Name"),
            self.description.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "snapshot_id": self.snapshot_id,
            "name": name(self),
            "description": self.description,
            "state": state_name(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "progress": self.progress,
            "volume_id": self.volume_id,
            "volume_size_bytes": self.volume_size_bytes,
            "incremental_bytes": self.incremental_bytes,
            "full_snapshot_bytes": self.full_snapshot_bytes,
            "encrypted": self.encrypted,
            "start_time": self.start_time,
            "completion_time": self.completion_time,
            "account_id": self.account_id,
            "tags": tags(&self.tags),
        })
    }

    fn id(&self) -> String {
        self.snapshot_id.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_in_the_making_shows_how_far_it_is() {
        let mut snapshot = Snapshot {
            snapshot_id: "snap-1".to_owned(),
            state: SnapshotState::Pending.into(),
            progress: 45,
            incremental_bytes: 3 << 20,
            ..Snapshot::default()
        };
        assert_eq!(snapshot.cells()[2], "pending (45 %)");
        snapshot.set_state(SnapshotState::Completed);
        assert_eq!((snapshot.cells()[2].as_str(), snapshot.cells()[4].as_str()), ("completed", "3 MiB"));
        assert_eq!(snapshot.cells().len(), Snapshot::COLUMNS.len());
        assert_eq!(snapshot.value()["state"], "completed");
    }
}
