//! What can go wrong, with what an operator can do about it.

use std::io;

use thiserror::Error;

/// Errors of this crate.
#[derive(Debug, Error)]
pub enum NetError {
    /// Settings that cannot work.
    #[error("{0}")]
    Config(String),
    /// The kernel refused a link or address change.
    #[error("cannot {action}: {source}")]
    Netlink {
        /// What was tried, on which link.
        action: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: String,
        /// errno.
        source: io::Error,
    },
    /// nft refused the rules.
    #[error(
        "nft refused the rules of '{table}': {message} (is nf_tables with its nat and bridge families available? `hearth doctor` tells)"
    )]
    Nft {
        /// Name of the table.
        table: String,
        /// nft's own words.
        message: String,
    },
    /// The link is there already and is something else.
    #[error("'{name}' exists but is not a bridge: choose another name with --bridge")]
    NotABridge {
        /// The link.
        name: String,
    },
}

impl NetError {
    pub(crate) fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::System { action, source }
    }
}
