//! Volumes, their attachments and modifications.

use hearth_proto::v1::{AttachmentState, Volume, VolumeAttachment, VolumeModification, VolumeState, VolumeStatus};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{enum_name, reason, tag_value, tags, tags_cell};
use crate::human;
use crate::output::View;

/// EC2's name of a volume state.
pub fn state_name(state: VolumeState) -> String {
    enum_name(state.as_str_name(), "VOLUME_STATE_")
}

/// EC2's name of an attachment's state.
pub fn attachment_name(state: AttachmentState) -> String {
    enum_name(state.as_str_name(), "ATTACHMENT_STATE_")
}

fn status_name(status: VolumeStatus) -> String {
    enum_name(status.as_str_name(), "VOLUME_STATUS_")
}

/// The volume's attachment to an instance.
pub fn attachment_to<'a>(volume: &'a Volume, instance_id: &str) -> Option<&'a VolumeAttachment> {
    volume.attachments.iter().find(|attachment| attachment.instance_id == instance_id)
}

/// The tag Name.
pub fn name(volume: &Volume) -> &str {
    tag_value(&volume.tags, "Name")
}

/// State, with what is happening to the attachment.
fn state_cell(volume: &Volume) -> String {
    let state = state_name(volume.state());
    match volume.attachments.first().map(VolumeAttachment::state) {
        None | Some(AttachmentState::Attached | AttachmentState::Unspecified) => state,
        Some(attachment) => format!("{state} ({})", attachment_name(attachment)),
    }
}

/// "3000", or that there is no limit.
fn limit(figure: u32) -> String {
    if figure == 0 { "no limit".to_owned() } else { figure.to_string() }
}

fn backend(volume: &Volume) -> String {
    if volume.backend.is_empty() { "local".to_owned() } else { volume.backend.clone() }
}

fn yes_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

impl View for Volume {
    const COLUMNS: &'static [&'static str] = &[
        "VOLUME",
        "NAME",
        "STATE",
        "STATUS",
        "SIZE",
        "TYPE",
        "INSTANCE",
        "DEVICE",
        "AGE",
        "IOPS",
        "MIB/S",
        "SNAPSHOT",
        "ZONE",
        "HOST",
        "ENCRYPTED",
        "BACKEND",
        "TAGS",
    ];
    const NARROW: usize = 9;

    fn cells(&self) -> Vec<String> {
        let attachment = self.attachments.first().cloned().unwrap_or_default();
        vec![
            self.volume_id.clone(),
            name(self).to_owned(),
            state_cell(self),
            status_name(self.status()),
            human::bytes(self.size_bytes),
            self.volume_type.clone(),
            attachment.instance_id,
            attachment.device,
            human::age(&self.create_time, OffsetDateTime::now_utc()),
            limit(self.iops),
            limit(self.throughput_mibps),
            self.snapshot_id.clone(),
            self.availability_zone.clone(),
            self.host_id.clone(),
            yes_no(self.encrypted),
            backend(self),
            tags_cell(&self.tags, "Name"),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "volume_id": self.volume_id,
            "name": name(self),
            "state": state_name(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "status": status_name(self.status()),
            "status_detail": self.status_detail,
            "size_bytes": self.size_bytes,
            "volume_type": self.volume_type,
            "iops": self.iops,
            "throughput_mibps": self.throughput_mibps,
            "snapshot_id": self.snapshot_id,
            "encrypted": self.encrypted,
            "availability_zone": self.availability_zone,
            "host_id": self.host_id,
            "backend": backend(self),
            "create_time": self.create_time,
            "attachments": self.attachments.iter().map(View::value).collect::<Vec<_>>(),
            "modification": self.modification.as_ref().map(View::value),
            "account_id": self.account_id,
            "tags": tags(&self.tags),
        })
    }

    fn id(&self) -> String {
        self.volume_id.clone()
    }
}

impl View for VolumeAttachment {
    const COLUMNS: &'static [&'static str] =
        &["VOLUME", "INSTANCE", "DEVICE", "STATE", "SERIAL", "DELETED WITH INSTANCE", "SINCE", "DETAIL"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.volume_id.clone(),
            self.instance_id.clone(),
            self.device.clone(),
            attachment_name(self.state()),
            self.serial.clone(),
            yes_no(self.delete_on_termination),
            human::age(&self.attach_time, OffsetDateTime::now_utc()),
            self.detail.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "volume_id": self.volume_id,
            "instance_id": self.instance_id,
            "device": self.device,
            "state": attachment_name(self.state()),
            "delete_on_termination": self.delete_on_termination,
            "attach_time": self.attach_time,
            "serial": self.serial,
            "progress": self.progress,
            "detail": self.detail,
        })
    }

    fn id(&self) -> String {
        self.volume_id.clone()
    }
}

