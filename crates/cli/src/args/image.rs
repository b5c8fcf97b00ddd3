//! `hearth image …`

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::mapping::{self, Mapping};
use super::{FilterFlags, ListFlags, WaitFlags, instance, types};

const WHICH: &str = "Id, unambiguous beginning of an id, or name";

/// Verbs of images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Upload and register a disk image (raw, qcow2, vmdk)
    #[command(after_help = "\
The disk needs no boot loader: hearth finds kernel, initrd and command line in its root file system.

When the connection breaks, the upload goes on by itself. When this command was ended, run it again: what the control plane \
has is not sent again, unless the file was changed. `hearth image deregister` gives an unfinished import up.

Examples:
  hearth image import disk.qcow2 --name debian-12
  hearth image import disk.raw --name test --cmdline 'root=/dev/vda1 ro console=ttyS0'")]
    Import(ImportArgs),
    /// Build an image from a recipe of hearth's images/ folder and register it
    #[command(after_help = "\
Needs root and Debian's package mirror. Recipes are looked for in HEARTH_IMAGES_DIR, ./images, the images/ folder \
beside the program's source tree, and /usr/share/hearth/images.

Examples:
  hearth image build debian-12
  hearth image build tiny --name tiny-test")]
    Build(BuildArgs),
    /// Register an image of a snapshot of a root disk, or of a bundle
    #[command(after_help = "\
The snapshot becomes the root device. --block-device adds further disks; one that names the root device says what else \
is to be so of the root volume.

Instances of a bundle's image have their root disk on their host and cannot be stopped; instance store is added to them \
unless --block-device says otherwise.

Examples:
  hearth image register snap-0123456789abcdef0 --name web-v2
  hearth image register web-root --name db -b device=/dev/sdf,size=100G,type=io2,iops=10000
  hearth image register web-root --name big -b device=/dev/sda1,size=50G
  hearth image register --location debian.manifest.json --name debian-store")]
    Register(Box<RegisterArgs>),
    /// Make an image of an instance: of all its volumes at one instant
    #[command(after_help = "\
A running instance is shut down and started again for it, so that its file systems are whole; --no-reboot leaves it \
running and takes the disks as a crash would leave them.

