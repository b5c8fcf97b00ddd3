//! Sleep and reset registers (ACPI 6.5 section 4.8.3.7 "sleep control and status", 4.8.3.6 "reset register").

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::events::{EventSink, MachineEvent};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the S5 state, as `_S5` says.
pub const S5_SLEEP_TYPE: u8 = 5;

/// SLP_EN bit and position of SLP_TYP in the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// Real-mode code for the reset vector: writes the reset register, then halts for good.
///
/// Linux on hardware-reduced ACPI restarts by EFI, and without EFI by jumping to the BIOS's reset vector; it does not get to
/// the ACPI reset register in between (arch/x86/kernel/reboot.c, `reboot_init`).
pub fn reset_vector(power_port: u16) -> [u8; 9] {
    let [low, high] = (power_port + RESET).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

/// The power registers; they report, others act.
pub struct PowerRegisters {
    events: Arc<dyn EventSink>,
}

impl PowerRegisters {
    /// Reports to `events`.
    pub fn new(events: Arc<dyn EventSink>) -> Self {
        Self { events }
    }
}

impl BusDevice for PowerRegisters {
    /// The sleep status register reads as "no wake event"; the others hold nothing.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match u16::try_from(offset) {
            Ok(SLEEP_CONTROL)
                if value & SLEEP_ENABLE != 0 && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == S5_SLEEP_TYPE =>
            {
                self.events.raise(MachineEvent::PoweredOff);
            }
            Ok(RESET) if value == RESET_VALUE => self.events.raise(MachineEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::EventQueue;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_the_documented_writes_act(offset in 0u64..8, data in prop::collection::vec(any::<u8>(), 1..9)) {
            let queue = Arc::new(EventQueue::new().unwrap());
            let power = PowerRegisters::new(queue.clone());
            let mut back = data.clone();
            power.read(offset, &mut back);
            power.write(offset, &data);
            let expected = match (offset, data.as_slice()) {
                (0, [v]) if v & 0x3c == 0x34 => vec![MachineEvent::PoweredOff],
                (2, [1]) => vec![MachineEvent::Reset],
                _ => vec![],
            };
            prop_assert_eq!(queue.take(), expected);
        }
    }

    #[test]
    fn linux_power_off_sequence_is_understood() {
        let queue = Arc::new(EventQueue::new().unwrap());
        let power = PowerRegisters::new(queue.clone());
        power.write(u64::from(SLEEP_STATUS), &[0x80]);
        power.write(u64::from(SLEEP_CONTROL), &[(5 << 2) | (1 << 5)]);
        assert_eq!(queue.take(), vec![MachineEvent::PoweredOff]);
    }
}
