//! Images.

use hearth_proto::v1::{BlockDeviceMapping, EbsBlockDevice, Image, ImageState};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use super::{enum_name, reason, tags, tags_cell};
use crate::human;
use crate::output::View;

/// EC2's name of an image state.
pub fn state_name(state: ImageState) -> String {
    enum_name(state.as_str_name(), "IMAGE_STATE_")
}

/// With how far a pending import is.
fn state_cell(image: &Image) -> String {
    let state = state_name(image.state());
    match &image.progress {
        Some(progress) => {
            let share = human::progress(progress.done_bytes, progress.total_bytes);
            format!("{state}, {} {share}", progress.step).trim_end().to_owned()
        }
        None => state,
    }
}

/// The snapshots of its disks.
pub fn snapshot_ids(image: &Image) -> Vec<String> {
    let volumes = image.block_device_mappings.iter().filter_map(|mapping| mapping.ebs.as_ref());
    volumes.map(|ebs| ebs.snapshot_id.clone()).filter(|id| !id.is_empty()).collect()
}

/// What is set, in one level: "ebs" is what has no other kind.
fn mapping(mapping: &BlockDeviceMapping) -> Value {
    let mut shown = Map::new();
    shown.insert("device_name".to_owned(), json!(mapping.device_name));
    match &mapping.ebs {
        Some(ebs) => shown.extend(volume(ebs)),
        None if mapping.no_device => drop(shown.insert("no_device".to_owned(), json!(true))),
        None => drop(shown.insert("virtual_name".to_owned(), json!(mapping.virtual_name))),
    }
    Value::Object(shown)
}

fn volume(ebs: &EbsBlockDevice) -> impl Iterator<Item = (String, Value)> {
    let text = |text: &str| (!text.is_empty()).then(|| json!(text));
    let fields = [
        ("snapshot_id", text(&ebs.snapshot_id)),
        ("volume_size_bytes", (ebs.volume_size_bytes > 0).then(|| json!(ebs.volume_size_bytes))),
        ("volume_type", text(&ebs.volume_type)),
        ("iops", ebs.iops.map(|iops| json!(iops))),
        ("throughput_mibps", ebs.throughput_mibps.map(|mibps| json!(mibps))),
        ("delete_on_termination", ebs.delete_on_termination.map(|on| json!(on))),
        ("encrypted", ebs.encrypted.map(|on| json!(on))),
    ];
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)))
}

impl View for Image {
    const COLUMNS: &'static [&'static str] =
        &["IMAGE", "NAME", "STATE", "SIZE", "AGE", "ROOT DEVICE", "ARCHITECTURE", "TAGS", "DESCRIPTION"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.image_id.clone(),
            self.name.clone(),
            state_cell(self),
            human::bytes(self.size_bytes),
            human::age(&self.creation_date, OffsetDateTime::now_utc()),
            self.root_device_type.clone(),
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
            "progress": self.progress.as_ref().map(|progress| json!({
                "step": progress.step, "done_bytes": progress.done_bytes, "total_bytes": progress.total_bytes,
            })),
            "upload_expires": self.upload_expires,
            "architecture": self.architecture,
            "size_bytes": self.size_bytes,
            "root_device_name": self.root_device_name,
            "root_device_type": self.root_device_type,
            "block_device_mappings": self.block_device_mappings.iter().map(mapping).collect::<Vec<_>>(),
            "image_location": self.image_location,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::OutputForm;
    use crate::output::render_one;

    #[test]
    fn mappings_show_what_is_set() {
        let ebs = EbsBlockDevice {
            snapshot_id: "snap-1".to_owned(),
            volume_size_bytes: 8 << 30,
            delete_on_termination: Some(true),
            ..EbsBlockDevice::default()
        };
        let root = BlockDeviceMapping { device_name: "/dev/sda1".into(), ebs: Some(ebs), ..Default::default() };
        let blank = BlockDeviceMapping {
            device_name: "/dev/sdf".into(),
            ebs: Some(EbsBlockDevice { iops: Some(0), ..Default::default() }),
            ..Default::default()
        };
        let store = BlockDeviceMapping {
            device_name: "/dev/sdb".into(),
            virtual_name: "ephemeral0".into(),
            ..Default::default()
        };
        let none = BlockDeviceMapping { device_name: "/dev/sdg".into(), no_device: true, ..Default::default() };
        let image = Image { block_device_mappings: vec![root, blank, store, none], ..Image::default() };
        assert_eq!(snapshot_ids(&image), ["snap-1"]);
        assert_eq!(
            image.value()["block_device_mappings"],
            json!([
                {"device_name": "/dev/sda1", "snapshot_id": "snap-1", "volume_size_bytes": 8u64 << 30, "delete_on_termination": true},
                {"device_name": "/dev/sdf", "iops": 0},
                {"device_name": "/dev/sdb", "virtual_name": "ephemeral0"},
                {"device_name": "/dev/sdg", "no_device": true},
            ])
        );
        let fields = render_one(&image, OutputForm::Table).unwrap();
        assert!(fields.contains("  device name /dev/sda1, snapshot id snap-1, "), "{fields}");
        assert_eq!(image.cells().len(), Image::COLUMNS.len());
    }
}
