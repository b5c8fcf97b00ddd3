//! COM1's host side: what the guest prints goes into the ring, and from there to any number of clients; what clients type
//! goes to the guest.
//!
//! vCPU threads only touch the ring and, when somebody listens, an eventfd; the control thread does the rest. A client that
//! reads too slowly falls behind in the ring; when its next byte has been overwritten it is told how much it missed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::console_ring::{RingError, RingWriter};

/// Most clients at once; more are turned away.
pub const MAX_CLIENTS: usize = 16;
/// Bytes moved to or from a client at a time.
const CHUNK: usize = 4096;
/// Most chunks sent to one client before anything else gets its turn.
const MAX_CHUNKS: usize = 64;

/// The guest's side: takes output bytes from vCPU threads.
#[derive(Debug)]
pub struct ConsoleOutput {
    ring: Mutex<RingWriter>,
    /// Somebody listens: tell them of new output.
    listened: AtomicBool,
    /// They have been told and have not looked yet.
    signalled: AtomicBool,
    wake: EventFd,
}

impl ConsoleOutput {
    /// Writes into the ring in `file`.
    pub fn new(file: &File) -> Result<Self, RingError> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| RingError::Io { action: "make an eventfd for", source })?;
        Ok(Self {
            ring: Mutex::new(RingWriter::open(file)?),
            listened: AtomicBool::new(false),
            signalled: AtomicBool::new(false),
            wake,
        })
    }

    fn ring(&self) -> MutexGuard<'_, RingWriter> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends guest output.
    pub fn write(&self, bytes: &[u8]) {
        self.ring().write(bytes);
        if self.listened.load(Ordering::Relaxed) && !self.signalled.swap(true, Ordering::AcqRel) {
            // Full only if the control thread has long been told.
            let _ = self.wake.write(1);
        }
    }
}

/// Where a client's bytes come from and go to.
#[derive(Debug)]
enum Channel {
    Socket(UnixStream),
    /// Input and output of the program itself (developer mode); writes may block the control thread, never the guest.
    Stdio(File, File),
}

impl Channel {
    fn input(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Socket(socket) => socket.read(buffer),
            Self::Stdio(input, _) => input.read(buffer),
        }
    }

    fn output(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Socket(socket) => socket.write(bytes),
            Self::Stdio(_, output) => output.write(bytes),
        }
    }
}

#[derive(Debug)]
struct Client {
    channel: Channel,
    /// Number of the next output byte to send.
    position: u64,
    /// Its socket is full: wait until it is writable.
    stalled: bool,
    /// It sends no more input.
    input_ended: bool,
}

/// What the control thread waits for on behalf of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Its input may bring something.
    pub readable: bool,
    /// Output waits for room.
    pub writable: bool,
}

/// The control thread's side.
#[derive(Debug)]
pub struct Console {
    output: Arc<ConsoleOutput>,
    listener: Option<UnixListener>,
    clients: Vec<Client>,
}

impl Console {
    /// Serves clients of `listener`.
    pub fn new(output: Arc<ConsoleOutput>, listener: Option<UnixListener>) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Self { output, listener, clients: Vec::new() })
    }

    /// The socket on which clients arrive.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// Readable when there is new output.
    pub fn wake(&self) -> &EventFd {
        &self.output.wake
    }

    /// Input descriptors of all clients, in order, and what to wait for. `None` for one that only takes output and is never
    /// waited for.
    pub fn clients(&self) -> impl Iterator<Item = (Option<BorrowedFd<'_>>, Interest)> {
        self.clients.iter().map(|client| {
            let fd = match &client.channel {
                Channel::Socket(socket) => Some(socket.as_fd()),
                Channel::Stdio(input, _) => (!client.input_ended).then(|| input.as_fd()),
            };
            (fd, Interest { readable: !client.input_ended, writable: client.stalled })
        })
    }

    /// Takes all waiting clients; each gets the backlog first.
    pub fn accept(&mut self) {
        while let Some(Ok((socket, _))) = self.listener.as_ref().map(UnixListener::accept) {
            if self.clients.len() < MAX_CLIENTS && socket.set_nonblocking(true).is_ok() {
                self.add(Channel::Socket(socket));
            }
        }
    }

    /// Makes the program's own input and output a client.
    pub fn add_stdio(&mut self, input: File, output: File) {
        self.add(Channel::Stdio(input, output));
    }

    fn add(&mut self, channel: Channel) {
        let ring = self.output.ring();
        let position = ring.total().saturating_sub(ring.capacity());
        self.output.listened.store(true, Ordering::Relaxed);
        drop(ring);
        self.clients.push(Client { channel, position, stalled: false, input_ended: false });
        self.send_output();
    }

    /// Sends every client what it has not seen.
    pub fn send_output(&mut self) {
        let _ = self.output.wake.read();
        self.output.signalled.store(false, Ordering::Release);
        let output = &self.output;
        self.clients.retain_mut(|client| send(client, output).is_ok());
        self.output.listened.store(!self.clients.is_empty(), Ordering::Relaxed);
    }

    /// Reads from client number `index` at most `room` bytes and appends them to `input`. The client is dropped when it is gone.
    pub fn receive(&mut self, index: usize, room: usize, input: &mut Vec<u8>) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let mut buffer = [0u8; CHUNK];
        let Some(buffer) = buffer.get_mut(..room.min(CHUNK)).filter(|b| !b.is_empty()) else { return };
        match client.channel.input(buffer) {
            // End of input. A socket client may have closed only its sending side, which the next write will show.
            Ok(0) => client.input_ended = true,
            Ok(n) => input.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => {
                self.clients.remove(index);
            }
        }
    }

    /// Drops client number `index`: both its directions are closed.
    pub fn drop_client(&mut self, index: usize) {
        if index < self.clients.len() {
            self.clients.remove(index);
        }
    }
}

