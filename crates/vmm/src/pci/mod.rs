//! PCI segment 0, bus 0: configuration space, MSI-X, the bus and its windows. Pure state machines, no file descriptors.

mod bus;
mod config;
mod host_bridge;
mod msix;

#[cfg(test)]
mod bus_test;
#[cfg(test)]
mod config_test;
#[cfg(test)]
pub(crate) mod fuzzing;
#[cfg(test)]
mod msix_test;

pub use bus::{DecodedBar, PciBus, PciDevice, PciError, PciLayout, SLOTS};
pub use config::{CONFIG_BYTES, ConfigSpace, Identity};
pub use host_bridge::HostBridge;
pub use msix::{MAX_VECTORS, MSIX_CAPABILITY_ID, MSIX_ENTRY_BYTES, MsiMessage, Msix};

/// Copies `source` to the start of `data` and fills the rest with zeros: a register read of any width.
pub(crate) fn copy_padded(data: &mut [u8], source: &[u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = source.get(index).copied().unwrap_or(0);
    }
}
