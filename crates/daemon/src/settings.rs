//! Settings: flags win over the configuration file, which wins over the defaults.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hearth_agent::BackendSettings;
use ipnet::Ipv4Net;
use serde::Deserialize;

use crate::error::DaemonError;

/// Read when it exists and no other file is named.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/hearth/hearthd.toml";

/// The daemon of hearth: EC2's programming model on your own Linux hosts.
#[derive(Debug, Parser)]
#[command(
    name = "hearthd",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Settings may also stand in /etc/hearth/hearthd.toml under the same names (listen = \"0.0.0.0:7443\"); \
                  flags win.\n\nExamples:\n  hearthd up\n  hearthd up --listen 0.0.0.0:7443 --server-name cloud.example.org\n  \
                  hearthd control --state-dir /srv/hearth\n  hearthd agent --control https://10.0.0.1:7443 --join \"$TOKEN\"\n  hearthd backup /backup/hearth.db"
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Control plane and agent in one process: a whole cloud on this host
    ///
    /// The first start makes the certificate authority, the store and the first operator's credentials
    /// (STATE-DIR/admin.json, which `hearth` finds by itself) and joins this host.
    Up {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Only the control plane: API, store, scheduler
    Control {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Only the agent: runs instances on this host for a control plane elsewhere
    ///
    /// Needs --control and --join (from `hearth host token`) until it has joined.
    Agent {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Copy the control plane's store to a file, also while it runs
    ///
    /// The copy is consistent: everything that was acknowledged before, nothing that came half. Keep it with control/pki and
    /// control/images, see docs/operations.md.
    #[command(after_help = "Example:\n  hearthd backup /backup/hearth-$(date +%F).db")]
    Backup(BackupArgs),
    /// Put a backup in the place of the control plane's store, which must not run
    ///
    /// The restored store's counters jump ahead, so that agents obey it although they have seen later ones.
    #[command(
        after_help = "Example:\n  systemctl stop hearthd && hearthd restore --force /backup/hearth-2026-11-23.db"
    )]
    Restore(RestoreArgs),
}

/// Where the store is.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct Place {
    /// Folder of everything that outlives a restart [default: /var/lib/hearth]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Configuration file that names it [default: /etc/hearth/hearthd.toml if it exists]
    #[arg(long, value_name = "FILE", env = "HEARTHD_CONFIG")]
    config: Option<PathBuf>,
}

impl Place {
    /// The settings that tell it.
    pub fn settings(&self) -> Settings {
        Settings { state_dir: self.state_dir.clone(), config: self.config.clone(), ..Settings::default() }
    }
}

/// Flags of `backup`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct BackupArgs {
    /// File to make; it must not exist
    pub file: PathBuf,
    /// Where the store is.
    #[command(flatten)]
    pub place: Place,
}

/// Flags of `restore`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct RestoreArgs {
    /// The backup
    pub file: PathBuf,
    /// Replace a store that is there; its files are kept under another name
    #[arg(long)]
    pub force: bool,
    /// Where the store is.
    #[command(flatten)]
    pub place: Place,
}

/// What this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Up,
    /// Control plane.
    Control,
    /// Agent.
    Agent,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Serve in a role, with these flags.
    Serve(Role, Box<Settings>),
    /// Copy the store.
    Backup(BackupArgs),
    /// Restore the store.
    Restore(RestoreArgs),
}

impl Arguments {
    /// What the command line asks for.
    pub fn task(self) -> Task {
        match self.command {
            Command::Up { settings } => Task::Serve(Role::Up, settings),
            Command::Control { settings } => Task::Serve(Role::Control, settings),
            Command::Agent { settings } => Task::Serve(Role::Agent, settings),
            Command::Backup(args) => Task::Backup(args),
            Command::Restore(args) => Task::Restore(args),
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line, for log collectors.
    Json,
}

/// A span of time as people write it: "90s", "10min", "2h".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text).map(Self).map_err(|error| format!("{error} (write it as 90s, 10min or 2h)"))
    }
}

impl TryFrom<String> for Span {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Network of a host's instances, of a size that one can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct InstanceCidr(pub Ipv4Net);

impl FromStr for InstanceCidr {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let network: Ipv4Net = text.parse().map_err(|_| "is no IPv4 network (write it as 172.30.0.0/20)".to_owned())?;
        hearth_net::check_instance_cidr(network).map_err(|error| error.to_string())?;
        Ok(Self(network))
    }
}

