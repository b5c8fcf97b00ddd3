//! The one thread that moves all queues of all devices.
//!
//! It sleeps in epoll on the doorbells (eventfds that KVM signals on a queue notification), the devices' own descriptors
//! (tap, io_uring) and the command channel. Everything is edge-triggered and eventfds are never read: their counters only
//! grow, one system call less per wake-up. After a wake-up a device runs until it finds nothing more; only when the thread
//! sleeps are notifications turned on again, so a busy guest exits once per burst, and one whose next request comes soon not at all
//! (see [`patience`](super::patience)).

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::backend::Wake;
use super::common_config::QueueSetup;
use super::io_device::{Departure, DeviceId, FD, IoDevice, Milestone, OUTSIDE, State};
use super::patience::Patience;
use super::queue::VirtQueue;
use super::shared::lock;
use super::{DeviceStats, VirtioError};

/// What the I/O thread is told. Commands for a device that is not there (any more) do nothing.
pub(crate) enum Command {
    Activate {
        device: DeviceId,
        features: u64,
        queues: Vec<QueueSetup>,
    },
    StartQueue {
        device: DeviceId,
        setup: QueueSetup,
    },
    ResetQueue {
        device: DeviceId,
        index: usize,
    },
    Reset {
        device: DeviceId,
    },
    /// A new device; its queues move when its driver says so.
    Add {
        device: Box<IoDevice>,
        done: SyncSender<Result<(), VirtioError>>,
    },
    /// Give back what is behind the device; told to [`DepartureSink::released`].
    Retire {
        device: DeviceId,
    },
    /// The guest has let go of the device; told to [`DepartureSink::gone`] after `released`.
    Remove {
        device: DeviceId,
    },
    /// The disk's volume has this many bytes now.
    Resize {
        device: DeviceId,
        bytes: u64,
        done: SyncSender<()>,
    },
    Pause {
        done: SyncSender<()>,
    },
    Resume {
        done: SyncSender<()>,
    },
    Stats {
        reply: SyncSender<DeviceStats>,
    },
    Stop {
        done: SyncSender<()>,
    },
}

/// Learns of devices on their way out, from the I/O thread.
pub(crate) trait DepartureSink: Send {
    /// Nothing behind the device is used any more; `durable` tells whether its last flush succeeded.
    fn released(&self, device: DeviceId, durable: bool);
    /// Nothing is left of the device.
    fn gone(&self, device: DeviceId);
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

const MAILBOX: u64 = u64::MAX;

/// What happened within `timeout` ms (-1 = whenever it does).
fn look(epoll: &Epoll, timeout: i32, events: &mut [EpollEvent]) -> Result<usize, VirtioError> {
    match epoll.wait(timeout, events) {
        Ok(count) => Ok(count),
        // io_uring's task work interrupts sleeping system calls.
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(0),
        Err(source) => Err(VirtioError::Setup { what: "epoll_wait", source }),
    }
}

/// What it costs to look for events and at the clock; the least of several measurements, because others may run in between.
fn cost_of_a_look() -> std::io::Result<Duration> {
    const TIMES: u32 = 8;
    // Not the thread's own: edges that this saw would be lost.
    let epoll = Epoll::new()?;
    let mut least = Duration::MAX;
    for _ in 0..TIMES {
        let began = Instant::now();
        let mut now = began;
        for _ in 0..TIMES {
            epoll.wait(0, &mut [EpollEvent::default(); 64])?;
            now = Instant::now();
        }
        least = least.min(now.duration_since(began) / TIMES);
    }
    Ok(least)
}

/// Everything the I/O thread owns.
pub(crate) struct IoLoop {
    epoll: Epoll,
    mailbox: CommandSender,
    memory: Arc<GuestMemoryMmap>,
    devices: Vec<IoDevice>,
    departures: Box<dyn DepartureSink>,
    patience: Patience,
    paused: bool,
    /// Told once everything in flight is done.
    pausing: Vec<SyncSender<()>>,
}

impl IoLoop {
    pub(crate) fn new(
        mailbox: CommandSender,
        memory: Arc<GuestMemoryMmap>,
        mut devices: Vec<IoDevice>,
        departures: Box<dyn DepartureSink>,
    ) -> Result<Self, VirtioError> {
        let setup = |source| VirtioError::Setup { what: "epoll", source };
        let epoll = Epoll::new().map_err(setup)?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, MAILBOX);
        epoll.ctl(ControlOperation::Add, mailbox.0.event.as_raw_fd(), event).map_err(setup)?;
        for device in &mut devices {
            device.watch(&epoll).map_err(setup)?;
        }
        let patience = Patience::new(cost_of_a_look().map_err(setup)?, available_parallelism().map_or(1, usize::from));
        Ok(Self { epoll, mailbox, memory, devices, departures, patience, paused: false, pausing: Vec::new() })
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) -> Result<(), VirtioError> {
        while self.turn(-1)? {}
        Ok(())
    }

