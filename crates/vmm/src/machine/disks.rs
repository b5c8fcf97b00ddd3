//! What the agent does to the disks of a machine.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_block::{BaseFiles, BlockError, FreezeState, LayeredVolume, RateLimits, Stage, VolumeFiles, XtsKey};

use super::{Descriptors, Machine, MachineError};
use crate::control::protocol::{DiskBacking, DiskKey, DiskLimits, DiskSpec, FdIndex, FreezeSpec, LayeredSpec};
use crate::control::socket::set_nonblocking;
use crate::virtio::{Backing, Disk, DiskCondition, DiskEvent, DiskNotice, LayeredBacking, NbdBacking};

/// Longest volume serial, in bytes (virtio 1.2 section 5.2.6.1).
const MAX_SERIAL: usize = 20;
/// Most request queues of one disk.
const MAX_QUEUES: u16 = 16;
/// How long writes in flight may take to end before a freeze is called off.
const FREEZE_PATIENCE: Duration = Duration::from_secs(20);

/// Checks everything about a disk that can be checked without its descriptors.
pub(super) fn validate(disk: &DiskSpec) -> Result<(), MachineError> {
    if disk.serial.len() > MAX_SERIAL || !disk.serial.is_ascii() {
        let text = format!("disk serial {:?} is not at most {MAX_SERIAL} ASCII bytes", disk.serial);
        return Err(MachineError::Spec(text));
    }
    if !(1..=MAX_QUEUES).contains(&disk.queues) {
        let text = format!("disk {} has {} queues; 1 to {MAX_QUEUES} are possible", disk.serial, disk.queues);
        return Err(MachineError::Spec(text));
    }
    Ok(())
}

/// A disk with its descriptors.
pub(super) fn take(disk: &DiskSpec, fds: &mut Descriptors) -> Result<Disk, MachineError> {
    let backing = match &disk.backing {
        DiskBacking::Raw { file } => Backing::Raw(File::from(fds.take(*file, "disk")?)),
        DiskBacking::Layered(spec) => Backing::Layered(Box::new(take_layered(spec, fds)?)),
        DiskBacking::Nbd(spec) => Backing::Nbd(Box::new(NbdBacking {
            socket: take_socket(&disk.serial, spec.socket, fds)?,
            export: spec.export.clone(),
            limits: limits(spec.limits),
        })),
    };
    Ok(Disk { serial: disk.serial.clone(), backing, read_only: disk.read_only, queues: disk.queues })
}

fn take_layered(spec: &LayeredSpec, fds: &mut Descriptors) -> Result<LayeredBacking, MachineError> {
    let base = match &spec.base {
        None => None,
        Some(base) => Some(BaseFiles {
            data: fds.take(base.data, "disk's base")?.into(),
            presence: fds.take(base.presence, "disk's presence bits")?.into(),
            key: base.key.as_ref().map(key).transpose()?,
        }),
    };
    let files = VolumeFiles {
        data: fds.take(spec.data, "disk's data")?.into(),
        map: fds.take(spec.map, "disk's map")?.into(),
        base,
        key: spec.key.as_ref().map(key).transpose()?,
    };
    let wake = fds.take(spec.wake, "disk's eventfd")?;
    Ok(LayeredBacking { files, wake, generation: spec.generation, limits: limits(spec.limits), direct: spec.direct })
}

/// A connection to the server of an NBD disk.
fn take_socket(serial: &str, socket: FdIndex, fds: &mut Descriptors) -> Result<OwnedFd, MachineError> {
    let refuse = |text: String| MachineError::Spec(format!("the connection of disk {serial} {text}"));
    let file = File::from(fds.take(socket, "disk's connection")?);
    let metadata = file.metadata().map_err(|error| refuse(format!("cannot be looked at: {error}")))?;
    if !metadata.file_type().is_socket() {
        return Err(refuse("is not a socket".to_owned()));
    }
    let socket = OwnedFd::from(file);
    // Here and not where it is used: the I/O thread may not.
    set_nonblocking(&socket).map_err(|error| refuse(format!("cannot be made non-blocking: {error}")))?;
    Ok(socket)
}

fn key(key: &DiskKey) -> Result<XtsKey, MachineError> {
    let mut bytes = [0; 64];
    bytes.iter_mut().zip(key.data.iter().chain(&key.tweak)).for_each(|(to, from)| *to = *from);
    XtsKey::new(bytes).ok_or_else(|| MachineError::Spec("a disk key has two equal halves".into()))
}

fn limits(limits: DiskLimits) -> RateLimits {
    RateLimits { iops: limits.iops, bytes_per_second: limits.bytes_per_second }
}

/// A freeze of several disks whose writes in flight have not all ended yet.
pub struct Freezing {
    disks: Vec<Candidate>,
    deadline: Instant,
}

struct Candidate {
    serial: String,
    volume: Arc<LayeredVolume>,
    stage: Stage,
}

impl Freezing {
    fn begin(disks: Vec<Candidate>) -> Result<Self, MachineError> {
        for (number, disk) in disks.iter().enumerate() {
            if let Err(source) = disk.volume.freeze_prepare() {
                disks.iter().take(number).for_each(|disk| disk.volume.freeze_cancel());
                return Err(MachineError::Volume { serial: disk.serial.clone(), source });
            }
        }
        Ok(Self { disks, deadline: Instant::now() + FREEZE_PATIENCE })
    }

