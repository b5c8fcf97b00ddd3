//! One device as the I/O thread sees it: its queues' backend, its state, and its departure.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, Broken};
use super::shared::DeviceShared;

/// Names a device to the I/O thread for as long as the machine lives: never used again after the device is gone, so that a
/// late command cannot reach another device.
pub type DeviceId = u32;

/// Source numbers of epoll tokens beside those of queues.
pub(super) const FD: u64 = 0xffff_ffff;
pub(super) const OUTSIDE: u64 = 0xffff_fffe;

pub(super) fn token(device: DeviceId, source: u64) -> u64 {
    (u64::from(device) << 32) | source
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Inactive,
    Active,
    /// Waits for a reset, moves nothing.
    Broken,
    Resetting,
}

/// How far a device is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Departure {
    /// It stays.
    No,
    /// What is behind it is given back; the function itself stays for the guest to let go of.
    Retiring,
    /// What was behind it has been given back.
    Retired,
    /// The guest has let go: all of it leaves.
    Leaving,
}

/// What a device's departure has reached; told to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Milestone {
    /// Nothing behind the device is used any more; `durable` tells whether its last flush succeeded.
    Released { durable: bool },
    /// The device can be dropped.
    Gone,
}

pub(crate) struct IoDevice {
    pub(super) id: DeviceId,
    pub(super) shared: Arc<DeviceShared>,
    pub(super) doorbells: Vec<Arc<EventFd>>,
    pub(super) backend: Box<dyn Backend>,
    pub(super) state: State,
    pub(super) departure: Departure,
    watched: Option<RawFd>,
    /// Queues being reset.
    pub(super) stopping: Vec<usize>,
    /// `run` has something to do.
    pub(super) runnable: bool,
    /// It has run since the driver was last asked to notify.
    pub(super) awake: bool,
    pub(super) event_idx: bool,
    /// For the log.
    name: String,
    complaints: u32,
}

const MAX_COMPLAINTS: u32 = 16;

impl IoDevice {
    pub(crate) fn new(
        id: DeviceId,
        name: String,
        shared: Arc<DeviceShared>,
        doorbells: Vec<Arc<EventFd>>,
        backend: Box<dyn Backend>,
    ) -> Self {
        Self {
            id,
            name,
            complaints: 0,
            shared,
            doorbells,
            backend,
            state: State::Inactive,
            departure: Departure::No,
            watched: None,
            stopping: Vec::new(),
            runnable: false,
            awake: false,
            event_idx: false,
        }
    }

