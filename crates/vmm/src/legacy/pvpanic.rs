//! pvpanic: a port by which a guest kernel says that it has panicked (QEMU docs/specs/pvpanic.rst).

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::events::{EventSink, MachineEvent};

/// The guest panicked and will not go on (bit 0); it may still boot a crash kernel (bit 1).
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The port.
pub struct PanicPort {
    events: Arc<dyn EventSink>,
}

impl PanicPort {
    /// Reports to `events`.
    pub fn new(events: Arc<dyn EventSink>) -> Self {
        Self { events }
    }
}

impl BusDevice for PanicPort {
    /// Reads as the set of supported bits.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|bits| bits & (PANICKED | CRASH_LOADED) != 0) {
            self.events.raise(MachineEvent::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::EventQueue;

    #[test]
    fn only_known_bits_are_a_panic() {
        let queue = Arc::new(EventQueue::new().unwrap());
        let port = PanicPort::new(queue.clone());
        let mut supported = [0u8];
        port.read(0, &mut supported);
        port.write(0, &[4]);
        assert_eq!((supported, queue.take()), ([3], vec![]));
        port.write(0, &[1]);
        assert_eq!(queue.take(), vec![MachineEvent::Panicked]);
    }
}
