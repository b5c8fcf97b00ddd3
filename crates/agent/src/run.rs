//! Putting an agent together and keeping it connected.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_driver::{Backend, DriverError};
use hearth_proto::v1;
use hearth_types::Resources;
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::boot::BootLoader;
use crate::capacity::{Admission, Calibration, capacity, reserved_disk_bytes};
use crate::config::AgentConfig;
use crate::epoch::Epoch;
use crate::error::AgentError;
use crate::hostnet::RealNetwork;
use crate::instance::Host;
use crate::launch::{Cgroups, KvmLauncher, VmmLauncher};
use crate::link::{
    Announcement, Identity, Link, LinkError, Pause, Session, connect, enroll, mutual, renew, renewal_due,
};
use crate::reports::Reports;
use crate::state::Layout;
use crate::storage::{Bases, Fills, HostVolumes, Keyring, NetworkVolumes, RemoteObjects, Snapshots};
use crate::supervisor::Supervisor;

/// A session this long clears the past.
const GOOD_SESSION: Duration = Duration::from_secs(5);
/// Longest sleep before the certificate is looked at again.
const RENEWAL_CHECK: Duration = Duration::from_secs(3600);

/// Runs one agent until `shutdown` is cancelled. Instances keep running then; the next agent with the same state folder
/// adopts them.
///
/// # Errors
/// When the host cannot be an agent at all (see [`AgentError`]); never because of one instance.
pub async fn run(config: AgentConfig, shutdown: CancellationToken) -> Result<(), AgentError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(AgentError::NotRoot);
    }
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    for folder in [&config.state_dir, &config.run_dir, &layout.instances(), &layout.volumes()] {
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(AgentError::file("creating", folder))?;
    }
    let _lock = take_lock(&layout.lock(), &config.state_dir)?;
    let epoch = Arc::new(Epoch::begin(&layout).map_err(AgentError::file("counting up", &layout.epoch()))?);
    let Some(identity) = join(&config, &layout, &shutdown).await? else { return Ok(()) };
    let measured = layout.clone();
    let calibration = tokio::task::spawn_blocking(move || Calibration::get(&measured)).await;
    let calibration = calibration
        .map_err(|error| AgentError::Internal(error.to_string()))?
        .map_err(AgentError::file("writing", &layout.calibration()))?;
    let capacity = capacity(&config, &calibration).map_err(AgentError::file("measuring", &config.state_dir))?;
    tracing::info!(host = %identity.host_id, ?capacity, ecu_milli_per_thread = calibration.ecu_milli_per_thread, "agent starts");

    let cgroups = Cgroups::open(&config.cgroup_mount, &config.cgroup_parent.join(identity.host_id.as_str()))?;
    let launcher = Arc::new(KvmLauncher::new(layout.clone(), cgroups.clone(), &config.vmm_binary, config.uid_base)?);
    let network = Arc::new(RealNetwork::start(&config.network).await?);
    let link = Arc::new(Link::default());
    let boot = BootLoader::new(&layout.kernels()).map_err(AgentError::file("creating", &layout.kernels()))?;
    let objects = match &config.objects {
        Some(objects) => objects.clone(),
        None => Arc::new(RemoteObjects(link.clone())),
    };
    let keyring = Arc::new(Keyring::open(&layout));
    let bases = Arc::new(Bases::new(layout.clone(), objects, keyring, boot_id(), config.background_fill));
    let reserve = reserved_disk_bytes(&config).map_err(AgentError::file("measuring", &config.state_dir))?;
    tokio::spawn(bases.clone().keep_room(reserve));
    let network_volumes = NetworkVolumes::new(layout.clone(), backends(&config)?);
    let names = network_volumes.names();
    let volumes = Arc::new(HostVolumes::new(layout.clone(), bases)?.with_network(network_volumes));
    let reports = Arc::new(Reports::default());
    let snapshots = Snapshots::new(layout.clone(), volumes.clone(), reports.clone());
    let snapshots = Arc::new(snapshots.map_err(AgentError::file("tidying", &layout.stages()))?);
    let fills = Fills::new(volumes.bases().clone(), reports.clone());
    let starts = (calibration.threads as usize).clamp(2, 16);
    let host = Arc::new(Host {
        layout: layout.clone(),
        launcher: launcher.clone(),
        network,
        volumes,
        snapshots,
        fills,
        boot: Arc::new(boot),
        admission: Admission::new(capacity, config.vcpu_overcommit_percent),
        calibration,
        reports,
        starts: Arc::new(Semaphore::new(starts)),
        stop_timeout: config.stop_timeout,
        terminate_timeout: config.terminate_timeout,
        mtu: config.network.mtu,
        #[cfg(test)]
        crash: crate::instance::CrashPoint::default(),
    });
    let supervisor = Supervisor::start(host.clone(), config.uid_count)?;
    let network_volumes = host.volumes.network().clone();
    let left = network_volumes.left_behind(&supervisor.volumes());
    // Not waited for: a storage daemon whose cluster is away ends slowly.
    tokio::spawn(async move {
        for volume in left {
            if let Err(error) = network_volumes.close(&volume).await {
                tracing::warn!(%error, "what serves a volume that no instance has");
            }
        }
    });
    sweep(&cgroups, launcher.as_ref(), &supervisor, &layout).await?;

    tracing::info!(instances = supervisor.instances().len(), "looks for the control plane");
    let mut hello = announcement(&config, &identity, capacity, epoch.agent_epoch());
    hello.volume_backends = names;
    let session = Session { supervisor, host, epoch, announcement: Announcement(hello), link };
    keep_connected(&config, &layout, identity, &session, &shutdown).await;
    Ok(())
}

