//! PCI segment 0, bus 0: configuration space, MSI-X, the bus and its windows. Pure state machines, no file descriptors.

mod bus;

pub use bus::{PciBus, PciLayout};
