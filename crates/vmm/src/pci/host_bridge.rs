//! The function at 00:00.0 that tells drivers there is a bus.

use std::sync::{Mutex, PoisonError};

use super::{ConfigSpace, DecodedBar, Identity, PciDevice};

/// A host bridge without registers of its own.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// The bridge every bus starts with: a generic PCI Express host bridge (1b36:0008).
    pub fn new() -> Self {
        let config = ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        Self { config: Mutex::new(config) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> bool {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }

    fn decoded_bar(&self) -> Option<DecodedBar> {
        None
    }

    fn bar_moved(&self, _address: Option<u64>) {}

    fn read_bar(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _offset: u64, _data: &[u8]) {}
}
