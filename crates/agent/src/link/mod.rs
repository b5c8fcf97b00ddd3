//! The way to the control plane: identity, TLS, the session.

mod connect;
mod console;
mod enroll;
mod identity;
mod pause;
mod session;

use parking_lot::Mutex;
use thiserror::Error;

pub use connect::{Client, Connection, ObjectClient, connect, mutual};
pub use enroll::{enroll, renew, renewal_due};
pub use identity::Identity;
pub use pause::Pause;
pub use session::{Announcement, Session};

/// Why the control plane cannot be talked to.
#[derive(Debug, Error)]
pub enum LinkError {
    /// No endpoint answers.
    #[error("{endpoint}: {reason}")]
    Connect {
        /// Which URL.
        endpoint: String,
        /// What happened.
        reason: String,
    },
    /// It refused; trying again does not help.
    #[error("the control plane refuses: {0}")]
    Refused(String),
    /// A call failed; it may work later.
    #[error("the control plane fails: {0}")]
    Call(String),
    /// The session ended.
    #[error("the session has ended: {0}")]
    Ended(String),
    /// Keys and certificates.
    #[error("{action}: {reason}")]
    Crypto {
        /// What was tried.
        action: &'static str,
        /// What happened.
        reason: String,
    },
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which one.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is nothing to enrol with.
    #[error("this host has not joined a cluster: give a join token (`hearth host token`) and the control plane's URL")]
    NotEnrolled,
}

impl LinkError {
    pub(crate) fn crypto<E: std::fmt::Display>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Crypto { action, reason: error.to_string() }
    }

    pub(crate) fn status(status: &tonic::Status) -> Self {
        use tonic::Code;
        let text = status.message().to_owned();
        match status.code() {
            Code::InvalidArgument
            | Code::Unauthenticated
            | Code::PermissionDenied
            | Code::NotFound
            | Code::Unimplemented
            | Code::AlreadyExists => Self::Refused(text),
            code => Self::Call(if text.is_empty() { code.description().to_owned() } else { text }),
        }
    }
}

/// The connection that is up now, for calls beside the session.
#[derive(Default)]
pub struct Link {
    connection: Mutex<Option<Connection>>,
}

impl Link {
    /// The agent service over the present connection.
    pub fn client(&self) -> Option<Client> {
        self.connection.lock().as_ref().map(Connection::agent)
    }

    /// The object service over the present connection.
    pub fn objects(&self) -> Option<ObjectClient> {
        self.connection.lock().as_ref().map(Connection::objects)
    }

    pub(crate) fn set(&self, connection: Option<Connection>) {
        *self.connection.lock() = connection;
    }
}

#[cfg(test)]
mod tests;
