//! Against a server of ours that loses its cache: what it answered and did not flush may be gone after a connection, in part and in
//! any order. The guest must not notice.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::workload::{Plan, read_all, run};
use super::{Random, Seen};
use crate::Volume;
use crate::nbd::{Connector, NbdOptions, NbdVolume, wire};

const SIZE: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct Disk {
    durable: Vec<u8>,
    /// Written and not flushed, in order.
    cached: Vec<(usize, Vec<u8>)>,
    random: Random,
    /// Connections of an older one are dead.
    life: u64,
    streams: Vec<UnixStream>,
    /// One request in so many is the last of its life; 0 = none.
    pub(super) dies: u64,
    deaths: usize,
    flags: u16,
    structured: bool,
}

impl Disk {
    fn flush(&mut self) {
        for (offset, bytes) in std::mem::take(&mut self.cached) {
            self.durable[offset..][..bytes.len()].copy_from_slice(&bytes);
        }
    }

    fn die(&mut self) {
        for (offset, bytes) in std::mem::take(&mut self.cached) {
            if self.random.chance(2) {
                self.durable[offset..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        self.life += 1;
        self.deaths += 1;
        for stream in self.streams.drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = self.durable[offset..][..length].to_vec();
        for (start, cached) in &self.cached {
            let from = (*start).max(offset);
            let to = (start + cached.len()).min(offset + length);
            if from < to {
                bytes[from - offset..to - offset].copy_from_slice(&cached[from - start..to - start]);
            }
        }
        bytes
    }

    fn carry_out(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: usize,
        length: usize,
        data: Vec<u8>,
    ) -> Vec<u8> {
        let fua = flags & wire::CMD_FLAG_FUA != 0;
        let mut answer = Vec::new();
        match command {
            wire::CMD_READ => answer = self.read(offset, length),
            wire::CMD_WRITE => self.cached.push((offset, data)),
            wire::CMD_WRITE_ZEROES => self.cached.push((offset, vec![0; length])),
            wire::CMD_TRIM => {
                let noise = self.random.next() as u8;
                self.cached.push((offset, vec![noise; length]));
            }
            wire::CMD_FLUSH => self.flush(),
            _ => panic!("command {command}"),
        }
        if fua {
            self.flush();
        }
        if self.structured && command == wire::CMD_READ {
            let mut reply = wire::MAGIC_STRUCTURED_REPLY.to_be_bytes().to_vec();
            reply.extend(1u16.to_be_bytes());
            reply.extend(wire::CHUNK_OFFSET_DATA.to_be_bytes());
            reply.extend(cookie.to_be_bytes());
            reply.extend((answer.len() as u32 + 8).to_be_bytes());
            reply.extend((offset as u64).to_be_bytes());
            return [reply, answer].concat();
        }
        [&wire::MAGIC_SIMPLE_REPLY.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes(), &answer].concat()
    }
}

#[derive(Clone, Debug)]
pub(super) struct Forgetful(Arc<Mutex<Disk>>);

impl Forgetful {
    pub(super) fn new(seed: u64, flags: u16, structured: bool) -> Self {
        Self(Arc::new(Mutex::new(Disk {
            durable: vec![0; SIZE],
            cached: Vec::new(),
            random: Random::new(seed),
            life: 0,
            streams: Vec::new(),
            dies: 150,
            deaths: 0,
            flags,
            structured,
        })))
    }

    pub(super) fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }
}

impl Connector for Forgetful {
    fn connect(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let mut disk = self.disk();
        disk.streams.push(ours.try_clone()?);
        let (life, server) = (disk.life, self.clone());
        // It ends with its connection.
        std::thread::spawn(move || server.serve(ours, life));
        Ok(theirs.into())
    }
}

impl Forgetful {
    fn serve(&self, mut stream: UnixStream, life: u64) -> io::Result<()> {
        self.negotiate(&mut stream)?;
        let mut answers: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut waits = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            let idle = poll(&mut waits, PollTimeout::ZERO)? == 0;
            if idle || answers.len() > 8 {
                // In any order.
                while !answers.is_empty() {
                    let index = self.disk().random.below(answers.len() as u64) as usize;
                    stream.write_all(&answers.swap_remove(index))?;
                }
            }
            let mut header = [0; wire::REQUEST_BYTES];
            stream.read_exact(&mut header)?;
            let mut fields = &header[4..];
            let flags = wire::take_u16(&mut fields).unwrap();
            let command = wire::take_u16(&mut fields).unwrap();
            let cookie = wire::take_u64(&mut fields).unwrap();
            let offset = wire::take_u64(&mut fields).unwrap() as usize;
            let length = wire::take_u32(&mut fields).unwrap() as usize;
            if command == wire::CMD_DISC {
                return Ok(());
            }
            let mut data = vec![0; if command == wire::CMD_WRITE { length } else { 0 }];
            stream.read_exact(&mut data)?;
            let mut disk = self.disk();
            if disk.life != life {
                return Ok(());
            }
            answers.push(disk.carry_out(command, flags, cookie, offset, length, data));
            let dies = disk.dies;
            if dies > 0 && disk.random.chance(dies) {
                disk.die();
            }
        }
    }

    pub(super) fn negotiate(&self, stream: &mut UnixStream) -> io::Result<()> {
        let flags = self.disk().flags;
        let structured = self.disk().structured;
        stream.write_all(&wire::MAGIC_SERVER.to_be_bytes())?;
        stream.write_all(&wire::MAGIC_OPTION.to_be_bytes())?;
        stream.write_all(&3u16.to_be_bytes())?;
        stream.read_exact(&mut [0; 4])?;
        loop {
            let mut header = [0; 16];
            stream.read_exact(&mut header)?;
            let option = u32::from_be_bytes(header[8..12].try_into().unwrap());
            let length = u32::from_be_bytes(header[12..].try_into().unwrap());
            stream.read_exact(&mut vec![0; length as usize])?;
            let answer = |kind: u32, data: &[u8]| {
                let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
                [&wire::MAGIC_OPTION_REPLY.to_be_bytes()[..], &numbers, data].concat()
            };
            if option == wire::OPT_GO {
                let info = [&[0, 0][..], &(SIZE as u64).to_be_bytes(), &flags.to_be_bytes()].concat();
                stream.write_all(&answer(wire::REP_INFO, &info))?;
                return stream.write_all(&answer(wire::REP_ACK, &[]));
            }
            stream.write_all(&answer(if structured { wire::REP_ACK } else { wire::REP_ERROR | 1 }, &[]))?;
        }
    }
}

pub(super) const CACHE: u16 = wire::HAS_FLAGS | wire::SEND_FLUSH | wire::SEND_TRIM | wire::SEND_WRITE_ZEROES;

fn survives(flags: u16, log_bytes: usize, queues: usize) {
    for seed in 1..=6 {
        let server = Forgetful::new(seed, flags, seed % 2 == 0);
        let options = NbdOptions { log_bytes, ..NbdOptions::default() };
        let seen = Seen::new();
        let volume = NbdVolume::open(Box::new(server.clone()), seen.clone(), options).unwrap();
        let plan = Plan { seed, requests: 3000, queues, ..Plan::default() };
        let outcome = run(&volume, &plan, |_| {});
        server.disk().dies = 0;
        let deaths = server.disk().deaths;
        assert!(deaths > 3 && seen.recovered() > 0, "seed {seed}: {deaths} deaths, {seen:?}");
        outcome.check(&read_all(&volume));
        volume.sync().unwrap();
        outcome.check(&server.disk().durable);
    }
}

#[test]
fn nothing_is_lost_with_one_connection() {
    survives(CACHE | wire::SEND_FUA, 16 << 20, 2);
}

#[test]
fn nothing_is_lost_with_several_connections() {
    survives(CACHE | wire::SEND_FUA | wire::CAN_MULTI_CONN, 16 << 20, 3);
}

#[test]
fn nothing_is_lost_when_the_log_is_small() {
    survives(CACHE | wire::SEND_FUA | wire::CAN_MULTI_CONN, 64 << 10, 2);
}

#[test]
fn nothing_is_lost_without_a_log_and_without_fua() {
    survives(CACHE, 0, 2);
    survives(CACHE, 48 << 10, 1);
}
