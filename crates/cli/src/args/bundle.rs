//! `hearth bundle …`

use clap::{Args, Subcommand};

use super::{FilterFlags, WaitFlags};

/// Verbs of bundles.
#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Pack the root disk of an image or of an instance-store-backed instance
    #[command(after_help = "\
A bundle is a manifest and parts in the object store. `hearth image register --location` makes an image of it; \
its instances have their root disk on their host, made of the bundle at the launch, and lose it when they end.

Examples:
  hearth bundle create --image debian-12 debian --wait
  hearth bundle create --instance web web-2026-11 --prefix nightly
  hearth image register --location debian.manifest.json --name debian-store")]
    Create(CreateArgs),
    /// Show bundle tasks
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n  hearth bundle list\n  hearth bundle list --filter state=storing,pending"
    )]
    List {
        /// Only these: ids
        #[arg(value_name = "BUNDLE")]
        bundles: Vec<String>,
        /// What to show
        #[command(flatten)]
        list: FilterFlags,
    },
    /// Show everything about one bundle task
    #[command(visible_alias = "show", after_help = "Example:\n  hearth bundle describe bun-0123456789abcdef0")]
    Describe {
        /// Id
        bundle: String,
    },
    /// Delete bundles
    #[command(
        visible_alias = "rm",
        after_help = "\
Refused while an image is registered with it.

Example:
  hearth bundle delete nightly/web-2026-11.manifest.json --yes"
    )]
    Delete {
        /// Their manifests, as `hearth bundle list` shows them
        #[arg(value_name = "LOCATION", required = true)]
        locations: Vec<String>,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Call off bundle tasks; what they have stored is removed
    #[command(after_help = "Example:\n  hearth bundle cancel bun-0123456789abcdef0")]
    Cancel {
        /// Ids
        #[arg(value_name = "BUNDLE", required = true)]
        bundles: Vec<String>,
    },
}

/// Flags of `create`.
#[derive(Clone, Debug, Args)]
#[group(id = "source", required = true, multiple = false, args = ["image", "instance"])]
pub struct CreateArgs {
    /// Name of the bundle: letters, digits, '-' and '_'
    pub name: String,
    /// Image with an EBS root volume: id, unambiguous beginning of an id, or name
    #[arg(long)]
    pub image: Option<String>,
    /// Running instance with an instance-store root disk: id, unambiguous beginning of an id, or Name tag
    #[arg(long)]
    pub instance: Option<String>,
    /// Folder of your bundles to put it into
    #[arg(long, value_name = "FOLDER", default_value = "", hide_default_value = true)]
    pub prefix: String,
    /// Makes repeating the same call harmless [default: a fresh one per call]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// How to wait
    #[command(flatten)]
    pub wait: WaitFlags,
}