    /// One turn: waits up to `timeout` ms (-1 = for ever), then does what is due. False once stopped.
    pub(crate) fn turn(&mut self, timeout: i32) -> Result<bool, VirtioError> {
        let mut events = [EpollEvent::default(); 64];
        let count = self.wait(timeout, &mut events)?;
        let mut told = false;
        for event in events.iter().take(count) {
            let device = (event.data() >> 32) as DeviceId;
            match (event.data(), event.data() & FD) {
                (MAILBOX, _) => told = true,
                (_, FD) => self.wake(device, Wake::Fd),
                (_, OUTSIDE) => self.wake(device, Wake::Outside),
                (_, index) => self.wake(device, Wake::Queue(index as usize)),
            }
        }
        if told && !self.obey() {
            return Ok(false);
        }
        for device in &mut self.devices {
            if std::mem::take(&mut device.runnable) {
                let accept = !self.paused && device.moves();
                device.awake = true;
                match device.backend.run(accept) {
                    Ok(more) => device.runnable = more,
                    Err(error) => device.break_down(&error),
                }
                device.settle();
            }
        }
        self.settle_departures();
        self.settle_pause();
        Ok(true)
    }

    /// Waits until a device can run or something has happened; returns the number of `events`.
    fn wait(&mut self, timeout: i32, events: &mut [EpollEvent]) -> Result<usize, VirtioError> {
        if self.is_busy() {
            self.rest();
            return look(&self.epoll, 0, events);
        }
        let began = Instant::now();
        if timeout != 0
            && let Some(count) = self.poll(began, events)?
        {
            return Ok(count);
        }
        self.rest();
        if timeout == 0 || self.is_busy() {
            return look(&self.epoll, 0, events);
        }
        let count = look(&self.epoll, timeout, events)?;
        self.patience.slept(began.elapsed());
        Ok(count)
    }

    /// Looks for work without sleeping, for as long as that has paid lately. `None`: there is none.
    fn poll(&mut self, began: Instant, events: &mut [EpollEvent]) -> Result<Option<usize>, VirtioError> {
        let (window, paused) = (self.patience.window(began), self.paused);
        let mut now = began;
        while now.duration_since(began) < window {
            for device in self.devices.iter_mut().filter(|device| device.awake && !paused && device.moves()) {
                device.runnable = device.backend.has_chains();
            }
            // Also when a driver has added something: commands and other devices do not wait until it pauses.
            let count = look(&self.epoll, 0, events)?;
            if count > 0 || self.is_busy() {
                return Ok(Some(count));
            }
            let before = std::mem::replace(&mut now, Instant::now());
            if !self.patience.looked(now.duration_since(before), now) {
                break;
            }
        }
        Ok(None)
    }

    fn is_busy(&self) -> bool {
        self.devices.iter().any(|device| device.runnable)
    }