impl TryFrom<String> for InstanceCidr {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

macro_rules! settings {
    ($($(#[$meta:meta])* $name:ident: $kind:ty,)*) => {
        /// Every setting; what is `None` (or empty) was not given.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Args, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
        pub struct Settings {
            /// Configuration file [default: /etc/hearth/hearthd.toml if it exists]
            #[arg(long, value_name = "FILE", env = "HEARTHD_CONFIG")]
            #[serde(skip)]
            pub config: Option<PathBuf>,
            $($(#[$meta])* pub $name: $kind,)*
        }

        impl Settings {
            /// What is missing here is taken from `other`.
            fn or(self, other: Self) -> Self {
                Self { config: self.config, $($name: Given::or(self.$name, other.$name),)* }
            }
        }
    };
}

/// A setting that may be missing.
trait Given {
    fn or(self, other: Self) -> Self;
}

impl<T> Given for Option<T> {
    fn or(self, other: Self) -> Self {
        Option::or(self, other)
    }
}

impl<T> Given for Vec<T> {
    fn or(self, other: Self) -> Self {
        if self.is_empty() { other } else { self }
    }
}

settings! {
    /// Folder of everything that outlives a restart [default: /var/lib/hearth]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Folder of sockets [default: /run/hearth]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// How log lines look, on standard error [default: text]
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
    /// What to log: error, warn, info, debug, trace, or per part: info,hearth_agent=debug [default: info]
    #[arg(long, value_name = "FILTER", env = "HEARTHD_LOG")]
    log: Option<String>,
    /// Name of this host (agent) or control plane [default: the machine's host name]
    #[arg(long)]
    name: Option<String>,

    /// Where the API listens [default: 127.0.0.1:7443 for `up`, 0.0.0.0:7443 for `control`]
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Control plane")]
    listen: Option<SocketAddr>,
    /// Another DNS name or address for the API's certificate (several times)
    #[arg(long = "server-name", value_name = "NAME", help_heading = "Control plane")]
    #[serde(rename = "server-names")]
    server_names: Vec<String>,
    /// URL for clients, written to the credentials file [default: https://localhost:PORT]
    #[arg(long, value_name = "URL", help_heading = "Control plane")]
    public_endpoint: Option<String>,
    /// Name of the region [default: local-1]
    #[arg(long, help_heading = "Control plane")]
    region: Option<String>,
    /// File with instance types of your own (TOML)
    #[arg(long, value_name = "FILE", help_heading = "Control plane")]
    instance_types: Option<PathBuf>,
    /// How long a host may be silent before it counts as impaired [default: 20s]
    #[arg(long, value_name = "TIME", help_heading = "Control plane")]
    host_timeout: Option<Span>,
    /// How long a terminated instance can still be described [default: 1h]
    #[arg(long, value_name = "TIME", help_heading = "Control plane")]
    tombstone_ttl: Option<Span>,
    /// Most instances of one account [default: 1000]
    #[arg(long, value_name = "COUNT", help_heading = "Control plane")]
    max_instances_per_account: Option<u32>,
    /// Most volumes of one account, 0 = any number [default: 5000]
    #[arg(long, value_name = "COUNT", help_heading = "Control plane")]
    max_volumes_per_account: Option<u32>,
    /// Most GiB of all volumes of one account, 0 = any number [default: 0]
    #[arg(long, value_name = "GIB", help_heading = "Control plane")]
    max_volume_gib_per_account: Option<u64>,
    /// Most snapshots of one account, 0 = any number [default: 100000]
    #[arg(long, value_name = "COUNT", help_heading = "Control plane")]
    max_snapshots_per_account: Option<u32>,
    /// Most images of one account, 0 = any number [default: 50000]
    #[arg(long, value_name = "COUNT", help_heading = "Control plane")]
    max_images_per_account: Option<u32>,
    /// Largest image and disk in it, in bytes [default: 2 TiB]
    #[arg(long, value_name = "BYTES", help_heading = "Control plane")]
    max_image_bytes: Option<u64>,
    /// How long an image's upload that broke off is kept to be gone on with [default: 1d]
    #[arg(long, value_name = "TIME", help_heading = "Control plane")]
    upload_ttl: Option<Span>,
    /// Where snapshots and images are kept: file:///FOLDER or s3://BUCKET/PREFIX, which is reached as the variables AWS_* say
    /// [default: control/objects in the state folder]
    #[arg(long, value_name = "URL", help_heading = "Control plane")]
    object_store: Option<String>,

    /// URL of the control plane to join (several times: tried in turn)
    #[arg(long = "control", value_name = "URL", help_heading = "Agent")]
    #[serde(rename = "control")]
    control: Vec<String>,
    /// One-time token to join with; not needed any more once joined
    #[arg(long, value_name = "TOKEN", env = "HEARTH_JOIN_TOKEN", hide_env_values = true, help_heading = "Agent")]
    join: Option<String>,
    /// Availability zone of this host [default: the region's name and "a"]
    #[arg(long, help_heading = "Agent")]
    zone: Option<String>,
    /// Label of this host, KEY=VALUE (several times)
    #[arg(long = "label", value_name = "KEY=VALUE", help_heading = "Agent")]
    #[serde(rename = "labels")]
    labels: Vec<String>,
    /// Bridge that instances are connected to [default: hearth0]
    #[arg(long, value_name = "NAME", help_heading = "Agent")]
    bridge: Option<String>,
    /// Addresses of instances, a network of /8 to /28; the first is the bridge's [default: 172.30.0.0/20]
    #[arg(long, value_name = "CIDR", help_heading = "Agent")]
    instance_cidr: Option<InstanceCidr>,
    /// Whether instances reach other networks through this host's address [default: true]
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true", help_heading = "Agent")]
    nat: Option<bool>,
    /// Name server for instances (several times) [default: this host's own]
    #[arg(long = "dns", value_name = "ADDRESS", help_heading = "Agent")]
    #[serde(rename = "dns")]
    dns: Vec<Ipv4Addr>,
    /// MTU of instance NICs [default: 1500]
    #[arg(long, value_name = "BYTES", help_heading = "Agent")]
    mtu: Option<u16>,
    /// The hearth-vmm program [default: beside hearthd, else /usr/lib/hearth/hearth-vmm]
    #[arg(long, value_name = "FILE", help_heading = "Agent")]
    vmm: Option<PathBuf>,
    /// cgroup under which instances get theirs [default: hearth]
    #[arg(long, value_name = "PATH", help_heading = "Agent")]
    cgroup_parent: Option<PathBuf>,
    /// First of the uids of instances [default: 200000]
    #[arg(long, value_name = "UID", help_heading = "Agent")]
    uid_base: Option<u32>,
    /// How many such uids: the most instances of this host [default: 10000]
    #[arg(long, value_name = "COUNT", help_heading = "Agent")]
    uid_count: Option<u32>,
    /// Memory kept for the host itself [default: one eighth, 256..=4096]
    #[arg(long, value_name = "MIB", help_heading = "Agent")]
    reserved_memory_mib: Option<u64>,
    /// Disk space kept from instance store, and kept free by removing unused copies of snapshots [default: one tenth]
    #[arg(long, value_name = "BYTES", help_heading = "Agent")]
    reserved_disk_bytes: Option<u64>,
    /// Fetch what volumes have not read yet in the background, this fast; 0 = only what is read [default: 0]
    #[arg(long, value_name = "MIB/S", help_heading = "Agent")]
    background_fill_mibps: Option<u32>,
    /// vCPUs offered per 100 host threads [default: 100]
    #[arg(long, value_name = "PERCENT", help_heading = "Agent")]
    vcpu_overcommit_percent: Option<u32>,
    /// Volume backends, tables in the configuration file alone (docs/storage.md).
    #[arg(skip)]
    #[serde(rename = "volume-backend")]
    volume_backends: Vec<BackendSettings>,
    /// How long a guest may take to shut down before it is killed [default: 90s]
    #[arg(long, value_name = "TIME", help_heading = "Agent")]
    stop_timeout: Option<Span>,
    /// The same for a terminated instance [default: 10s]
    #[arg(long, value_name = "TIME", help_heading = "Agent")]
    terminate_timeout: Option<Span>,
}

impl Settings {
    /// Adds what the configuration file says to the flags. A file that was named must exist, `default_file` need not.
    pub fn resolve(flags: Self, default_file: &Path) -> Result<Self, DaemonError> {
        let (path, named) = match &flags.config {
            Some(path) => (path.clone(), true),
            None => (default_file.to_owned(), false),
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => return Ok(flags),
            Err(source) => return Err(DaemonError::ConfigFile { path, source }),
        };
        let file: Self = toml::from_str(&text)
            .map_err(|error| DaemonError::ConfigSyntax { path, reason: error.to_string().trim_end().to_owned() })?;
        Ok(flags.or(file))
    }

    /// The state folder.
    pub fn state_dir(&self) -> &Path {
        self.state_dir.as_deref().unwrap_or(Path::new("/var/lib/hearth"))
    }

    /// Where `up` (only this machine) or `control` (everybody) listens.
    pub fn listen_or(&self, default: IpAddr) -> SocketAddr {
        self.listen.unwrap_or(SocketAddr::new(default, hearth_control::config::DEFAULT_PORT))
    }

    /// The region's name.
    pub fn region(&self) -> &str {
        self.region.as_deref().unwrap_or("local-1")
    }
}

#[cfg(test)]
#[path = "settings_test.rs"]
mod tests;
