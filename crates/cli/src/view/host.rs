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

/// "3/16": taken of all that instances can be given.
fn share(taken: u64, all: u64) -> String {
    format!("{taken}/{all}")
}

/// What the scheduler gives out at most. Control planes before this field knew nothing but the capacity.
fn allocatable(host: &Host) -> Resources {
    host.allocatable.or(host.capacity).unwrap_or_default()
}

/// "8 x 2.00": threads of the machine, and how many vCPUs are offered for each.
fn threads(host: &Host) -> String {
    let threads = host.capacity.unwrap_or_default().vcpus;
    match host.vcpu_overcommit_percent {
        0 | 100 => threads.to_string(),
        percent => format!("{threads} x {}.{:02}", percent / 100, percent % 100),
    }
}

impl View for Host {
    const COLUMNS: &'static [&'static str] = &[
        "HOST",
        "NAME",
        "STATE",
        "INSTANCES",
        "VCPU USED",
        "MEMORY USED",
        "ZONE",
        "THREADS",
        "ECU",
        "INSTANCE STORE",
        "SEEN",
        "AGENT",
        "KERNEL",
        "ADDRESSES",
        "LABELS",
        "VOLUME BACKENDS",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        let (all, taken) = (allocatable(self), self.allocated.unwrap_or_default());
        vec![
            self.host_id.clone(),
            self.name.clone(),
            state_name(self),
            self.instance_count.to_string(),
            share(taken.vcpus.into(), all.vcpus.into()),
            format!("{} of {}", human::bytes(taken.memory_mib << 20), human::bytes(all.memory_mib << 20)),
            self.availability_zone.clone(),
            threads(self),
            format!("{}/{}", human::ecu(taken.ecu_milli), human::ecu(all.ecu_milli)),
            format!("{} of {}", human::bytes(taken.instance_store_bytes), human::bytes(all.instance_store_bytes)),
            human::age(&self.last_seen, OffsetDateTime::now_utc()),
            self.agent_version.clone(),
            self.kernel_version.clone(),
            self.instance_cidr.clone(),
            tags_cell(&self.labels, ""),
            self.volume_backends.join(","),
        ]
    }

    fn value(&self) -> Value {
        let free = |all: Resources, taken: Resources| Resources {
            vcpus: all.vcpus.saturating_sub(taken.vcpus),
            memory_mib: all.memory_mib.saturating_sub(taken.memory_mib),
            ecu_milli: all.ecu_milli.saturating_sub(taken.ecu_milli),
            instance_store_bytes: all.instance_store_bytes.saturating_sub(taken.instance_store_bytes),
        };
        let free = self.capacity.map(|_| free(allocatable(self), self.allocated.unwrap_or_default()));
        json!({
            "host_id": self.host_id,
            "name": self.name,
            "state": if self.state() == HostState::Draining { "draining" } else { "active" },
            "connected": self.connected,
            "last_seen": self.last_seen,
            "availability_zone": self.availability_zone,
            "instance_count": self.instance_count,
            "capacity": resources(self.capacity.as_ref()),
            "vcpu_overcommit_percent": self.vcpu_overcommit_percent,
            "allocatable": resources(self.capacity.map(|_| allocatable(self)).as_ref()),
            "allocated": resources(self.allocated.as_ref()),
            "free": resources(free.as_ref()),
            "agent_version": self.agent_version,
            "kernel_version": self.kernel_version,
            "boot_id": self.boot_id,
            "instance_cidr": self.instance_cidr,
            "volume_backends": self.volume_backends,
            "labels": tags(&self.labels),
        })
    }

    fn id(&self) -> String {
        self.host_id.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_is_compared_with_what_the_scheduler_gives_out() {
        let machine = Resources { vcpus: 8, memory_mib: 16384, ..Resources::default() };
        let mut host = Host {
            capacity: Some(machine),
            allocatable: Some(Resources { vcpus: 20, ..machine }),
            allocated: Some(Resources { vcpus: 9, memory_mib: 4096, ..Resources::default() }),
            vcpu_overcommit_percent: 250,
            ..Host::default()
        };
        let cell = |host: &Host, column: &str| {
            let at = Host::COLUMNS.iter().position(|name| *name == column).unwrap();
            host.cells()[at].clone()
        };
        assert_eq!((cell(&host, "VCPU USED"), cell(&host, "THREADS")), ("9/20".into(), "8 x 2.50".into()));
        let value = host.value();
        assert_eq!((&value["free"]["vcpus"], &value["allocatable"]["vcpus"]), (&json!(11), &json!(20)));
        assert_eq!((&value["capacity"]["vcpus"], &value["vcpu_overcommit_percent"]), (&json!(8), &json!(250)));
        host.allocatable = None;
        host.vcpu_overcommit_percent = 100;
        assert_eq!((cell(&host, "VCPU USED"), cell(&host, "THREADS")), ("9/8".into(), "8".into()));
    }
}
