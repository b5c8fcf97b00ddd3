//! The EBS volumes of a running guest: what is attached, and the way from there to what is wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hearth_proto::v1::{self, AttachedVolumeReport, DetachWish, ObservedAttachment};
use hearth_types::VolumeId;
use hearth_vmm::control::protocol::{Event, VolumeCause};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant, timeout};

use super::Attachment;
use super::network::{self, Remote};
use crate::launch::{Backing, Disk, DiskControl, DiskLimits, LayeredBacking};
use crate::storage::{Base, HostVolumes, Placed, Reader, Snapshots, VolumeError, is_network};

/// How long a guest may take to let go of a disk before it counts as busy.
const BUSY_AFTER: Duration = Duration::from_secs(15);
/// Chunks fetched ahead when a guest waits for one behind another, and when it has done so before.
const READ_AHEAD: (u64, u64) = (4, 16);
/// How long the other work of an instance waits for a backend, or for the base of a volume.
pub(super) const MOMENT: Duration = Duration::from_secs(1);

/// One volume that a VMM has, or had until it let go of it.
pub struct Slot {
    /// As it was attached.
    pub volume: v1::HostVolume,
    pub(super) serial: String,
    /// Its way to its server, when a backend keeps it.
    pub(super) remote: Option<Remote>,
    base: Option<Arc<Base>>,
    /// Taken up from an earlier agent, and its base is not found yet.
    orphan: bool,
    /// Under way to the volume's files and base.
    placing: Option<Placing>,
    /// Taken up from an earlier agent, which may not have told the VMM the newest size and limits.
    untold: bool,
    /// Chunks that the guest waits for until then.
    missed: BTreeSet<u64>,
    /// The last chunk that it waited for.
    missed_last: Option<u64>,
    /// That was behind the one before.
    reads_on: bool,
    /// A VMM was started with it by this agent: what the guest waits for belongs to the working set of its image.
    launched: bool,
    /// Held so that the base tells of chunks that come.
    _listener: Option<Listener>,
    pub(super) state: ObservedAttachment,
    asked: Option<Instant>,
    /// Number of the newest request that the guest was asked for.
    attempt: u32,
    forced: bool,
    impaired: String,
    error: String,
}

/// A volume on its way to this host. Dropping it calls that off.
struct Placing(JoinHandle<Result<Placed, VolumeError>>);

impl Drop for Placing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Is called when chunks of a base have come.
type Listener = Arc<dyn Fn() + Send + Sync>;

/// Tells a VMM of chunks over its connection, as often as it can take it. Ends with the listener.
fn caller(serial: String, disks: Arc<dyn DiskControl>) -> Listener {
    let (news, mut heard) = watch::channel(());
    tokio::spawn(async move {
        while heard.changed().await.is_ok() {
            if let Err(error) = disks.chunks_came(&serial).await {
                tracing::debug!(serial, %error, "telling a VMM of chunks");
            }
        }
    });
    Arc::new(move || {
        news.send_replace(());
    })
}

/// Whether a guest that waited for one chunk and then for the other reads from the one to the other: what was fetched ahead between
/// them was not waited for.
fn reads_on(last: Option<u64>, chunk: u64) -> bool {
    last.is_some_and(|last| chunk > last && chunk - last <= READ_AHEAD.1 + 1)
}

/// How fast a volume may be.
pub(super) fn limits(volume: &v1::HostVolume) -> DiskLimits {
    DiskLimits { iops: u64::from(volume.iops), bytes_per_second: u64::from(volume.throughput_mibps) << 20 }
}

/// Opens a volume for a VMM: the disk to give to it, and what is kept of it here.
pub fn open_for_vmm(placed: &Placed) -> Result<(Disk, Slot), VolumeError> {
    let failed =
        |errno: nix::Error| VolumeError::Spec { id: placed.id.to_string(), reason: format!("eventfd: {errno}") };
    // Grows it, if it is to be larger, and tells early when somebody else has it.
    drop(placed.open_offline()?);
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(failed)?;
    let wake: OwnedFd = wake.into();
    let bell =
        wake.try_clone().map_err(|error| VolumeError::Spec { id: placed.id.to_string(), reason: error.to_string() })?;
    let slot = Slot::with(
        placed,
        Arc::new(move || {
            // A full counter rings as well.
            let _ = nix::unistd::write(&bell, &1u64.to_ne_bytes());
        }),
    );
    let backing = LayeredBacking {
        files: placed.files()?,
        wake,
        generation: placed.wanted.attach_generation,
        limits: limits(&placed.wanted),
    };
    Ok((Disk { serial: placed.id.serial(), backing: Backing::Layered(Box::new(backing)) }, slot))
}