Examples:
  hearth image create web --name web-v2 --wait
  hearth image create web --name web-v3 --no-reboot -b device=/dev/sdf,none")]
    Create(Box<CreateArgs>),
    /// Make a copy that stays when the source goes
    #[command(after_help = "Example:\n  hearth image copy web-v2 --name web-golden --wait")]
    Copy {
        /// The source
        #[arg(value_name = "IMAGE", help = WHICH)]
        image: String,
        /// Name of the copy, unique in your account
        #[arg(short, long)]
        name: String,
        /// Text for people [default: the source's]
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        description: String,
        /// Encrypt the copy's snapshots, and with them the disks of instances launched from it
        #[arg(long)]
        encrypted: bool,
        /// Tag (several times)
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
        tags: Vec<types::Tag>,
        /// Tag of the snapshots (several times)
        #[arg(long = "snapshot-tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
        snapshot_tags: Vec<types::Tag>,
        /// Makes repeating the same call harmless [default: a fresh one per call]
        #[arg(long, value_name = "TOKEN")]
        client_token: Option<String>,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Save the root disk of an image as a file
    #[command(after_help = "\
Holes of the disk are holes of the file. The file appears when it is complete.

Examples:
  hearth image export debian-12 debian.raw
  hearth image export debian-12 debian.qcow2
  hearth image export debian-12 debian.img --format qcow2 --overwrite")]
    Export(ExportArgs),
    /// Store an image with all its disks as one object, to keep it or take it to another cloud
    #[command(after_help = "\
The object is archive/ACCOUNT/FOLDER/IMAGE.bin in the object store; `hearth image restore` makes an image of it again.

Example:
  hearth image store web-golden --prefix backup --wait")]
    Store {
        /// Which
        #[arg(value_name = "IMAGE", help = WHICH)]
        image: String,
        /// Folder of your archives to put it into
        #[arg(long, value_name = "FOLDER", default_value = "", hide_default_value = true)]
        prefix: String,
        /// Makes repeating the same call harmless [default: a fresh one per call]
        #[arg(long, value_name = "TOKEN")]
        client_token: Option<String>,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Show tasks that store images
    #[command(after_help = "Example:\n  hearth image store-tasks web-golden")]
    StoreTasks {
        /// Only of these: ids, unambiguous beginnings of ids, or names
        #[arg(value_name = "IMAGE")]
        images: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: FilterFlags,
    },
    /// Show tasks that make images of stored ones
    #[command(after_help = "Example:\n  hearth image restore-tasks")]
    RestoreTasks {
        /// Only those that make these: ids, unambiguous beginnings of ids, or names
        #[arg(value_name = "IMAGE")]
        images: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: FilterFlags,
    },
    /// Delete stored images
    #[command(after_help = "Example:\n  hearth image delete-stored backup/ami-0123456789abcdef0.bin --yes")]
    DeleteStored {
        /// The objects, as `hearth image store-tasks` shows them
        #[arg(value_name = "OBJECT", required = true)]
        objects: Vec<String>,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Make an image of a stored one
    #[command(after_help = "\
Examples:
  hearth image restore backup/ami-0123456789abcdef0.bin --name web-restored --wait")]
    Restore {
        /// The object, as `hearth image store-tasks` shows it
        #[arg(value_name = "OBJECT")]
        object: String,
        /// Name of the image, unique in your account [default: the stored one's]
        #[arg(short, long, default_value = "", hide_default_value = true)]
        name: String,
        /// Tag (several times)
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
        tags: Vec<types::Tag>,
        /// Tag of the snapshots (several times)
        #[arg(long = "snapshot-tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
        snapshot_tags: Vec<types::Tag>,
        /// Makes repeating the same call harmless [default: a fresh one per call]
        #[arg(long, value_name = "TOKEN")]
        client_token: Option<String>,
        /// How to wait
        #[command(flatten)]
        wait: WaitFlags,
    },
    /// Show images
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  hearth image list
  hearth image list --filter name='debian-*'"
    )]
    List {
        /// Only these: ids or names
        #[arg(value_name = "IMAGE")]
        images: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: ListFlags,
    },
    /// Show everything about one image
    #[command(visible_alias = "show", after_help = "Example:\n  hearth image describe debian-12")]
    Describe {
        /// Id, unambiguous beginning of an id, or name
        image: String,
    },
    /// No longer offer an image, or give up an unfinished import; instances made from it keep running
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  hearth image deregister debian-12 --yes
  hearth image deregister web-v1 web-v2 --delete-snapshots"
    )]
    Deregister {
        /// Ids, unambiguous beginnings of ids, or names
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
        /// Delete the snapshots of its disks too, unless another image uses them
        #[arg(long)]
        delete_snapshots: bool,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

/// Format of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The bytes of the disk
    Raw,
    /// QEMU
    Qcow2,
    /// VMware, one file
    Vmdk,
}

impl ImageFormat {
    /// The API's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }
}

/// What is registered with an image.
#[derive(Clone, Debug, Args)]
pub struct RegisterFlags {
    /// Text for people
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Tag (several times)
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
    pub tags: Vec<types::Tag>,
    /// Kernel command line instead of the one found in the image
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub cmdline: String,
    /// Added to the kernel command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub extra_cmdline: String,
}

/// [`ImportArgs::reconnect_for`] when nothing is said.
pub const DEFAULT_RECONNECT: Duration = Duration::from_secs(600);

