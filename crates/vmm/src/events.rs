//! What happens to the machine as a whole, from any thread to the control thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::DiskEvent;

/// Something the agent must learn of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest powered off (ACPI S5).
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot go on for reasons inside the guest.
    Crashed(String),
    /// The guest kernel reported a panic.
    Panicked,
    /// The host let the machine down.
    HostFailed(String),
    /// A disk is on its way out, needs something or got into or out of trouble.
    Disk(DiskEvent),
}

impl MachineEvent {
    /// After this the guest must not run on.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Panicked | Self::Disk(_))
    }
}

/// Where devices and vCPUs report.
pub trait EventSink: Send + Sync {
    /// Reports `event`. Must not block; events that a guest can raise are dropped beyond the sink's capacity.
    fn raise(&self, event: MachineEvent);
}

/// Most events of the guest's making kept until the control thread takes them: a guest can raise them in a loop.
const CAPACITY: usize = 16;

/// An [`EventSink`] that wakes an event loop.
#[derive(Debug)]
pub struct EventQueue {
    pending: Mutex<Vec<MachineEvent>>,
    over: Arc<AtomicBool>,
    wake: EventFd,
}

impl EventQueue {
    /// An empty queue.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            pending: Mutex::new(Vec::new()),
            over: Arc::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Readable when events wait.
    pub fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// True from the first final event on: a vCPU that sees it does not enter the guest again.
    pub fn over(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.over)
    }

    /// Takes all events, oldest first.
    pub fn take(&self) -> Vec<MachineEvent> {
        // Nothing to read only means that another `take` was quicker.
        let _ = self.wake.read();
        std::mem::take(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl EventSink for EventQueue {
    fn raise(&self, event: MachineEvent) {
        self.over.fetch_or(event.is_final(), Ordering::Release);
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        // Disks report at most once per request in flight and chunk; the rest a guest can raise at will.
        if matches!(event, MachineEvent::Disk(_)) || (pending.len() < CAPACITY && !pending.contains(&event)) {
            pending.push(event);
        }
        drop(pending);
        // The counter can only be full if the control thread has long been told.
        let _ = self.wake.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_fill_memory_with_events() {
        let queue = EventQueue::new().unwrap();
        for i in 0..1000 {
            queue.raise(MachineEvent::Panicked);
            queue.raise(MachineEvent::Crashed(i.to_string()));
        }
        assert_eq!(queue.take().len(), CAPACITY);
        assert!(queue.take().is_empty());
        queue.raise(MachineEvent::Reset);
        assert_eq!(queue.wake_fd().read().unwrap(), 1);
        assert_eq!(queue.take(), vec![MachineEvent::Reset]);
    }
}
