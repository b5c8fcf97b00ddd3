//! Instances and their types.

use hearth_proto::v1::{Instance, InstanceState, InstanceTypeInfo, StatusCheck};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::volume::attachment_name;
use super::{enum_name, reason, resources, tag_value, tags, tags_cell};
use crate::human;
use crate::output::View;

/// EC2's name of an instance state.
pub fn state_name(state: InstanceState) -> String {
    enum_name(state.as_str_name(), "INSTANCE_STATE_")
}

fn check_name(check: StatusCheck) -> String {
    enum_name(check.as_str_name(), "STATUS_CHECK_")
}

/// The tag Name.
pub fn name(instance: &Instance) -> &str {
    tag_value(&instance.tags, "Name")
}

/// First address.
pub fn address(instance: &Instance) -> &str {
    instance.network_interfaces.first().map(|nic| nic.private_ip_address.as_str()).unwrap_or_default()
}

/// State, with what is being done or went wrong.
fn state_cell(instance: &Instance) -> String {
    let state = state_name(instance.state());
    match instance.progress.as_ref().filter(|progress| !progress.step.is_empty()) {
        Some(p) if instance.state() == InstanceState::Pending => {
            format!("{state} ({} {})", p.step, human::progress(p.done_bytes, p.total_bytes)).replace(" )", ")")
        }
        _ => state,
    }
}

/// The worse of both status checks.
fn status_cell(instance: &Instance) -> String {
    match (instance.system_status(), instance.instance_status()) {
        _ if instance.state() != InstanceState::Running => String::new(),
        (StatusCheck::Ok, StatusCheck::Ok) => "ok".to_owned(),
        (StatusCheck::Ok, other) | (other, _) => check_name(other),
    }
}

impl View for Instance {
    const COLUMNS: &'static [&'static str] = &[
        "INSTANCE", "NAME", "STATE", "STATUS", "TYPE", "ADDRESS", "AGE", "IMAGE", "HOST", "ZONE", "KEY", "TAGS",
        "REASON",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        vec![
            self.instance_id.clone(),
            name(self).to_owned(),
            state_cell(self),
            status_cell(self),
            self.instance_type.clone(),
            address(self).to_owned(),
            human::age(&self.launch_time, OffsetDateTime::now_utc()),
            self.image_id.clone(),
            self.host_id.clone(),
            self.availability_zone.clone(),
            self.key_name.clone(),
            tags_cell(&self.tags, "Name"),
            self.state_reason.as_ref().map(|reason| reason.code.clone()).unwrap_or_default(),
        ]
    }

    fn value(&self) -> Value {
        let nic = |nic: &hearth_proto::v1::NetworkInterface| {
            json!({
                "device_index": nic.device_index,
                "mac_address": nic.mac_address,
                "private_ip_address": nic.private_ip_address,
            })
        };
        let disk = |disk: &hearth_proto::v1::BlockDevice| {
            json!({
                "device_name": disk.device_name,
                "volume_id": disk.volume_id,
                "virtual_name": disk.virtual_name,
                // The states of instance store are those of its instance.
                "state": (!disk.volume_id.is_empty()).then(|| attachment_name(disk.state())),
                "size_bytes": disk.size_bytes,
                "delete_on_termination": (!disk.volume_id.is_empty()).then_some(disk.delete_on_termination),
                "serial": disk.serial,
            })
        };
        let progress = self.progress.as_ref().filter(|progress| !progress.step.is_empty());
        json!({
            "instance_id": self.instance_id,
            "name": name(self),
            "state": state_name(self.state()),
            "state_reason": reason(self.state_reason.as_ref()),
            "state_transition_reason": self.state_transition_reason,
            "system_status": check_name(self.system_status()),
            "instance_status": check_name(self.instance_status()),
            "progress": progress.map(|p| json!({
                "step": p.step, "done_bytes": p.done_bytes, "total_bytes": p.total_bytes,
            })),
            "instance_type": self.instance_type,
            "image_id": self.image_id,
            "key_name": self.key_name,
            "host_id": self.host_id,
            "availability_zone": self.availability_zone,
            "launch_time": self.launch_time,
            "root_device_name": self.root_device_name,
            "root_device_type": self.root_device_type,
            "network_interfaces": self.network_interfaces.iter().map(nic).collect::<Vec<_>>(),
            "block_devices": self.block_devices.iter().map(disk).collect::<Vec<_>>(),
            "reservation_id": self.reservation_id,
            "ami_launch_index": self.ami_launch_index,
            "account_id": self.account_id,
            "client_token": self.client_token,
            "instance_initiated_shutdown_behavior": self.instance_initiated_shutdown_behavior,
            "disable_api_termination": self.disable_api_termination,
            "tags": tags(&self.tags),
        })
    }

    fn id(&self) -> String {
        self.instance_id.clone()
    }
}

impl View for InstanceTypeInfo {
    const COLUMNS: &'static [&'static str] =
        &["TYPE", "VCPU", "MEMORY", "ECU", "INSTANCE STORE", "NETWORK MBIT/S", "EBS MBIT/S", "MAX INTERFACES"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        let r = self.resources.unwrap_or_default();
        let limit = |mbps: u64| if mbps == 0 { "no limit".to_owned() } else { mbps.to_string() };
        let disks = self.instance_store_gib.iter().map(|gib| format!("{gib} GiB")).collect::<Vec<_>>().join(" + ");
        vec![
            self.name.clone(),
            r.vcpus.to_string(),
            human::bytes(r.memory_mib << 20),
            if r.ecu_milli == 0 { "whole threads".to_owned() } else { human::ecu(r.ecu_milli) },
            disks,
            limit(self.network_mbps),
            limit(self.ebs_mbps),
            self.max_network_interfaces.to_string(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "instance_type": self.name,
            "resources": resources(self.resources.as_ref()),
            "instance_store_gib": self.instance_store_gib,
            "network_mbps": self.network_mbps,
            "ebs_mbps": self.ebs_mbps,
            "max_network_interfaces": self.max_network_interfaces,
        })
    }

    fn id(&self) -> String {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::OutputForm;
    use crate::output::render_one;
    use hearth_proto::v1::{AttachmentState, BlockDevice};

    #[test]
    fn disks_show_volume_and_state() {
        let volume = BlockDevice {
            device_name: "/dev/sdf".into(),
            volume_id: "vol-1".into(),
            state: AttachmentState::Attaching.into(),
            ..Default::default()
        };
        let store =
            BlockDevice { device_name: "/dev/sdb".into(), virtual_name: "ephemeral0".into(), ..Default::default() };
        let instance = Instance { block_devices: vec![volume, store], ..Instance::default() };
        let value = instance.value();
        assert_eq!(
            (&value["block_devices"][0]["state"], &value["block_devices"][1]["state"]),
            (&json!("attaching"), &Value::Null)
        );
        assert_eq!(value["block_devices"][0]["delete_on_termination"], false);
        let fields = render_one(&instance, OutputForm::Table).unwrap();
        assert!(fields.contains("device name /dev/sdf, volume id vol-1, state attaching"), "{fields}");
        assert!(fields.contains("device name /dev/sdb, virtual name ephemeral0, size"), "{fields}");
        assert_eq!(instance.cells().len(), Instance::COLUMNS.len());
    }
}
