//! The control thread: one event loop over the control socket, the machine's events and its console.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::obey::{News, PendingFreeze};
use super::protocol::{Command, Event, MAX_MESSAGE_BYTES, Message, Reply, Request, exit};
use super::socket::{self, Packet};
use crate::events::MachineEvent;
use crate::machine::Machine;
use crate::memory_use;

/// Most events kept for an agent that is away.
const MAX_KEPT_EVENTS: usize = 16;
/// Bytes of console input taken from clients before the guest has room for them.
const INPUT_BUFFER: usize = 4096;

/// How long console output is gathered before it is passed on.
const OUTPUT_DELAY: Duration = Duration::from_millis(2);

/// Serves one machine until it ends.
pub struct Server {
    listener: Option<OwnedFd>,
    connection: Option<OwnedFd>,
    pub(super) machine: Option<Machine>,
    pub(super) born: Instant,
    /// Print counters when the machine ends; the process's memory map, opened while that was allowed.
    report: Option<File>,
    /// Events no agent has been told of.
    kept: Vec<Event>,
    /// Console input the guest has no room for yet.
    input: Vec<u8>,
    /// When console output that has begun is passed on.
    flush_at: Option<Instant>,
    /// A freeze that waits for writes in flight.
    pub(super) freezing: Option<PendingFreeze>,
    /// The guest's panic has been told: it can report as many as it likes, but neither fill logs nor the agent's socket.
    panicked: bool,
}

/// How a turn of the loop ended.
enum Turn {
    GoOn,
    Exit(i32),
}

/// Why a descriptor is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Listener,
    Connection,
    MachineEvents,
    ConsoleListener,
    ConsoleOutput,
    SerialRoom,
    ConsoleClient(usize),
}

impl Server {
    /// Waits for an agent on `listener`.
    pub fn new(listener: OwnedFd, born: Instant) -> io::Result<Self> {
        socket::set_nonblocking(&listener)?;
        Ok(Self {
            listener: Some(listener),
            connection: None,
            machine: None,
            born,
            report: None,
            kept: Vec::new(),
            input: Vec::new(),
            flush_at: None,
            freezing: None,
            panicked: false,
        })
    }

    /// Serves a machine that exists already (developer mode), with or without a control socket.
    pub fn with_machine(
        machine: Machine,
        listener: Option<OwnedFd>,
        report: Option<File>,
        born: Instant,
    ) -> io::Result<Self> {
        if let Some(listener) = &listener {
            socket::set_nonblocking(listener)?;
        }
        Ok(Self {
            listener,
            connection: None,
            machine: Some(machine),
            born,
            report,
            kept: Vec::new(),
            input: Vec::new(),
            flush_at: None,
            freezing: None,
            panicked: false,
        })
    }

