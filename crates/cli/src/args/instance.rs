//! `hearth instance …`

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::mapping::{self, DeviceSwitch, Mapping};
use super::{ListFlags, WaitFlags, types};

pub(super) const WHICH: &str = "Id, unambiguous beginning of an id, or Name tag";

/// Verbs of instances.
#[derive(Debug, Subcommand)]
pub enum InstanceCommand {
    /// Launch instances
    #[command(after_help = "\
A block device is written as KEY=VALUE,… with device and any of size, type, iops, throughput, snapshot, \
delete-on-termination, encrypted (an EBS volume); or device and virtual=ephemeral0 (an instance-store disk); or device \
and none (leaves out what the image has there). What is not said is as in the image.

Examples:
  hearth instance run debian-12 --wait
  hearth instance run debian-12 -b device=/dev/sdf,size=100G,type=gp3,iops=6000,throughput=250
  hearth instance run debian-12 -b device=/dev/sdf,snapshot=db-nightly,delete-on-termination=true
  hearth instance run debian-12 --type m5d.large --name db --key-name me --root-size 40G
  hearth instance run ami-0123456789abcdef0 --count 5 --spread --tag env=test -o id
  hearth instance run debian-12 --user-data cloud-config.yaml --wait=ok")]
    Run(Box<RunArgs>),
    /// Show instances
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  hearth instance list
  hearth instance list --filter instance-state-name=running,pending --tag env=test
  hearth instance list -o json"
    )]
    List {
        /// Only these
        #[arg(value_name = "INSTANCE", help = WHICH)]
        instances: Vec<String>,
        /// Terminated ones too
        #[arg(short, long)]
        all: bool,
        /// What to show
        #[command(flatten)]
        list: ListFlags,
    },
    /// Show everything about one instance
    #[command(visible_alias = "show", after_help = "Example:\n  hearth instance describe web")]
    Describe {
        /// Which
        #[arg(value_name = "INSTANCE", help = WHICH)]
        instance: String,
    },
    /// Start stopped instances
    #[command(after_help = "Example:\n  hearth instance start web --wait")]
    Start {
        /// Which
        #[arg(value_name = "INSTANCE", required = true, help = WHICH)]
        instances: Vec<String>,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Shut instances down; their volumes are kept, instance-store disks are not
    #[command(after_help = "Examples:\n  hearth instance stop web --wait\n  hearth instance stop web --force")]
    Stop {
        /// Which
        #[arg(value_name = "INSTANCE", required = true, help = WHICH)]
        instances: Vec<String>,
        /// Pull the plug instead of asking the guest
        #[arg(long)]
        force: bool,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Restart the guest; disks and addresses stay
    #[command(after_help = "Example:\n  hearth instance reboot web")]
    Reboot {
        /// Which
        #[arg(value_name = "INSTANCE", required = true, help = WHICH)]
        instances: Vec<String>,
    },
    /// End instances for good and delete their disks
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  hearth instance terminate web --wait
  hearth instance terminate i-0123 i-0456 --yes"
    )]
    Terminate {
        /// Which
        #[arg(value_name = "INSTANCE", required = true, help = WHICH)]
        instances: Vec<String>,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Change what an instance was launched with
    #[command(after_help = "\
Type and user data can only be changed while the instance is stopped; its next start takes them up.

Examples:
  hearth instance modify web --termination-protection off
  hearth instance modify web --shutdown-behavior terminate
  hearth instance modify web --delete-on-termination /dev/sdf=true
  hearth instance stop web --wait && hearth instance modify web --type m5.large")]
    Modify(ModifyArgs),
    /// Give a running instance another root volume; the guest is restarted for it
    #[command(after_help = "\
Without --snapshot and --image the root volume begins as it did at the launch. Everything else of the instance stays.

Examples:
  hearth instance replace-root web --wait
  hearth instance replace-root web --snapshot web-nightly --delete-replaced
  hearth instance replace-root web --image debian-12 --wait")]
    ReplaceRoot {
        /// Which
        #[arg(value_name = "INSTANCE", help = WHICH)]
        instance: String,
        /// Snapshot that it begins as: id, unambiguous beginning of an id, or Name tag
        #[arg(long, conflicts_with = "image")]
        snapshot: Option<String>,
        /// Image whose root volume it begins as: id, unambiguous beginning of an id, or name
        #[arg(long)]
        image: Option<String>,
        /// Delete the volume that is replaced; it is kept otherwise
        #[arg(long)]
        delete_replaced: bool,
        /// Makes repeating the same call harmless [default: a fresh one per call]
        #[arg(long, value_name = "TOKEN")]
        client_token: Option<String>,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Show tasks that replace root volumes
    #[command(after_help = "Example:\n  hearth instance replace-root-tasks")]
    ReplaceRootTasks {
        /// Only these: ids
        #[arg(value_name = "TASK")]
        tasks: Vec<String>,
    },
    /// Connect to the serial console
    #[command(after_help = "\
On a terminal, Ctrl-] or ~. at the start of a line ends the connection (~~ sends one ~).
With input from a pipe or file, it ends a second after the last output that follows the last input;
--until, --follow and --timeout say otherwise.

Examples:
  hearth instance console web
  printf 'root\\n' | hearth instance console web --until '# ' --timeout 1min")]
    Console(ConsoleArgs),
    /// Print the last output of the serial console (also of stopped instances)
    #[command(after_help = "Example:\n  hearth instance console-output web | tail")]
    ConsoleOutput {
        /// Which
        #[arg(value_name = "INSTANCE", help = WHICH)]
        instance: String,
    },
}