impl Slot {
    fn with(placed: &Placed, ring: Listener) -> Self {
        let mut slot = Self::of(placed.id.serial(), placed.wanted.clone(), ObservedAttachment::Attached);
        slot.follow_base(placed.base.as_ref(), ring);
        slot
    }

    fn of(serial: String, volume: v1::HostVolume, state: ObservedAttachment) -> Self {
        Self {
            volume,
            serial,
            remote: None,
            base: None,
            orphan: false,
            placing: None,
            untold: false,
            missed: BTreeSet::new(),
            missed_last: None,
            reads_on: false,
            launched: false,
            _listener: None,
            state,
            asked: None,
            attempt: 0,
            forced: false,
            impaired: String::new(),
            error: String::new(),
        }
    }

    /// Has `ring` called when chunks of the base come.
    fn follow_base(&mut self, base: Option<&Arc<Base>>, ring: Listener) {
        if let Some(base) = base {
            base.listen(&ring);
            self.base = Some(base.clone());
            self._listener = Some(ring);
        }
    }

    fn report(&self) -> AttachedVolumeReport {
        AttachedVolumeReport {
            volume_id: self.volume.volume_id.clone(),
            attach_generation: self.volume.attach_generation,
            state: self.state.into(),
            error: match &self.remote {
                Some(remote) if self.error.is_empty() => remote.trouble.clone(),
                _ => self.error.clone(),
            },
            impaired: match &self.remote {
                Some(remote) if !self.impaired.is_empty() && !remote.trouble.is_empty() => {
                    format!("{}: {}", self.impaired, remote.trouble)
                }
                _ => self.impaired.clone(),
            },
            size_bytes: if self.untold && self.remote.is_none() { 0 } else { self.volume.size_bytes },
        }
    }
}

fn cause(cause: VolumeCause) -> String {
    match cause {
        VolumeCause::NoSpace => "the host's file system is full: its writes wait".to_owned(),
        VolumeCause::ChunkUnavailable { chunk } => {
            format!("chunk {chunk} does not come from the object store: its reads wait")
        }
        VolumeCause::SyncFailed { errno } => {
            let error = std::io::Error::from_raw_os_error(errno);
            format!("writes cannot be made durable ({error}): detach it, or stop the instance")
        }
        VolumeCause::Disconnected => "the connection to the volume's server is lost: its requests wait".to_owned(),
        VolumeCause::StageFailed { errno } => {
            let error = std::io::Error::from_raw_os_error(errno);
            format!("a snapshot in the making is lost: {error}")
        }
    }
}

/// All volumes of one guest.
#[derive(Default)]
pub struct Slots(Vec<Slot>);

impl Slots {
    /// Those that a VMM was started with.
    pub fn begin(&mut self, slots: Vec<Slot>) {
        self.0 = slots;
        self.0.iter_mut().for_each(|slot| slot.launched = true);
    }

    /// The VMM is gone, and every volume with it.
    pub fn end(&mut self) {
        self.0.clear();
    }

    /// After the agent was away: those of the volumes that the VMM has.
    pub async fn adopt(&mut self, volumes: &Arc<HostVolumes>, wanted: &[Attachment], disks: &Arc<dyn DiskControl>) {
        let there = match disks.serials().await {
            Ok(there) => Some(there),
            Err(error) => {
                tracing::warn!(%error, "the VMM does not tell its disks: it counts as having all");
                None
            }
        };
        for attachment in wanted {
            let serial = attachment.id.serial();
            if there.as_ref().is_some_and(|there| !there.contains(&serial)) {
                continue;
            }
            // A snapshot that the agent before was making has failed: what it would have had belongs to the next one.
            if let Err(error) = disks.thaw(&serial, true).await {
                tracing::debug!(volume = %attachment.id, %error, "ending a freeze");
            }
            // Its base may have to wait for the connection to the control plane; the guest has the disk all the same.
            let orphan = attachment.volume.base.is_some();
            let state = ObservedAttachment::Attached;
            let mut slot = Slot { state, orphan, untold: true, ..Slot::detached(attachment) };
            if let Some(remote) = remote_of(&attachment.volume, volumes) {
                slot.volume = remote.as_seen(&attachment.volume);
                slot.remote = Some(remote);
            }
            self.0.push(slot);
        }
        self.find_bases(volumes, disks).await;
    }

