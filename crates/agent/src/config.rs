//! What an operator tells an agent.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hearth_types::JoinToken;
use ipnet::Ipv4Net;

/// Settings of one agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Folder of everything that outlives a restart: identity, instances and their disks, images. Only one agent uses it at
    /// a time. Its file system needs sparse files.
    pub state_dir: PathBuf,
    /// Folder of sockets; emptied by a reboot of the host. Two agents on one host need different ones.
    pub run_dir: PathBuf,
    /// Where the control plane listens, `https://HOST:PORT`, tried in turn. Needed to enrol; empty afterwards = those that the
    /// agent enrolled with.
    pub control_endpoints: Vec<String>,
    /// How to enrol when the state folder has no identity yet; ignored afterwards.
    pub join_token: Option<JoinToken>,
    /// Name shown to operators; the host's own name by default.
    pub host_name: String,
    /// Availability zone to report.
    pub availability_zone: String,
    /// Labels to report; placement can ask for them.
    pub labels: BTreeMap<String, String>,
    /// The `hearth-vmm` program. It must be linked statically to run in an empty root; otherwise the jail gets the host's
    /// shared libraries, read-only.
    pub vmm_binary: PathBuf,
    /// A way of its own to the object store with the snapshots; `None` = through the control plane.
    pub objects: Option<Arc<dyn hearth_snapshot::ObjectStore>>,
    /// Under which cgroup (v2) instances get theirs, relative to the cgroup mount, e.g. `hearth`. The agent adds its host id.
    pub cgroup_parent: PathBuf,
    /// Where cgroup v2 is mounted.
    pub cgroup_mount: PathBuf,
    /// First of the uids (and equal gids) that VMM processes run under; one per instance.
    pub uid_base: u32,
    /// How many such uids there are: the most instances this host can hold.
    pub uid_count: u32,
    /// Memory kept for the host itself, in MiB; `None` = one eighth, at least 256 and at most 4096.
    pub reserved_memory_mib: Option<u64>,
    /// vCPUs offered per host thread, times 100.
    pub vcpu_overcommit_percent: u32,
    /// Bytes of the state folder's file system kept from instance-store disks, and kept free by removing what was fetched of
    /// snapshots that no volume here is made from; `None` = one tenth of it.
    pub reserved_disk_bytes: Option<u64>,
    /// Bytes per second at which bases are filled with what no volume has read yet; 0 = they are not.
    pub background_fill: u64,
    /// How long a guest may take to shut down after the power button before it is killed.
    pub stop_timeout: Duration,
    /// The same for a terminated instance, whose disks are deleted anyway.
    pub terminate_timeout: Duration,
    /// Volume backends that this host can reach.
    pub volume_backends: Vec<hearth_driver::BackendSettings>,
    /// The network of the host's instances.
    pub network: NetworkConfig,
}

/// The network of the host's instances.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Name of the bridge; two agents in one network namespace need different ones.
    pub bridge: String,
    /// Addresses of instances; the first one is the bridge's and the instances' gateway.
    pub instance_cidr: Ipv4Net,
    /// Masquerade what leaves the host.
    pub nat: bool,
    /// Name servers handed to instances; empty = this host's own.
    pub dns: Vec<Ipv4Addr>,
    /// MTU of instance NICs, in bytes.
    pub mtu: u16,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/hearth/agent"),
            run_dir: PathBuf::from("/run/hearth"),
            control_endpoints: Vec::new(),
            join_token: None,
            host_name: own_host_name(),
            availability_zone: "local-1a".to_owned(),
            labels: BTreeMap::new(),
            vmm_binary: default_vmm_binary(),
            objects: None,
            cgroup_parent: PathBuf::from("hearth"),
            cgroup_mount: PathBuf::from("/sys/fs/cgroup"),
            uid_base: 200_000,
            uid_count: 10_000,
            reserved_memory_mib: None,
            vcpu_overcommit_percent: 100,
            reserved_disk_bytes: None,
            background_fill: 0,
            stop_timeout: Duration::from_secs(90),
            terminate_timeout: Duration::from_secs(10),
            volume_backends: Vec::new(),
            network: NetworkConfig::default(),
        }
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            bridge: "hearth0".to_owned(),
            instance_cidr: Ipv4Net::new_assert(Ipv4Addr::new(172, 30, 0, 0), 20),
            nat: true,
            dns: Vec::new(),
            mtu: 1500,
        }
    }
}

fn own_host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

/// `hearth-vmm` beside the running program, else where packages put it.
fn default_vmm_binary() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|program| program.parent().map(|folder| folder.join("hearth-vmm")))
        .filter(|path| path.exists())
        .unwrap_or_else(|| Path::new("/usr/lib/hearth/hearth-vmm").to_owned())
}
