//! NBD disks: their connections come from the agent.
//!
//! The VMM has no network and opens no paths. When a connection is lost the agent is told, and it passes a new one; until then
//! requests wait. The client (`hearth_block::nbd`) repeats what was not answered, and what was answered but not flushed.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hearth_block::nbd::{Connector, NbdError, NbdEvents, NbdOptions, NbdVolume};
use hearth_block::{BlockError, Cause, RateLimits, Volume};

use super::hotplug::DiskEvent;
use super::io_device::DeviceId;
use super::shared::lock;
use crate::events::{EventSink, MachineEvent};

/// How long a server may need to negotiate, and to take the last flush. The control thread waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
/// A disk that is to go waits so long for a lost connection.
const LONG: Duration = Duration::from_secs(5);

/// An NBD volume to be opened.
pub struct NbdBacking {
    /// A connected, non-blocking stream socket.
    pub socket: OwnedFd,
    /// Name of the export.
    pub export: String,
    /// Rate limits.
    pub limits: RateLimits,
}

#[derive(Default)]
struct State {
    /// Passed by the agent, not used yet.
    socket: Option<OwnedFd>,
    /// The agent was asked for one and has not passed any since.
    asked: bool,
    lost_since: Option<Instant>,
    /// What was logged of this outage.
    logged: String,
}

/// The volume's connections, and its reports as events of its device.
struct Connections {
    device: DeviceId,
    events: Arc<dyn EventSink>,
    state: Mutex<State>,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Connections {
    fn raise(&self, event: DiskEvent) {
        self.events.raise(MachineEvent::Disk(event));
    }
}

/// The volume's handle.
#[derive(Debug)]
struct Passed(Arc<Connections>);

impl Connector for Passed {
    fn connect(&self) -> io::Result<OwnedFd> {
        let none = || io::Error::new(io::ErrorKind::WouldBlock, "the agent has not passed a connection");
        lock(&self.0.state).socket.take().ok_or_else(none)
    }
}

impl NbdEvents for Connections {
    fn lost(&self, error: &NbdError) {
        let device = self.device;
        let mut state = lock(&self.state);
        // To a server that is no more, perhaps; and one server's connections end together.
        state.socket = None;
        let first = state.lost_since.is_none();
        state.lost_since.get_or_insert_with(Instant::now);
        let ask = !std::mem::replace(&mut state.asked, true);
        let text = error.to_string();
        if state.logged != text {
            let _ = writeln!(io::stderr(), "device {device}: requests wait: {text}");
            state.logged = text;
        }
        drop(state);
        if first {
            self.raise(DiskEvent::Impaired { device, cause: Cause::Disconnected });
        }
        if ask {
            self.raise(DiskEvent::ConnectionWanted { device });
        }
    }

    fn recovered(&self) {
        let mut state = lock(&self.state);
        state.lost_since = None;
        state.asked = false;
        state.logged.clear();
        drop(state);
        self.raise(DiskEvent::Recovered { device: self.device });
    }
}

/// An open NBD volume.
#[derive(Clone)]
pub(crate) struct Nbd {
    volume: Arc<NbdVolume>,
    connections: Arc<Connections>,
}

impl Nbd {
    /// Negotiates with the server. Blocks.
    pub(crate) fn open(
        backing: NbdBacking,
        read_only: bool,
        device: DeviceId,
        events: &Arc<dyn EventSink>,
    ) -> Result<Self, BlockError> {
        let state = Mutex::new(State { socket: Some(backing.socket), ..State::default() });
        let connections = Arc::new(Connections { device, events: Arc::clone(events), state });
        let options = NbdOptions {
            export: backing.export,
            read_only,
            handshake_timeout: PATIENCE,
            close_timeout: PATIENCE,
            ..NbdOptions::default()
        };
        let connector = Box::new(Passed(Arc::clone(&connections)));
        let volume = Arc::new(NbdVolume::open(connector, Arc::clone(&connections) as _, options)?);
        volume.set_rate_limits(backing.limits);
        Ok(Self { volume, connections })
    }

    pub(crate) fn volume(&self) -> Arc<dyn Volume> {
        Arc::clone(&self.volume) as _
    }

    pub(crate) fn set_rate_limits(&self, limits: RateLimits) {
        self.volume.set_rate_limits(limits);
    }

    /// Takes a connection, a non-blocking socket.
    pub(crate) fn connect(&self, socket: OwnedFd) {
        let mut state = lock(&self.connections.state);
        state.socket = Some(socket);
        state.asked = false;
        drop(state);
        self.volume.connection_came();
    }

    /// The agent was asked for a connection and has not passed one.
    pub(crate) fn wants_connection(&self) -> bool {
        lock(&self.connections.state).asked
    }

    /// There is no connection, or not a whole one yet.
    pub(crate) fn is_lost(&self) -> bool {
        lock(&self.connections.state).lost_since.is_some()
    }

    /// And that for so long that it may not come back.
    pub(crate) fn is_lost_for_long(&self) -> bool {
        lock(&self.connections.state).lost_since.is_some_and(|since| since.elapsed() >= LONG)
    }
}
