//! A volume whose requests complete when the test says so.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use hearth_block::{BlockError, Completion, IoError, Limits, Operation, Request, Volume, VolumeQueue};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub const HELD_BYTES: u64 = 1 << 20;

#[derive(Default)]
struct State {
    waiting: Vec<(u64, Operation)>,
    finished: Vec<(u64, bool)>,
    seen: Vec<Operation>,
    syncs: usize,
}

/// Shared by the volume, its queue and the test.
#[derive(Clone)]
pub struct Held {
    state: Arc<Mutex<State>>,
    event: Arc<EventFd>,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Held")
    }
}

impl Held {
    pub fn new() -> Self {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        Self { state: Arc::default(), event: Arc::new(event) }
    }

    pub fn waiting(&self) -> usize {
        self.state.lock().unwrap().waiting.len()
    }

    pub fn seen(&self) -> Vec<Operation> {
        self.state.lock().unwrap().seen.clone()
    }

    pub fn syncs(&self) -> usize {
        self.state.lock().unwrap().syncs
    }

    /// Handles that someone still has, this one included.
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.state)
    }

    /// Completes the oldest `count` requests.
    pub fn release(&self, count: usize, ok: bool) {
        let mut state = self.state.lock().unwrap();
        let count = count.min(state.waiting.len());
        let released: Vec<_> = state.waiting.drain(..count).map(|(token, _)| (token, ok)).collect();
        state.finished.extend(released);
        self.event.write(1).unwrap();
    }
}

impl Volume for Held {
    fn size_bytes(&self) -> u64 {
        HELD_BYTES
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Limits {
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            optimal_io_bytes: 0,
            max_discard_bytes: HELD_BYTES,
            discard_granularity_bytes: 4096,
            max_write_zeroes_bytes: HELD_BYTES,
        }
    }
    fn open_queue(&self, _capacity: usize) -> Result<Box<dyn VolumeQueue>, BlockError> {
        Ok(Box::new(self.clone()))
    }
    fn grow(&self, _bytes: u64) -> Result<(), BlockError> {
        panic!("this volume has one size")
    }
    fn sync(&self) -> Result<(), BlockError> {
        self.state.lock().unwrap().syncs += 1;
        Ok(())
    }
}

impl VolumeQueue for Held {
    unsafe fn submit(&mut self, request: Request<'_>) -> Result<(), BlockError> {
        let mut state = self.state.lock().unwrap();
        state.waiting.push((request.token, request.operation));
        state.seen.push(request.operation);
        Ok(())
    }
    fn kick(&mut self) -> Result<(), BlockError> {
        Ok(())
    }
    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    fn drain(&mut self, sink: &mut dyn FnMut(Completion)) -> Result<(), BlockError> {
        let _ = self.event.read();
        let finished = std::mem::take(&mut self.state.lock().unwrap().finished);
        for (token, ok) in finished {
            let source = std::io::Error::from_raw_os_error(libc::EIO);
            let error = IoError { operation: Operation::Read, offset: 0, length: 0, source };
            sink(Completion { token, result: if ok { Ok(()) } else { Err(error) } });
        }
        Ok(())
    }
    fn in_flight(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.waiting.len() + state.finished.len()
    }
    fn capacity(&self) -> usize {
        64
    }
}
