//! The other nouns.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::Shell;

use super::{ListFlags, types};

/// Verbs of images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Upload and register a disk image (raw, qcow2, vmdk)
    #[command(after_help = "\
The disk needs no boot loader: hearth finds kernel, initrd and command line in its root file system.

Examples:
  hearth image import disk.qcow2 --name debian-12
  hearth image import disk.raw --name test --tag env=test --cmdline 'root=/dev/vda1 ro console=ttyS0'")]
    Import(ImportArgs),
    /// Build an image from a recipe of hearth's images/ folder and register it
    #[command(after_help = "\
Needs root and Debian's package mirror. Recipes are looked for in HEARTH_IMAGES_DIR, ./images, the images/ folder
beside the program's source tree, and /usr/share/hearth/images.

Examples:
  hearth image build debian-12
  hearth image build tiny --name tiny-test")]
    Build(BuildArgs),
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
    /// No longer offer an image; instances made from it keep running
    #[command(visible_alias = "rm", after_help = "Example:\n  hearth image deregister debian-12 --yes")]
    Deregister {
        /// Ids, unambiguous beginnings of ids, or names
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
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
    /// Makes repeating the same call harmless [default: a fresh one per call]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
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

/// Verbs of instance types.
#[derive(Debug, Subcommand)]
pub enum InstanceTypeCommand {
    /// Show instance types
    #[command(visible_alias = "ls", after_help = "Example:\n  hearth instance-type list --filter instance-type='t3.*'")]
    List {
        /// Only these
        #[arg(value_name = "TYPE")]
        names: Vec<String>,
        /// Only what matches: NAME=VALUE[,VALUE...]
        #[arg(short, long = "filter", value_name = "NAME=VALUE", value_parser = types::parse_filter)]
        filters: Vec<types::Filter>,
    },
}

/// Verbs of hosts.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Show hosts
    #[command(visible_alias = "ls", after_help = "Example:\n  hearth host list -o wide")]
    List {
        /// Only these: ids or names
        #[arg(value_name = "HOST")]
        hosts: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: ListFlags,
    },
    /// Show everything about one host
    #[command(visible_alias = "show", after_help = "Example:\n  hearth host describe attic")]
    Describe {
        /// Id or name
        host: String,
    },
    /// Place no more instances on a host; what runs there goes on
    #[command(after_help = "Example:\n  hearth host drain attic")]
    Drain {
        /// Id or name
        host: String,
    },
    /// Place instances on a drained host again
    #[command(after_help = "Example:\n  hearth host activate attic")]
    Activate {
        /// Id or name
        host: String,
    },
    /// Forget a host; its certificate is refused from then on
    #[command(
        visible_alias = "rm",
        after_help = "\
Only a host without instances is removed, unless --force says that it is lost for good: then its instances are terminated.

Examples:
  hearth host remove attic
  hearth host remove attic --force --yes"
    )]
    Remove {
        /// Id or name
        host: String,
        /// Even if instances are placed there
        #[arg(long)]
        force: bool,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Make a one-time token with which one more host can join
    #[command(after_help = "\
Examples:
  hearth host token
  hearth host token --ttl 1h -o id      only the token, for scripts")]
    Token {
        /// How long it is valid, at most 24h
        #[arg(long, value_name = "TIME", default_value = "15min", value_parser = types::parse_duration)]
        ttl: Duration,
    },
}

