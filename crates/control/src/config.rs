//! What an operator tells a control plane.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// TCP port of the control plane when nothing else is said.
pub const DEFAULT_PORT: u16 = 7443;

/// Settings of one control plane. [`ControlConfig::new`] gives the defaults; every field may be changed before
/// [`crate::Control::start`].
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Folder of everything that outlives a restart: the store (`hearth.db`), the CA (`pki/`), snapshots
    /// (`objects/`, unless they are kept elsewhere) and unfinished uploads (`spool/`). Only one control plane uses it at a time.
    pub state_dir: PathBuf,
    /// Where to listen, for users and agents alike. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Further DNS names and IP addresses of this control plane for its certificate; `localhost`, the loopback addresses, the
    /// host's own name and the listening address are always in it.
    pub server_names: Vec<String>,
    /// URL under which clients reach this control plane, for the credentials file; `None` = `https://localhost:<port>`.
    pub public_endpoint: Option<String>,
    /// Name of the region.
    pub region: String,
    /// Unique among the control planes of a region and stable over restarts.
    pub name: String,
    /// Where the first operator's credentials go ([`hearth_types::Credentials`] as JSON, mode 0600); `None` =
    /// `<state_dir>/admin.json`. A missing file is written anew with a new token at the next start.
    pub admin_credentials: Option<PathBuf>,
    /// Operator's own instance types, TOML as in [`hearth_types::Catalogue`].
    pub instance_types: Option<PathBuf>,
    /// How long a host may be without a session before it takes no new instances and its instances' checks fail; also how
    /// long hosts have after a start of the control plane to come back.
    pub host_timeout: Duration,
    /// A session without any message for this long is ended. Agents send heartbeats.
    pub session_timeout: Duration,
    /// How long a terminated instance can still be described.
    pub tombstone_ttl: Duration,
    /// How long the answer for a client token is kept; at least 24 h is promised.
    pub client_token_ttl: Duration,
    /// A running guest that has not responded for this long fails its instance status check.
    pub guest_timeout: Duration,
    /// How long to wait for an agent's answer about a console.
    pub console_timeout: Duration,
    /// Pause between two runs of the reconcilers when nothing kicks them.
    pub resync_interval: Duration,
    /// Pause between two runs of the object store's garbage collector.
    pub collect_interval: Duration,
    /// Lease of the leader.
    pub leader_ttl: Duration,
    /// Largest file that may be uploaded as an image, and largest disk in it, in bytes.
    pub max_image_bytes: u64,
    /// Where snapshots are kept: `file:///folder` or `s3://bucket/prefix`; `None` = `objects/` in the state folder.
    pub object_store: Option<String>,
    /// How to reach it; [`crate::object_store_options`] makes them from the environment.
    pub object_store_options: hearth_snapshot::StoreOptions,
    /// Most volumes that an account may have; 0 = as many as it likes, here and below.
    pub max_volumes_per_account: u32,
    /// Most GiB that its volumes may have together.
    pub max_volume_gib_per_account: u64,
    /// Most snapshots that it may have, those of its images among them.
    pub max_snapshots_per_account: u32,
    /// Most images that it may have.
    pub max_images_per_account: u32,
    /// Most instances that an account may have.
    pub max_instances_per_account: u32,
    /// Imports and exports going on at the same time; uploads that wait for their client are none.
    pub max_concurrent_imports: usize,
    /// Exports of one account among them.
    pub max_transfers_per_account: usize,
    /// An export whose caller takes nothing for this long is given up.
    pub transfer_timeout: Duration,
    /// Tasks that the control plane works on at the same time: bundles of images, images that are stored or restored.
    pub max_concurrent_tasks: usize,
    /// Those of one account among them.
    pub max_tasks_per_account: usize,
    /// How long an upload that broke off is kept for its client to go on with.
    pub upload_ttl: Duration,
}

impl ControlConfig {
    /// Defaults, with everything kept in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT)),
            server_names: Vec::new(),
            public_endpoint: None,
            region: "local-1".to_owned(),
            name: "control".to_owned(),
            admin_credentials: None,
            instance_types: None,
            host_timeout: Duration::from_secs(20),
            session_timeout: Duration::from_secs(30),
            tombstone_ttl: Duration::from_secs(3600),
            client_token_ttl: Duration::from_secs(25 * 3600),
            guest_timeout: Duration::from_secs(600),
            console_timeout: Duration::from_secs(10),
            resync_interval: Duration::from_secs(30),
            collect_interval: Duration::from_secs(3600),
            leader_ttl: Duration::from_secs(10),
            max_image_bytes: 2 << 40,
            object_store: None,
            object_store_options: hearth_snapshot::StoreOptions::default(),
            max_volumes_per_account: 5000,
            max_volume_gib_per_account: 0,
            max_snapshots_per_account: 100_000,
            max_images_per_account: 50_000,
            max_instances_per_account: 1000,
            max_concurrent_imports: 8,
            max_transfers_per_account: 4,
            transfer_timeout: Duration::from_secs(60),
            max_concurrent_tasks: 4,
            max_tasks_per_account: 3,
            upload_ttl: Duration::from_secs(24 * 3600),
        }
    }

    /// Where the first operator's credentials are written.
    pub fn admin_credentials_path(&self) -> PathBuf {
        self.admin_credentials.clone().unwrap_or_else(|| self.state_dir.join("admin.json"))
    }

    /// The store's file.
    pub fn store_path(&self) -> PathBuf {
        self.state_dir.join("hearth.db")
    }

    /// Where snapshots are kept.
    pub fn object_store_url(&self) -> String {
        let local = || {
            let folder = std::path::absolute(self.state_dir.join("objects"));
            format!("file://{}", folder.unwrap_or_else(|_| self.state_dir.join("objects")).display())
        };
        self.object_store.clone().unwrap_or_else(local)
    }

    /// Where uploads are kept until they are converted.
    pub fn spool_dir(&self) -> PathBuf {
        self.state_dir.join("spool")
    }
}
