//! The control thread: one event loop over the control socket, the machine's events and its console.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::protocol::{
    Command, Event, MAX_MESSAGE_BYTES, MachineState, Message, Outcome, PROTOCOL_VERSION, Reply, Request, exit,
};
use super::socket::{self, Packet};
use crate::boot::Placement;
use crate::events::MachineEvent;
use crate::machine::{Descriptors, Machine};
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
    machine: Option<Machine>,
    born: Instant,
    /// Print counters when the machine ends; the process's memory map, opened while that was allowed.
    report: Option<File>,
    /// Events no agent has been told of.
    kept: Vec<Event>,
    /// Console input the guest has no room for yet.
    input: Vec<u8>,
    /// When console output that has begun is passed on.
    flush_at: Option<Instant>,
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

    /// Milliseconds until console output is due; -1 when there is none. Passes on what is due now.
    fn poll_timeout(&mut self) -> i32 {
        let Some(at) = self.flush_at else { return -1 };
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.flush_at = None;
            self.with_console(|machine| machine.console().send_output());
            return 0;
        }
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
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
            Ok(Some(connection)) => self.connection = Some(connection),
            Ok(None) => {}
            Err(e) => log(&format!("cannot accept a control connection: {e}")),
        }
    }

    fn serve_connection(&mut self) -> Turn {
        let Some(connection) = &self.connection else { return Turn::GoOn };
        match socket::receive(connection.as_fd()) {
            Ok(Some(packet)) => self.serve_packet(packet),
            Ok(None) => {
                self.connection = None;
                Turn::GoOn
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Turn::GoOn,
            Err(e) => {
                log(&format!("control connection dropped: {e}"));
                self.connection = None;
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
                self.connection = None;
                return Turn::GoOn;
            }
        };
        let (hello, kill) =
            (matches!(request.command, Command::Hello { .. }), matches!(request.command, Command::Kill));
        let outcome = self.obey(request.command, packet.fds);
        self.send(&Message::Reply(Reply { id: request.id, outcome }));
        if hello {
            for event in std::mem::take(&mut self.kept) {
                self.tell(event);
            }
        }
        if kill { Turn::Exit(self.end(exit::KILLED, "")) } else { Turn::GoOn }
    }

    fn obey(&mut self, command: Command, fds: Vec<OwnedFd>) -> Result<Outcome, String> {
        let machine = self.machine.as_mut();
        let none = || "there is no machine yet".to_owned();
        let done = |result: Result<(), crate::machine::MachineError>| {
            result.map(|()| Outcome::Done).map_err(|e| e.to_string())
        };
        match command {
            Command::Hello { version } if version != PROTOCOL_VERSION => {
                Err(format!("this VMM speaks protocol version {PROTOCOL_VERSION}, not {version}"))
            }
            Command::Hello { .. } => Ok(Outcome::Hello {
                version: PROTOCOL_VERSION,
                instance_id: machine.as_ref().map(|m| m.instance_id().to_owned()).unwrap_or_default(),
                state: machine.map_or(MachineState::Empty, |m| m.state()),
            }),
            Command::Create(_) if machine.is_some() => Err("there is a machine already".to_owned()),
            Command::Create(spec) => {
                let machine = Machine::create(&spec, Descriptors::new(fds), Placement::Copy, self.born)
                    .map_err(|e| e.to_string())?;
                self.machine = Some(machine);
                Ok(Outcome::Done)
            }
            Command::Start => done(machine.ok_or_else(none)?.start()),
            Command::Pause => done(machine.ok_or_else(none)?.pause()),
            Command::Resume => done(machine.ok_or_else(none)?.resume()),
            Command::PowerButton => done(machine.ok_or_else(none)?.power_button()),
            Command::Stats => machine
                .ok_or_else(none)?
                .stats()
                .map(|stats| Outcome::Stats(Box::new(stats)))
                .map_err(|e| e.to_string()),
            Command::AttachDisk(disk) => done(machine.ok_or_else(none)?.attach_disk(&disk, Descriptors::new(fds))),
            Command::DetachDisk { serial, force } => done(machine.ok_or_else(none)?.detach_disk(&serial, force)),
            Command::ResizeDisk { serial, bytes } => done(machine.ok_or_else(none)?.resize_disk(&serial, bytes)),
            Command::Kill => Ok(Outcome::Done),
        }
    }

    /// Sends to the agent; one that does not read is disconnected.
    fn send(&mut self, message: &Message) -> bool {
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
            self.connection = None;
        }
        sent.is_ok()
    }

    /// Tells the agent of an event, now or when it comes back.
    fn tell(&mut self, event: Event) {
        let message = Message::Event(event);
        if self.send(&message) {
            return;
        }
        // A detachment is never forgotten: there are no more of them than the agent asked for.
        let Message::Event(event) = message else { return };
        let keep = matches!(event, Event::DiskDetached { .. }) || self.kept.len() < MAX_KEPT_EVENTS;
        if keep && !self.kept.contains(&event) {
            self.kept.push(event);
        }
    }

    fn take_events(&mut self) -> Turn {
        let Some(events) = self.machine.as_ref().map(|machine| machine.events().take()) else { return Turn::GoOn };
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
                    if let Some(disk) = self.machine.as_mut().and_then(|machine| machine.note_disk(event)) {
                        self.tell(Event::DiskDetached { serial: disk.serial, durable: disk.durable });
                    }
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
