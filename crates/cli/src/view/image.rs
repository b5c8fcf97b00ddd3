//! Images.

use hearth_proto::v1::{Image, ImageState};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{enum_name, reason, tags, tags_cell};
use crate::human;
use crate::output::View;

/// EC2's name of an image state.
pub fn state_name(state: ImageState) -> String {
    enum_name(state.as_str_name(), "IMAGE_STATE_")
}

impl View for Image {
    const COLUMNS: &'static [&'static str] =
        &["IMAGE", "NAME", "STATE", "SIZE", "AGE", "ARCHITECTURE", "TAGS", "DESCRIPTION"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.image_id.clone(),
            self.name.clone(),
            state_name(self.state()),
            human::bytes(self.size_bytes),
            human::age(&self.creation_date, OffsetDateTime::now_utc()),
            self.architecture.clone(),
            tags_cell(&self.tags, ""),
            self.description.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "image_id": self.image_id,
            "name": self.name,
            "description": self.description,
            "state": state_name(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "architecture": self.architecture,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "root_device_name": self.root_device_name,
            "boot": self.boot.as_ref().map(|boot| json!({"cmdline": boot.cmdline, "extra_cmdline": boot.extra_cmdline})),
            "creation_date": self.creation_date,
            "account_id": self.account_id,
            "tags": tags(&self.tags),
        })
    }

    fn id(&self) -> String {
        self.image_id.clone()
    }
}
