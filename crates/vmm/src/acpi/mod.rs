//! ACPI, hardware-reduced: the tables a stock kernel reads, and the few registers behind them.

pub mod dsdt;
pub mod ged;
pub mod hotplug;
pub mod power;
mod slots;
pub mod tables;
