//! From disks on paper to a running VMM.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_block::{OfflineVolume, VolumeFiles};
use hearth_proto::v1;
use hearth_types::{InstanceId, StateReason, VolumeId};
use hearth_vmm::console_ring;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::OwnedSemaphorePermit;

use super::volumes::{Slot, open_for_vmm};
use super::{Attachment, Host, Spec, network};
use crate::boot::{BootFilesError, ReadAt};
use crate::instance_store::{self, InstanceStoreError};
use crate::launch::{Backing, Disk, DiskLimits, LaunchError, LaunchSpec, LayeredBacking, Limits, Vmm};
use crate::net::{Metadata, NicRequest};
use crate::storage::{BundleRootError, Connect, Placed, VolumeDisk, VolumeError, is_network, make_root, open_root};

/// Bytes of console output that are kept.
const CONSOLE_RING_BYTES: u64 = 256 << 10;
/// Attachment generation of root disks made from bundles: they never leave their instance.
const ROOT_GENERATION: u64 = 1;
/// Least time between two reports of progress.
const TELL_EVERY: Duration = Duration::from_millis(500);

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
    /// Its volumes.
    pub slots: Vec<Slot>,
}

/// Everything that a start has to wait for.
pub struct Ready {
    /// Volumes on this host, the root first.
    volumes: Vec<Placed>,
    /// Volumes that backends keep.
    network: Vec<Attachment>,
    /// The instance's turn.
    _turn: OwnedSemaphorePermit,
}

/// Waits for the volumes' bases and for the instance's turn. May be given up at any time.
///
/// Volumes that `made` names, with their attachment generation, were here before.
pub async fn ready(
    host: &Arc<Host>,
    id: &InstanceId,
    spec: &Spec,
    made: &BTreeMap<VolumeId, u64>,
) -> Result<Ready, StartError> {
    let attached = spec.volumes.iter().filter(|attachment| attachment.detach == v1::DetachWish::Unspecified);
    let (network, here): (Vec<_>, Vec<_>) = attached.partition(|attachment| is_network(&attachment.volume));
    let network = network.into_iter().cloned().collect();
    let mut volumes = Vec::new();
    for attachment in here {
        let placed = match made.get(&attachment.id) {
            // It must never come back as what it was made from.
            Some(generation) if *generation == attachment.volume.attach_generation => {
                host.volumes.find(&attachment.volume).await
            }
            _ => host.volumes.place(&attachment.volume).await,
        };
        volumes.push(placed.map_err(|error| volume_failed(&error))?);
    }
    if let Some(bundle) = &spec.bundle_root {
        bring_root(host, id, bundle).await?;
    } else if volumes.is_empty() {
        let reason = format!("{id} has no root volume");
        return Err(StartError::Permanent(StateReason::new(StateReason::INTERNAL_ERROR, reason)));
    }
    for placed in &volumes {
        host.snapshots.settle(&placed.id).await;
    }
    let turn = host.starts.clone().acquire_owned().await;
    Ok(Ready { volumes, network, _turn: turn.map_err(|error| StartError::internal(error.to_string()))? })
}

/// Makes the root disk from its bundle.
async fn bring_root(host: &Arc<Host>, id: &InstanceId, bundle: &v1::BundleRoot) -> Result<(), StartError> {
    let (reports, instance) = (host.reports.clone(), id.clone());
    let step = "fetching the bundle";
    let last = parking_lot::Mutex::new(None::<Instant>);
    let progress = Arc::new(move |done_bytes: u64, total_bytes: u64| {
        let mut last = last.lock();
        if last.is_none_or(|last| last.elapsed() >= TELL_EVERY) {
            *last = Some(Instant::now());
            reports.progress(&instance, v1::Progress { done_bytes, total_bytes, step: step.to_owned() });
        }
    });
    let objects = host.volumes.bases().objects();
    make_root(objects.as_ref(), bundle, &host.layout.bundle_root(id), progress).await.map_err(|error| match &error {
        BundleRootError::Storage { source, .. } if source.is_transient() => StartError::Waiting(error.to_string()),
        error if error.is_transient() => StartError::internal(error.to_string()),
        error => StartError::Permanent(StateReason::new(StateReason::INVALID_IMAGE, error.to_string())),
    })
}

