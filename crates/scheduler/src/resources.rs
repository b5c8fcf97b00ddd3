//! Flat resource vectors: what hosts offer and what instances take.

use std::fmt;

/// One dimension of a [`ResourceVector`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    /// Virtual CPUs (host threads times the host's overcommit).
    Vcpus,
    /// Guest memory.
    Memory,
    /// EC2 Compute Units.
    Ecu,
    /// Local disk for instance-store volumes.
    InstanceStore,
    /// Bandwidth to EBS volumes.
    EbsBandwidth,
    /// Bandwidth of the network interfaces.
    NetworkBandwidth,
}

impl Resource {
    /// Every dimension, in the order in which messages name them.
    pub const ALL: [Resource; 6] = [
        Resource::Vcpus,
        Resource::Memory,
        Resource::Ecu,
        Resource::InstanceStore,
        Resource::EbsBandwidth,
        Resource::NetworkBandwidth,
    ];

    /// Writes an amount of this resource with its unit, e.g. `8192 MiB` or `1.5 ECU`.
    pub fn display(self, amount: u64) -> impl fmt::Display {
        Amount { resource: self, amount }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Resource::Vcpus => "vCPU",
            Resource::Memory => "memory",
            Resource::Ecu => "ECU",
            Resource::InstanceStore => "instance store",
            Resource::EbsBandwidth => "EBS bandwidth",
            Resource::NetworkBandwidth => "network bandwidth",
        })
    }
}

struct Amount {
    resource: Resource,
    amount: u64,
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = self.amount;
        match self.resource {
            Resource::Vcpus => write!(f, "{amount} vCPU"),
            Resource::Memory => write!(f, "{amount} MiB"),
            Resource::Ecu => match (amount / 1000, amount % 1000) {
                (units, 0) => write!(f, "{units} ECU"),
                (units, rest) => write!(f, "{units}.{} ECU", format!("{rest:03}").trim_end_matches('0')),
            },
            Resource::InstanceStore => match amount {
                bytes if bytes % (1 << 30) == 0 => write!(f, "{} GiB", bytes >> 30),
                bytes if bytes >= 1 << 30 => write!(f, "{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
                bytes => write!(f, "{bytes} bytes"),
            },
            Resource::EbsBandwidth | Resource::NetworkBandwidth => write!(f, "{amount} Mbit/s"),
        }
    }
}

/// An amount in every dimension. A host must have room in all of them; an amount of 0 asks for nothing, so a host that
/// has none of a dimension still takes instances that do not ask for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ResourceVector {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Thousandths of an EC2 Compute Unit.
    pub ecu_milli: u64,
    /// Local disk for instance store, in bytes.
    pub instance_store_bytes: u64,
    /// EBS bandwidth in Mbit/s.
    pub ebs_mbps: u64,
    /// Network bandwidth in Mbit/s.
    pub network_mbps: u64,
}

impl ResourceVector {
    /// The amount in one dimension.
    pub fn get(&self, resource: Resource) -> u64 {
        match resource {
            Resource::Vcpus => u64::from(self.vcpus),
            Resource::Memory => self.memory_mib,
            Resource::Ecu => self.ecu_milli,
            Resource::InstanceStore => self.instance_store_bytes,
            Resource::EbsBandwidth => self.ebs_mbps,
            Resource::NetworkBandwidth => self.network_mbps,
        }
    }

    /// Whether `wanted` fits into what is here, in every dimension.
    #[inline]
    pub fn fits(&self, wanted: &Self) -> bool {
        // `&`, not `&&`: one test without branches; candidates nearly always pass or fail unpredictably.
        (wanted.vcpus <= self.vcpus)
            & (wanted.memory_mib <= self.memory_mib)
            & (wanted.ecu_milli <= self.ecu_milli)
            & (wanted.instance_store_bytes <= self.instance_store_bytes)
            & (wanted.ebs_mbps <= self.ebs_mbps)
            & (wanted.network_mbps <= self.network_mbps)
    }

    /// Sum in every dimension, held at the largest value instead of overflowing.
    #[inline]
    pub fn saturating_add(&self, other: &Self) -> Self {
        self.zip(other, u32::saturating_add, u64::saturating_add)
    }

    /// Difference in every dimension, held at 0.
    #[inline]
    pub fn saturating_sub(&self, other: &Self) -> Self {
        self.zip(other, u32::saturating_sub, u64::saturating_sub)
    }

    #[inline]
    fn zip(&self, other: &Self, narrow: fn(u32, u32) -> u32, wide: fn(u64, u64) -> u64) -> Self {
        Self {
            vcpus: narrow(self.vcpus, other.vcpus),
            memory_mib: wide(self.memory_mib, other.memory_mib),
            ecu_milli: wide(self.ecu_milli, other.ecu_milli),
            instance_store_bytes: wide(self.instance_store_bytes, other.instance_store_bytes),
            ebs_mbps: wide(self.ebs_mbps, other.ebs_mbps),
            network_mbps: wide(self.network_mbps, other.network_mbps),
        }
    }
}

/// How much of each resource a host may promise, in thousandths of what it has: 1000 = exactly what it has, 4000 = each
/// host thread stands for four vCPUs, 900 = a tenth is kept back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overcommit {
    /// vCPUs per 1000 host threads.
    pub vcpus_permille: u32,
    /// Memory.
    pub memory_permille: u32,
    /// ECU.
    pub ecu_permille: u32,
    /// Instance store.
    pub instance_store_permille: u32,
    /// EBS bandwidth.
    pub ebs_permille: u32,
    /// Network bandwidth.
    pub network_permille: u32,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self {
            vcpus_permille: 1000,
            memory_permille: 1000,
            ecu_permille: 1000,
            instance_store_permille: 1000,
            ebs_permille: 1000,
            network_permille: 1000,
        }
    }
}

impl Overcommit {
    /// What a host with `capacity` may promise, rounded down in each dimension.
    pub fn apply(&self, capacity: &ResourceVector) -> ResourceVector {
        let scale = |amount: u64, permille: u32| {
            u64::try_from(u128::from(amount) * u128::from(permille) / 1000).unwrap_or(u64::MAX)
        };
        ResourceVector {
            vcpus: u32::try_from(scale(u64::from(capacity.vcpus), self.vcpus_permille)).unwrap_or(u32::MAX),
            memory_mib: scale(capacity.memory_mib, self.memory_permille),
            ecu_milli: scale(capacity.ecu_milli, self.ecu_permille),
            instance_store_bytes: scale(capacity.instance_store_bytes, self.instance_store_permille),
            ebs_mbps: scale(capacity.ebs_mbps, self.ebs_permille),
            network_mbps: scale(capacity.network_mbps, self.network_permille),
        }
    }
}
