//! Bundle tasks.

use hearth_proto::v1::{BundleTask, BundleTaskState};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{enum_name, reason};
use crate::human;
use crate::output::View;

/// EC2's name of a bundle task's state.
pub fn state_name(state: BundleTaskState) -> String {
    enum_name(state.as_str_name(), "BUNDLE_TASK_STATE_")
}

/// What is packed: an instance or an image.
fn source(task: &BundleTask) -> &str {
    if task.instance_id.is_empty() { &task.image_id } else { &task.instance_id }
}

fn state_cell(task: &BundleTask) -> String {
    let state = state_name(task.state());
    match task.state() {
        BundleTaskState::Storing => format!("{state} ({} %)", task.progress.min(100)),
        _ => state,
    }
}

impl View for BundleTask {
    const COLUMNS: &'static [&'static str] = &["BUNDLE", "STATE", "OF", "AGE", "LOCATION"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.bundle_id.clone(),
            state_cell(self),
            source(self).to_owned(),
            human::age(&self.start_time, OffsetDateTime::now_utc()),
            self.image_location.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "bundle_id": self.bundle_id,
            "state": state_name(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "progress": self.progress,
            "instance_id": self.instance_id,
            "image_id": self.image_id,
            "image_location": self.image_location,
            "start_time": self.start_time,
            "update_time": self.update_time,
        })
    }

    fn id(&self) -> String {
        self.bundle_id.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_in_the_making_shows_how_far_it_is() {
        let mut task = BundleTask { image_id: "ami-1".to_owned(), progress: 12, ..BundleTask::default() };
        task.set_state(BundleTaskState::Storing);
        assert_eq!(task.cells()[1..3], ["storing (12 %)", "ami-1"]);
        task.set_state(BundleTaskState::Complete);
        task.instance_id = "i-1".to_owned();
        assert_eq!(task.cells()[1..3], ["complete", "i-1"]);
        assert_eq!(task.cells().len(), BundleTask::COLUMNS.len());
    }
}
