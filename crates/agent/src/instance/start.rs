//! From disks on paper to a running VMM.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_proto::v1;
use hearth_types::{InstanceId, StateReason};
use hearth_vmm::console_ring;
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::{Host, Spec};
use crate::boot::BootFilesError;
use crate::images::{FetchError, ImageError};
use crate::launch::{Disk, LaunchError, LaunchSpec, Limits, Vmm};
use crate::net::{Metadata, NicRequest};

/// Bytes of console output that are kept.
const CONSOLE_RING_BYTES: u64 = 256 << 10;
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Why an instance did not start.
#[derive(Debug)]
pub enum StartError {
    /// Trying again would not help.
    Permanent(StateReason),
    /// The root volume holds nothing that boots; trying again would not help.
    Unbootable(String),
    /// The host failed; it may work the next time.
    Transient(String),
    /// There is no way to the image while there is no control plane: wait for it, however long.
    Waiting(String),
}

impl StartError {
    fn internal(message: impl Into<String>) -> Self {
        Self::Transient(message.into())
    }
}

/// A started guest.
pub struct Started {
    /// Its VMM.
    pub vmm: Box<dyn Vmm>,
    /// Bytes its console ring had seen before.
    pub console_start: u64,
}

/// Tells how far long work is, now and then.
pub struct ProgressReport {
    host: Arc<Host>,
    id: InstanceId,
    step: &'static str,
    last: Mutex<Option<Instant>>,
}

impl ProgressReport {
    pub fn new(host: &Arc<Host>, id: &InstanceId, step: &'static str) -> Self {
        Self { host: host.clone(), id: id.clone(), step, last: Mutex::new(None) }
    }

    pub fn tell(&self, done: u64, total: u64) {
        let mut last = self.last.lock();
        if done < total && last.is_some_and(|last| last.elapsed() < PROGRESS_EVERY) {
            return;
        }
        *last = Some(Instant::now());
        if let Some(report) = self.host.reports.get(&self.id) {
            let progress = v1::Progress { done_bytes: done, total_bytes: total, step: self.step.to_owned() };
            self.host.reports.publish(&self.id, v1::InstanceReport { progress: Some(progress), ..report });
        }
    }
}

/// Everything that a start has to wait for.
pub struct Ready {
    /// What the root volume is to be made from, unless it is there.
    image: Option<PathBuf>,
    /// The instance's turn.
    _turn: OwnedSemaphorePermit,
}

/// Waits for the image and for the instance's turn. May be given up at any time.
pub async fn ready(host: &Arc<Host>, id: &InstanceId, spec: &Spec) -> Result<Ready, StartError> {
    let image = if host.layout.root_disk(id).exists() { None } else { Some(fetch_image(host, id, spec).await?) };
    let turn = host.starts.clone().acquire_owned().await;
    Ok(Ready { image, _turn: turn.map_err(|error| StartError::internal(error.to_string()))? })
}

async fn fetch_image(host: &Arc<Host>, id: &InstanceId, spec: &Spec) -> Result<PathBuf, StartError> {
    let progress = ProgressReport::new(host, id, "fetching the image");
    match host.images.ensure(&spec.image, &|done, total| progress.tell(done, total)).await {
        Ok(path) => Ok(path),
        Err(ImageError::Fetch(FetchError::Unreachable(reason))) => Err(StartError::Waiting(reason)),
        Err(error) if error.is_transient() => Err(StartError::internal(error.to_string())),
        Err(error) => Err(StartError::Permanent(StateReason::new(StateReason::INVALID_IMAGE, error.to_string()))),
    }
}

