//! Address ranges and the devices behind them.

/// A device behind an I/O port or MMIO range. Called from vCPU threads, several at once; must never panic or block on the
/// guest's behalf. `offset` is relative to the start of the range; `data` is 1, 2, 4 or 8 bytes.
pub trait BusDevice: Send + Sync {
    /// Fills `data`; unknown registers read as all ones (ports) or zeros (MMIO), the device decides.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`; unknown registers ignore it.
    fn write(&self, offset: u64, data: &[u8]);
}
