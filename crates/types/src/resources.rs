//! What instances take and hosts have.

use serde::{Deserialize, Serialize};

/// A resource vector. Every dimension counts on its own; a host must have room in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// Virtual CPUs (host threads before overcommit).
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Thousandths of an EC2 Compute Unit (see [`crate::instance_type`] for hearth's definition).
    pub ecu_milli: u64,
    /// Local disk for instance store, in bytes.
    pub instance_store_bytes: u64,
}

impl Resources {
    /// Sum in every dimension, `None` on overflow.
    pub fn checked_add(&self, other: &Self) -> Option<Self> {
        Some(Self {
            vcpus: self.vcpus.checked_add(other.vcpus)?,
            memory_mib: self.memory_mib.checked_add(other.memory_mib)?,
            ecu_milli: self.ecu_milli.checked_add(other.ecu_milli)?,
            instance_store_bytes: self.instance_store_bytes.checked_add(other.instance_store_bytes)?,
        })
    }

    /// Difference in every dimension, `None` where `other` is larger in any.
    pub fn checked_sub(&self, other: &Self) -> Option<Self> {
        Some(Self {
            vcpus: self.vcpus.checked_sub(other.vcpus)?,
            memory_mib: self.memory_mib.checked_sub(other.memory_mib)?,
            ecu_milli: self.ecu_milli.checked_sub(other.ecu_milli)?,
            instance_store_bytes: self.instance_store_bytes.checked_sub(other.instance_store_bytes)?,
        })
    }

    /// Whether `wanted` fits into what is here.
    pub fn fits(&self, wanted: &Self) -> bool {
        self.checked_sub(wanted).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_short_dimension_is_enough_not_to_fit() {
        let have = Resources { vcpus: 2, memory_mib: 1024, ecu_milli: 2000, instance_store_bytes: 10 };
        assert!(have.fits(&have));
        assert!(!have.fits(&Resources { vcpus: 3, ..have }));
        assert!(!have.fits(&Resources { memory_mib: 1025, ..have }));
        assert!(!have.fits(&Resources { ecu_milli: 2001, ..have }));
        assert!(!have.fits(&Resources { instance_store_bytes: 11, ..have }));
        assert_eq!(have.checked_sub(&have), Some(Resources::default()));
        assert_eq!(have.checked_add(&Resources { vcpus: u32::MAX, ..have }), None);
    }
}