/// Sends until nothing is left or the socket is full; an error when the client must go. A guest that prints without end must
/// not keep the control thread here, so after some turns the rest waits for the next wake-up.
fn send(client: &mut Client, output: &ConsoleOutput) -> io::Result<()> {
    let mut buffer = [0u8; CHUNK];
    client.stalled = false;
    for _ in 0..MAX_CHUNKS {
        let ring = output.ring();
        let Some(count) = ring.copy_out(client.position, &mut buffer) else {
            let oldest = ring.total().saturating_sub(ring.capacity());
            let notice = format!("\r\n[{} bytes of output skipped]\r\n", oldest.saturating_sub(client.position));
            drop(ring);
            client.position = oldest;
            // Only a notice: a client that has no room for it either goes without.
            let _ = client.channel.output(notice.as_bytes());
            continue;
        };
        drop(ring);
        let bytes = buffer.get(..count).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(());
        }
        match client.channel.output(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => client.position += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                client.stalled = true;
                return Ok(());
            }
            Err(e) => return Err(e),
        }
    }
    let _ = output.wake.write(1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console_ring;

    fn console() -> (tempfile::TempDir, Console, Arc<ConsoleOutput>) {
        let file = tempfile::tempfile().unwrap();
        console_ring::create(&file, 4096).unwrap();
        let output = Arc::new(ConsoleOutput::new(&file).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("console")).unwrap();
        let console = Console::new(output.clone(), Some(listener)).unwrap();
        (dir, console, output)
    }

    fn connect(dir: &tempfile::TempDir) -> UnixStream {
        UnixStream::connect(dir.path().join("console")).unwrap()
    }

    #[test]
    fn each_client_gets_backlog_then_live_output_and_can_type() {
        let (dir, mut console, output) = console();
        output.write(b"early ");
        assert!(console.wake().read().is_err(), "nobody listens yet");
        let mut first = connect(&dir);
        console.accept();
        output.write(b"late");
        output.write(b"!");
        assert_eq!(console.wake().read().unwrap(), 1);
        console.send_output();
        let mut text = [0u8; 11];
        first.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"early late!");
        let mut second = connect(&dir);
        console.accept();
        second.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"early late!");
        second.write_all(b"ls\n").unwrap();
        let mut input = Vec::new();
        console.receive(0, 16, &mut input);
        console.receive(1, 2, &mut input);
        console.receive(1, 0, &mut input);
        console.receive(7, 16, &mut input);
        assert_eq!(input, b"ls");
    }

    #[test]
    fn a_client_that_does_not_read_misses_output_and_others_do_not() {
        let (dir, mut console, output) = console();
        let mut lazy = connect(&dir);
        let mut eager = connect(&dir);
        console.accept();
        let mut seen = 0;
        for _ in 0..2000 {
            output.write(&[b'x'; 1000]);
            console.send_output();
            let mut buffer = [0u8; 1000];
            eager.read_exact(&mut buffer).unwrap();
            seen += buffer.len();
        }
        assert_eq!(seen, 2_000_000);
        output.write(b"the end");
        console.clients[0].stalled = false;
        let mut text = Vec::new();
        lazy.set_nonblocking(true).unwrap();
        while !text.ends_with(b"the end") {
            let mut buffer = [0u8; 65536];
            match lazy.read(&mut buffer) {
                Ok(n) => text.extend_from_slice(&buffer[..n]),
                Err(_) => console.send_output(),
            }
        }
        assert!(text.len() < 2_000_000);
        assert!(String::from_utf8_lossy(&text).contains("bytes of output skipped]"));
    }

    #[test]
    fn a_client_that_left_is_forgotten() {
        let (dir, mut console, output) = console();
        drop(connect(&dir));
        console.accept();
        let mut input = Vec::new();
        console.receive(0, 1, &mut input);
        output.write(b"x");
        console.send_output();
        assert!(console.clients.is_empty());
        output.write(b"y");
        assert!(console.wake().read().is_err());
    }
}