/// What `--wait` of a launch waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WaitFor {
    /// The VMM runs
    Running,
    /// The guest has answered too (status checks passed)
    Ok,
}

/// What a power-off from inside does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GuestShutdown {
    /// Instance becomes stopped
    Stop,
    /// Instance becomes terminated
    Terminate,
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Image: id, unambiguous beginning of an id, or name
    pub image: String,
    /// Instance type, see `hearth instance-type list`
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "t3.micro")]
    pub instance_type: String,
    /// Name (the tag Name); with several instances all get it
    #[arg(short, long)]
    pub name: Option<String>,
    /// How many
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Be content with this many if there is no room for all
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub min_count: Option<u32>,
    /// Key pair whose owner is let in
    #[arg(short, long, value_name = "NAME")]
    pub key_name: Option<String>,
    /// User data for cloud-init, at most 16 KiB (- = standard input)
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Tag (several times)
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
    pub tags: Vec<types::Tag>,
    /// Tag of the volumes that are made for it (several times)
    #[arg(long = "volume-tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
    pub volume_tags: Vec<types::Tag>,
    /// Availability zone
    #[arg(long)]
    pub zone: Option<String>,
    /// Only on this host (id or name; for operators)
    #[arg(long)]
    pub host: Option<String>,
    /// Spread over hosts instead of packing them
    #[arg(long)]
    pub spread: bool,
    /// Never share a host with another instance of this group
    #[arg(long, value_name = "GROUP")]
    pub spread_group: Option<String>,
    /// Number of network interfaces
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=15))]
    pub network_interfaces: u32,
    /// Size of the root volume in whole GiB, at least the image's, e.g. 20G
    #[arg(long, value_name = "SIZE", value_parser = types::parse_volume_size)]
    pub root_size: Option<u64>,
    /// A disk other than the image's, or one more (several times); see below
    #[arg(short, long = "block-device", value_name = mapping::FORM, value_parser = mapping::parse_mapping)]
    pub block_devices: Vec<Mapping>,
    /// What a power-off from inside does [default: stop; terminate for an image with an instance-store root device]
    #[arg(long, value_enum, value_name = "ACTION")]
    pub on_guest_shutdown: Option<GuestShutdown>,
    /// Refuse `terminate` until this is lifted (`modify --termination-protection off`)
    #[arg(long)]
    pub protect: bool,
    /// Makes repeating the same call harmless: at most 64 characters [default: a fresh one per call]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// Check everything, launch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Wait until the instances run, or with =ok until their guests have answered too
    #[arg(
        short,
        long,
        value_enum,
        value_name = "FOR",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "running"
    )]
    pub wait: Option<WaitFor>,
    /// How long to wait at most
    #[arg(long, value_name = "TIME", default_value = "10min", value_parser = types::parse_duration)]
    pub timeout: Duration,
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Set
    On,
    /// Not set
    Off,
}

/// Flags of `modify`.
#[derive(Debug, Args)]
pub struct ModifyArgs {
    /// Which
    #[arg(value_name = "INSTANCE", help = WHICH)]
    pub instance: String,
    /// What to change
    #[command(flatten)]
    pub attributes: AttributeFlags,
}

/// Attributes of an instance; what is not given stays.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct AttributeFlags {
    /// Whether `terminate` is refused
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub termination_protection: Option<Switch>,
    /// What a power-off from inside does: stop or terminate
    #[arg(long, value_enum, value_name = "ACTION", hide_possible_values = true)]
    pub shutdown_behavior: Option<GuestShutdown>,
    /// Another instance type (only while it is stopped)
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    pub instance_type: Option<String>,
    /// Other user data, at most 16 KiB, - = standard input (only while it is stopped)
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Whether the volume at a device is deleted with the instance (several times)
    #[arg(long, value_name = "DEVICE=true|false", value_parser = mapping::parse_device_switch)]
    pub delete_on_termination: Vec<DeviceSwitch>,
}

/// Flags of `console`.
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Which
    #[arg(value_name = "INSTANCE", help = WHICH)]
    pub instance: String,
    /// End with success as soon as the output contains this text
    #[arg(long, value_name = "TEXT")]
    pub until: Option<String>,
    /// Keep on showing output after the input has ended
    #[arg(long)]
    pub follow: bool,
    /// End after this time (with exit code 5)
    #[arg(long, value_name = "TIME", value_parser = types::parse_duration)]
    pub timeout: Option<Duration>,
}
