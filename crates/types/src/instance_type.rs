//! The catalogue of instance types, a TOML file that operators can extend.
//!
//! **ECU.** One EC2 Compute Unit is, as EC2 once defined it, the integer throughput of a 1.0-1.2 GHz 2007 Opteron/Xeon
//! core. hearth fixes it as 1 ECU = [`ECU_CALIBRATION_SCORE`] rounds per second of the agent's calibration loop, which each
//! host runs at start; an instance type's `ecu` is turned into a cgroup `cpu.max` quota on its host by that score. A type
//! without `ecu` gets whole threads (no quota) and a weight of its vCPU count.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::resources::Resources;

/// Rounds per second of the calibration loop that one ECU stands for.
pub const ECU_CALIBRATION_SCORE: u64 = 100_000_000;

/// The catalogue that every installation starts with.
pub const BUILT_IN_CATALOGUE: &str = include_str!("instance_types.toml");

/// Largest number of vCPUs a VMM offers.
pub const MAX_VCPUS: u32 = 32;

/// Smallest guest memory, in MiB.
pub const MIN_MEMORY_MIB: u64 = 128;

/// One instance type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceType {
    /// EC2-like name: family + generation, a dot, a size.
    pub name: String,
    /// Virtual CPUs, 1..=32.
    pub vcpus: u32,
    /// Memory in MiB, at least 128.
    pub memory_mib: u64,
    /// Compute units in thousandths; absent = whole threads, no quota.
    #[serde(default)]
    pub ecu_milli: Option<u64>,
    /// Instance-store disks, sizes in GiB.
    #[serde(default)]
    pub instance_store_gib: Vec<u64>,
    /// Network bandwidth in Mbit/s; 0 = not limited.
    #[serde(default)]
    pub network_mbps: u64,
    /// EBS bandwidth in Mbit/s; 0 = not limited.
    #[serde(default)]
    pub ebs_mbps: u64,
    /// Most network interfaces.
    #[serde(default = "default_max_network_interfaces")]
    pub max_network_interfaces: u32,
}

fn default_max_network_interfaces() -> u32 {
    2
}

impl InstanceType {
    /// What one instance of this type takes from its host. A type without ECU takes none of that dimension.
    pub fn resources(&self) -> Resources {
        Resources {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            ecu_milli: self.ecu_milli.unwrap_or(0),
            instance_store_bytes: self.instance_store_gib.iter().fold(0u64, |sum, gib| sum.saturating_add(gib << 30)),
        }
    }

    fn check(&self) -> Result<(), String> {
        let (family, size) = self.name.split_once('.').ok_or("its name must be family.size, e.g. t3.micro")?;
        let word = |text: &str| {
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if !word(family) || !word(size) || self.name.len() > 40 {
            return Err("its name may hold a-z, 0-9 and '-' around one dot, 40 characters at most".into());
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(format!("vcpus is {}, must be 1..={MAX_VCPUS}", self.vcpus));
        }
        if !(MIN_MEMORY_MIB..=16 << 20).contains(&self.memory_mib) {
            return Err(format!("memory_mib is {}, must be {MIN_MEMORY_MIB}..=16777216", self.memory_mib));
        }
        if self.ecu_milli == Some(0) {
            return Err("ecu_milli is 0; leave it out for whole threads".into());
        }
        if self.instance_store_gib.len() > 24 {
            return Err(format!("{} instance-store disks, at most 24", self.instance_store_gib.len()));
        }
        if self.instance_store_gib.iter().any(|gib| !(1..=65536).contains(gib)) {
            return Err("instance_store_gib entries must be 1..=65536".into());
        }
        if !(1..=15).contains(&self.max_network_interfaces) {
            return Err(format!("max_network_interfaces is {}, must be 1..=15", self.max_network_interfaces));
        }
        Ok(())
    }
}

/// Why a catalogue file is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CatalogueError {
    /// Not TOML of the right form.
    #[error("instance type catalogue: {0}")]
    Syntax(String),
    /// One type is out of range.
    #[error("instance type '{name}': {reason}")]
    Type {
        /// Which type.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The same name twice in one file.
    #[error("instance type '{0}' stands twice in the catalogue file")]
    Duplicate(String),
}

/// All instance types of a region, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalogue {
    types: BTreeMap<String, InstanceType>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueFile {
    #[serde(default)]
    instance_type: Vec<InstanceType>,
}

impl Catalogue {
    /// The catalogue built into hearth.
    pub fn built_in() -> Result<Self, CatalogueError> {
        Self::parse(BUILT_IN_CATALOGUE)
    }

    /// Reads a catalogue file: `[[instance_type]]` tables with the fields of [`InstanceType`].
    pub fn parse(text: &str) -> Result<Self, CatalogueError> {
        let file: CatalogueFile = toml::from_str(text).map_err(|e| CatalogueError::Syntax(e.to_string()))?;
        let mut types = BTreeMap::new();
        for entry in file.instance_type {
            entry.check().map_err(|reason| CatalogueError::Type { name: entry.name.clone(), reason })?;
            let name = entry.name.clone();
            if types.insert(name.clone(), entry).is_some() {
                return Err(CatalogueError::Duplicate(name));
            }
        }
        Ok(Self { types })
    }

    /// Adds an operator's own types; an entry of the same name replaces the built-in one.
    pub fn extend(&mut self, other: Self) {
        self.types.extend(other.types);
    }

    /// The type of that name.
    pub fn get(&self, name: &str) -> Option<&InstanceType> {
        self.types.get(name)
    }

    /// All types, by name.
    pub fn iter(&self) -> impl Iterator<Item = &InstanceType> {
        self.types.values()
    }
}

#[cfg(test)]
#[path = "instance_type_test.rs"]
mod tests;