/// "8 GiB", or "8 GiB to 20 GiB" when it changes.
fn change<T: PartialEq>(from: &T, to: &T, show: impl Fn(&T) -> String) -> String {
    if from == to { show(to) } else { format!("{} to {}", show(from), show(to)) }
}

impl View for VolumeModification {
    const COLUMNS: &'static [&'static str] =
        &["VOLUME", "STATE", "PROGRESS", "SIZE", "TYPE", "IOPS", "MIB/S", "AGE", "MESSAGE"];
    const NARROW: usize = 8;

    fn cells(&self) -> Vec<String> {
        vec![
            self.volume_id.clone(),
            self.modification_state.clone(),
            format!("{} %", self.progress),
            change(&self.original_size_bytes, &self.target_size_bytes, |size| human::bytes(*size)),
            change(&self.original_volume_type, &self.target_volume_type, String::clone),
            change(&self.original_iops, &self.target_iops, |iops| limit(*iops)),
            change(&self.original_throughput_mibps, &self.target_throughput_mibps, |mibps| limit(*mibps)),
            human::age(&self.start_time, OffsetDateTime::now_utc()),
            self.status_message.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "volume_id": self.volume_id,
            "modification_state": self.modification_state,
            "status_message": self.status_message,
            "progress": self.progress,
            "original_size_bytes": self.original_size_bytes,
            "original_volume_type": self.original_volume_type,
            "original_iops": self.original_iops,
            "original_throughput_mibps": self.original_throughput_mibps,
            "target_size_bytes": self.target_size_bytes,
            "target_volume_type": self.target_volume_type,
            "target_iops": self.target_iops,
            "target_throughput_mibps": self.target_throughput_mibps,
            "start_time": self.start_time,
            "end_time": self.end_time,
        })
    }

    fn id(&self) -> String {
        self.volume_id.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::OutputForm;
    use crate::output::{render_list, render_one};

    fn volume() -> Volume {
        let attachment = VolumeAttachment {
            volume_id: "vol-1".to_owned(),
            instance_id: "i-1".to_owned(),
            device: "/dev/sdf".to_owned(),
            state: AttachmentState::Busy.into(),
            ..VolumeAttachment::default()
        };
        Volume {
            volume_id: "vol-1".to_owned(),
            state: VolumeState::InUse.into(),
            status: VolumeStatus::InsufficientData.into(),
            size_bytes: 10 << 30,
            volume_type: "gp3".to_owned(),
            iops: 3000,
            attachments: vec![attachment],
            ..Volume::default()
        }
    }

    #[test]
    fn a_volume_shows_where_it_is() {
        let table = render_list(&[volume()], OutputForm::Wide).unwrap();
        for cell in ["in-use (busy)", "insufficient-data", "10 GiB", "i-1", "/dev/sdf", "3000", "no limit"] {
            assert!(table.contains(cell), "{cell}: {table}");
        }
        assert_eq!(Volume::COLUMNS.len(), volume().cells().len());
        let fields = render_one(&volume(), OutputForm::Table).unwrap();
        assert!(fields.contains("instance id i-1, device /dev/sdf, state busy"), "{fields}");
        let mut attached = volume();
        attached.attachments[0].set_state(AttachmentState::Attached);
        assert_eq!(state_cell(&attached), "in-use");
        assert!(attachment_to(&attached, "i-1").is_some() && attachment_to(&attached, "i-2").is_none());
    }

    #[test]
    fn a_modification_shows_what_changes() {
        let modification = VolumeModification {
            volume_id: "vol-1".to_owned(),
            modification_state: "modifying".to_owned(),
            original_size_bytes: 8 << 30,
            target_size_bytes: 20 << 30,
            original_volume_type: "gp3".to_owned(),
            target_volume_type: "gp3".to_owned(),
            original_iops: 3000,
            ..VolumeModification::default()
        };
        let cells = modification.cells();
        assert_eq!(cells[3..6], ["8 GiB to 20 GiB", "gp3", "3000 to no limit"]);
        assert_eq!(cells.len(), VolumeModification::COLUMNS.len());
    }

    #[test]
    fn an_attachment_has_a_cell_for_each_column() {
        let attachment = volume().attachments.remove(0);
        assert_eq!(attachment.cells().len(), VolumeAttachment::COLUMNS.len());
        assert_eq!(attachment.value()["state"], "busy");
    }
}
