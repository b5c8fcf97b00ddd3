//! `hearth volume …`, `hearth snapshot …` and `hearth storage …`

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use hearth_types::VolumeType;

use super::{FilterFlags, ListFlags, WaitFlags, instance, mapping, types};

const WHICH_VOLUME: &str = "Id, unambiguous beginning of an id, or Name tag";
const WHICH_SNAPSHOT: &str = WHICH_VOLUME;

fn volume_types() -> PossibleValuesParser {
    PossibleValuesParser::new(VolumeType::ALL.map(VolumeType::name))
}

/// Verbs of volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume, blank or with the content of a snapshot
    #[command(after_help = "\
Examples:
  hearth volume create --size 100G --name data
  hearth volume create --size 500G --type gp3 --iops 6000 --throughput 500 --wait
  hearth volume create --snapshot db-nightly --name restored --tag env=test")]
    Create(Box<CreateVolumeArgs>),
    /// Show volumes
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  hearth volume list
  hearth volume list --filter status=available --tag env=test
  hearth volume list --filter attachment.instance-id=i-0123456789abcdef0 -o wide"
    )]
    List {
        /// Only these
        #[arg(value_name = "VOLUME", help = WHICH_VOLUME)]
        volumes: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: ListFlags,
    },
    /// Show everything about one volume
    #[command(visible_alias = "show", after_help = "Example:\n  hearth volume describe data")]
    Describe {
        /// Which
        #[arg(value_name = "VOLUME", help = WHICH_VOLUME)]
        volume: String,
    },
    /// Delete volumes that are not attached; their snapshots stay
    #[command(
        visible_alias = "rm",
        after_help = "Examples:\n  hearth volume delete data --wait\n  hearth volume delete vol-0123 vol-0456 --yes"
    )]
    Delete {
        /// Which
        #[arg(value_name = "VOLUME", required = true, help = WHICH_VOLUME)]
        volumes: Vec<String>,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Give a volume to a running or stopped instance
    #[command(after_help = "\
The device name is a label. In the guest, find the disk by its serial number: /dev/disk/by-id/virtio-vol0123456789abcdef0.

Examples:
  hearth volume attach data web --wait
  hearth volume attach data web --device /dev/sdf --delete-on-termination")]
    Attach {
        /// Which
        #[arg(value_name = "VOLUME", help = WHICH_VOLUME)]
        volume: String,
        /// To which instance
        #[arg(value_name = "INSTANCE", help = instance::WHICH)]
        instance: String,
        /// Its label there [default: the next free of /dev/sdf to /dev/sdp]
        #[arg(long, value_name = "DEVICE", value_parser = mapping::parse_device)]
        device: Option<String>,
        /// Delete the volume when the instance is terminated
        #[arg(long)]
        delete_on_termination: bool,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Take a volume from its instance
    #[command(after_help = "\
Unmount it in the guest first: a guest that holds on to the disk makes the attachment busy. --force takes the disk away \
all the same, and what the guest has not flushed is lost.

Examples:
  hearth volume detach data --wait
  hearth volume detach data --instance web --force")]
    Detach {
        /// Which
        #[arg(value_name = "VOLUME", help = WHICH_VOLUME)]
        volume: String,
        /// Only if it is attached to this instance
        #[arg(long, value_name = "INSTANCE")]
        instance: Option<String>,
        /// Only if it has this label
        #[arg(long, value_name = "DEVICE", value_parser = mapping::parse_device)]
        device: Option<String>,
        /// Do not ask the guest; what it has not flushed is lost
        #[arg(long)]
        force: bool,
        /// Do not ask you
        #[arg(short, long)]
        yes: bool,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Grow a volume or change its type and speed, attached or not
    #[command(after_help = "\
A running guest sees the new size at once; its partition and file system are grown there (growpart, resize2fs).

Examples:
  hearth volume modify data --size 200G --wait
  hearth volume modify data --type gp3 --iops 10000 --throughput 500")]
    Modify(ModifyVolumeArgs),
    /// Show the last modification of volumes
    #[command(after_help = "Examples:\n  hearth volume modifications\n  hearth volume modifications data -o json")]
    Modifications {
        /// Only of these
        #[arg(value_name = "VOLUME", help = WHICH_VOLUME)]
        volumes: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: FilterFlags,
    },
}

/// Flags of `volume create`.
#[derive(Debug, Args)]
pub struct CreateVolumeArgs {
    /// What it begins with and how large it is
    #[command(flatten)]
    pub content: ContentFlags,
    /// Name (the tag Name)
    #[arg(short, long)]
    pub name: Option<String>,
    /// Volume type: kind and limits of speed
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "gp3", value_parser = volume_types())]
    pub volume_type: String,
    /// I/O operations per second, 0 = not limited [default: the type's]
    #[arg(long, value_name = "COUNT")]
    pub iops: Option<u32>,
    /// MiB per second, 0 = not limited [default: the type's]
    #[arg(long, value_name = "MIB")]
    pub throughput: Option<u32>,
    /// Availability zone
    #[arg(long)]
    pub zone: Option<String>,
    /// Encrypt its data at rest
    #[arg(long)]
    pub encrypted: bool,
    /// Volume backend that keeps it, as the operator calls it [default: local, the hosts' own disks]
    #[arg(long, value_name = "NAME")]
    pub backend: Option<String>,
    /// Tag (several times)
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
    pub tags: Vec<types::Tag>,
    /// Makes repeating the same call harmless: at most 64 characters [default: a fresh one per call]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// Check everything, make nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How to wait
    #[command(flatten)]
    pub wait: WaitFlags,
}

