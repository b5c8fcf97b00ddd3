//! As much of an NBD server as a comparison over NBD needs: one client on a Unix socket, reads, writes and flushes of one
//! volume, on one thread. (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>)

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use hearth_block::{Operation, Request, Volume, VolumeQueue};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
/// `NBD_FLAG_HAS_FLAGS`, `NBD_FLAG_SEND_FLUSH`.
const FLAGS: u16 = 1 | 4;
const REQUEST: usize = 28;
/// Requests in flight, and the most bytes of one.
const SLOTS: usize = 64;
pub const MOST: usize = 64 << 10;
const PAGE: usize = 4096;

/// Serves `volume` to the one client that connects, until that one goes.
pub fn serve(volume: impl Volume + 'static, socket: &Path) -> JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        negotiate(&mut stream, volume.size_bytes());
        let mut queue = volume.open_queue(SLOTS).unwrap();
        Server::new(stream).run(queue.as_mut());
    })
}

fn negotiate(stream: &mut UnixStream, size: u64) {
    // Fixed newstyle, no zeros.
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let mut data = vec![0; u32::from_be_bytes(head[12..].try_into().unwrap()) as usize];
        stream.read_exact(&mut data).unwrap();
        let mut reply = |kind: u32, data: &[u8]| {
            let head = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()];
            let reply = [&head.concat()[..], &(data.len() as u32).to_be_bytes(), data].concat();
            stream.write_all(&reply).unwrap();
        };
        if option == OPT_GO {
            reply(REP_INFO, &[&[0, 0][..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat());
            return reply(REP_ACK, &[]);
        }
        reply(REP_ERR_UNSUP, &[]);
    }
}

struct Server {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    memory: &'static mut [u8],
    free: Vec<usize>,
    /// Cookie, and bytes to send with the reply.
    requests: Vec<([u8; 8], usize)>,
}

impl Server {
    fn new(stream: UnixStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        let memory = Box::leak(vec![0; (SLOTS + 1) * MOST].into_boxed_slice());
        let skip = memory.as_ptr().align_offset(PAGE);
        let (memory, free) = (&mut memory[skip..], (0..SLOTS).collect());
        Self { stream, input: Vec::new(), output: Vec::new(), memory, free, requests: vec![([0; 8], 0); SLOTS] }
    }

    fn run(&mut self, queue: &mut dyn VolumeQueue) {
        while self.receive() {
            self.submit(queue);
            queue.kick().unwrap();
            let Self { output, memory, free, requests, .. } = self;
            let mut answered = false;
            queue
                .drain(&mut |completion| {
                    let slot = completion.token as usize;
                    completion.result.unwrap();
                    let (cookie, bytes) = requests[slot];
                    output.extend_from_slice(&[&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &cookie].concat());
                    output.extend_from_slice(&memory[slot * MOST..][..bytes]);
                    free.push(slot);
                    answered = true;
                })
                .unwrap();
            self.send();
            if !answered {
                let mut events = PollFlags::POLLIN;
                events.set(PollFlags::POLLOUT, !self.output.is_empty());
                let fds =
                    [PollFd::new(self.stream.as_fd(), events), PollFd::new(queue.completion_fd(), PollFlags::POLLIN)];
                poll(&mut { fds }, PollTimeout::NONE).unwrap();
            }
        }
    }

    /// False when the client is gone.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; MOST];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(length) => self.input.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return false,
                Err(error) => panic!("{error}"),
            }
            if self.input.len() >= MOST {
                return true;
            }
        }
    }

    fn submit(&mut self, queue: &mut dyn VolumeQueue) {
        let mut at = 0;
        while let Some(head) = self.input.get(at..at + REQUEST) {
            let kind = u16::from_be_bytes([head[6], head[7]]);
            let offset = u64::from_be_bytes(head[16..24].try_into().unwrap());
            let length = u32::from_be_bytes(head[24..].try_into().unwrap()) as usize;
            let operation = match kind {
                0 => Operation::Read,
                1 => Operation::Write,
                2 => {
                    self.input.clear();
                    return;
                }
                3 => Operation::Flush,
                other => panic!("request of kind {other}"),
            };
            let sent = if operation == Operation::Write { length } else { 0 };
            if self.input.len() < at + REQUEST + sent {
                break;
            }
            let Some(slot) = self.free.pop() else { break };
            let memory = &mut self.memory[slot * MOST..][..length];
            memory[..sent].copy_from_slice(&self.input[at + REQUEST..][..sent]);
            let back = if operation == Operation::Read { length } else { 0 };
            self.requests[slot] = (head[8..16].try_into().unwrap(), back);
            let buffers = [libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: length }];
            let buffers = if length > 0 { &buffers[..] } else { &[] };
            let request = Request { operation, offset, length: 0, buffers, token: slot as u64 };
            // SAFETY: the memory is never freed, and nobody else uses the slot.
            unsafe { queue.submit(request).unwrap() };
            at += REQUEST + sent;
        }
        self.input.drain(..at);
    }

    fn send(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The next read tells that the client is gone.
                Err(_) => self.output.clear(),
            }
        }
    }
}
