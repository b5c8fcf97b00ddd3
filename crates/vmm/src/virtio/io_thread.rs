//! The one thread that moves all queues of all devices.
//!
//! It sleeps in epoll on the doorbells (eventfds that KVM signals on a queue notification), the devices' own descriptors
//! (tap, io_uring) and the command channel. Everything is edge-triggered and eventfds are never read: their counters only
//! grow, one system call less per wake-up. After a wake-up a device runs until it finds nothing more; only then are
//! notifications turned on again, so a busy guest exits once per burst.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::backend::{Backend, Broken, Wake};
use super::common_config::QueueSetup;
use super::queue::VirtQueue;
use super::shared::{DeviceShared, lock};
use super::{DeviceStats, VirtioError};

/// What the I/O thread is told. `device` is a position in [`IoLoop::devices`].
pub(crate) enum Command {
    Activate { device: usize, features: u64, queues: Vec<QueueSetup> },
    StartQueue { device: usize, setup: QueueSetup },
    ResetQueue { device: usize, index: usize },
    Reset { device: usize },
    Pause { done: SyncSender<()> },
    Resume { done: SyncSender<()> },
    Stats { reply: SyncSender<DeviceStats> },
    Stop { flush: bool, done: SyncSender<Result<(), VirtioError>> },
}

struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    event: EventFd,
}

/// Puts commands into the I/O thread's mailbox. Register accesses add at most one command per device and queue between two
/// resets, so a guest cannot make it grow.
#[derive(Clone)]
pub(crate) struct CommandSender(Arc<Mailbox>);

impl CommandSender {
    pub(crate) fn new() -> Result<Self, VirtioError> {
        let event = eventfd()?;
        Ok(Self(Arc::new(Mailbox { commands: Mutex::new(VecDeque::new()), event })))
    }

    pub(crate) fn send(&self, command: Command) {
        lock(&self.0.commands).push_back(command);
        // Fails only with a full counter, which is a signal already.
        let _ = self.0.event.write(1);
    }
}

/// A non-blocking eventfd.
pub(crate) fn eventfd() -> Result<EventFd, VirtioError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| VirtioError::Setup { what: "eventfd", source })
}

/// One device as the I/O thread sees it.
pub(crate) struct IoDevice {
    pub(crate) shared: Arc<DeviceShared>,
    pub(crate) doorbells: Vec<Arc<EventFd>>,
    pub(crate) backend: Box<dyn Backend>,
    state: State,
    watched: Option<RawFd>,
    /// Queues being reset.
    stopping: Vec<usize>,
    /// `run` has something to do.
    runnable: bool,
    event_idx: bool,
    /// For the log.
    name: String,
    complaints: u32,
}

const MAX_COMPLAINTS: u32 = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Inactive,
    Active,
    /// Waits for a reset, moves nothing.
    Broken,
    Resetting,
}

impl IoDevice {
    pub(crate) fn new(
        name: String,
        shared: Arc<DeviceShared>,
        doorbells: Vec<Arc<EventFd>>,
        backend: Box<dyn Backend>,
    ) -> Self {
        Self {
            name,
            complaints: 0,
            shared,
            doorbells,
            backend,
            state: State::Inactive,
            watched: None,
            stopping: Vec::new(),
            runnable: false,
            event_idx: false,
        }
    }

    fn in_flight(&self) -> usize {
        (0..self.doorbells.len()).map(|index| self.backend.in_flight(index)).sum()
    }

    fn stop_queues(&mut self) {
        for index in 0..self.doorbells.len() {
            self.backend.stop_queue(index);
        }
    }

    fn break_down(&mut self, error: &Broken) {
        // A guest can break its devices as often as it likes, but not fill the host's log with it.
        if self.complaints < MAX_COMPLAINTS {
            self.complaints += 1;
            let _ = writeln!(std::io::stderr(), "{}: the guest's driver must reset it: {error}", self.name);
        }
        // The error may have come between taking requests and sending them; run once more for those.
        self.runnable = self.state == State::Active && self.in_flight() > 0;
        self.state = State::Broken;
        self.stop_queues();
        self.shared.needs_reset();
    }

