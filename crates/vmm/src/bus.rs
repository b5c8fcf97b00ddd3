//! Address ranges and the devices behind them.

use std::sync::{Arc, PoisonError, RwLock};

/// A device behind an I/O port or MMIO range. Called from vCPU threads, several at once; must never panic or block on the
/// guest's behalf. `offset` is relative to the start of the range; `data` is 1, 2, 4 or 8 bytes.
pub trait BusDevice: Send + Sync {
    /// Fills `data`; unknown registers read as all ones (ports) or zeros (MMIO), the device decides.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`; unknown registers ignore it.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be added to a [`Bus`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Part of it belongs to another device, or it is empty or wraps around.
    #[error("the range of {size:#x} bytes at {start:#x} is empty, wraps around or overlaps another device")]
    Overlap {
        /// First address.
        start: u64,
        /// Bytes.
        size: u64,
    },
}

struct Range {
    start: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space: I/O ports, or physical addresses without RAM. Nobody there reads as all ones and ignores writes, as
/// on PCI.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start. Written while the machine is built, read at every exit.
    ranges: RwLock<Vec<Range>>,
}

impl Bus {
    /// Puts `device` at `start..start + size`.
    pub fn insert(&self, start: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let overlap = BusError::Overlap { start, size };
        let last = size.checked_sub(1).and_then(|s| start.checked_add(s)).ok_or(overlap)?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if ranges.iter().any(|r| start <= r.last && r.start <= last) {
            return Err(overlap);
        }
        let at = ranges.partition_point(|r| r.start < start);
        ranges.insert(at, Range { start, last, device });
        Ok(())
    }

    /// The device that owns all of `address..address + length`, and the offset in its range. The device is called without the lock.
    fn find(&self, address: u64, length: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let last = address.checked_add((length as u64).checked_sub(1)?)?;
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let range = ranges.get(ranges.partition_point(|r| r.start <= address).checked_sub(1)?)?;
        (last <= range.last).then(|| (Arc::clone(&range.device), address - range.start))
    }

    /// A guest read of any length. Odd lengths (accesses that KVM cut at a page boundary) are done byte by byte.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        if let 1 | 2 | 4 | 8 = data.len() {
            match self.find(address, data.len()) {
                Some((device, offset)) => device.read(offset, data),
                None => data.fill(0xff),
            }
        } else {
            for (i, byte) in data.iter_mut().enumerate() {
                self.read(address.wrapping_add(i as u64), std::slice::from_mut(byte));
            }
        }
    }

    /// A guest write of any length; see [`Bus::read`].
    pub fn write(&self, address: u64, data: &[u8]) {
        if let 1 | 2 | 4 | 8 = data.len() {
            if let Some((device, offset)) = self.find(address, data.len()) {
                device.write(offset, data);
            }
        } else {
            for (i, byte) in data.iter().enumerate() {
                self.write(address.wrapping_add(i as u64), std::slice::from_ref(byte));
            }
        }
    }
}

/// Both address spaces of an x86 machine.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: Bus,
    /// Physical addresses without RAM.
    pub mmio: Bus,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn ranges_must_not_overlap_or_wrap() {
        let bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        for (start, size) in [(0x10f, 1), (0xff, 2), (0, 0x1000), (0x104, 2), (5, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(start, size, device.clone()), Err(BusError::Overlap { start, size }));
        }
        bus.insert(0x110, 1, device.clone()).unwrap();
        bus.insert(u64::MAX, 1, device).unwrap();
    }

    #[test]
    fn accesses_reach_the_owner_or_nobody() {
        let bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        let mut word = [0u8; 2];
        bus.read(0x104, &mut word);
        assert_eq!(word, [4, 4]);
        bus.read(0x10f, &mut word);
        assert_eq!(word, [0xff, 0xff], "half outside the range");
        let mut three = [0u8; 3];
        bus.read(0x10e, &mut three);
        assert_eq!(three, [0xe, 0xf, 0xff]);
        bus.write(0x102, &[1, 2, 3, 4]);
        bus.write(0xff, &[1, 2]);
        assert_eq!(*device.0.lock().unwrap(), vec![(2, vec![1, 2, 3, 4])]);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(ranges in prop::collection::vec((any::<u16>(), 0u64..64), 0..20), address: u64, near: u16, length in 0usize..20) {
            let bus = Bus::default();
            let device = Arc::new(Recorder::default());
            for (start, size) in ranges {
                let _ = bus.insert(u64::from(start), size, device.clone());
            }
            let mut data = vec![0; length];
            bus.read(address, &mut data);
            bus.read(u64::from(near), &mut data);
            bus.write(address, &data);
            bus.write(u64::from(near), &data);
        }
    }
}