/// Makes what is missing and starts the VMM. Must run to its end.
pub async fn start(
    host: &Arc<Host>,
    id: &InstanceId,
    spec: &Spec,
    wire: &v1::InstanceSpec,
    slot: u32,
    ready: Ready,
) -> Result<Started, StartError> {
    let (work_host, work_id, work_spec) = (host.clone(), id.clone(), spec.clone());
    host.step("before making disks").await;
    let image = ready.image.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare(&work_host, &work_id, &work_spec, image)).await;
    let (boot, disks, console_ring, console_start) =
        prepared.map_err(|error| StartError::internal(format!("internal error: {error}")))??;
    host.step("after making disks").await;
    let metadata = metadata(host, id, spec, wire);
    let mut nics = Vec::new();
    for (nic, request) in spec.nics.iter().zip(&metadata.nics) {
        let tap =
            host.network.attach(request.clone()).await.map_err(|error| StartError::internal(error.to_string()))?;
        nics.push(crate::launch::Nic { mac: nic.mac, mtu: request.mtu, tap });
    }
    host.network.register(metadata).await.map_err(|error| StartError::internal(error.to_string()))?;
    host.step("before launching").await;
    let launch = LaunchSpec {
        instance_id: id.clone(),
        instance_type: spec.instance_type.clone(),
        slot,
        vcpus: spec.vcpus,
        memory_mib: spec.resources.memory_mib,
        limits: Limits {
            vcpus: spec.resources.vcpus,
            cpu_quota_us: host.calibration.quota_us(spec.ecu_milli_quota),
            memory_mib: spec.resources.memory_mib,
        },
        boot,
        disks,
        nics,
        console_ring,
    };
    let vmm = host.launcher.launch(launch).await.map_err(|error| match error {
        LaunchError::AlreadyRunning(_) => StartError::internal(format!("{error}; ending it")),
        error => StartError::internal(error.to_string()),
    })?;
    host.step("after launching").await;
    Ok(Started { vmm, console_start })
}

/// What the network answers for the instance.
pub fn metadata(host: &Host, id: &InstanceId, spec: &Spec, wire: &v1::InstanceSpec) -> Metadata {
    let request = |nic: &super::Nic| NicRequest {
        instance_id: id.clone(),
        device_index: nic.device_index,
        mac: nic.mac,
        ipv4: nic.ipv4,
        mtu: host.mtu,
    };
    Metadata { instance_id: id.clone(), nics: spec.nics.iter().map(request).collect(), spec: wire.clone() }
}

type Prepared = (crate::launch::BootFiles, Vec<Disk>, std::fs::File, u64);

fn prepare(host: &Arc<Host>, id: &InstanceId, spec: &Spec, image: Option<PathBuf>) -> Result<Prepared, StartError> {
    let layout = &host.layout;
    let volume_failed = |error: crate::volumes::VolumeError| StartError::internal(error.to_string());
    let root = layout.root_disk(id);
    if let Some(image) = image {
        let progress = ProgressReport::new(host, id, "copying the image to the root volume");
        let tell = |done, total| progress.tell(done, total);
        host.volumes.create_root(&image, &root, spec.root_bytes, &tell).map_err(volume_failed)?;
    }
    let mut disks =
        vec![Disk { serial: spec.root_serial.clone(), file: host.volumes.open(&root).map_err(volume_failed)? }];
    for (index, disk) in spec.instance_store.iter().enumerate() {
        let path = layout.ephemeral_disk(id, index);
        host.volumes.create_empty(&path, disk.bytes).map_err(volume_failed)?;
        disks.push(Disk { serial: disk.serial.clone(), file: host.volumes.open(&path).map_err(volume_failed)? });
    }
    let boot = host.boot.load(&root, &spec.boot).map_err(|error| match error {
        BootFilesError::Image(error) => StartError::Unbootable(error.to_string()),
        error => StartError::internal(error.to_string()),
    })?;
    let (ring, seen) = open_console_ring(&layout.console_ring(id)).map_err(StartError::Transient)?;
    Ok((boot, disks, ring, seen))
}

/// The ring outlives reboots and stops; one that is damaged is made anew.
fn open_console_ring(path: &std::path::Path) -> Result<(std::fs::File, u64), String> {
    let failed = |error: std::io::Error| format!("opening {}: {error}", path.display());
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
    match console_total(&file) {
        Some(total) => Ok((file, total)),
        None => {
            console_ring::create(&file, CONSOLE_RING_BYTES).map_err(|error| error.to_string())?;
            Ok((file, 0))
        }
    }
}

/// Bytes a console ring has seen; `None` when the file is no ring.
pub fn console_total(ring: &std::fs::File) -> Option<u64> {
    console_ring::read(ring, u64::MAX).ok().map(|snapshot| snapshot.start)
}
