//! Generic event device (ACPI 6.5 section 5.6.9): one interrupt and one register that says why.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// The power button was pressed.
pub const POWER_BUTTON: u32 = 1 << 0;
/// The PCI hot-plug registers changed; see [`hotplug`](super::hotplug).
pub const PCI_HOTPLUG: u32 = 1 << 1;

/// The register block: a 32-bit word of pending events at offset 0, cleared by reading it.
pub struct GenericEventDevice {
    pending: AtomicU32,
    line: Arc<dyn IrqLine>,
}

impl GenericEventDevice {
    /// Interrupts through `line`.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { pending: AtomicU32::new(0), line }
    }

    /// Makes `events` pending and interrupts the guest.
    pub fn raise(&self, events: u32) -> io::Result<()> {
        self.pending.fetch_or(events, Ordering::AcqRel);
        self.line.trigger()
    }
}

/// One kind of event as an interrupt line of its own.
pub struct EventLine {
    ged: Arc<GenericEventDevice>,
    events: u32,
}

impl EventLine {
    /// Triggering it raises `events`.
    pub fn new(ged: Arc<GenericEventDevice>, events: u32) -> Self {
        Self { ged, events }
    }
}

impl IrqLine for EventLine {
    fn trigger(&self) -> io::Result<()> {
        self.ged.raise(self.events)
    }
}

impl BusDevice for GenericEventDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Ok(word)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *word = self.pending.swap(0, Ordering::AcqRel).to_le_bytes();
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Line(AtomicUsize);

    impl IrqLine for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn events_wait_until_the_whole_register_is_read() {
        let line = Arc::new(Line::default());
        let ged = Arc::new(GenericEventDevice::new(line.clone()));
        ged.raise(POWER_BUTTON).unwrap();
        EventLine::new(Arc::clone(&ged), PCI_HOTPLUG).trigger().unwrap();
        assert_eq!(line.0.load(Ordering::SeqCst), 2);
        let mut byte = [1u8];
        ged.read(0, &mut byte);
        let mut elsewhere = [0xffu8; 4];
        ged.read(4, &mut elsewhere);
        ged.write(0, &[0xff; 4]);
        let mut word = [0u8; 4];
        ged.read(0, &mut word);
        assert_eq!((byte, elsewhere, u32::from_le_bytes(word)), ([0], [0; 4], POWER_BUTTON | PCI_HOTPLUG));
        ged.read(0, &mut word);
        assert_eq!(word, [0; 4]);
    }
}
