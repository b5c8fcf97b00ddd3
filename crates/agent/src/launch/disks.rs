//! Disks of a running VMM: attached, detached, resized, frozen.

use std::fs::File;
use std::os::fd::OwnedFd;

use async_trait::async_trait;
use hearth_block::{VolumeFiles, XtsKey};
pub use hearth_vmm::control::protocol::DiskLimits;
use hearth_vmm::control::protocol::{BaseSpec, DiskBacking, DiskKey, DiskSpec, Event, FdIndex, LayeredSpec, NbdSpec};
use tokio::sync::mpsc;

use super::LaunchError;

/// What VMMs tell of their disks, among other things.
pub type DiskEvents = mpsc::UnboundedReceiver<Event>;

/// One disk to give to a VMM.
#[derive(Debug)]
pub struct Disk {
    /// What the guest reads as serial number.
    pub serial: String,
    /// Where its bytes are.
    pub backing: Backing,
}

/// What is behind a disk.
#[derive(Debug)]
pub enum Backing {
    /// A raw file, opened read-write.
    Raw(File),
    /// An EBS volume.
    Layered(Box<LayeredBacking>),
    /// An EBS volume that a backend keeps.
    Nbd(NbdBacking),
}

/// An EBS volume that a backend keeps, connected for a VMM.
#[derive(Debug)]
pub struct NbdBacking {
    /// A stream socket; its other end begins the NBD negotiation.
    pub socket: OwnedFd,
    /// Name of the export.
    pub export: String,
    /// How fast it may be.
    pub limits: DiskLimits,
}

/// An EBS volume, opened for a VMM.
#[derive(Debug)]
pub struct LayeredBacking {
    /// Its files; the VMM locks the map.
    pub files: VolumeFiles,
    /// An eventfd that is written when chunks of the base have come.
    pub wake: OwnedFd,
    /// Attachment generation.
    pub generation: u64,
    /// How fast it may be.
    pub limits: DiskLimits,
}

/// One disk of a freeze.
#[derive(Debug)]
pub struct FreezeDisk {
    /// Its serial number.
    pub serial: String,
    /// Takes chunks as they were.
    pub stage: File,
    /// Frozen set and progress.
    pub staged: File,
}

/// Commands to a VMM about its disks.
#[async_trait]
pub trait DiskControl: Send + Sync {
    /// Puts a disk into the running guest.
    async fn attach(&self, disk: Disk, queues: u16) -> Result<(), LaunchError>;
    /// Asks the guest to let go of a disk, or takes it away with `force`. An event tells when it is gone.
    async fn detach(&self, serial: &str, force: bool) -> Result<(), LaunchError>;
    /// Passes a new connection for a disk that a backend keeps.
    async fn connect(&self, serial: &str, socket: OwnedFd) -> Result<(), LaunchError>;
    /// Makes a disk larger.
    async fn resize(&self, serial: &str, bytes: u64) -> Result<(), LaunchError>;
    /// Makes a disk faster or slower.
    async fn limit(&self, serial: &str, limits: DiskLimits) -> Result<(), LaunchError>;
    /// Fixes the point in time of a snapshot of these disks; the number of frozen chunks of each.
    async fn freeze(&self, disks: Vec<FreezeDisk>) -> Result<Vec<u64>, LaunchError>;
    /// Has chunks copied to the stage.
    async fn stage(&self, serial: &str, chunks: Vec<u64>) -> Result<(), LaunchError>;
    /// Tells that chunks of a layered disk's base have come, where its eventfd is lost.
    async fn chunks_came(&self, serial: &str) -> Result<(), LaunchError>;
    /// Serial numbers of the disks that the VMM has; without those that it is done with.
    async fn serials(&self) -> Result<Vec<String>, LaunchError>;
    /// Ends a freeze.
    async fn thaw(&self, serial: &str, restore_dirty: bool) -> Result<(), LaunchError>;
}

fn disk_key(key: &XtsKey) -> DiskKey {
    let mut disk_key = DiskKey { data: [0; 32], tweak: [0; 32] };
    let material = key.material();
    let (data, tweak) = material.split_at(32);
    disk_key.data.copy_from_slice(data);
    disk_key.tweak.copy_from_slice(tweak);
    disk_key
}

/// Descriptors on their way to a VMM.
#[derive(Debug, Default)]
pub(super) struct Fds(pub Vec<OwnedFd>);

impl Fds {
    pub fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        // A message has room for far fewer.
        u8::try_from(self.0.len() - 1).unwrap_or(FdIndex::MAX)
    }

    /// The disk as the VMM is told of it. Its files are moved: the sender must not keep the map open.
    pub fn disk(&mut self, disk: Disk, queues: u16) -> DiskSpec {
        let backing = match disk.backing {
            Backing::Raw(file) => DiskBacking::Raw { file: self.add(file) },
            Backing::Nbd(nbd) => DiskBacking::Nbd(Box::new(NbdSpec {
                socket: self.add(nbd.socket),
                export: nbd.export,
                limits: nbd.limits,
            })),
            Backing::Layered(layered) => {
                let VolumeFiles { data, map, base, key } = layered.files;
                DiskBacking::Layered(Box::new(LayeredSpec {
                    data: self.add(data),
                    map: self.add(map),
                    base: base.map(|base| BaseSpec {
                        data: self.add(base.data),
                        presence: self.add(base.presence),
                        key: base.key.as_ref().map(disk_key),
                    }),
                    wake: self.add(layered.wake),
                    key: key.as_ref().map(disk_key),
                    generation: layered.generation,
                    limits: layered.limits,
                    direct: true,
                }))
            }
        };
        DiskSpec { serial: disk.serial, backing, read_only: false, queues }
    }
}
