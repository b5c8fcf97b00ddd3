//! The steps that the threads of queues take, and when.

use std::time::{Duration, Instant};

use nix::sys::epoll::EpollEvent;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};

use super::{Phase, Queue, Session, interest};
use crate::nbd::error::NbdError;
use crate::nbd::link::Link;

impl Session {
    /// Sends what waits; called after `submit`.
    pub(in crate::nbd) fn kick(&mut self, id: usize) {
        self.dispatch(id);
        for index in 0..self.links.len() {
            if let Err(error) = self.transmit(index) {
                self.lose(error);
                break;
            }
        }
        self.arm();
    }

    /// Takes every step that can be taken for the links this queue waits for.
    pub(super) fn pump(&mut self, id: usize) {
        let all = self.queues.get(id).is_none_or(|queue| queue.as_ref().is_none_or(|queue| queue.all_links));
        self.timeouts();
        let mut index = 0;
        while let Some(link) = self.links.get(index) {
            let negotiating = !link.is_ready();
            if all || link.owner == Some(id) || link.owner.is_none() {
                match self.step(index) {
                    Ok(()) => {}
                    // A further connection that the server does not want: the others do.
                    Err(_) if negotiating && self.phase == Phase::Running => {
                        if let Some(owner) = self.links.remove(index).owner {
                            self.share_links(owner);
                        }
                        continue;
                    }
                    Err(error) => {
                        self.lose(error);
                        break;
                    }
                }
            }
            index += 1;
        }
        self.timeouts();
        if self.links.iter().any(|link| link.unread) {
            // Who waits for edges gets none for what was there before.
            self.queues.iter_mut().flatten().for_each(Queue::signal);
        }
        self.kick(id);
    }

    pub(super) fn pump_all(&mut self) {
        self.pump(usize::MAX);
    }

    pub(super) fn step(&mut self, index: usize) -> Result<(), NbdError> {
        let Some(link) = self.links.get_mut(index) else { return Ok(()) };
        let received = link.receive();
        // What was answered before the connection ended counts.
        let finished = link.take_finished();
        for (purpose, result) in finished {
            self.outcome(purpose, result)?;
        }
        if let Some(export) = received? {
            self.negotiated(&export)?;
        }
        self.transmit(index)
    }

    pub(super) fn transmit(&mut self, index: usize) -> Result<(), NbdError> {
        let Some(link) = self.links.get_mut(index) else { return Ok(()) };
        let before = link.blocked;
        link.transmit()?;
        if link.blocked == before {
            return Ok(());
        }
        if let Some(link) = self.links.get(index) {
            for queue in self.watchers(index) {
                let mut event = EpollEvent::new(interest(link), 0);
                let modified = queue.wakes.epoll.modify(link.socket(), &mut event);
                modified.map_err(|errno| NbdError::Events(errno.into()))?;
            }
        }
        Ok(())
    }

    pub(super) fn timeouts(&mut self) {
        let now = Instant::now();
        if self.armed.is_some_and(|at| at <= now) {
            // It may have been read already.
            let _ = self.timer.wait();
            self.armed = None;
        }
        self.retire_after = self.retire_after.filter(|after| *after > now);
        self.throttled_until = self.throttled_until.filter(|until| *until > now);
        match self.phase {
            Phase::Opening(until) if until <= now => self.lose(NbdError::Silent("negotiation")),
            Phase::Down(_) | Phase::Opening(_) => {}
            Phase::Running | Phase::Repeating(_) | Phase::Flushing => {
                let patience = self.options.reply_timeout;
                let silent = |link: &Link| link.in_flight() > 0 && link.last_received + patience <= now;
                if self.links.iter().any(silent) {
                    self.lose(NbdError::Silent("a request"));
                }
                let patience = self.options.handshake_timeout;
                let late = |link: &Link| !link.is_ready() && link.last_received + patience <= now;
                while let Some(index) = self.links.iter().position(late) {
                    if let Some(owner) = self.links.remove(index).owner {
                        self.share_links(owner);
                    }
                }
            }
        }
        if let Phase::Down(until) = self.phase
            && until <= now
        {
            self.reconnect();
        }
    }

    /// Sets the timer to the next moment at which something is due.
    pub(super) fn arm(&mut self) {
        let next = match self.phase {
            Phase::Down(at) | Phase::Opening(at) => Some(at),
            _ => {
                let silence = self.links.iter().filter_map(|link| match link.is_ready() {
                    true if link.in_flight() > 0 => Some(link.last_received + self.options.reply_timeout),
                    true => None,
                    false => Some(link.last_received + self.options.handshake_timeout),
                });
                silence.chain(self.retire_after).chain(self.throttled_until).min()
            }
        };
        let Some(next) = next else { return };
        // One that fires too early costs little: it is set again then. Requests do not pay for it.
        if self.armed.is_some_and(|at| at <= next) {
            return;
        }
        let delay = next.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        let expiration = Expiration::OneShot(TimeSpec::from_duration(delay));
        if self.timer.set(expiration, TimerSetTimeFlags::empty()).is_ok() {
            self.armed = Some(next);
        }
    }
}