    /// Watches what is to be watched from the start.
    pub(super) fn watch(&mut self, epoll: &Epoll) -> std::io::Result<()> {
        for (index, doorbell) in self.doorbells.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token(self.id, index as u64));
            epoll.ctl(ControlOperation::Add, doorbell.as_raw_fd(), event)?;
        }
        if let Some(fd) = self.backend.wake_fd() {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token(self.id, OUTSIDE));
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        if self.backend.always_on() {
            self.watch_event_fd(epoll)?;
            self.runnable = true;
        }
        Ok(())
    }

    /// Whether wake-ups concern it.
    pub(super) fn listens(&self) -> bool {
        self.state != State::Inactive || self.departs() || self.backend.always_on()
    }

    /// Watches the backend's descriptor, if it has one and it is not watched yet.
    pub(super) fn watch_backend(&mut self, epoll: &Epoll) -> Result<(), Broken> {
        self.watch_event_fd(epoll).map_err(Broken::Watch)
    }

    fn watch_event_fd(&mut self, epoll: &Epoll) -> std::io::Result<()> {
        let wanted = self.backend.event_fd();
        if let Some(fd) = wanted
            && self.watched != wanted
        {
            let set = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            // The descriptor of an earlier activation is closed and so out of the set already.
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token(self.id, FD)))?;
            self.watched = wanted;
        }
        Ok(())
    }

    /// Takes everything of this device out of the set: a doorbell may stay open a little longer in a vCPU's hands.
    pub(super) fn unwatch(&mut self, epoll: &Epoll) {
        for doorbell in &self.doorbells {
            let _ = epoll.ctl(ControlOperation::Delete, doorbell.as_raw_fd(), EpollEvent::default());
        }
        if let (Some(fd), true) = (self.watched.take(), self.backend.event_fd().is_some()) {
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Requests of the guest that the host still works on.
    pub(super) fn in_flight(&self) -> usize {
        (0..self.doorbells.len()).map(|index| self.backend.in_flight(index)).sum()
    }

    /// Nothing is in flight, or only what waits for someone outside, who may need the paused machine's control thread.
    pub(super) fn is_quiet(&self) -> bool {
        self.in_flight() == 0 || self.backend.is_stuck()
    }

    /// Its queues may move.
    pub(super) fn moves(&self) -> bool {
        self.state == State::Active && self.shared.bus_master()
    }

    /// Has the driver notify before the thread sleeps.
    pub(super) fn rest(&mut self) {
        self.awake = false;
        match self.backend.rest() {
            Ok(more) => self.runnable |= more,
            Err(error) => self.break_down(&error),
        }
    }

    pub(super) fn stop_queues(&mut self) {
        for index in 0..self.doorbells.len() {
            self.backend.stop_queue(index);
        }
    }

    pub(super) fn break_down(&mut self, error: &Broken) {
        // A guest can break its devices as often as it likes, but not fill the host's log with it.
        if self.complaints < MAX_COMPLAINTS {
            self.complaints += 1;
            let _ = writeln!(std::io::stderr(), "{}: the guest's driver must reset it: {error}", self.name);
        }
        // The error may have come between taking requests and sending them; run once more for those. A departure goes on.
        self.runnable = self.state == State::Active && self.in_flight() > 0 || self.departs();
        self.state = State::Broken;
        self.stop_queues();
        self.shared.needs_reset();
    }

    /// Something of it is on its way out and not yet there.
    pub(super) fn departs(&self) -> bool {
        matches!(self.departure, Departure::Retiring | Departure::Leaving)
    }

    /// Reports finished resets.
    pub(super) fn settle(&mut self) {
        if self.state == State::Resetting && self.in_flight() == 0 {
            self.state = State::Inactive;
            self.stopping.clear();
            self.shared.finish_reset();
        }
        let (backend, shared) = (&self.backend, &self.shared);
        self.stopping.retain(|index| {
            let busy = backend.in_flight(*index) > 0;
            if !busy {
                shared.finish_queue_reset(*index);
            }
            busy
        });
    }

    /// What is behind the device is to be given back: requests in flight finish, new ones are refused.
    pub(super) fn retire(&mut self, epoll: &Epoll) {
        if self.departure == Departure::No {
            self.departure = Departure::Retiring;
            self.begin_departure(epoll);
        }
    }

    /// The guest has let go of the function: nothing of it is to be touched again.
    pub(super) fn leave(&mut self, epoll: &Epoll) {
        let before = std::mem::replace(&mut self.departure, Departure::Leaving);
        self.stop_queues();
        if before == Departure::No {
            self.begin_departure(epoll);
        }
        self.runnable = true;
    }

    fn begin_departure(&mut self, epoll: &Epoll) {
        if let Some(fd) = self.backend.wake_fd() {
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        self.backend.retire();
        self.runnable = true;
    }

    /// What the departure has reached since it was last asked, in this order.
    pub(super) fn milestones(&mut self) -> Vec<Milestone> {
        let mut reached = Vec::new();
        if self.departs()
            && let Some(durable) = self.backend.take_released()
        {
            reached.push(Milestone::Released { durable });
            // Its descriptor is closed.
            self.watched = None;
        }
        match self.departure {
            Departure::Retiring if !reached.is_empty() => self.departure = Departure::Retired,
            Departure::Leaving if self.in_flight() == 0 && !self.backend.holds_host() => reached.push(Milestone::Gone),
            _ => {}
        }
        reached
    }
}
