//! What is behind a disk: a raw file, or a volume with ties to the agent.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hearth_block::{
    BlockError, Cause, ChunkFetcher, Engine, LayeredVolume, OpenOptions, RateLimits, RawFile, Volume, VolumeEvents,
    VolumeFiles,
};

use super::hotplug::DiskEvent;
use super::io_device::DeviceId;
use super::nbd::{Nbd, NbdBacking};
use crate::events::{EventSink, MachineEvent};

/// Where a disk's bytes are.
pub enum Backing {
    /// A raw file or block device.
    Raw(File),
    /// A volume of its own blocks over a shared base.
    Layered(Box<LayeredBacking>),
    /// An export of an NBD server.
    Nbd(Box<NbdBacking>),
}

/// A layered volume to be opened.
pub struct LayeredBacking {
    /// Its files.
    pub files: VolumeFiles,
    /// An eventfd that the agent writes after it set presence bits.
    pub wake: OwnedFd,
    /// Attachment generation.
    pub generation: u64,
    /// Rate limits.
    pub limits: RateLimits,
    /// Use direct I/O where the file system has it.
    pub direct: bool,
}

/// The volume's reports, as events of its device.
pub(crate) struct Reporter {
    device: DeviceId,
    events: Arc<dyn EventSink>,
    impaired: AtomicBool,
}

impl Reporter {
    fn raise(&self, event: DiskEvent) {
        self.events.raise(MachineEvent::Disk(event));
    }
}

impl ChunkFetcher for Reporter {
    fn fetch(&self, chunk: u64) {
        self.raise(DiskEvent::Fetch { device: self.device, chunk });
    }
}

impl VolumeEvents for Reporter {
    fn impaired(&self, cause: Cause) {
        self.impaired.store(true, Ordering::Relaxed);
        self.raise(DiskEvent::Impaired { device: self.device, cause });
    }

    fn recovered(&self) {
        self.impaired.store(false, Ordering::Relaxed);
        self.raise(DiskEvent::Recovered { device: self.device });
    }

    fn staged(&self, chunk: u64) {
        self.raise(DiskEvent::Staged { device: self.device, chunk });
    }
}

/// What a layered volume has beyond other volumes.
#[derive(Clone)]
pub(crate) struct Layered {
    pub(crate) volume: Arc<LayeredVolume>,
    wake: Arc<OwnedFd>,
    reporter: Arc<Reporter>,
}

impl Layered {
    fn is_stuck(&self) -> bool {
        self.reporter.impaired.load(Ordering::Relaxed) || !self.volume.pending_fetches().is_empty()
    }
}

/// What ties a volume to the agent.
#[derive(Clone)]
enum Ties {
    None,
    Layered(Layered),
    Nbd(Nbd),
}

/// An open volume, shared by the I/O thread and the control thread.
#[derive(Clone)]
pub(crate) struct OpenVolume {
    pub(crate) volume: Arc<dyn Volume>,
    ties: Ties,
}

impl OpenVolume {
    /// A volume without ties to the agent.
    pub(crate) fn plain(volume: Arc<dyn Volume>) -> Self {
        Self { volume, ties: Ties::None }
    }

    /// Opens what is behind `device`. Blocks.
    pub(crate) fn open(
        backing: Backing,
        read_only: bool,
        device: DeviceId,
        events: &Arc<dyn EventSink>,
    ) -> Result<Self, BlockError> {
        let backing = match backing {
            Backing::Raw(file) => return Ok(Self::plain(Arc::new(RawFile::new(file, read_only, Engine::Auto)?))),
            Backing::Nbd(backing) => {
                let nbd = Nbd::open(*backing, read_only, device, events)?;
                return Ok(Self { volume: nbd.volume(), ties: Ties::Nbd(nbd) });
            }
            Backing::Layered(backing) => *backing,
        };
        let reporter = Arc::new(Reporter { device, events: Arc::clone(events), impaired: AtomicBool::new(false) });
        let options = OpenOptions {
            generation: backing.generation,
            fetcher: Arc::clone(&reporter) as _,
            events: Arc::clone(&reporter) as _,
            engine: Engine::Auto,
            direct: backing.direct,
        };
        let volume = LayeredVolume::open(backing.files, options)?;
        let volume = Arc::new(if read_only { volume.into_read_only() } else { volume });
        volume.set_rate_limits(backing.limits);
        let layered = Layered { volume: Arc::clone(&volume), wake: Arc::new(backing.wake), reporter };
        Ok(Self { volume, ties: Ties::Layered(layered) })
    }

    /// The layered engine, if it is one.
    pub(crate) fn layered(&self) -> Option<&Layered> {
        if let Ties::Layered(layered) = &self.ties { Some(layered) } else { None }
    }

    /// The descriptor by which the agent tells of new chunks.
    pub(crate) fn wake_fd(&self) -> Option<RawFd> {
        self.layered().map(|layered| layered.wake.as_raw_fd())
    }

    /// The agent has told of new chunks.
    pub(crate) fn chunks_came(&self) {
        if let Some(layered) = self.layered() {
            layered.volume.presence_changed();
        }
    }

    /// What it asked the agent for and did not get: chunks, and whether a connection. `None` when it never asks.
    pub(crate) fn wants(&self) -> Option<(Vec<u64>, bool)> {
        match &self.ties {
            Ties::None => None,
            Ties::Layered(layered) => Some((layered.volume.pending_fetches(), false)),
            Ties::Nbd(nbd) => Some((Vec::new(), nbd.wants_connection())),
        }
    }

    /// A new connection; `false` when the volume has no use for one.
    pub(crate) fn connect(&self, socket: OwnedFd) -> bool {
        let Ties::Nbd(nbd) = &self.ties else { return false };
        nbd.connect(socket);
        true
    }

    /// New rate limits; `false` when the volume has none.
    pub(crate) fn set_rate_limits(&self, limits: RateLimits) -> bool {
        match &self.ties {
            Ties::None => return false,
            Ties::Layered(layered) => layered.volume.set_rate_limits(limits),
            Ties::Nbd(nbd) => nbd.set_rate_limits(limits),
        }
        true
    }

    /// Requests in flight wait for something outside this process for as long as it likes.
    pub(crate) fn is_stuck(&self) -> bool {
        match &self.ties {
            Ties::None => false,
            Ties::Layered(layered) => layered.is_stuck(),
            Ties::Nbd(nbd) => nbd.is_lost(),
        }
    }

    /// They do, and it has been long enough: a disk that is to go does not wait for them.
    pub(crate) fn is_hopeless(&self) -> bool {
        match &self.ties {
            Ties::None => false,
            Ties::Layered(layered) => layered.is_stuck(),
            Ties::Nbd(nbd) => nbd.is_lost_for_long(),
        }
    }
}