    /// Finds the bases of volumes that were taken up again. `true` when some are missing.
    async fn find_bases(&mut self, volumes: &Arc<HostVolumes>, disks: &Arc<dyn DiskControl>) -> bool {
        let mut missing = false;
        for slot in self.0.iter_mut().filter(|slot| slot.orphan) {
            let Some(placed) = slot.place(volumes).await else {
                missing = true;
                continue;
            };
            match placed {
                Ok(placed) => {
                    slot.orphan = false;
                    slot.follow_base(placed.base.as_ref(), caller(slot.serial.clone(), disks.clone()));
                    if let Some(base) = &slot.base {
                        std::mem::take(&mut slot.missed)
                            .into_iter()
                            .for_each(|chunk| base.want(chunk, Reader::Waiting));
                    }
                }
                Err(error) => {
                    tracing::warn!(volume = slot.volume.volume_id, %error, "taking up a volume again");
                    missing = true;
                }
            }
        }
        missing
    }

    /// Volumes of this host's own disk that the VMM has, with their attachment generation.
    pub fn made(&self) -> BTreeMap<VolumeId, u64> {
        let has =
            |slot: &&Slot| slot.remote.is_none() && slot.state != ObservedAttachment::Failed && !slot.is_on_its_way();
        let local = self.0.iter().filter(has);
        local.filter_map(|slot| Some((slot.volume.volume_id.parse().ok()?, slot.volume.attach_generation))).collect()
    }

    /// What is told of them. With neither a VMM nor rest, a VMM may be there that nobody has looked for yet: sizes are not known.
    pub fn reports(&self, running: bool, at_rest: bool, wanted: &[Attachment]) -> Vec<AttachedVolumeReport> {
        if running {
            return self.0.iter().map(Slot::report).collect();
        }
        // Without a guest nobody holds on to anything.
        let state = |attachment: &Attachment| match attachment.detach {
            DetachWish::Unspecified => ObservedAttachment::Attached,
            DetachWish::Ask | DetachWish::Force => ObservedAttachment::Detached,
        };
        let report = |attachment: &Attachment| AttachedVolumeReport {
            volume_id: attachment.volume.volume_id.clone(),
            attach_generation: attachment.volume.attach_generation,
            state: state(attachment).into(),
            size_bytes: if at_rest { attachment.volume.size_bytes } else { 0 },
            ..AttachedVolumeReport::default()
        };
        wanted.iter().map(report).collect()
    }

    /// Works in what the VMM tells.
    pub fn hear(&mut self, event: &Event) {
        match event {
            Event::DiskDetached { serial, durable } => {
                if let Some(slot) = self.of(serial) {
                    let lost = match &mut slot.remote {
                        // What serves it here has to end first.
                        Some(remote) => {
                            remote.released = true;
                            "its server was not there: what was not flushed is lost"
                        }
                        None => {
                            slot.state = ObservedAttachment::Detached;
                            "the host's file system failed: not all of its writes are durable"
                        }
                    };
                    if !durable {
                        lost.clone_into(&mut slot.error);
                    }
                }
            }
            Event::FetchChunks { serial, chunks } => {
                let Some(slot) = self.of(serial) else { return };
                let Some(base) = slot.base.clone() else {
                    if slot.orphan {
                        slot.missed.extend(chunks);
                    }
                    return;
                };
                let reader = if slot.launched { Reader::Launch } else { Reader::Waiting };
                for chunk in chunks {
                    base.want(*chunk, reader);
                }
                for chunk in chunks {
                    // Guests read here and there when they boot: most of what stands behind that is never wanted.
                    let last = slot.missed_last.replace(*chunk);
                    let before = std::mem::replace(&mut slot.reads_on, reads_on(last, *chunk));
                    if let (true, true, Some(last)) = (slot.launched, slot.reads_on, last) {
                        (last + 1..*chunk).for_each(|chunk| base.note(chunk));
                    }
                    let ahead = match (before, slot.reads_on) {
                        (_, false) => 0,
                        (false, true) => READ_AHEAD.0,
                        (true, true) => READ_AHEAD.1,
                    };
                    (1..=ahead).for_each(|ahead| base.want(chunk.saturating_add(ahead), Reader::Nobody));
                }
            }
            Event::VolumeImpaired { serial, cause: why } => {
                if let Some(slot) = self.of(serial) {
                    slot.impaired = cause(*why);
                }
            }
            Event::ConnectVolume { serial } => {
                if let Some(remote) = self.of(serial).and_then(|slot| slot.remote.as_mut()) {
                    remote.wanted = true;
                }
            }
            Event::VolumeRecovered { serial } => {
                if let Some(slot) = self.of(serial) {
                    slot.impaired.clear();
                }
            }
            _ => {}
        }
    }

