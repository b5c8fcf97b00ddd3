//! Names of files and folders.

use std::path::{Path, PathBuf};

use hearth_types::{InstanceId, VolumeId};

/// Where everything is.
///
/// ```text
/// STATE/lock                        held while an agent runs
/// STATE/identity.json               host id, key, certificates, endpoints
/// STATE/epoch.json                  starts of the agent, highest term
/// STATE/calibration.json            measured ECUs
/// STATE/instances/ID/instance.json  what is wanted and how far it is
/// STATE/instances/ID/ephemeralN.raw instance-store disks
/// STATE/instances/ID/console.ring   last console output
/// STATE/instances/ID/vmm.lock       held by the VMM; its exit code
/// STATE/instances/ID/vmm.log        what the VMM says
/// STATE/instances/.gone-ID          being deleted
/// STATE/volumes/ID/...              EBS volumes, see `storage::volumes`
/// STATE/bases/ROOT/...              content of snapshots that volumes here are made from, see `storage::base`
/// STATE/stages/ID                   chunks as they were when a snapshot was taken
/// STATE/kernels/SHA256/vmlinux      unpacked kernel
/// RUN/ID/control.sock               the VMM's control socket
/// RUN/ID/console.sock               the VMM's console
/// RUN/.staged                       which chunks are in the stages
/// RUN/.keys                         keys of volumes and snapshots
/// RUN/.network/ID/...               what serves a volume of a backend, see `storage::network`
/// RUN/jail                          mount point of the VMMs' empty root
/// ```
#[derive(Clone, Debug)]
pub struct Layout {
    state: PathBuf,
    run: PathBuf,
}

impl Layout {
    /// The layout below these two folders.
    pub fn new(state: &Path, run: &Path) -> Self {
        Self { state: state.to_owned(), run: run.to_owned() }
    }

    /// Held by the running agent.
    pub fn lock(&self) -> PathBuf {
        self.state.join("lock")
    }

    /// Who this host is.
    pub fn identity(&self) -> PathBuf {
        self.state.join("identity.json")
    }

    /// Counters that only grow.
    pub fn epoch(&self) -> PathBuf {
        self.state.join("epoch.json")
    }

    /// Measured speed.
    pub fn calibration(&self) -> PathBuf {
        self.state.join("calibration.json")
    }

    /// Folder of all instances.
    pub fn instances(&self) -> PathBuf {
        self.state.join("instances")
    }

    /// Folder of one instance.
    pub fn instance(&self, id: &InstanceId) -> PathBuf {
        self.instances().join(id.as_str())
    }

    /// Where an instance's folder goes before it is deleted.
    pub fn gone(&self, id: &InstanceId) -> PathBuf {
        self.instances().join(format!(".gone-{id}"))
    }

    /// Whether a name in [`Self::instances`] is one that [`Self::gone`] makes.
    pub fn is_gone_name(name: &str) -> bool {
        name.starts_with(".gone-")
    }

    /// An instance's record.
    pub fn record(&self, id: &InstanceId) -> PathBuf {
        self.instance(id).join("instance.json")
    }

    /// Folder of a root disk that was made from a bundle.
    pub fn bundle_root(&self, id: &InstanceId) -> PathBuf {
        self.instance(id).join("root")
    }

    /// An instance-store disk, by its position.
    pub fn ephemeral_disk(&self, id: &InstanceId, index: usize) -> PathBuf {
        self.instance(id).join(format!("ephemeral{index}.raw"))
    }

    /// Last console output.
    pub fn console_ring(&self, id: &InstanceId) -> PathBuf {
        self.instance(id).join("console.ring")
    }

    /// Held by the instance's VMM.
    pub fn vmm_lock(&self, id: &InstanceId) -> PathBuf {
        self.instance(id).join("vmm.lock")
    }

    /// The VMM's messages.
    pub fn vmm_log(&self, id: &InstanceId) -> PathBuf {
        self.instance(id).join("vmm.log")
    }

    /// Folder of all volumes.
    pub fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// Folder of one volume.
    pub fn volume(&self, id: &VolumeId) -> PathBuf {
        self.volumes().join(id.as_str())
    }

    /// Folder of chunks as they were when a snapshot was taken.
    pub fn stages(&self) -> PathBuf {
        self.state.join("stages")
    }

    /// Folder of what is known of them; gone with the boot of the host.
    pub fn staged(&self) -> PathBuf {
        self.run.join(".staged")
    }

    /// Keys; gone with the boot of the host.
    pub fn keyring(&self) -> PathBuf {
        self.run.join(".keys")
    }

    /// Folder of what serves volumes of backends; gone with the boot of the host.
    pub fn network(&self) -> PathBuf {
        self.run.join(".network")
    }

    /// The same of one volume.
    pub fn network_volume(&self, id: &VolumeId) -> PathBuf {
        self.network().join(id.as_str())
    }

    /// Folder of all bases.
    pub fn bases(&self) -> PathBuf {
        self.state.join("bases")
    }

    /// Folder of the base with this root hash.
    pub fn base(&self, root: &str) -> PathBuf {
        self.bases().join(root)
    }

    /// Folder of unpacked kernels.
    pub fn kernels(&self) -> PathBuf {
        self.state.join("kernels")
    }

    /// Folder of all sockets.
    pub fn run_root(&self) -> &Path {
        &self.run
    }

    /// Folder of the state itself.
    pub fn state_root(&self) -> &Path {
        &self.state
    }

    /// Folder of one instance's sockets.
    pub fn run(&self, id: &InstanceId) -> PathBuf {
        self.run.join(id.as_str())
    }

    /// Control socket.
    pub fn control_socket(&self, id: &InstanceId) -> PathBuf {
        self.run(id).join("control.sock")
    }

    /// Console socket.
    pub fn console_socket(&self, id: &InstanceId) -> PathBuf {
        self.run(id).join("console.sock")
    }

    /// Mount point for the VMMs' root, always empty.
    pub fn jail(&self) -> PathBuf {
        self.run.join("jail")
    }
}
