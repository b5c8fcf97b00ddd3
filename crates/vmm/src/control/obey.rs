//! What the control thread does with commands, and how it tells of disks.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use hearth_block::Cause;

use super::protocol::{Command, Event, MachineState, Message, Outcome, PROTOCOL_VERSION, Reply, VolumeCause};
use super::server::Server;
use crate::boot::Placement;
use crate::machine::{Descriptors, Freezing, Machine, MachineError};
use crate::virtio::{DiskNews, DiskNotice};

/// Most chunk numbers in one event: far below the longest message.
const CHUNKS_PER_EVENT: usize = 4096;
/// How often a freeze looks whether its writes have ended, in milliseconds. Writes wait meanwhile.
const FREEZE_TICK_MS: i32 = 1;

/// A freeze under way, and the request that asked for it.
pub(super) struct PendingFreeze {
    id: u64,
    freezing: Freezing,
}

impl Server {
    /// Does what a request says; its outcome, or `None` when that comes later.
    pub(super) fn obey(&mut self, id: u64, command: Command, fds: Vec<OwnedFd>) -> Option<Result<Outcome, String>> {
        if let Command::Freeze { disks } = &command {
            return self.begin_freeze(id, |machine| machine.freeze_disks(disks, Descriptors::new(fds)));
        }
        Some(self.obey_at_once(command, fds))
    }

    fn obey_at_once(&mut self, command: Command, fds: Vec<OwnedFd>) -> Result<Outcome, String> {
        match command {
            Command::Hello { version } if version != PROTOCOL_VERSION => {
                return Err(format!("this VMM speaks protocol version {PROTOCOL_VERSION}, not {version}"));
            }
            Command::Hello { .. } => {
                return Ok(Outcome::Hello {
                    version: PROTOCOL_VERSION,
                    instance_id: self.machine.as_ref().map(|m| m.instance_id().to_owned()).unwrap_or_default(),
                    state: self.machine.as_ref().map_or(MachineState::Empty, Machine::state),
                });
            }
            Command::Create(_) if self.machine.is_some() => return Err("there is a machine already".to_owned()),
            Command::Create(spec) => {
                let machine = Machine::create(&spec, Descriptors::new(fds), Placement::Copy, self.born)
                    .map_err(|e| e.to_string())?;
                self.machine = Some(machine);
                return Ok(Outcome::Done);
            }
            Command::Kill => return Ok(Outcome::Done),
            _ => {}
        }
        let machine = self.machine.as_mut().ok_or_else(|| "there is no machine yet".to_owned())?;
        obey_with(machine, command, fds).map_err(|e| e.to_string())
    }

    fn begin_freeze(
        &mut self,
        id: u64,
        begin: impl FnOnce(&mut Machine) -> Result<Freezing, MachineError>,
    ) -> Option<Result<Outcome, String>> {
        if self.freezing.is_some() {
            return Some(Err("another freeze is under way".into()));
        }
        let Some(machine) = self.machine.as_mut() else { return Some(Err("there is no machine yet".into())) };
        match begin(machine) {
            Ok(freezing) => self.freezing = Some(PendingFreeze { id, freezing }),
            Err(error) => return Some(Err(error.to_string())),
        }
        None
    }

    /// Goes on with a freeze; milliseconds until it wants to go on again, -1 without one.
    pub(super) fn turn_freeze(&mut self) -> i32 {
        let Some(PendingFreeze { id, freezing }) = self.freezing.take() else { return -1 };
        match freezing.proceed() {
            Err(freezing) => {
                self.freezing = Some(PendingFreeze { id, freezing });
                FREEZE_TICK_MS
            }
            Ok(result) => {
                let outcome = result
                    .map(|(chunks, held)| Outcome::Frozen { chunks, held_us: held.as_micros() as u64 })
                    .map_err(|e| e.to_string());
                self.send(&Message::Reply(Reply { id, outcome }));
                -1
            }
        }
    }

    pub(super) fn cancel_freeze(&mut self) {
        if let Some(PendingFreeze { freezing, .. }) = self.freezing.take() {
            freezing.cancel();
        }
    }