    /// Runs until the machine ends; the exit code for the process.
    pub fn run(mut self) -> i32 {
        loop {
            let timeout = self.poll_timeout();
            let (sources, mut polls) = self.watch();
            // SAFETY: the array is valid for its length; its descriptors are owned by `self` and stay open meanwhile.
            let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
            if ready < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return self.end(exit::HOST_ERROR, &format!("poll failed: {error}"));
            }
            // Clients last and backwards: dropping one moves those behind it.
            let mut fired: Vec<(Source, i16)> =
                sources.into_iter().zip(&polls).filter(|(_, p)| p.revents != 0).map(|(s, p)| (s, p.revents)).collect();
            fired.sort_by_key(|(source, _)| match source {
                Source::MachineEvents => (0, 0),
                Source::ConsoleClient(index) => (2, usize::MAX - index),
                _ => (1, 0),
            });
            for (source, revents) in fired {
                if let Turn::Exit(code) = self.handle(source, revents) {
                    return code;
                }
            }
        }
    }

    /// Milliseconds until something is due; -1 when nothing is. Does what is due now.
    fn poll_timeout(&mut self) -> i32 {
        let freeze = self.turn_freeze();
        let Some(at) = self.flush_at else { return freeze };
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.flush_at = None;
            self.with_console(|machine| machine.console().send_output());
            return 0;
        }
        let left = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        if freeze < 0 { left } else { left.min(freeze) }
    }

    /// What to wait for now.
    fn watch(&self) -> (Vec<Source>, Vec<libc::pollfd>) {
        let mut sources = Vec::new();
        let mut polls = Vec::new();
        let mut add = |source, fd: RawFd, events| {
            sources.push(source);
            polls.push(libc::pollfd { fd, events, revents: 0 });
        };
        if let Some(listener) = &self.listener {
            add(Source::Listener, listener.as_raw_fd(), libc::POLLIN);
        }
        if let Some(connection) = &self.connection {
            add(Source::Connection, connection.as_raw_fd(), libc::POLLIN);
        }
        if let Some(machine) = &self.machine {
            let console = machine.console_ref();
            add(Source::MachineEvents, machine.events().wake_fd().as_raw_fd(), libc::POLLIN);
            if self.flush_at.is_none() {
                add(Source::ConsoleOutput, console.wake().as_raw_fd(), libc::POLLIN);
            }
            if let Some(listener) = console.listener() {
                add(Source::ConsoleListener, listener.as_raw_fd(), libc::POLLIN);
            }
            if !self.input.is_empty() {
                add(Source::SerialRoom, machine.serial().room_fd().as_raw_fd(), libc::POLLIN);
            }
            for (index, (fd, interest)) in console.clients().enumerate() {
                let mut events = 0;
                if interest.readable && self.input.len() < INPUT_BUFFER {
                    events |= libc::POLLIN;
                }
                if interest.writable {
                    events |= libc::POLLOUT;
                }
                // Even without events poll reports a peer that has gone.
                add(Source::ConsoleClient(index), fd.map_or(-1, |fd| fd.as_raw_fd()), events);
            }
        }
        (sources, polls)
    }

    fn handle(&mut self, source: Source, revents: i16) -> Turn {
        match source {
            Source::Listener => self.accept(),
            Source::Connection => return self.serve_connection(),
            Source::MachineEvents => return self.take_events(),
            Source::ConsoleListener => self.with_console(|machine| machine.console().accept()),
            // The guest prints byte by byte; until this is over its further bytes wake nobody.
            Source::ConsoleOutput => self.flush_at = Some(Instant::now() + OUTPUT_DELAY),
            Source::SerialRoom => self.feed_guest(),
            Source::ConsoleClient(index) => self.serve_client(index, revents),
        }
        Turn::GoOn
    }

    fn with_console(&mut self, action: impl FnOnce(&mut Machine)) {
        if let Some(machine) = &mut self.machine {
            action(machine);
        }
    }

    fn serve_client(&mut self, index: usize, revents: i16) {
        let room = INPUT_BUFFER.saturating_sub(self.input.len());
        let Some(machine) = &mut self.machine else { return };
        if revents & libc::POLLIN != 0 {
            machine.console().receive(index, room, &mut self.input);
            self.feed_guest();
        } else if revents & libc::POLLOUT != 0 {
            machine.console().send_output();
        } else if revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0 {
            machine.console().drop_client(index);
        }
    }

    /// Moves waiting input into the guest's receive buffer as far as it has room.
    fn feed_guest(&mut self) {
        let Some(machine) = &self.machine else { return };
        let count = machine.serial().room().min(self.input.len());
        if count > 0 {
            let bytes: Vec<u8> = self.input.drain(..count).collect();
            machine.serial().receive(&bytes);
        }
    }

    /// Takes a new connection; it replaces the old one.
    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match socket::accept(listener.as_fd()) {
            Ok(Some(connection)) => {
                self.drop_connection();
                self.connection = Some(connection);
            }
            Ok(None) => {}
            Err(e) => log(&format!("cannot accept a control connection: {e}")),
        }
    }

    fn serve_connection(&mut self) -> Turn {
        let Some(connection) = &self.connection else { return Turn::GoOn };
        match socket::receive(connection.as_fd()) {
            Ok(Some(packet)) => self.serve_packet(packet),
            Ok(None) => {
                self.drop_connection();
                Turn::GoOn
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Turn::GoOn,
            Err(e) => {
                log(&format!("control connection dropped: {e}"));
                self.drop_connection();
                Turn::GoOn
            }
        }
    }

    fn serve_packet(&mut self, packet: Packet) -> Turn {
        let request: Request = match postcard::take_from_bytes(&packet.bytes) {
            Ok((request, [])) => request,
            other => {
                let e = other.err().map_or_else(|| "it has more bytes than it needs".to_owned(), |e| e.to_string());
                log(&format!(
                    "control connection dropped: a message of {} bytes is not understood: {e}",
                    packet.bytes.len()
                ));
                self.drop_connection();
                return Turn::GoOn;
            }
        };
        let (hello, kill) =
            (matches!(request.command, Command::Hello { .. }), matches!(request.command, Command::Kill));
        if let Some(outcome) = self.obey(request.id, request.command, packet.fds) {
            self.send(&Message::Reply(Reply { id: request.id, outcome }));
        }
        if hello {
            for event in std::mem::take(&mut self.kept) {
                self.tell(event);
            }
            self.tell_conditions();
        }
        if kill { Turn::Exit(self.end(exit::KILLED, "")) } else { Turn::GoOn }
    }

    /// Sends to the agent; one that does not read is disconnected.
    pub(super) fn send(&mut self, message: &Message) -> bool {
        let Some(connection) = &self.connection else { return false };
        let bytes = match postcard::to_allocvec(message) {
            Ok(bytes) if bytes.len() <= MAX_MESSAGE_BYTES => bytes,
            _ => {
                log("an answer was too long and was not sent");
                return false;
            }
        };
        let sent = socket::send(connection.as_fd(), &bytes, &[]);
        if let Err(e) = &sent {
            log(&format!("control connection dropped: {e}"));
            self.drop_connection();
        }
        sent.is_ok()
    }

    fn drop_connection(&mut self) {
        self.connection = None;
        // Nobody would learn of it.
        self.cancel_freeze();
    }

    /// Tells the agent of an event, now or when it comes back.
    pub(super) fn tell(&mut self, event: Event) {
        let message = Message::Event(event);
        if self.send(&message) {
            return;
        }
        // A detachment is never forgotten: there are no more of them than the agent asked for.
        let Message::Event(event) = message else { return };
        let keep = match &event {
            Event::DiskDetached { .. } => true,
            // Told anew to who comes.
            Event::FetchChunks { .. }
            | Event::ChunksStaged { .. }
            | Event::ConnectVolume { .. }
            | Event::VolumeImpaired { .. }
            | Event::VolumeRecovered { .. } => false,
            _ => self.kept.len() < MAX_KEPT_EVENTS,
        };
        if keep && !self.kept.contains(&event) {
            self.kept.push(event);
        }
    }

    fn take_events(&mut self) -> Turn {
        let Some(events) = self.machine.as_ref().map(|machine| machine.events().take()) else { return Turn::GoOn };
        let mut news = News::default();
        for event in events {
            let (event, code, why) = match event {
                MachineEvent::Panicked if self.panicked => continue,
                MachineEvent::Panicked => {
                    self.panicked = true;
                    log("the guest kernel reports a panic");
                    self.tell(Event::GuestPanicked);
                    continue;
                }
                MachineEvent::Disk(event) => {
                    news.extend(self.machine.as_mut().and_then(|machine| machine.note_disk(event)));
                    continue;
                }
                MachineEvent::PoweredOff => (Some(Event::PoweredOff), exit::POWER_OFF, String::new()),
                MachineEvent::Reset => (Some(Event::Reset), exit::RESET, String::new()),
                MachineEvent::Crashed(text) => (Some(Event::GuestCrashed), exit::GUEST_CRASH, text),
                MachineEvent::HostFailed(text) => (None, exit::HOST_ERROR, text),
            };
            if self.report.is_some() {
                log(&format!("over after {} us", self.born.elapsed().as_micros()));
            }
            let code = self.end(code, &why);
            if let Some(event) = event {
                self.tell(event);
            }
            return Turn::Exit(code);
        }
        for event in news.into_events() {
            self.tell(event);
        }
        Turn::GoOn
    }

    /// Ends the machine, disks first made durable, and gives console clients the last output.
    fn end(&mut self, code: i32, why: &str) -> i32 {
        if !why.is_empty() {
            log(why);
        }
        let Some(mut machine) = self.machine.take() else { return code };
        machine.console().send_output();
        if let Some(smaps) = &self.report {
            report(&machine, smaps);
        }
        match machine.end() {
            Ok(()) => code,
            Err(e) => {
                log(&format!("the machine did not end cleanly: {e}"));
                exit::HOST_ERROR
            }
        }
    }
}