    /// Has the drivers of devices that have nothing to do notify again.
    fn rest(&mut self) {
        let paused = self.paused;
        for device in self.devices.iter_mut().filter(|device| device.awake && !device.runnable) {
            if !paused && device.moves() {
                device.rest();
            }
        }
    }

    /// Polls for so long, for tests.
    #[cfg(test)]
    pub(crate) fn be_patient(&mut self, window: Duration) {
        self.patience = Patience::of(window);
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

    fn find(&mut self, id: DeviceId) -> Option<&mut IoDevice> {
        self.devices.iter_mut().find(|device| device.id == id)
    }

    fn wake(&mut self, id: DeviceId, wake: Wake) {
        if let Some(device) = self.find(id)
            && device.listens()
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
                    if let Some(device) = self.find(device) {
                        device.backend.stop_queue(index);
                        device.stopping.push(index);
                        device.settle();
                    }
                }
                Command::Reset { device } => {
                    if let Some(device) = self.find(device) {
                        device.stop_queues();
                        device.state = State::Resetting;
                        device.settle();
                    }
                }
                Command::Add { device, done } => {
                    let _ = done.send(self.add(*device));
                }
                Command::Retire { device } => self.depart(device, IoDevice::retire),
                Command::Remove { device } => self.depart(device, IoDevice::leave),
                Command::Resize { device, bytes, done } => {
                    if let Some(device) = self.find(device) {
                        device.backend.resized(bytes);
                    }
                    let _ = done.send(());
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
                Command::Stop { done } => {
                    // Waits for what the kernel works on; volumes are closed by the control thread.
                    self.devices.clear();
                    let _ = done.send(());
                    return false;
                }
            }
        }
    }

    fn add(&mut self, mut device: IoDevice) -> Result<(), VirtioError> {
        device.watch(&self.epoll).map_err(|source| VirtioError::Setup { what: "epoll", source })?;
        self.devices.push(device);
        Ok(())
    }

    fn depart(&mut self, id: DeviceId, how: impl FnOnce(&mut IoDevice, &Epoll)) {
        if let Some(device) = self.devices.iter_mut().find(|device| device.id == id) {
            how(device, &self.epoll);
        }
    }

    /// Tells what departures have reached, and drops devices that are gone.
    fn settle_departures(&mut self) {
        let (epoll, departures) = (&self.epoll, &self.departures);
        self.devices.retain_mut(|device| {
            let mut stays = true;
            for milestone in device.milestones() {
                match milestone {
                    Milestone::Released { durable } => departures.released(device.id, durable),
                    Milestone::Gone => {
                        device.unwatch(epoll);
                        stays = false;
                    }
                }
            }
            if !stays {
                departures.gone(device.id);
            }
            stays
        });
    }

    fn activate(&mut self, id: DeviceId, features: u64, queues: &[QueueSetup]) {
        let Some(device) = self.devices.iter_mut().find(|device| device.id == id) else { return };
        if device.departure == Departure::Leaving {
            return;
        }
        device.state = State::Active;
        device.event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let activated = device.backend.activate(features).and_then(|()| device.watch_backend(&self.epoll));
        if let Err(error) = activated {
            device.break_down(&error);
            return;
        }
        for setup in queues {
            self.start_queue(id, setup);
        }
    }

    fn start_queue(&mut self, id: DeviceId, setup: &QueueSetup) {
        let Some(device) = self.devices.iter_mut().find(|device| device.id == id) else { return };
        if device.state != State::Active || device.departure == Departure::Leaving {
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
        for device in self.devices.iter_mut().filter(|device| device.listens()) {
            for index in 0..device.doorbells.len() {
                device.backend.wake(Wake::Queue(index));
            }
            device.backend.wake(Wake::Fd);
            device.runnable = true;
        }
    }

    fn settle_pause(&mut self) {
        if !self.pausing.is_empty() && self.devices.iter().all(IoDevice::is_quiet) {
            for done in self.pausing.drain(..) {
                let _ = done.send(());
            }
        }
    }
}
