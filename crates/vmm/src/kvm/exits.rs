//! Counters of exits to this process, by kind.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU came back to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// Read of an I/O port.
    IoIn,
    /// Write of an I/O port.
    IoOut,
    /// Read of an address without RAM.
    MmioRead,
    /// Write of an address without RAM.
    MmioWrite,
    /// End of interrupt of a level-triggered I/O APIC pin.
    IoapicEoi,
    /// A signal: pause, or the process ends.
    Interrupted,
    /// Anything else.
    Other,
}

/// Names in the order of [`ExitKind`].
const NAMES: [&str; 7] = ["io_in", "io_out", "mmio_read", "mmio_write", "ioapic_eoi", "interrupted", "other"];

/// One vCPU's counters; written by its thread, read by anyone.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; NAMES.len()]);

impl ExitCounters {
    /// Counts one exit.
    pub fn count(&self, kind: ExitKind) {
        if let Some(counter) = self.0.get(kind as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds these counters to `sums`, which has one entry per kind.
    pub fn add_to(&self, sums: &mut Vec<(String, u64)>) {
        for (name, counter) in NAMES.iter().zip(&self.0) {
            add(sums, name, counter.load(Ordering::Relaxed));
        }
    }
}

/// Adds `value` to the entry called `name`, which is made if it is missing.
pub(crate) fn add(sums: &mut Vec<(String, u64)>, name: &str, value: u64) {
    match sums.iter_mut().find(|(n, _)| n == name) {
        Some((_, sum)) => *sum = sum.saturating_add(value),
        None => sums.push((name.to_owned(), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_several_vcpus_add_up() {
        let (a, b) = (ExitCounters::default(), ExitCounters::default());
        a.count(ExitKind::IoOut);
        b.count(ExitKind::IoOut);
        b.count(ExitKind::Other);
        let mut sums = Vec::new();
        a.add_to(&mut sums);
        b.add_to(&mut sums);
        let get = |name: &str| sums.iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!((get("io_out"), get("other"), get("mmio_read")), (2, 1, 0));
        assert_eq!(sums.len(), NAMES.len());
    }
}
