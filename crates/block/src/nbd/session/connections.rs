//! The end of connections, and how requests go on over new ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Phase, Session};
use crate::nbd::error::NbdError;
use crate::nbd::handshake::Export;
use crate::nbd::link::{Command, Link, Payload, Purpose};
use crate::nbd::log::{Content, Repeat};
use crate::nbd::task::flush;
use crate::nbd::wire;

/// Before the second attempt; the first is made at once.
const FIRST_DELAY: Duration = Duration::from_millis(40);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// How often the connector is asked that waits for somebody else.
const STARVED_DELAY: Duration = Duration::from_secs(1);

impl Session {
    /// Gives up all connections. What is not answered waits for the next.
    pub(super) fn lose(&mut self, why: NbdError) {
        for link in &mut self.links {
            link.disconnect();
        }
        self.links.clear();
        self.retiring = false;
        self.waiting.clear();
        let mut unfinished: Vec<(u64, usize)> = Vec::new();
        for (slot, task) in self.tasks.iter_mut().enumerate() {
            if let Some(task) = task {
                task.reset();
                unfinished.push((task.number, slot));
            }
        }
        unfinished.sort_unstable();
        self.waiting.extend(unfinished.into_iter().map(|(_, slot)| slot));
        let delay = match self.failures {
            0 => Duration::ZERO,
            failures => FIRST_DELAY.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST_DELAY),
        };
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Down(Instant::now() + delay);
        if !matches!(why, NbdError::Renegotiate) {
            self.impaired = true;
            self.events.lost(&why);
        }
    }

    pub(super) fn reconnect(&mut self) {
        self.starved = false;
        // Every queue's thread can take the steps of the reconnection.
        let link = self.connect().and_then(|socket| Link::new(socket, &self.options.export, None));
        match link {
            Err(error @ NbdError::Connect(_)) if error.would_block() => {
                self.starved = true;
                self.impaired = true;
                self.phase = Phase::Down(Instant::now() + STARVED_DELAY);
                self.events.lost(&error);
            }
            Ok(link) => {
                self.phase = Phase::Opening(Instant::now() + self.options.handshake_timeout);
                self.links.push(link);
                if let Err(error) = self.watch(self.links.len() - 1) {
                    self.lose(error);
                }
            }
            Err(error) => self.lose(error),
        }
    }

    /// The connector has a connection now.
    pub(in crate::nbd) fn connection_came(&mut self) {
        if self.starved && matches!(self.phase, Phase::Down(_)) {
            self.phase = Phase::Down(Instant::now());
            self.arm();
        }
    }

    /// Goes on over a connection that was negotiated by someone else, after the export had grown.
    pub(in crate::nbd) fn adopt(&mut self, link: Link, export: &Export) -> Result<(), NbdError> {
        self.export.accepts(export).map_err(NbdError::Changed)?;
        self.lose(NbdError::Renegotiate);
        self.failures = 0;
        self.phase = Phase::Opening(Instant::now() + self.options.handshake_timeout);
        self.links.push(link);
        if let Err(error) = self.watch(0).and_then(|()| self.negotiated(export)) {
            self.lose(error);
        }
        self.pump_all();
        Ok(())
    }

    /// A link finished its negotiation.
    pub(super) fn negotiated(&mut self, export: &Export) -> Result<(), NbdError> {
        self.export.accepts(export).map_err(NbdError::Changed)?;
        if export.size_bytes < self.size {
            return Err(NbdError::Changed(format!("it has {} bytes and had {}", export.size_bytes, self.size)));
        }
        if !matches!(self.phase, Phase::Opening(_)) {
            return Ok(());
        }
        self.offered = export.size_bytes;
        let repeats = self.log.repeats();
        if repeats.is_empty() {
            return self.run();
        }
        let mut count = 0;
        for repeat in repeats {
            let mut done = 0;
            while done < repeat.length {
                let length = (repeat.length - done).min(u64::from(self.export.max_payload_bytes));
                let command = repeat_command(&repeat, done, length);
                if let Some(link) = self.links.first_mut() {
                    link.push(command);
                }
                done += length;
                count += 1;
            }
        }
        self.repeated(count);
        Ok(())
    }

    pub(super) fn repeated(&mut self, left: usize) {
        self.phase = Phase::Repeating(left);
        if left == 0 {
            self.phase = Phase::Flushing;
            let mark = self.log.mark();
            if let Some(link) = self.links.first_mut() {
                link.push(flush(Purpose::RepeatFlush { mark }));
            }
        }
    }

    /// Requests go on.
    pub(super) fn run(&mut self) -> Result<(), NbdError> {
        self.phase = Phase::Running;
        if std::mem::take(&mut self.impaired) {
            self.events.recovered();
        }
        for id in 0..self.queues.len() {
            let wants = self.queues.get(id).is_some_and(|queue| queue.as_ref().is_some_and(|q| !q.all_links));
            if wants && !self.links.iter().any(|link| link.owner == Some(id)) {
                self.give_link(id);
                self.watch(self.links.len().saturating_sub(1))?;
            }
        }
        Ok(())
    }
}

fn repeat_command(repeat: &Repeat, done: u64, length: u64) -> Command {
    let (command, flags, payload) = match &repeat.content {
        Content::Data(data) => {
            let payload = Payload::Log(Arc::clone(data), repeat.start + done as usize, length as usize);
            (wire::CMD_WRITE, 0, payload)
        }
        Content::Zeros { no_hole: true } => (wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_NO_HOLE, Payload::None),
        Content::Zeros { no_hole: false } | Content::Durable => (wire::CMD_WRITE_ZEROES, 0, Payload::None),
    };
    Command {
        purpose: Purpose::Repeat,
        command,
        flags,
        offset: repeat.offset + done,
        // At most the longest payload, which fits.
        length: length as u32,
        payload,
        into: Vec::new(),
    }
}
