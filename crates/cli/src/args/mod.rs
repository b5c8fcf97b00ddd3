//! The grammar of the command line: `hearth NOUN VERB`.

pub mod bundle;
pub mod image;
pub mod instance;
pub mod mapping;
pub mod others;
pub mod storage;
pub mod types;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use bundle::BundleCommand;
pub use image::ImageCommand;
pub use instance::InstanceCommand;
pub use others::{
    AccountCommand, CompletionArgs, DoctorArgs, HostCommand, InstanceTypeCommand, KeyPairCommand, TagCommand,
    TokenCommand,
};
pub use storage::{FastRestoreCommand, SnapshotCommand, StorageCommand, VolumeCommand};

const EXAMPLES: &str = "\
Examples:
  hearth image build debian-12                       make and register an image
  hearth instance run debian-12 --name web --wait    launch an instance of it
  hearth instance list                               what runs
  hearth instance console web                        its serial console (Ctrl-] ends)
  hearth instance terminate web --wait               end it

Exit codes: 0 done, 1 error, 2 usage, 3 not found, 4 conflict, limit or no capacity, 5 time-out.
Settings: flags, then HEARTH_* variables, then ~/.config/hearth/config.toml, then the credentials that hearthd wrote.";

/// The command line of hearth: EC2's programming model on your own Linux hosts.
#[derive(Debug, Parser)]
#[command(name = "hearth", version, propagate_version = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Arguments {
    /// Whom to talk to and how to answer.
    #[command(flatten)]
    pub global: Global,
    /// The noun.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Clone, Debug, Default, Args)]
pub struct Global {
    /// URL of the control plane
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "HEARTH_ENDPOINT",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub endpoint: Option<String>,
    /// CA certificate of the control plane (PEM)
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "HEARTH_CA",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub ca: Option<PathBuf>,
    /// Bearer token of your account (better in HEARTH_TOKEN or a file: others see command lines)
    #[arg(
        long,
        global = true,
        value_name = "TOKEN",
        env = "HEARTH_TOKEN",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub token: Option<String>,
    /// Credentials file, as hearthd writes it [default: /var/lib/hearth/admin.json]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "HEARTH_CREDENTIALS",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub credentials: Option<PathBuf>,
    /// Profile of the configuration file [default: default]
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        env = "HEARTH_PROFILE",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub profile: Option<String>,
    /// Configuration file [default: ~/.config/hearth/config.toml]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "HEARTH_CONFIG",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub config: Option<PathBuf>,
    /// How to print the answer: table, wide, json, yaml, id
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t,
        hide_possible_values = true,
        hide_env_values = true,
        value_name = "FORM",
        env = "HEARTH_OUTPUT",
        help_heading = "Global options"
    )]
    pub output: OutputForm,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OutputForm {
    /// A table for people
    #[default]
    Table,
    /// The same with more columns
    Wide,
    /// JSON, everything there is
    Json,
    /// YAML, everything there is
    Yaml,
    /// Only ids, one a line
    Id,
}

/// Nouns.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// AMIs: disk images that instances start from
    #[command(subcommand, visible_alias = "images")]
    Image(ImageCommand),
    /// Disks packed for instance-store-backed images
    #[command(subcommand, visible_alias = "bundles")]
    Bundle(BundleCommand),
    /// Virtual machines
    #[command(subcommand, visible_alias = "instances")]
    Instance(InstanceCommand),
    /// EBS volumes: disks that live on without instances
    #[command(subcommand, visible_alias = "volumes")]
    Volume(VolumeCommand),
    /// Copies of volumes at one point in time
    #[command(subcommand, visible_alias = "snapshots")]
    Snapshot(SnapshotCommand),
    /// Sizes of instances
    #[command(subcommand, visible_alias = "instance-types")]
    InstanceType(InstanceTypeCommand),
    /// Machines that run instances (for operators)
    #[command(subcommand, visible_alias = "hosts")]
    Host(HostCommand),
    /// The object store that holds snapshots (for operators)
    #[command(subcommand)]
    Storage(StorageCommand),
    /// SSH public keys that instances let in
    #[command(subcommand, visible_alias = "key-pairs")]
    KeyPair(KeyPairCommand),
    /// Labels on resources
    #[command(subcommand, visible_alias = "tags")]
    Tag(TagCommand),
    /// Accounts and who you are
    #[command(subcommand, visible_alias = "accounts")]
    Account(AccountCommand),
    /// Bearer tokens of an account
    #[command(subcommand, visible_alias = "tokens")]
    Token(TokenCommand),
    /// Check whether this machine can run instances, and tell what is missing
    Doctor(DoctorArgs),
    /// Print a completion script for your shell
    Completion(CompletionArgs),
}

/// Flags of every list command.
#[derive(Clone, Debug, Default, Args)]
pub struct ListFlags {
    /// Only what matches: NAME=VALUE[,VALUE...]; * and ? are wildcards; several filters must all match
    #[arg(short, long = "filter", value_name = "NAME=VALUE", value_parser = types::parse_filter)]
    pub filters: Vec<types::Filter>,
    /// Only what has this tag: KEY=VALUE, or KEY for any value
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = types::parse_tag_filter)]
    pub tags: Vec<types::Filter>,
}

/// Flags of lists of what has no tags.
#[derive(Clone, Debug, Default, Args)]
pub struct FilterFlags {
    /// Only what matches: NAME=VALUE[,VALUE...]; * and ? are wildcards; several filters must all match
    #[arg(short, long = "filter", value_name = "NAME=VALUE", value_parser = types::parse_filter)]
    pub filters: Vec<types::Filter>,
}

/// Flags of commands whose effect takes time.
#[derive(Clone, Copy, Debug, Args)]
pub struct WaitFlags {
    /// Wait until it is done
    #[arg(short, long)]
    pub wait: bool,
    /// How long to wait at most
    #[arg(long, value_name = "TIME", default_value = "10min", value_parser = types::parse_duration)]
    pub timeout: std::time::Duration,
}