/// Verbs of key pairs.
#[derive(Debug, Subcommand)]
pub enum KeyPairCommand {
    /// Make an Ed25519 key pair; the private key is shown or saved once and kept nowhere
    #[command(after_help = "\
Examples:
  hearth key-pair create me --save ~/.ssh/hearth_me
  hearth key-pair create me > me.pem")]
    Create {
        /// Name, unique in your account
        name: String,
        /// Write the private key to this new file (readable by you only)
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
        /// Tag (several times)
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
        tags: Vec<types::Tag>,
    },
    /// Register the public key that you have
    #[command(after_help = "Example:\n  hearth key-pair import me ~/.ssh/id_ed25519.pub")]
    Import {
        /// Name, unique in your account
        name: String,
        /// OpenSSH public key (- = standard input)
        file: PathBuf,
        /// Tag (several times)
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag)]
        tags: Vec<types::Tag>,
    },
    /// Show key pairs
    #[command(visible_alias = "ls", after_help = "Example:\n  hearth key-pair list")]
    List {
        /// Only these
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: ListFlags,
    },
    /// Delete a key pair; instances that have the key keep it
    #[command(visible_alias = "rm", after_help = "Example:\n  hearth key-pair delete me")]
    Delete {
        /// Name or id
        #[arg(value_name = "NAME")]
        key_pair: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

/// Verbs of tags.
#[derive(Debug, Subcommand)]
pub enum TagCommand {
    /// Put tags on resources; a tag that is there gets the new value
    #[command(after_help = "Example:\n  hearth tag create i-0123456789abcdef0 --tag env=prod --tag owner=me")]
    Create {
        /// Ids of resources
        #[arg(value_name = "RESOURCE-ID", required = true)]
        resources: Vec<String>,
        /// Tag (several times)
        #[arg(long = "tag", value_name = "KEY=VALUE", required = true, value_parser = types::parse_tag)]
        tags: Vec<types::Tag>,
    },
    /// Take tags off resources
    #[command(visible_alias = "rm", after_help = "Example:\n  hearth tag delete i-0123456789abcdef0 --tag env")]
    Delete {
        /// Ids of resources
        #[arg(value_name = "RESOURCE-ID", required = true)]
        resources: Vec<String>,
        /// Tag; with a value only if it has that value (several times)
        #[arg(long = "tag", value_name = "KEY[=VALUE]", required = true, value_parser = types::parse_tag_or_key)]
        tags: Vec<types::Tag>,
    },
    /// Show tags
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  hearth tag list
  hearth tag list --filter resource-type=instance --filter key=env"
    )]
    List {
        /// Only what matches: NAME=VALUE[,VALUE...]
        #[arg(short, long = "filter", value_name = "NAME=VALUE", value_parser = types::parse_filter)]
        filters: Vec<types::Filter>,
    },
}

/// Verbs of accounts.
#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Show who you are
    #[command(after_help = "Example:\n  hearth account whoami")]
    Whoami,
    /// Make an account; its token is shown once (for operators)
    #[command(after_help = "\
Examples:
  hearth account create ci
  hearth account create ci --save ci.json       then: hearth --credentials ci.json …")]
    Create {
        /// Name
        name: String,
        /// May manage hosts and accounts
        #[arg(long)]
        operator: bool,
        /// Write a credentials file (readable by you only)
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
    },
    /// Show accounts (for operators)
    #[command(visible_alias = "ls", after_help = "Example:\n  hearth account list")]
    List,
}

/// Verbs of tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make another token; it is shown once
    #[command(after_help = "\
Examples:
  hearth token create --description laptop
  hearth token create --save laptop.json        then: hearth --credentials laptop.json …")]
    Create {
        /// What it is for
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        description: String,
        /// Of this account instead of your own (for operators)
        #[arg(long, value_name = "ACCOUNT")]
        account: Option<String>,
        /// Write a credentials file (readable by you only)
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
    },
    /// Show tokens, without their secrets
    #[command(visible_alias = "ls", after_help = "Example:\n  hearth token list")]
    List {
        /// Of this account instead of your own (for operators)
        #[arg(long, value_name = "ACCOUNT")]
        account: Option<String>,
    },
    /// Refuse tokens from now on
    #[command(visible_alias = "rm", after_help = "Example:\n  hearth token revoke tok-0123456789abcdef0")]
    Revoke {
        /// Ids, see `list`
        #[arg(value_name = "TOKEN-ID", required = true)]
        tokens: Vec<String>,
    },
}

/// Flags of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code 0: this machine can run instances directly. 1: something is missing (see below each line how to mend it).

Examples:
  hearth doctor
  hearth doctor -o json")]
pub struct DoctorArgs {
    /// State folder to check for space and reflinks
    #[arg(long, value_name = "DIR", default_value = "/var/lib/hearth")]
    pub state_dir: PathBuf,
    /// The hearth-vmm program that runs the probe guest [default: beside hearth, else /usr/lib/hearth/hearth-vmm]
    #[arg(long, value_name = "FILE", env = "HEARTH_VMM")]
    pub vmm: Option<PathBuf>,
}

/// Flags of `completion`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hearth completion bash > /etc/bash_completion.d/hearth
  hearth completion zsh > ~/.zfunc/_hearth")]
pub struct CompletionArgs {
    /// Your shell
    #[arg(value_enum)]
    pub shell: Shell,
}