    fn of(&mut self, serial: &str) -> Option<&mut Slot> {
        self.0.iter_mut().find(|slot| slot.serial == serial)
    }

    /// Takes the next steps towards what is wanted. `true` when there is something to look at again soon.
    pub async fn approach(
        &mut self,
        wanted: &[Attachment],
        volumes: &Arc<HostVolumes>,
        snapshots: &Snapshots,
        disks: &Arc<dyn DiskControl>,
        queues: u16,
        is_root: impl Fn(&Attachment) -> bool,
    ) -> bool {
        // The control plane has seen that it is off, or does not want it any more.
        self.0.retain(|slot| {
            !(slot.state == ObservedAttachment::Detached || slot.is_on_its_way())
                || wanted.iter().any(|other| {
                    other.volume.attach_generation == slot.volume.attach_generation
                        && other.volume.volume_id == slot.volume.volume_id
                })
        });
        let mut again = self.find_bases(volumes, disks).await;
        for attachment in wanted {
            let serial = attachment.id.serial();
            let known = self.0.iter().position(|slot| slot.serial == serial);
            match known.and_then(|at| self.0.get_mut(at)) {
                Some(slot) if slot.state == ObservedAttachment::Failed => {
                    self.0.retain(|slot| slot.serial != serial);
                    again = true;
                }
                Some(slot) if slot.remote.is_some() => {
                    again |= network::follow(slot, attachment, disks.as_ref(), queues).await;
                }
                Some(slot) if slot.is_on_its_way() => {
                    again |= slot.attach(attachment, volumes, disks.as_ref(), queues).await;
                }
                Some(slot) => again |= follow(slot, attachment, disks.as_ref()).await,
                // Another root volume comes with the reboot that is wanted with it.
                None if is_root(attachment) => {}
                None if is_network(&attachment.volume) => {
                    // One that is to go may have been let go of while no agent ran.
                    let mut slot = Slot::network(attachment, volumes);
                    again |= network::follow(&mut slot, attachment, disks.as_ref(), queues).await;
                    self.0.push(slot);
                }
                // What a snapshot still needs of it is set aside first.
                None if attachment.detach == DetachWish::Unspecified && !snapshots.is_settled(&attachment.id) => {
                    again = true;
                }
                None if attachment.detach == DetachWish::Unspecified => {
                    let mut slot = Slot { state: ObservedAttachment::Attaching, ..Slot::detached(attachment) };
                    again |= slot.attach(attachment, volumes, disks.as_ref(), queues).await;
                    self.0.push(slot);
                }
                None => self.0.push(Slot::detached(attachment)),
            }
        }
        again
    }
}

impl Slot {
    /// A backend's volume that no VMM has yet.
    pub(super) fn network(attachment: &Attachment, volumes: &HostVolumes) -> Self {
        let remote = remote_of(&attachment.volume, volumes);
        Self { remote, state: ObservedAttachment::Attaching, ..Self::detached(attachment) }
    }

    /// A backend's volume that a VMM was started with.
    pub fn launched(attachment: &Attachment, volumes: &HostVolumes) -> Self {
        Self { state: ObservedAttachment::Attached, ..Self::network(attachment, volumes) }
    }

    fn detached(attachment: &Attachment) -> Self {
        Self::of(attachment.id.serial(), attachment.volume.clone(), ObservedAttachment::Detached)
    }

    /// A volume of this host that no VMM has yet.
    fn is_on_its_way(&self) -> bool {
        self.state == ObservedAttachment::Attaching && self.remote.is_none()
    }