    /// Calls it off.
    pub fn cancel(self) {
        self.disks.iter().for_each(|disk| disk.volume.freeze_cancel());
    }

    /// Fixes the point in time if all disks are ready: their numbers of frozen chunks and the longest time for which writes of one
    /// of them were held, or why there is no freeze. `Err` gives itself back while writes are still in flight.
    pub fn proceed(self) -> Result<Result<(Vec<u64>, Duration), MachineError>, Self> {
        let waiting = self.disks.iter().find(|disk| disk.volume.freeze_state() == FreezeState::Preparing);
        match waiting {
            Some(_) if Instant::now() < self.deadline => return Err(self),
            Some(disk) => {
                let source = BlockError::FreezeState(FreezeState::Preparing, FreezeState::Ready);
                let error = MachineError::Volume { serial: disk.serial.clone(), source };
                self.cancel();
                return Ok(Err(error));
            }
            None => {}
        }
        let held = self.disks.iter().filter_map(|disk| disk.volume.writes_held_since()).min();
        // No disk takes a write between the first of these and the last.
        let mut frozen: Vec<Arc<LayeredVolume>> = Vec::new();
        let mut counts = Vec::new();
        let mut failed = None;
        for Candidate { serial, volume, stage } in self.disks {
            if failed.is_some() {
                volume.freeze_cancel();
                continue;
            }
            match volume.freeze(stage) {
                Ok(set) => {
                    counts.push(set.len());
                    frozen.push(volume);
                }
                Err(source) => {
                    volume.freeze_cancel();
                    failed = Some(MachineError::Volume { serial, source });
                }
            }
        }
        let Some(error) = failed else {
            return Ok(Ok((counts, held.map(|since| since.elapsed()).unwrap_or_default())));
        };
        frozen.iter().for_each(|volume| volume.thaw(true));
        Ok(Err(error))
    }
}

impl Machine {
    /// Puts a disk into a free PCI slot and tells the guest.
    pub fn attach_disk(&mut self, spec: &DiskSpec, mut fds: Descriptors) -> Result<(), MachineError> {
        validate(spec)?;
        Ok(self.io.attach_disk(take(spec, &mut fds)?)?)
    }

    /// Asks the guest to let go of a disk, or with `force` takes it away; [`Machine::note_disk`] tells the end.
    pub fn detach_disk(&mut self, serial: &str, force: bool) -> Result<(), MachineError> {
        Ok(self.io.detach_disk(serial, force)?)
    }

    /// Makes a disk larger and shows the guest.
    pub fn resize_disk(&mut self, serial: &str, bytes: u64) -> Result<(), MachineError> {
        Ok(self.io.resize_disk(serial, bytes)?)
    }

    /// New rate limits for a layered or an NBD disk.
    pub fn set_disk_limits(&mut self, serial: &str, new: DiskLimits) -> Result<(), MachineError> {
        Ok(self.io.set_rate_limits(serial, limits(new))?)
    }

    /// A new connection for an NBD disk.
    pub fn connect_volume(&mut self, serial: &str, socket: FdIndex, mut fds: Descriptors) -> Result<(), MachineError> {
        let socket = take_socket(serial, socket, &mut fds)?;
        Ok(self.io.connect_volume(serial, socket)?)
    }

    /// Begins a freeze of these disks at one instant.
    pub fn freeze_disks(&mut self, specs: &[FreezeSpec], mut fds: Descriptors) -> Result<Freezing, MachineError> {
        let mut disks: Vec<Candidate> = Vec::with_capacity(specs.len());
        for FreezeSpec { serial, stage, staged } in specs {
            if disks.iter().any(|disk| disk.serial == *serial) {
                return Err(MachineError::Spec(format!("disk {serial} is to be frozen twice")));
            }
            let stage =
                Stage { file: fds.take(*stage, "stage")?.into(), staged: fds.take(*staged, "staged file")?.into() };
            disks.push(Candidate { serial: serial.clone(), volume: self.io.layered(serial)?, stage });
        }
        Freezing::begin(disks)
    }

    /// Has chunks of a frozen disk copied to its stage.
    pub fn stage_chunks(&mut self, serial: &str, chunks: &[u64]) -> Result<(), MachineError> {
        let volume = self.io.layered(serial)?;
        for chunk in chunks {
            volume.stage_chunk(*chunk).map_err(|source| MachineError::Volume { serial: serial.to_owned(), source })?;
        }
        Ok(())
    }

    /// Has reads of a layered disk that wait for chunks look again.
    pub fn chunks_came(&mut self, serial: &str) -> Result<(), MachineError> {
        self.io.layered(serial)?.presence_changed();
        Ok(())
    }

    /// Ends a freeze.
    pub fn thaw_disk(&mut self, serial: &str, restore_dirty: bool) -> Result<(), MachineError> {
        self.io.layered(serial)?.thaw(restore_dirty);
        Ok(())
    }

    /// Takes in an event about a disk; what the agent is to be told.
    pub fn note_disk(&mut self, event: DiskEvent) -> Option<DiskNotice> {
        self.io.note(event)
    }

    /// What an agent that comes back has to know of the disks.
    pub fn disk_conditions(&self) -> Vec<DiskCondition> {
        self.io.conditions()
    }
}