/// At least one of both.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct ContentFlags {
    /// Size in whole GiB, e.g. 100G [default: the snapshot's]
    #[arg(short, long, value_name = "SIZE", value_parser = types::parse_volume_size)]
    pub size: Option<u64>,
    /// Begin with the content of this snapshot
    #[arg(long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
}

/// Flags of `volume modify`.
#[derive(Debug, Args)]
pub struct ModifyVolumeArgs {
    /// Which
    #[arg(value_name = "VOLUME", help = WHICH_VOLUME)]
    pub volume: String,
    /// What to change
    #[command(flatten)]
    pub shape: ShapeFlags,
    /// How to wait
    #[command(flatten)]
    pub wait: WaitFlags,
}

/// What a volume is like; what is not given stays.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct ShapeFlags {
    /// New size in whole GiB; volumes only grow
    #[arg(short, long, value_name = "SIZE", value_parser = types::parse_volume_size)]
    pub size: Option<u64>,
    /// Another volume type
    #[arg(short = 't', long = "type", value_name = "TYPE", value_parser = volume_types())]
    pub volume_type: Option<String>,
    /// I/O operations per second, 0 = not limited
    #[arg(long, value_name = "COUNT")]
    pub iops: Option<u32>,
    /// MiB per second, 0 = not limited
    #[arg(long, value_name = "MIB")]
    pub throughput: Option<u32>,
}

/// What is said of new snapshots.
#[derive(Clone, Debug, Args)]
pub struct SnapshotFlags {
    /// Name (the tag Name)
    #[arg(short, long)]
    pub name: Option<String>,
    /// Text for people
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub description: String,
    /// Tag (several times)
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
    pub tags: Vec<types::Tag>,
    /// Makes repeating the same call harmless: at most 64 characters [default: a fresh one per call]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// How to wait
    #[command(flatten)]
    pub wait: WaitFlags,
}

/// Verbs of snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Fix the content of a volume as it is now; only what has changed since the last snapshot is stored
    #[command(after_help = "\
The point in time is fixed when the command ends; the upload goes on in state pending (--wait waits for it).

Examples:
  hearth snapshot create data --name db-nightly --wait
  hearth snapshot create vol-0123456789abcdef0 --description 'before the upgrade' --tag env=prod")]
    Create {
        /// Of which volume
        #[arg(value_name = "VOLUME", help = WHICH_VOLUME)]
        volume: String,
        /// What is said of it
        #[command(flatten)]
        flags: SnapshotFlags,
    },
    /// Fix the content of all volumes of an instance at one instant
    #[command(after_help = "\
