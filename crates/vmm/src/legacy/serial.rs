//! COM1: a 16550A (state machine by vm-superio) between the port bus, an I/O APIC pin and the console.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{NoEvents, SerialEvents};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::console::ConsoleOutput;
use crate::interrupt::IrqLine;

/// The chip's interrupt output.
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Tells the control thread that the guest has emptied the receive buffer.
struct RoomSignal(EventFd);

impl SerialEvents for RoomSignal {
    fn buffer_read(&self) {}
    fn out_byte(&self) {
        NoEvents.out_byte();
    }
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Full only if the control thread has long been told.
        let _ = self.0.write(1);
    }
}

/// Takes bytes from the chip's transmitter.
struct Transmitter(Arc<ConsoleOutput>);

impl io::Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's chip.
pub struct SerialPort {
    chip: Mutex<Serial<Line, RoomSignal, Transmitter>>,
    room: EventFd,
}

impl SerialPort {
    /// Interrupts through `line`, prints to `output`.
    pub fn new(line: Arc<dyn IrqLine>, output: Arc<ConsoleOutput>) -> io::Result<Self> {
        let room = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let chip = Serial::with_events(Line(line), RoomSignal(room.try_clone()?), Transmitter(output));
        Ok(Self { chip: Mutex::new(chip), room })
    }

    fn chip(&self) -> MutexGuard<'_, Serial<Line, RoomSignal, Transmitter>> {
        self.chip.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when the guest has read all input.
    pub fn room_fd(&self) -> &EventFd {
        &self.room
    }

    /// How many input bytes the receive buffer can take now.
    pub fn room(&self) -> usize {
        let _ = self.room.read();
        self.chip().fifo_capacity()
    }

    /// Puts input into the receive buffer; what does not fit is dropped, as on a wire.
    pub fn receive(&self, bytes: &[u8]) {
        // Errors mean "full" or a lost interrupt, neither of which the sender can mend.
        let _ = self.chip().enqueue_raw_bytes(bytes);
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.chip().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // Errors mean a lost interrupt or console byte; the guest cannot be told by a 16550.
            let _ = self.chip().write(offset, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console_ring;
    use proptest::prelude::*;
    use std::fs::File;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Pulses(AtomicUsize);

    impl IrqLine for Pulses {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn port() -> (File, Arc<Pulses>, SerialPort) {
        let file = tempfile::tempfile().unwrap();
        console_ring::create(&file, 4096).unwrap();
        let pulses = Arc::new(Pulses::default());
        let port = SerialPort::new(pulses.clone(), Arc::new(ConsoleOutput::new(&file).unwrap())).unwrap();
        (file, pulses, port)
    }

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut byte = [0];
        port.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_the_ring_and_input_the_guest() {
        let (file, pulses, port) = port();
        port.write(0, b"h");
        port.write(0, b"i");
        assert_eq!(console_ring::read(&file, 0).unwrap().bytes, b"hi");
        port.write(1, &[1]);
        let before = pulses.0.load(Ordering::SeqCst);
        let room = port.room();
        port.receive(b"ls\n");
        assert_eq!(port.room(), room - 3);
        assert_eq!(pulses.0.load(Ordering::SeqCst), before + 1);
        assert!(port.room_fd().read().is_err());
        assert_eq!([read(&port, 0), read(&port, 0), read(&port, 0)], *b"ls\n");
        assert_eq!(port.room_fd().read().unwrap(), 1);
        assert_eq!(port.room(), room);
    }

    #[test]
    fn wide_accesses_are_refused() {
        let (file, _, port) = port();
        port.write(0, b"ab");
        let mut word = [0; 2];
        port.read(0, &mut word);
        assert_eq!((word, console_ring::read(&file, 0).unwrap().bytes.len()), ([0xff, 0xff], 0));
    }

    proptest! {
        #[test]
        fn no_register_access_breaks_it(accesses in prop::collection::vec((any::<u64>(), any::<u8>(), any::<u8>()), 0..300)) {
            let (_, _, port) = port();
            for (offset, value, kind) in accesses {
                let offset = if kind & 0x10 == 0 { offset % 8 } else { offset };
                match kind & 3 {
                    0 => { read(&port, offset); }
                    1 => port.receive(&[value; 70]),
                    _ => port.write(offset, &[value]),
                }
                prop_assert!(port.room() <= 64);
            }
        }
    }
}
