//! Hosts.

use hearth_proto::v1::{Host, HostState, Resources};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{resources, tags, tags_cell};
use crate::human;
use crate::output::View;

fn state_name(host: &Host) -> String {
    let state = match host.state() {
        HostState::Draining => "draining",
        HostState::Active => "active",
        HostState::Unspecified => "unknown",
    };
    if host.connected { state.to_owned() } else { format!("{state}, silent") }
}

/// "3/8": taken of all.
fn share(taken: u64, all: u64) -> String {
    format!("{taken}/{all}")
}

impl View for Host {
    const COLUMNS: &'static [&'static str] = &[
        "HOST",
        "NAME",
        "STATE",
        "INSTANCES",
        "VCPU",
        "MEMORY",
        "ZONE",
        "ECU",
        "INSTANCE STORE",
        "SEEN",
        "AGENT",
        "KERNEL",
        "ADDRESSES",
        "LABELS",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        let (all, taken) = (self.capacity.unwrap_or_default(), self.allocated.unwrap_or_default());
        vec![
            self.host_id.clone(),
            self.name.clone(),
            state_name(self),
            self.instance_count.to_string(),
            share(taken.vcpus.into(), all.vcpus.into()),
            format!("{} of {}", human::bytes(taken.memory_mib << 20), human::bytes(all.memory_mib << 20)),
            self.availability_zone.clone(),
            format!("{}/{}", human::ecu(taken.ecu_milli), human::ecu(all.ecu_milli)),
            format!("{} of {}", human::bytes(taken.instance_store_bytes), human::bytes(all.instance_store_bytes)),
            human::age(&self.last_seen, OffsetDateTime::now_utc()),
            self.agent_version.clone(),
            self.kernel_version.clone(),
            self.instance_cidr.clone(),
            tags_cell(&self.labels, ""),
        ]
    }

    fn value(&self) -> Value {
        let free = |all: Resources, taken: Resources| Resources {
            vcpus: all.vcpus.saturating_sub(taken.vcpus),
            memory_mib: all.memory_mib.saturating_sub(taken.memory_mib),
            ecu_milli: all.ecu_milli.saturating_sub(taken.ecu_milli),
            instance_store_bytes: all.instance_store_bytes.saturating_sub(taken.instance_store_bytes),
        };
        let free = self.capacity.map(|all| free(all, self.allocated.unwrap_or_default()));
        json!({
            "host_id": self.host_id,
            "name": self.name,
            "state": if self.state() == HostState::Draining { "draining" } else { "active" },
            "connected": self.connected,
            "last_seen": self.last_seen,
            "availability_zone": self.availability_zone,
            "instance_count": self.instance_count,
            "capacity": resources(self.capacity.as_ref()),
            "allocated": resources(self.allocated.as_ref()),
            "free": resources(free.as_ref()),
            "agent_version": self.agent_version,
            "kernel_version": self.kernel_version,
            "boot_id": self.boot_id,
            "instance_cidr": self.instance_cidr,
            "labels": tags(&self.labels),
        })
    }

    fn id(&self) -> String {
        self.host_id.clone()
    }
}