/// The backends, each under a name of its own.
fn backends(config: &AgentConfig) -> Result<Vec<Backend>, AgentError> {
    let mut made: Vec<Backend> = Vec::new();
    for settings in &config.volume_backends {
        let backend = Backend::new(settings, tokio::runtime::Handle::current()).map_err(AgentError::Backend)?;
        if made.iter().any(|other| other.name() == backend.name()) {
            let why = "there are two of this name".to_owned();
            return Err(AgentError::Backend(DriverError::Settings { backend: backend.name().to_owned(), why }));
        }
        made.push(backend);
    }
    Ok(made)
}

fn take_lock(path: &Path, state: &Path) -> Result<File, AgentError> {
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path).map_err(AgentError::file("opening", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(AgentError::InUse(state.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(AgentError::file("locking", path)(source)),
    }
}

/// The identity on disk, or a new one by the join token, waiting for the control plane as long as it takes. `None` = shut
/// down meanwhile.
async fn join(
    config: &AgentConfig,
    layout: &Layout,
    shutdown: &CancellationToken,
) -> Result<Option<Identity>, AgentError> {
    if let Some(identity) = Identity::load(layout)? {
        return Ok(Some(identity));
    }
    let Some(token) = config.join_token.as_ref().filter(|_| !config.control_endpoints.is_empty()) else {
        return Err(LinkError::NotEnrolled.into());
    };
    let mut pause = Pause::default();
    loop {
        let enrolling = enroll(&config.control_endpoints, token, &config.host_name);
        let result = tokio::select! {
            result = enrolling => result,
            () = shutdown.cancelled() => return Ok(None),
        };
        match result {
            Ok(identity) => {
                identity.save(layout)?;
                tracing::info!(host = %identity.host_id, "this host has joined the cluster");
                return Ok(Some(identity));
            }
            Err(error @ (LinkError::Connect { .. } | LinkError::Call(_))) => {
                tracing::warn!(%error, "joining the cluster; trying again");
                tokio::select! {
                    () = sleep(pause.longer()) => {}
                    () = shutdown.cancelled() => return Ok(None),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn keep_connected(
    config: &AgentConfig,
    layout: &Layout,
    mut identity: Identity,
    session: &Session,
    shutdown: &CancellationToken,
) {
    let endpoints =
        if config.control_endpoints.is_empty() { identity.endpoints.clone() } else { config.control_endpoints.clone() };
    let mut pause = Pause::default();
    while !shutdown.is_cancelled() {
        let begun = Instant::now();
        let once = async {
            let tls = mutual(&identity)?;
            let connection = connect(&endpoints, &tls).await?;
            let mut client = connection.agent();
            let running = session.run(connection);
            tokio::pin!(running);
            loop {
                let due = renewal_due(&identity)?;
                tokio::select! {
                    error = &mut running => return Err(error),
                    () = sleep(due.min(RENEWAL_CHECK)) => {}
                }
                if renewal_due(&identity)?.is_zero() {
                    tokio::select! {
                        error = &mut running => return Err(error),
                        renewed = renew(&mut client, &identity) => return renewed,
                    }
                }
            }
        };
        let result: Result<Identity, LinkError> = tokio::select! {
            result = once => result,
            () = shutdown.cancelled() => return,
        };
        session.link.set(None);
        let saved = result.and_then(|renewed| renewed.save(layout).map(|()| renewed));
        match saved {
            Ok(renewed) => {
                tracing::info!("the host's certificate is renewed");
                identity = renewed;
                continue;
            }
            Err(error) => tracing::warn!(%error, "no session with the control plane; instances go on, trying again"),
        }
        if begun.elapsed() > GOOD_SESSION {
            pause = Pause::default();
        }
        tokio::select! {
            () = sleep(pause.longer()) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Removes cgroups, VMMs and sockets of instances that this host does not have.
async fn sweep(
    cgroups: &Cgroups,
    launcher: &dyn VmmLauncher,
    supervisor: &Supervisor,
    layout: &Layout,
) -> Result<(), AgentError> {
    let mut found = cgroups.instances()?;
    let sockets = std::fs::read_dir(layout.run_root()).map_err(AgentError::file("reading", layout.run_root()))?;
    found.extend(sockets.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()));
    for id in found {
        // One whose record cannot be read keeps its folder, and its VMM if it has one.
        if !supervisor.knows(&id) && !layout.instance(&id).exists() {
            tracing::warn!(instance = %id, "removing what is left of an instance that is not here");
            launcher.clean_up(&id).await?;
        }
    }
    Ok(())
}

/// Id of this boot of the host.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn announcement(config: &AgentConfig, identity: &Identity, capacity: Resources, epoch: u64) -> v1::AgentHello {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    v1::AgentHello {
        host_id: identity.host_id.to_string(),
        host_name: config.host_name.clone(),
        boot_id: boot_id(),
        agent_epoch: epoch,
        highest_term: 0,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_version: read("/proc/sys/kernel/osrelease"),
        capacity: Some(v1::Resources {
            vcpus: capacity.vcpus,
            memory_mib: capacity.memory_mib,
            ecu_milli: capacity.ecu_milli,
            instance_store_bytes: capacity.instance_store_bytes,
        }),
        vcpu_overcommit_percent: config.vcpu_overcommit_percent,
        availability_zone: config.availability_zone.clone(),
        instance_cidr: config.network.instance_cidr.to_string(),
        volume_backends: Vec::new(),
        labels: config.labels.iter().map(|(key, value)| v1::Tag { key: key.clone(), value: value.clone() }).collect(),
    }
}