    /// Tells an agent that has just connected what disks need and suffer from.
    pub(super) fn tell_conditions(&mut self) {
        let conditions = self.machine.as_ref().map(Machine::disk_conditions).unwrap_or_default();
        for condition in conditions {
            let serial = condition.serial;
            let fetches = condition.chunks.chunks(CHUNKS_PER_EVENT);
            let mut events: Vec<Event> =
                fetches.map(|chunks| Event::FetchChunks { serial: serial.clone(), chunks: chunks.to_vec() }).collect();
            if condition.connect {
                events.push(Event::ConnectVolume { serial: serial.clone() });
            }
            events.extend(condition.impaired.map(|cause| Event::VolumeImpaired { serial, cause: cause.into() }));
            for event in events {
                self.tell(event);
            }
        }
    }
}

fn obey_with(machine: &mut Machine, command: Command, fds: Vec<OwnedFd>) -> Result<Outcome, MachineError> {
    match command {
        Command::Start => machine.start(),
        Command::Pause => machine.pause(),
        Command::Resume => machine.resume(),
        Command::PowerButton => machine.power_button(),
        Command::Stats => return machine.stats().map(|stats| Outcome::Stats(Box::new(stats))),
        Command::AttachDisk(disk) => machine.attach_disk(&disk, Descriptors::new(fds)),
        Command::DetachDisk { serial, force } => machine.detach_disk(&serial, force),
        Command::ResizeDisk { serial, bytes } => machine.resize_disk(&serial, bytes),
        Command::SetDiskLimits { serial, limits } => machine.set_disk_limits(&serial, limits),
        Command::ConnectVolume { serial, socket } => machine.connect_volume(&serial, socket, Descriptors::new(fds)),
        Command::StageChunks { serial, chunks } => machine.stage_chunks(&serial, &chunks),
        Command::ChunksCame { serial } => machine.chunks_came(&serial),
        Command::Thaw { serial, restore_dirty } => machine.thaw_disk(&serial, restore_dirty),
        // Done before.
        Command::Hello { .. } | Command::Create(_) | Command::Kill | Command::Freeze { .. } => Ok(()),
    }?;
    Ok(Outcome::Done)
}

impl From<Cause> for VolumeCause {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::NoSpace => Self::NoSpace,
            Cause::ChunkUnavailable { chunk } => Self::ChunkUnavailable { chunk },
            Cause::SyncFailed { errno } => Self::SyncFailed { errno },
            Cause::StageFailed { errno } => Self::StageFailed { errno },
            Cause::Disconnected => Self::Disconnected,
        }
    }
}

/// News of disks on their way to the agent: chunk numbers of one disk travel together.
#[derive(Default)]
pub(super) struct News {
    fetches: BTreeMap<String, Vec<u64>>,
    staged: BTreeMap<String, Vec<u64>>,
    others: Vec<Event>,
}

impl Extend<DiskNotice> for News {
    fn extend<I: IntoIterator<Item = DiskNotice>>(&mut self, notices: I) {
        for DiskNotice { serial, news } in notices {
            match news {
                DiskNews::Fetch(chunk) => self.fetches.entry(serial).or_default().push(chunk),
                DiskNews::Staged(chunk) => self.staged.entry(serial).or_default().push(chunk),
                DiskNews::Detached { durable } => self.others.push(Event::DiskDetached { serial, durable }),
                DiskNews::Impaired(cause) => {
                    self.others.push(Event::VolumeImpaired { serial, cause: cause.into() });
                }
                DiskNews::ConnectionWanted => self.others.push(Event::ConnectVolume { serial }),
                DiskNews::Recovered => self.others.push(Event::VolumeRecovered { serial }),
            }
        }
    }
}

impl News {
    /// Chunks first, oldest first otherwise.
    pub(super) fn into_events(self) -> Vec<Event> {
        let mut events = Vec::new();
        for (serial, chunks) in self.fetches {
            let parts = chunks.chunks(CHUNKS_PER_EVENT);
            events.extend(parts.map(|part| Event::FetchChunks { serial: serial.clone(), chunks: part.to_vec() }));
        }
        for (serial, chunks) in self.staged {
            let parts = chunks.chunks(CHUNKS_PER_EVENT);
            events.extend(parts.map(|part| Event::ChunksStaged { serial: serial.clone(), chunks: part.to_vec() }));
        }
        events.extend(self.others);
        events
    }
}