    /// Reports finished resets.
    fn settle(&mut self) {
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
}

const MAILBOX: u64 = u64::MAX;
const FD: u64 = 0xffff_ffff;

fn token(device: usize, source: u64) -> u64 {
    ((device as u64) << 32) | source
}

/// Everything the I/O thread owns.
pub(crate) struct IoLoop {
    epoll: Epoll,
    mailbox: CommandSender,
    memory: Arc<GuestMemoryMmap>,
    devices: Vec<IoDevice>,
    paused: bool,
    /// Told once everything in flight is done.
    pausing: Vec<SyncSender<()>>,
}

impl IoLoop {
    pub(crate) fn new(
        mailbox: CommandSender,
        memory: Arc<GuestMemoryMmap>,
        devices: Vec<IoDevice>,
    ) -> Result<Self, VirtioError> {
        let setup = |source| VirtioError::Setup { what: "epoll", source };
        let epoll = Epoll::new().map_err(setup)?;
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(edge, MAILBOX);
        epoll.ctl(ControlOperation::Add, mailbox.0.event.as_raw_fd(), event).map_err(setup)?;
        for (number, device) in devices.iter().enumerate() {
            for (index, doorbell) in device.doorbells.iter().enumerate() {
                let event = EpollEvent::new(edge, token(number, index as u64));
                epoll.ctl(ControlOperation::Add, doorbell.as_raw_fd(), event).map_err(setup)?;
            }
        }
        Ok(Self { epoll, mailbox, memory, devices, paused: false, pausing: Vec::new() })
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) -> Result<(), VirtioError> {
        while self.turn(-1)? {}
        Ok(())
    }

    /// One turn: waits up to `timeout` ms (-1 = for ever), then does what is due. False once stopped.
    pub(crate) fn turn(&mut self, timeout: i32) -> Result<bool, VirtioError> {
        let busy = self.devices.iter().any(|device| device.runnable);
        let mut events = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(if busy { 0 } else { timeout }, &mut events) {
            Ok(count) => count,
            // io_uring's task work interrupts sleeping system calls.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(source) => return Err(VirtioError::Setup { what: "epoll_wait", source }),
        };
        let mut told = false;
        for event in events.iter().take(count) {
            let number = (event.data() >> 32) as usize;
            match (event.data(), event.data() & FD) {
                (MAILBOX, _) => told = true,
                (_, FD) => self.wake(number, Wake::Fd),
                (_, index) => self.wake(number, Wake::Queue(index as usize)),
            }
        }
        if told && !self.obey() {
            return Ok(false);
        }
        for device in &mut self.devices {
            if std::mem::take(&mut device.runnable) {
                let accept = !self.paused && device.state == State::Active && device.shared.bus_master();
                match device.backend.run(accept) {
                    Ok(more) => device.runnable = more,
                    Err(error) => device.break_down(&error),
                }
                device.settle();
            }
        }
        self.settle_pause();
        Ok(true)
    }

    /// The mailbox, for tests that talk to a loop without a thread.
    #[cfg(test)]
    pub(crate) fn commands(&self) -> CommandSender {
        self.mailbox.clone()
    }

    /// Counters of all devices.
    pub(crate) fn device_stats(&self) -> DeviceStats {
        let mut stats = DeviceStats::default();
        for device in &self.devices {
            device.backend.collect(&mut stats);
        }
        stats
    }

    fn wake(&mut self, number: usize, wake: Wake) {
        if let Some(device) = self.devices.get_mut(number)
            && device.state != State::Inactive
        {
            device.backend.wake(wake);
            device.runnable = true;
        }
    }