/// Flags of `import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    /// The disk image
    pub file: PathBuf,
    /// Its name, unique in your account [default: the file's name without extension]
    #[arg(short, long)]
    pub name: Option<String>,
    /// Its format [default: told by content]
    #[arg(long, value_enum)]
    pub format: Option<ImageFormat>,
    /// What is registered with it
    #[command(flatten)]
    pub register: RegisterFlags,
    /// Names the import, so that the same call goes on with it [default: made of the file's size and time, and of all flags]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// How long to try again when the connection breaks and nothing gets further [default: 10min]
    #[arg(long, value_name = "TIME", default_value = "10min", hide_default_value = true, value_parser = types::parse_duration)]
    pub reconnect_for: Duration,
}

/// Flags of `build`.
#[derive(Clone, Debug, Args)]
pub struct BuildArgs {
    /// Name of the recipe, e.g. debian-12
    pub recipe: String,
    /// Name of the image [default: the recipe's]
    #[arg(short, long)]
    pub name: Option<String>,
    /// Keep the disk image in this file too
    #[arg(long, value_name = "FILE")]
    pub keep: Option<PathBuf>,
    /// What is registered with it
    #[command(flatten)]
    pub register: RegisterFlags,
    /// Further arguments for the recipe, behind --
    #[arg(last = true, value_name = "ARGUMENT")]
    pub arguments: Vec<String>,
}

/// Flags of `register`.
#[derive(Clone, Debug, Args)]
pub struct RegisterArgs {
    /// Snapshot of the root disk: id, unambiguous beginning of an id, or Name tag
    #[arg(required_unless_present = "location", conflicts_with = "location")]
    pub snapshot: Option<String>,
    /// Manifest of a bundle, as `hearth bundle list` shows it
    #[arg(long)]
    pub location: Option<String>,
    /// Name of the image, unique in your account
    #[arg(short, long)]
    pub name: String,
    /// Device name of the root disk [default: the bundle's, else /dev/sda1]
    #[arg(long, value_name = "DEVICE", value_parser = mapping::parse_device)]
    pub root_device: Option<String>,
    /// Disk of the image's instances (several times); `hearth instance run --help` tells what can be said
    #[arg(short, long = "block-device", value_name = mapping::FORM, value_parser = mapping::parse_mapping)]
    pub block_devices: Vec<Mapping>,
    /// What is registered with it
    #[command(flatten)]
    pub register: RegisterFlags,
    /// Makes repeating the same call harmless [default: a fresh one per call]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
}

/// Flags of `create`.
#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// The instance
    #[arg(help = instance::WHICH)]
    pub instance: String,
    /// Name of the image, unique in your account
    #[arg(short, long)]
    pub name: String,
    /// Text for people
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Leave the instance running; what its guest has not written yet is not in the image
    #[arg(long)]
    pub no_reboot: bool,
    /// Another disk for the image's instances than the instance has, or with `none` no such disk (several times)
    #[arg(short, long = "block-device", value_name = mapping::FORM, value_parser = mapping::parse_mapping)]
    pub block_devices: Vec<Mapping>,
    /// Tag (several times)
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
    pub tags: Vec<types::Tag>,
    /// Tag of the snapshots (several times)
    #[arg(long = "snapshot-tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
    pub snapshot_tags: Vec<types::Tag>,
    /// Makes repeating the same call harmless [default: a fresh one per call]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// How to wait
    #[command(flatten)]
    pub wait: WaitFlags,
}

/// Format of an exported file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// The bytes of the disk, with holes
    Raw,
    /// QEMU
    Qcow2,
}

impl ExportFormat {
    /// The API's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Flags of `export`.
#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    /// The image
    #[arg(help = WHICH)]
    pub image: String,
    /// Where to write the disk
    pub file: PathBuf,
    /// The file's format [default: qcow2 if the file's name ends so, else raw]
    #[arg(long, value_enum)]
    pub format: Option<ExportFormat>,
    /// Replace the file if there is one
    #[arg(long)]
    pub overwrite: bool,
}

impl ExportArgs {
    /// The format that is meant.
    pub fn format(&self) -> ExportFormat {
        let named = self.file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
        self.format.unwrap_or(if named { ExportFormat::Qcow2 } else { ExportFormat::Raw })
    }
}
