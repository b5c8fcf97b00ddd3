//! Tasks: images that are stored, root volumes that are replaced.

use hearth_proto::v1::{
    ReplaceRootVolumeTask, ReplaceRootVolumeTaskState, RestoreImageTask, StoreImageTask, StoreImageTaskState,
};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{enum_name, reason};
use crate::human;
use crate::output::View;

/// State of a task that stores an image or makes one of a stored one.
pub fn store_state(state: StoreImageTaskState) -> String {
    enum_name(state.as_str_name(), "STORE_IMAGE_TASK_STATE_")
}

/// EC2's state of a task that replaces a root volume.
pub fn replacement_state(state: ReplaceRootVolumeTaskState) -> String {
    enum_name(state.as_str_name(), "REPLACE_ROOT_VOLUME_TASK_STATE_")
}

fn state_cell(state: StoreImageTaskState, progress: u32) -> String {
    let words = store_state(state);
    match state {
        StoreImageTaskState::InProgress => format!("{words} ({} %)", progress.min(100)),
        _ => words,
    }
}

impl View for StoreImageTask {
    const COLUMNS: &'static [&'static str] = &["IMAGE", "STATE", "AGE", "OBJECT", "TASK"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        vec![
            self.image_id.clone(),
            state_cell(self.state(), self.progress),
            human::age(&self.start_time, OffsetDateTime::now_utc()),
            self.object_key.clone(),
            self.task_id.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "task_id": self.task_id,
            "image_id": self.image_id,
            "object_key": self.object_key,
            "state": store_state(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "progress": self.progress,
            "start_time": self.start_time,
        })
    }

    fn id(&self) -> String {
        self.task_id.clone()
    }
}

impl View for RestoreImageTask {
    const COLUMNS: &'static [&'static str] = &["IMAGE", "STATE", "AGE", "OBJECT", "TASK", "SNAPSHOTS"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        vec![
            self.image_id.clone(),
            state_cell(self.state(), self.progress),
            human::age(&self.start_time, OffsetDateTime::now_utc()),
            self.object_key.clone(),
            self.task_id.clone(),
            self.snapshot_ids.join(","),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "task_id": self.task_id,
            "image_id": self.image_id,
            "object_key": self.object_key,
            "snapshot_ids": self.snapshot_ids,
            "state": store_state(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "progress": self.progress,
            "start_time": self.start_time,
        })
    }

    fn id(&self) -> String {
        self.task_id.clone()
    }
}

impl View for ReplaceRootVolumeTask {
    const COLUMNS: &'static [&'static str] =
        &["TASK", "STATE", "INSTANCE", "VOLUME", "REPLACED", "AGE", "FROM", "DELETES REPLACED"];
    const NARROW: usize = 6;

    fn cells(&self) -> Vec<String> {
        vec![
            self.task_id.clone(),
            replacement_state(self.state()),
            self.instance_id.clone(),
            self.volume_id.clone(),
            self.replaced_volume_id.clone(),
            human::age(&self.start_time, OffsetDateTime::now_utc()),
            if self.image_id.is_empty() { self.snapshot_id.clone() } else { self.image_id.clone() },
            if self.delete_replaced_root_volume { "yes" } else { "no" }.to_owned(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "task_id": self.task_id,
            "instance_id": self.instance_id,
            "state": replacement_state(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "snapshot_id": self.snapshot_id,
            "image_id": self.image_id,
            "volume_id": self.volume_id,
            "replaced_volume_id": self.replaced_volume_id,
            "delete_replaced_root_volume": self.delete_replaced_root_volume,
            "start_time": self.start_time,
            "complete_time": self.complete_time,
        })
    }

    fn id(&self) -> String {
        self.task_id.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_has_its_cell() {
        let mut store = StoreImageTask { progress: 3, ..Default::default() };
        store.set_state(StoreImageTaskState::InProgress);
        assert_eq!(store.cells()[1], "in-progress (3 %)");
        assert_eq!(store.cells().len(), StoreImageTask::COLUMNS.len());
        let mut restore = RestoreImageTask { progress: 40, ..Default::default() };
        restore.set_state(StoreImageTaskState::InProgress);
        assert_eq!(restore.cells()[1], "in-progress (40 %)");
        assert_eq!(restore.cells().len(), RestoreImageTask::COLUMNS.len());
        let mut replace = ReplaceRootVolumeTask { snapshot_id: "snap-1".into(), ..Default::default() };
        replace.set_state(ReplaceRootVolumeTaskState::FailedDetached);
        assert_eq!((replace.cells()[1].as_str(), replace.cells()[6].as_str()), ("failed-detached", "snap-1"));
        assert_eq!(replace.cells().len(), ReplaceRootVolumeTask::COLUMNS.len());
    }
}