    /// The volume with its base, if they are there within a moment. An object store that does not answer may take minutes.
    async fn place(&mut self, volumes: &Arc<HostVolumes>) -> Option<Result<Placed, String>> {
        let patience = if self.placing.is_none() { MOMENT } else { Duration::ZERO };
        let (volumes, wanted) = (volumes.clone(), self.volume.clone());
        // What a VMM has is here.
        let is_here = self.orphan;
        let place = async move { if is_here { volumes.find(&wanted).await } else { volumes.place(&wanted).await } };
        let begin = || Placing(tokio::spawn(place));
        let placing = self.placing.get_or_insert_with(begin);
        let ended = timeout(patience, &mut placing.0).await.ok()?;
        self.placing = None;
        Some(match ended {
            Ok(placed) => placed.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Takes the next step with a volume that no VMM has yet. `true` when there is something to look at again soon.
    async fn attach(
        &mut self,
        attachment: &Attachment,
        volumes: &Arc<HostVolumes>,
        disks: &dyn DiskControl,
        queues: u16,
    ) -> bool {
        if attachment.detach != DetachWish::Unspecified {
            *self = Self::detached(attachment);
            return false;
        }
        let Some(placed) = self.place(volumes).await else { return true };
        let attached = async {
            let placed = placed?;
            let opened = tokio::task::spawn_blocking(move || open_for_vmm(&placed)).await;
            let (disk, slot) = opened.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            disks.attach(disk, queues).await.map_err(|error| error.to_string())?;
            Ok::<_, String>(slot)
        };
        match attached.await {
            Ok(slot) => {
                tracing::info!(volume = %attachment.id, "volume attached");
                *self = slot;
                false
            }
            Err(error) => {
                tracing::warn!(volume = %attachment.id, error, "the volume cannot be attached yet");
                *self = Self { state: ObservedAttachment::Failed, error, ..Self::detached(attachment) };
                true
            }
        }
    }
}

fn remote_of(volume: &v1::HostVolume, volumes: &HostVolumes) -> Option<Remote> {
    is_network(volume).then(|| Remote::new(volumes.network()))
}

/// Brings one attached volume closer to its wish.
pub(super) async fn follow(slot: &mut Slot, attachment: &Attachment, disks: &dyn DiskControl) -> bool {
    if slot.state == ObservedAttachment::Detached {
        return false;
    }
    let force = attachment.detach == DetachWish::Force;
    if attachment.detach != DetachWish::Unspecified {
        let anew = attachment.detach_attempt > slot.attempt;
        if slot.asked.is_none() || anew || (force && !slot.forced) {
            match disks.detach(&slot.serial, force).await {
                Ok(()) => {
                    slot.asked = slot.asked.filter(|_| !anew).or_else(|| Some(Instant::now()));
                    slot.attempt = attachment.detach_attempt;
                    slot.forced = force;
                    slot.state = ObservedAttachment::Detaching;
                }
                Err(error) => slot.error = error.to_string(),
            }
        } else if slot.asked.is_some_and(|asked| asked.elapsed() >= BUSY_AFTER) {
            slot.state = ObservedAttachment::Busy;
        }
        return true;
    }
    let wanted = &attachment.volume;
    let mut again = false;
    if (slot.untold || wanted.size_bytes > slot.volume.size_bytes) && slot.remote.is_none() {
        match disks.resize(&slot.serial, wanted.size_bytes).await {
            Ok(()) => slot.volume.size_bytes = wanted.size_bytes,
            Err(error) => {
                slot.error = error.to_string();
                again = true;
            }
        }
    }
    if slot.untold || limits(wanted) != limits(&slot.volume) {
        match disks.limit(&slot.serial, limits(wanted)).await {
            Ok(()) => {
                slot.volume.iops = wanted.iops;
                slot.volume.throughput_mibps = wanted.throughput_mibps;
            }
            Err(error) => {
                slot.error = error.to_string();
                again = true;
            }
        }
    }
    slot.untold &= again;
    if !again {
        slot.error.clear();
    }
    again
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_reads_on_has_chunks_fetched_ahead() {
        assert!(!reads_on(None, 0) && !reads_on(Some(7), 7) && !reads_on(Some(7), 3) && !reads_on(Some(7), 700));
        // And again when all that was fetched ahead has been read.
        assert!(reads_on(Some(7), 8) && reads_on(Some(7), 8 + READ_AHEAD.1) && !reads_on(Some(7), 9 + READ_AHEAD.1));
    }
}
