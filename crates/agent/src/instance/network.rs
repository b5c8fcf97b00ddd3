//! A backend's volume of a running guest: its way to its server. Backends may take long, so they are asked in the background.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hearth_proto::v1::{self, DetachWish, ObservedAttachment};
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant, timeout};

use super::Attachment;
use super::volumes::{MOMENT, Slot, limits};
use crate::launch::{Backing, Disk, DiskControl, NbdBacking};
use crate::storage::{Connect, NetworkError, NetworkVolumes};

/// Pause after a failure.
const PAUSE: Duration = Duration::from_secs(2);

type Socket = (OwnedFd, String);

/// What is done for a volume at its backend.
struct Job {
    /// Size that it has then.
    bytes: u64,
    task: JoinHandle<Result<Socket, NetworkError>>,
}

/// See the module.
pub struct Remote {
    network: Arc<NetworkVolumes>,
    job: Option<Job>,
    /// The VMM waits for a connection.
    pub wanted: bool,
    /// The VMM has let go of it; what serves it here has to end.
    pub released: bool,
    /// Why the last try failed.
    pub trouble: String,
    next_try: Instant,
}

impl Remote {
    /// Nothing is done yet.
    pub fn new(network: &Arc<NetworkVolumes>) -> Self {
        Self {
            network: network.clone(),
            job: None,
            wanted: false,
            released: false,
            trouble: String::new(),
            next_try: Instant::now(),
        }
    }

    /// What the guest of a volume that was taken up again sees of it.
    pub fn as_seen(&self, volume: &v1::HostVolume) -> v1::HostVolume {
        v1::HostVolume { size_bytes: self.network.noted_size(volume), ..volume.clone() }
    }

    /// A connection, if there is one within a moment, and the size that the volume has over it.
    async fn socket(&mut self, volume: &v1::HostVolume, connect: Connect) -> Option<(Socket, u64)> {
        if self.job.is_none() {
            if Instant::now() < self.next_try {
                return None;
            }
            let (network, wanted) = (self.network.clone(), volume.clone());
            let task = tokio::spawn(async move { network.connect(&wanted, connect).await });
            self.job = Some(Job { bytes: volume.size_bytes, task });
        }
        let job = self.job.as_mut()?;
        let ended = timeout(MOMENT, &mut job.task).await.ok()?;
        let bytes = job.bytes;
        self.job = None;
        let outcome = match ended {
            Ok(outcome) => outcome.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match outcome {
            Ok(socket) => {
                self.trouble.clear();
                Some((socket, bytes))
            }
            Err(error) => {
                self.failed(volume, error);
                None
            }
        }
    }

    fn failed(&mut self, volume: &v1::HostVolume, error: String) {
        if self.trouble != error {
            tracing::warn!(volume = volume.volume_id, error, "a volume's backend");
        }
        self.trouble = error;
        self.next_try = Instant::now() + PAUSE;
    }

    /// Ends what serves the volume here; `false` = not yet.
    async fn close(&mut self, volume: &v1::HostVolume) -> bool {
        if Instant::now() < self.next_try {
            return false;
        }
        match timeout(MOMENT, self.network.close(volume)).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                self.failed(volume, error.to_string());
                false
            }
            // It goes on; asked again, it waits for its end.
            Err(_) => false,
        }
    }
}

/// The volume as a disk for a VMM.
pub fn disk(serial: String, volume: &v1::HostVolume, (socket, export): Socket) -> Disk {
    Disk { serial, backing: Backing::Nbd(NbdBacking { socket, export, limits: limits(volume) }) }
}

/// Takes the next step with a backend's volume. `true` when there is something to look at again soon.
pub async fn follow(slot: &mut Slot, attachment: &Attachment, disks: &dyn DiskControl, queues: u16) -> bool {
    let Some(remote) = &mut slot.remote else { return false };
    let wanted = &attachment.volume;
    let off = attachment.detach != DetachWish::Unspecified;
    if slot.state == ObservedAttachment::Detached {
        return false;
    }
    if remote.released || (off && slot.state == ObservedAttachment::Attaching) {
        if remote.close(wanted).await {
            remote.job = None;
            slot.state = ObservedAttachment::Detached;
            return false;
        }
        return true;
    }
    if slot.state == ObservedAttachment::Attaching {
        let Some((socket, _)) = remote.socket(wanted, Connect::First).await else { return true };
        return match disks.attach(disk(slot.serial.clone(), wanted, socket), queues).await {
            Ok(()) => {
                tracing::info!(volume = %attachment.id, "volume attached");
                slot.state = ObservedAttachment::Attached;
                slot.volume = wanted.clone();
                remote.network.note_size(wanted);
                false
            }
            Err(error) => {
                remote.failed(wanted, error.to_string());
                true
            }
        };
    }
    let mut again = super::volumes::follow(slot, attachment, disks).await;
    let Some(remote) = &mut slot.remote else { return again };
    let grow = wanted.size_bytes > slot.volume.size_bytes && !off;
    if remote.wanted || grow {
        // Some servers tell the new size only when they begin anew.
        let connect = if grow { Connect::First } else { Connect::Again };
        let Some(((socket, _), bytes)) = remote.socket(wanted, connect).await else { return true };
        let mut done = disks.connect(&slot.serial, socket).await;
        if done.is_ok() {
            remote.wanted = false;
            if bytes > slot.volume.size_bytes && !off {
                done = disks.resize(&slot.serial, bytes).await;
                if done.is_ok() {
                    slot.volume.size_bytes = bytes;
                    remote.network.note_size(&slot.volume);
                }
            }
        }
        if let Err(error) = done {
            remote.failed(wanted, error.to_string());
        }
        again = true;
    }
    again
}
