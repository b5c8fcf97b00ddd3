//! The I/O APIC (Intel 82093AA data sheet; version 0x11) on a split interrupt controller: it turns
//! pulses on its pins into interrupt messages for the local APICs, which live in the kernel.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;
use crate::interrupt::{IrqLine, MsiSender};
use crate::mem::layout::{IOAPIC_PINS, LOCAL_APIC};

/// Register windows: index and data.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

/// Indirect registers.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const REDIRECTION: u8 = 0x10;

/// Version 0x11 and the number of the last pin.
const VERSION_VALUE: u32 = 0x11 | ((IOAPIC_PINS as u32 - 1) << 16);

/// Fields of a redirection entry.
const VECTOR: u64 = 0xff;
const DELIVERY_MODE_SHIFT: u32 = 8;
const DESTINATION_LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// Delivery status and remote IRR belong to the chip.
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

struct State {
    select: u8,
    id: u32,
    redirection: [u64; IOAPIC_PINS],
    /// Pins pulsed while masked; delivered when the guest unmasks them.
    latched: u32,
}

/// The interrupt message for a redirection entry: Intel SDM volume 3A section 11.11 "message signalled interrupts". Pins are
/// pulsed by their devices, so a level-triggered entry is delivered as an edge and needs no end-of-interrupt.
fn message(entry: u64) -> (u64, u32) {
    let destination = entry >> DESTINATION_SHIFT;
    let logical = u64::from(entry & DESTINATION_LOGICAL != 0);
    let address = LOCAL_APIC | (destination << 12) | (logical << 2);
    let mode = (entry >> DELIVERY_MODE_SHIFT) & 7;
    (address, (entry & VECTOR) as u32 | ((mode as u32) << 8))
}

/// The chip.
pub struct IoApic {
    state: Mutex<State>,
    messages: Arc<dyn MsiSender>,
}

impl IoApic {
    /// All pins masked, as after reset.
    pub fn new(messages: Arc<dyn MsiSender>) -> Self {
        let state = State { select: 0, id: 0, redirection: [MASKED; IOAPIC_PINS], latched: 0 };
        Self { state: Mutex::new(state), messages }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pulse on `pin`. Pins that do not exist are ignored.
    pub fn pulse(&self, pin: u32) -> io::Result<()> {
        let mut state = self.state();
        let Some(&entry) = state.redirection.get(pin as usize) else { return Ok(()) };
        if entry & MASKED != 0 {
            state.latched |= 1 << pin;
            return Ok(());
        }
        drop(state);
        let (address, data) = message(entry);
        self.messages.send(address, data)
    }

    fn read_register(state: &State) -> u32 {
        match state.select {
            ID | ARBITRATION => state.id,
            VERSION => VERSION_VALUE,
            index => match index
                .checked_sub(REDIRECTION)
                .and_then(|i| state.redirection.get(usize::from(i / 2)).map(|e| (i, e)))
            {
                Some((i, entry)) if i % 2 == 0 => *entry as u32,
                Some((_, entry)) => (*entry >> 32) as u32,
                None => 0,
            },
        }
    }

    /// Writes the selected register; the number of a pin whose latched pulse is now due.
    fn write_register(state: &mut State, value: u32) -> Option<u32> {
        match state.select {
            ID => state.id = value & 0x0f00_0000,
            VERSION | ARBITRATION => {}
            index => {
                let index = index.checked_sub(REDIRECTION)?;
                let pin = index / 2;
                let entry = state.redirection.get_mut(usize::from(pin))?;
                *entry = if index % 2 == 0 {
                    (*entry & !0xffff_ffff) | (*entry & READ_ONLY) | (u64::from(value) & !READ_ONLY)
                } else {
                    (*entry & 0xffff_ffff) | (u64::from(value) << 32)
                };
                if *entry & MASKED == 0 && state.latched & (1 << pin) != 0 {
                    state.latched &= !(1 << pin);
                    return Some(u32::from(pin));
                }
            }
        }
        None
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else { return };
        let state = self.state();
        *word = match offset {
            IOREGSEL => u32::from(state.select),
            IOWIN => Self::read_register(&state),
            _ => 0,
        }
        .to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        match (offset, <[u8; 4]>::try_from(data)) {
            (IOREGSEL, _) => state.select = data.first().copied().unwrap_or(0),
            (IOWIN, Ok(word)) => {
                let due = Self::write_register(&mut state, u32::from_le_bytes(word));
                drop(state);
                if let Some(pin) = due {
                    // The guest asked for a message KVM does not accept: its own loss.
                    let _ = self.pulse(pin);
                }
            }
            _ => {}
        }
    }
}

/// One pin as a device sees it.
pub struct Pin {
    ioapic: Arc<IoApic>,
    pin: u32,
}

impl Pin {
    /// Pin number `pin` of `ioapic`.
    pub fn new(ioapic: Arc<IoApic>, pin: u32) -> Self {
        Self { ioapic, pin }
    }
}

impl IrqLine for Pin {
    fn trigger(&self) -> io::Result<()> {
        self.ioapic.pulse(self.pin)
    }
}

#[cfg(test)]
#[path = "ioapic_test.rs"]
mod tests;
