//! The other nouns.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use clap_complete::Shell;

use super::{ListFlags, types};

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
    /// State folder to check for space
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