/// Counters and memory as one line each on standard error.
fn report(machine: &Machine, smaps: &File) {
    let stats = match machine.stats() {
        Ok(stats) => stats,
        Err(e) => return log(&format!("no counters: {e}")),
    };
    log(&format!("started after {} us", stats.start_ns / 1000));
    for (name, count) in stats.exits.iter().filter(|(_, count)| *count > 0) {
        log(&format!("{name} {count}"));
    }
    for (number, disk) in stats.disks.iter().enumerate() {
        log(&format!("disk {number}: {disk:?}"));
    }
    for (number, nic) in stats.nics.iter().enumerate() {
        log(&format!("nic {number}: {nic:?}"));
    }
    match read_all(smaps) {
        Ok(text) => log(&format!("{:?} bytes", memory_use::parse(&text, &stats.guest_ram))),
        Err(e) => log(&format!("no memory figures: {e}")),
    }
}

/// `read_to_string` would ask for the file's size first, a system call the sandbox does not know.
fn read_all(mut file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
            n => bytes.extend_from_slice(chunk.get(..n).unwrap_or_default()),
        }
    }
}

/// One line on standard error, which the agent keeps.
pub fn log(text: &str) {
    use std::io::Write;
    // Nothing can be done when even that fails.
    let _ = writeln!(io::stderr(), "hearth-vmm: {text}");
}

/// Takes the inherited listening socket.
pub fn inherited_listener(fd: RawFd) -> io::Result<OwnedFd> {
    use nix::sys::socket::{getsockopt, sockopt};
    // SAFETY: only looked at here; F_GETFD tells whether it is open at all.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open (just checked), and nothing else in this process owns it: the parent passed it for this.
    let owned = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let listening = getsockopt(&owned, sockopt::AcceptConn)?;
    if listening { Ok(owned) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a listening socket")) }
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