Examples:
  hearth snapshot create-all web --name web-nightly --wait
  hearth snapshot create-all web --exclude-root --exclude scratch")]
    CreateAll {
        /// Of which instance
        #[arg(value_name = "INSTANCE", help = instance::WHICH)]
        instance: String,
        /// Not of the root volume
        #[arg(long)]
        exclude_root: bool,
        /// Not of this volume (several times)
        #[arg(long, value_name = "VOLUME")]
        exclude: Vec<String>,
        /// What is said of them
        #[command(flatten)]
        flags: SnapshotFlags,
    },
    /// Show snapshots
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  hearth snapshot list
  hearth snapshot list --filter volume-id=vol-0123456789abcdef0 --filter status=completed"
    )]
    List {
        /// Only these
        #[arg(value_name = "SNAPSHOT", help = WHICH_SNAPSHOT)]
        snapshots: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: ListFlags,
    },
    /// Show everything about one snapshot
    #[command(visible_alias = "show", after_help = "Example:\n  hearth snapshot describe db-nightly")]
    Describe {
        /// Which
        #[arg(value_name = "SNAPSHOT", help = WHICH_SNAPSHOT)]
        snapshot: String,
    },
    /// Delete snapshots, in any order; volumes made from them are not touched
    #[command(
        visible_alias = "rm",
        after_help = "Examples:\n  hearth snapshot delete db-nightly\n  hearth snapshot delete snap-0123 snap-0456 --yes"
    )]
    Delete {
        /// Which
        #[arg(value_name = "SNAPSHOT", required = true, help = WHICH_SNAPSHOT)]
        snapshots: Vec<String>,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Make a copy that stays when the source goes
    #[command(after_help = "Example:\n  hearth snapshot copy db-nightly --name db-golden --wait")]
    Copy {
        /// The source
        #[arg(value_name = "SNAPSHOT", help = WHICH_SNAPSHOT)]
        snapshot: String,
        /// Encrypt the copy, and with it the volumes made from it
        #[arg(long)]
        encrypted: bool,
        /// What is said of the copy
        #[command(flatten)]
        flags: SnapshotFlags,
    },
    /// Have hosts fetch all content of snapshots before it is asked for
    #[command(subcommand)]
    FastRestore(FastRestoreCommand),
}

/// Verbs of fast snapshot restore.
#[derive(Debug, Subcommand)]
pub enum FastRestoreCommand {
    /// Have hosts fetch all content now, so that volumes made from a snapshot never wait for the object store there
    #[command(after_help = "\
Examples:
  hearth snapshot fast-restore enable db-golden --host host-a --wait
  hearth snapshot fast-restore enable db-golden --zone local-1a")]
    Enable {
        /// Which
        #[arg(value_name = "SNAPSHOT", required = true, help = WHICH_SNAPSHOT)]
        snapshots: Vec<String>,
        /// Where
        #[command(flatten)]
        places: FastRestorePlaces,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Leave it to volumes again to fetch what they read; what is there stays
    #[command(after_help = "Example:\n  hearth snapshot fast-restore disable db-golden")]
    Disable {
        /// Which
        #[arg(value_name = "SNAPSHOT", required = true, help = WHICH_SNAPSHOT)]
        snapshots: Vec<String>,
        /// Where, as it was enabled [default: everywhere]
        #[command(flatten)]
        places: FastRestorePlaces,
    },
    /// Show which snapshots hosts have or fetch whole
    #[command(visible_alias = "ls", after_help = "Example:\n  hearth snapshot fast-restore list")]
    List {
        /// Only these
        #[arg(value_name = "SNAPSHOT", help = WHICH_SNAPSHOT)]
        snapshots: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: FilterFlags,
    },
}

/// Hosts by name or zone.
#[derive(Debug, Args)]
pub struct FastRestorePlaces {
    /// On this host (several times); for operators
    #[arg(long = "host", value_name = "HOST")]
    pub hosts: Vec<String>,
    /// On every host of this availability zone, also on those that come later (several times)
    #[arg(long = "zone", value_name = "ZONE")]
    pub zones: Vec<String>,
}

/// Verbs of the object store.
#[derive(Debug, Subcommand)]
pub enum StorageCommand {
    /// Show what the object store holds
    #[command(after_help = "Examples:\n  hearth storage df\n  hearth storage df -o json")]
    Df,
    /// Delete now what no snapshot, image or volume refers to
    #[command(after_help = "\
The control plane does this by itself from time to time.

Example:
  hearth storage gc")]
    Gc,
    /// Read every object of snapshots again and check it
    #[command(after_help = "\
Exit code 1: something is missing or damaged; each such object is a line of the answer.

Examples:
  hearth storage verify
  hearth storage verify db-nightly -o json")]
    Verify {
        /// Only of these
        #[arg(value_name = "SNAPSHOT", help = WHICH_SNAPSHOT)]
        snapshots: Vec<String>,
    },
}