fn volume_failed(error: &VolumeError) -> StartError {
    match error {
        VolumeError::Base(base) if base.is_transient() => StartError::Waiting(error.to_string()),
        error if error.is_transient() => StartError::internal(error.to_string()),
        error => StartError::Permanent(StateReason::new(StateReason::INTERNAL_ERROR, error.to_string())),
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
    let runtime = tokio::runtime::Handle::current();
    let Ready { volumes, network, _turn } = ready;
    let prepared =
        tokio::task::spawn_blocking(move || prepare(&work_host, &work_id, &work_spec, &volumes, runtime)).await;
    let Prepared { boot, mut disks, mut slots, console_ring, console_start } =
        prepared.map_err(|error| StartError::internal(format!("internal error: {error}")))??;
    host.step("after making disks").await;
    for attachment in &network {
        let opened = host.volumes.network().connect(&attachment.volume, Connect::First).await;
        // It is the operator's to mend, and there is no other place for the instance.
        let socket = opened.map_err(|error| StartError::Waiting(error.to_string()))?;
        disks.push(network::disk(attachment.id.serial(), &attachment.volume, socket));
        host.volumes.network().note_size(&attachment.volume);
        slots.push(Slot::launched(attachment, &host.volumes));
    }
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
    Ok(Started { vmm, console_start, slots })
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

struct Prepared {
    boot: crate::launch::BootFiles,
    disks: Vec<Disk>,
    slots: Vec<Slot>,
    console_ring: std::fs::File,
    console_start: u64,
}

fn prepare(
    host: &Arc<Host>,
    id: &InstanceId,
    spec: &Spec,
    volumes: &[Placed],
    runtime: tokio::runtime::Handle,
) -> Result<Prepared, StartError> {
    let layout = &host.layout;
    // Opened for as long as discovery reads it; the VMM opens it again.
    let bundle_failed = |error: BundleRootError| StartError::internal(error.to_string());
    let (name, disk) = match (&spec.bundle_root, volumes.first()) {
        (Some(_), _) => {
            let files = open_root(&layout.bundle_root(id)).map_err(bundle_failed)?;
            let offline =
                OfflineVolume::open(files, ROOT_GENERATION).map_err(|e| StartError::internal(e.to_string()))?;
            (id.as_str(), VolumeDisk::new(offline, None, runtime))
        }
        (None, Some(root)) => {
            let offline = root.open_offline().map_err(|error| volume_failed(&error))?;
            (root.id.as_str(), VolumeDisk::new(offline, root.base.clone(), runtime))
        }
        (None, None) => return Err(StartError::internal("no root volume")),
    };
    let disk = Arc::new(disk);
    let found = host.boot.load_from(&(disk.clone() as Arc<dyn ReadAt>), name, &spec.boot, || disk.take_failure());
    let boot = found.map_err(|error| match error {
        BootFilesError::Image(error) => StartError::Unbootable(error.to_string()),
        error => StartError::internal(error.to_string()),
    })?;
    drop(disk);
    let (mut disks, mut slots) = (Vec::new(), Vec::new());
    if let Some(bundle) = &spec.bundle_root {
        let files = open_root(&layout.bundle_root(id)).map_err(bundle_failed)?;
        disks.push(root_disk(bundle, files).map_err(StartError::Transient)?);
    }
    for placed in volumes {
        let (disk, slot) = open_for_vmm(placed).map_err(|error| volume_failed(&error))?;
        disks.push(disk);
        slots.push(slot);
    }
    let store_failed = |error: InstanceStoreError| StartError::internal(error.to_string());
    for (index, disk) in spec.instance_store.iter().enumerate() {
        let path = layout.ephemeral_disk(id, index);
        instance_store::create(&path, disk.bytes).map_err(store_failed)?;
        let file = instance_store::open(&path).map_err(store_failed)?;
        disks.push(Disk { serial: disk.serial.clone(), backing: Backing::Raw(file) });
    }
    let (console_ring, console_start) = open_console_ring(&layout.console_ring(id)).map_err(StartError::Transient)?;
    Ok(Prepared { boot, disks, slots, console_ring, console_start })
}

/// The root disk that was made from a bundle, for a VMM.
fn root_disk(bundle: &v1::BundleRoot, files: VolumeFiles) -> Result<Disk, String> {
    // Nothing of it is ever fetched, so nobody rings.
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|errno| format!("eventfd: {errno}"))?;
    let limits = DiskLimits { iops: 0, bytes_per_second: 0 };
    let backing = LayeredBacking { files, wake: wake.into(), generation: ROOT_GENERATION, limits };
    Ok(Disk { serial: bundle.serial.clone(), backing: Backing::Layered(Box::new(backing)) })
}

/// The ring outlives reboots and stops; one that is damaged is made anew.
fn open_console_ring(path: &std::path::Path) -> Result<(std::fs::File, u64), String> {
    let failed = |error: std::io::Error| format!("opening {}: {error}", path.display());
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
    match console_total(&file) {
        Some(total) => {
            console_ring::reserve(&file).map_err(|error| error.to_string())?;
            Ok((file, total))
        }
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
