//! Bus 0 with 32 slots.

use std::ops::Range;
use std::sync::Arc;

use crate::bus::BusDevice;

/// Guest physical ranges of the PCI windows. Must match the host bridge's `_CRS` and the MCFG table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciLayout {
    /// ECAM of bus 0: 1 MiB (32 slots x 8 functions x 4 KiB).
    pub ecam: Range<u64>,
    /// Window for 32-bit BARs (none of our devices has one, a guest may still move BARs there).
    pub mmio32: Range<u64>,
    /// Window for 64-bit BARs; the built devices' BARs lie at its start, 64 KiB apart.
    pub mmio64: Range<u64>,
}

/// The bus.
pub struct PciBus {
    layout: PciLayout,
}

struct Nobody;

impl BusDevice for Nobody {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

impl PciBus {
    /// An empty bus.
    pub fn new(layout: PciLayout) -> Self {
        Self { layout }
    }

    /// Configuration access mechanism #1: ports 0xCF8..=0xCFF.
    pub fn port_device(&self) -> Arc<dyn BusDevice> {
        Arc::new(Nobody)
    }

    /// ECAM and BAR windows.
    pub fn mmio_devices(&self) -> Vec<(Range<u64>, Arc<dyn BusDevice>)> {
        [&self.layout.ecam, &self.layout.mmio32, &self.layout.mmio64]
            .into_iter()
            .filter(|range| !range.is_empty())
            .map(|range| (range.clone(), Arc::new(Nobody) as Arc<dyn BusDevice>))
            .collect()
    }
}