    /// Works through the mailbox. False on `Stop`.
    fn obey(&mut self) -> bool {
        loop {
            let Some(command) = lock(&self.mailbox.0.commands).pop_front() else { return true };
            match command {
                Command::Activate { device, features, queues } => self.activate(device, features, &queues),
                Command::StartQueue { device, setup } => self.start_queue(device, &setup),
                Command::ResetQueue { device, index } => {
                    if let Some(device) = self.devices.get_mut(device) {
                        device.backend.stop_queue(index);
                        device.stopping.push(index);
                        device.settle();
                    }
                }
                Command::Reset { device } => {
                    if let Some(device) = self.devices.get_mut(device) {
                        device.stop_queues();
                        device.state = State::Resetting;
                        device.settle();
                    }
                }
                Command::Pause { done } => {
                    self.paused = true;
                    self.pausing.push(done);
                }
                Command::Resume { done } => {
                    self.paused = false;
                    self.wake_all();
                    let _ = done.send(());
                }
                Command::Stats { reply } => {
                    let _ = reply.send(self.device_stats());
                }
                Command::Stop { flush, done } => {
                    let result = if flush { self.drain_and_sync() } else { Ok(()) };
                    let _ = done.send(result);
                    return false;
                }
            }
        }
    }

    fn activate(&mut self, number: usize, features: u64, queues: &[QueueSetup]) {
        let Some(device) = self.devices.get_mut(number) else { return };
        device.state = State::Active;
        device.event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        if let Err(error) = device.backend.activate(features) {
            device.break_down(&error);
            return;
        }
        let wanted = device.backend.event_fd();
        if wanted.is_some() && device.watched != wanted {
            let set = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            let fd = wanted.unwrap_or(-1);
            // The descriptor of an earlier activation is closed and so out of the set already.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
            let event = EpollEvent::new(set, token(number, FD));
            if let Err(error) = self.epoll.ctl(ControlOperation::Add, fd, event) {
                device.break_down(&Broken::Watch(error));
                return;
            }
            device.watched = wanted;
        }
        for setup in queues {
            self.start_queue(number, setup);
        }
    }

    fn start_queue(&mut self, number: usize, setup: &QueueSetup) {
        let Some(device) = self.devices.get_mut(number) else { return };
        if device.state != State::Active {
            return;
        }
        match VirtQueue::new(setup, device.event_idx, Arc::clone(&self.memory), Arc::clone(&device.shared)) {
            Ok(queue) => {
                device.backend.start_queue(queue);
                // Chains may wait since before the doorbell was watched.
                device.backend.wake(Wake::Queue(setup.index));
                device.runnable = true;
            }
            Err(error) => device.break_down(&error.into()),
        }
    }

    fn wake_all(&mut self) {
        for number in 0..self.devices.len() {
            let queues = self.devices.get(number).map_or(0, |device| device.doorbells.len());
            for index in 0..queues {
                self.wake(number, Wake::Queue(index));
            }
            self.wake(number, Wake::Fd);
        }
    }

    fn settle_pause(&mut self) {
        if !self.pausing.is_empty() && self.devices.iter().all(|device| device.in_flight() == 0) {
            for done in self.pausing.drain(..) {
                let _ = done.send(());
            }
        }
    }

    /// The orderly end: nothing new is taken, what is in flight finishes, disks become durable.
    fn drain_and_sync(&mut self) -> Result<(), VirtioError> {
        self.paused = true;
        while self.devices.iter().any(|device| device.in_flight() > 0) {
            for device in &mut self.devices {
                if device.in_flight() > 0 {
                    device.backend.wake(Wake::Fd);
                    device.runnable = true;
                }
            }
            for device in &mut self.devices {
                if std::mem::take(&mut device.runnable)
                    && let Err(error) = device.backend.run(false)
                {
                    device.break_down(&error);
                }
            }
            // Wakes up early for completions; what else happened no longer matters.
            let _ = self.epoll.wait(10, &mut [EpollEvent::default(); 8]);
        }
        let mut result = Ok(());
        for device in &self.devices {
            if let Err(error) = device.backend.sync() {
                result = Err(VirtioError::IoThreadGone(error.to_string()));
            }
        }
        result
    }
}
