//! What only this process knows: open sessions of hosts, progress of work on instances. Lost at a restart and learned anew.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hearth_proto::v1;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::clock;

/// Commands waiting for a host; more than these and its session is too slow to be of use.
pub(crate) const COMMAND_QUEUE: usize = 256;

/// The way to a host.
#[derive(Clone)]
pub(crate) struct SessionHandle {
    pub number: u64,
    /// Epoch of the agent that opened it.
    pub epoch: u64,
    pub commands: mpsc::Sender<v1::control_message::Message>,
    /// Ends the session.
    pub end: CancellationToken,
}

#[derive(Default)]
struct LiveHost {
    session: Option<SessionHandle>,
    /// Since when there is no session.
    lost: Option<Instant>,
    /// It was gone already when this control plane started.
    gone_before: bool,
    last_seen_ms: u64,
    /// Something that this host should know has changed.
    kick: Arc<Notify>,
}

/// See the module.
pub(crate) struct Live {
    started: Instant,
    host_timeout: Duration,
    next_session: AtomicU64,
    hosts: Mutex<HashMap<String, LiveHost>>,
    /// By instance, or by image that is imported.
    progress: Mutex<HashMap<String, v1::Progress>>,
    /// Percent, by snapshot or task.
    percents: Mutex<HashMap<String, u32>>,
    departures: Mutex<HashMap<String, Departure>>,
}

/// How far a volume that is to leave its host is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Departure {
    pub percent: u32,
    /// Why it does not go on; it is tried again.
    pub error: String,
}

impl Live {
    pub fn new(host_timeout: Duration) -> Self {
        Self {
            started: Instant::now(),
            host_timeout,
            next_session: AtomicU64::new(1),
            hosts: Mutex::default(),
            progress: Mutex::default(),
            percents: Mutex::default(),
            departures: Mutex::default(),
        }
    }

    /// Notes, at the start, that a host has been gone for longer than is allowed.
    pub fn gone_before(&self, host: &str) {
        self.hosts.lock().entry(host.to_owned()).or_default().gone_before = true;
    }

    /// Registers a new session of a host and ends the one before, whether that one's connection is known to be dead or not.
    /// `Err` tells the epoch of a later life of the agent that has a session: what comes late from an earlier one must not
    /// take its place.
    pub fn open(
        &self,
        host: &str,
        epoch: u64,
        commands: mpsc::Sender<v1::control_message::Message>,
        end: CancellationToken,
    ) -> Result<(SessionHandle, Arc<Notify>), u64> {
        let mut hosts = self.hosts.lock();
        let live = hosts.entry(host.to_owned()).or_default();
        if let Some(later) = live.session.as_ref().filter(|session| session.epoch > epoch) {
            return Err(later.epoch);
        }
        let number = self.next_session.fetch_add(1, Ordering::Relaxed);
        let handle = SessionHandle { number, epoch, commands, end };
        if let Some(older) = live.session.replace(handle.clone()) {
            older.end.cancel();
        }
        live.lost = None;
        live.gone_before = false;
        live.last_seen_ms = clock::now_ms();
        Ok((handle, live.kick.clone()))
    }

    /// Unregisters a session; `false` when a newer one has taken its place.
    pub fn close(&self, host: &str, number: u64) -> bool {
        let mut hosts = self.hosts.lock();
        let Some(live) = hosts.get_mut(host) else { return false };
        if live.session.as_ref().is_none_or(|session| session.number != number) {
            return false;
        }
        live.session = None;
        live.lost = Some(Instant::now());
        true
    }

    /// Ends a host's session for good.
    pub fn forget(&self, host: &str) {
        if let Some(LiveHost { session: Some(session), .. }) = self.hosts.lock().remove(host) {
            session.end.cancel();
        }
    }

    pub fn seen(&self, host: &str) {
        if let Some(live) = self.hosts.lock().get_mut(host) {
            live.last_seen_ms = clock::now_ms();
        }
    }

    pub fn session(&self, host: &str) -> Option<SessionHandle> {
        self.hosts.lock().get(host)?.session.clone()
    }

    pub fn connected(&self, host: &str) -> bool {
        self.hosts.lock().get(host).is_some_and(|live| live.session.is_some())
    }

    /// Whether new instances may go there: it has a session, or has not been without one for long.
    pub fn is_up(&self, host: &str) -> bool {
        let hosts = self.hosts.lock();
        match hosts.get(host) {
            Some(LiveHost { session: Some(_), .. }) => true,
            Some(LiveHost { gone_before: true, .. }) => false,
            Some(LiveHost { lost: Some(lost), .. }) => lost.elapsed() < self.host_timeout,
            // Not heard of since this control plane started.
            _ => self.started.elapsed() < self.host_timeout,
        }
    }

    /// When the host last said anything; 0 = not since the start.
    pub fn last_seen_ms(&self, host: &str) -> u64 {
        self.hosts.lock().get(host).map_or(0, |live| live.last_seen_ms)
    }

    /// Lets the host's session look for changes.
    pub fn kick(&self, host: &str) {
        if let Some(live) = self.hosts.lock().get(host) {
            live.kick.notify_one();
        }
    }

    /// How long this control plane has been there.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn set_progress(&self, id: &str, progress: Option<v1::Progress>) -> bool {
        let mut all = self.progress.lock();
        match progress {
            Some(progress) => all.insert(id.to_owned(), progress.clone()).as_ref() != Some(&progress),
            None => all.remove(id).is_some(),
        }
    }

    pub fn progress(&self, id: &str) -> Option<v1::Progress> {
        self.progress.lock().get(id).cloned()
    }

    /// How far a snapshot's upload or a task is; `None` = it has ended. `true` when that is new.
    pub fn set_percent(&self, id: &str, percent: Option<u32>) -> bool {
        let mut all = self.percents.lock();
        match percent {
            Some(percent) => all.insert(id.to_owned(), percent) != Some(percent),
            None => all.remove(id).is_some(),
        }
    }

    pub fn percent(&self, id: &str) -> u32 {
        self.percents.lock().get(id).copied().unwrap_or(0)
    }

    /// Notes how far a volume that is to leave its host is; `None` = it has left. `true` when that is new.
    pub fn set_departure(&self, volume: &str, departure: Option<Departure>) -> bool {
        let mut all = self.departures.lock();
        match departure {
            Some(departure) => all.insert(volume.to_owned(), departure.clone()).as_ref() != Some(&departure),
            None => all.remove(volume).is_some(),
        }
    }

    /// What its host has said last of a volume that is to leave it.
    pub fn departure(&self, volume: &str) -> Departure {
        self.departures.lock().get(volume).cloned().unwrap_or_default()
    }
}
