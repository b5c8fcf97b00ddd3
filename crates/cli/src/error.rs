//! What goes wrong, in words for people and as exit codes for scripts.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};

use thiserror::Error;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// What a command ends with.
#[derive(Debug, Error)]
pub enum CliError {
    /// The server refused the call.
    #[error("{0}")]
    Api(Box<ApiFailure>),
    /// The server cannot be reached.
    #[error("cannot reach the control plane at {endpoint}: {reason}")]
    Connect {
        /// Where it should be.
        endpoint: String,
        /// Why not.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// A flag, variable or file of settings makes no sense.
    #[error("{0}")]
    Usage(String),
    /// No such thing.
    #[error("{message}")]
    NotFound {
        /// What was looked for.
        message: String,
        /// How to see what there is.
        advice: String,
    },
    /// A short form of an id or a name stands for several things.
    #[error("{0}")]
    Ambiguous(String),
    /// Something was waited for that cannot happen any more.
    #[error("{message}")]
    Failed {
        /// What happened.
        message: String,
        /// EC2's reason code, if any.
        reason: String,
    },
    /// Something was waited for that does not come by itself.
    #[error("{message}")]
    Blocked {
        /// What stands in the way.
        message: String,
        /// How to take it out of the way.
        advice: String,
    },
    /// Waiting took too long.
    #[error("{0}")]
    Timeout(String),
    /// The user said no.
    #[error("nothing was done")]
    Declined,
    /// The control plane ended a stream without saying how it ended.
    #[error("the control plane ended the call without an answer")]
    Interrupted,
    /// A file or terminal of this machine.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file that is no image.
    #[error("{0}")]
    Image(#[from] hearth_snapshot::ImageError),
    /// A program that was started failed.
    #[error("{0}")]
    Program(String),
    /// `doctor` found something; it has printed what.
    #[error("this machine cannot run instances {}", if *testbed { "directly" } else { "yet" })]
    Unfit {
        /// Only the testbed helps.
        testbed: bool,
    },
}

/// An error status of the API, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiFailure {
    /// gRPC's code.
    pub code: Code,
    /// EC2's code, or gRPC's name when there is none.
    pub reason: String,
    /// Text of the server.
    pub message: String,
    /// Fields that were wrong, beyond what the message says: (field, what is wrong).
    pub fields: Vec<(String, String)>,
    /// Machine-readable details.
    pub metadata: Vec<(String, String)>,
}

impl std::fmt::Display for ApiFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.reason)
    }
}

impl ApiFailure {
    /// Takes a status apart.
    pub fn new(status: &Status) -> Self {
        let details = status.get_error_details();
        let mut metadata: Vec<_> =
            details.error_info().map(|info| info.metadata.clone().into_iter().collect()).unwrap_or_default();
        metadata.sort();
        let reason = details.error_info().map(|info| info.reason.clone()).filter(|reason| !reason.is_empty());
        let fields = details.bad_request().map(|bad| {
            let said = |violation: &&tonic_types::FieldViolation| !status.message().contains(&violation.description);
            bad.field_violations.iter().filter(said).map(|v| (v.field.clone(), v.description.clone())).collect()
        });
        let message = match status.message() {
            "" => status.code().description().to_owned(),
            message => message.to_owned(),
        };
        Self {
            code: status.code(),
            reason: reason.unwrap_or_else(|| format!("{:?}", status.code())),
            message,
            fields: fields.unwrap_or_default(),
            metadata,
        }
    }

    fn exit_code(&self) -> u8 {
        match self.code {
            _ if self.reason.ends_with(".NotFound") => 3,
            Code::NotFound => 3,
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted | Code::ResourceExhausted => 4,
            Code::DeadlineExceeded => 5,
            Code::InvalidArgument | Code::OutOfRange => 2,
            _ => 1,
        }
    }

    fn advice(&self) -> Option<&'static str> {
        Some(match self.reason.as_str() {
            "InvalidInstanceID.NotFound" | "InvalidInstanceID.Malformed" => "`hearth instance list` shows yours.",
            "InvalidAMIID.NotFound" | "InvalidAMIID.Malformed" => "`hearth image list` shows what there is.",
            "InvalidVolume.NotFound" | "InvalidVolumeID.Malformed" => "`hearth volume list` shows yours.",
            "InvalidSnapshot.NotFound" | "InvalidSnapshotID.Malformed" => "`hearth snapshot list` shows yours.",
            "VolumeInUse" => "`hearth volume detach` takes it from its instance.",
            "InvalidSnapshot.InUse" => {
                "`hearth image deregister --delete-snapshots` deletes images with their snapshots."
            }
            "IncorrectState" => {
                "`hearth volume describe` and `hearth snapshot describe` show states; --wait waits until a change is done."
            }
            "IncorrectImageState" | "InvalidAMIID.Unavailable" => "`hearth image list` shows states.",
            "VolumeLimitExceeded" => "delete volumes you no longer need, or ask the operator for a higher limit.",
            "SnapshotLimitExceeded" => "delete snapshots you no longer need, or ask the operator for a higher limit.",
            "ResourceLimitExceeded" => "deregister images you no longer need, or ask the operator for a higher limit.",
            "ConcurrentSnapshotLimitExceeded" => {
                "wait until one of them is completed (`hearth snapshot list --filter status=pending`)."
            }
            "InvalidKeyPair.NotFound" => "`hearth key-pair list` shows yours.",
            "InvalidHostID.NotFound" | "InvalidHostID.Malformed" => "`hearth host list` shows them.",
            "InvalidInstanceType" | "InvalidParameterValue.InstanceType" => {
                "`hearth instance-type list` shows what there is."
            }
            "IncorrectInstanceState" => "`hearth instance list` shows states; --wait waits until a change is done.",
            "InsufficientInstanceCapacity" => {
                "`hearth host list -o wide` shows what is free; a smaller --type may fit."
            }
            "InstanceLimitExceeded" => {
                "terminate instances you no longer need, or ask the operator for a higher limit."
            }
            "OperationNotPermitted" if self.message.contains("protect") => {
                "the instance is protected against termination (it was launched with --protect)."
            }
            "AuthFailure" | "Unauthenticated" => {
                "is the token right? It comes from --token, HEARTH_TOKEN, your profile, or the credentials file \
                 (/var/lib/hearth/admin.json on the control plane's host, readable by root)."
            }
            "UnauthorizedOperation" => "`hearth account whoami` shows who you are; this call is for operators.",
            "IdempotentParameterMismatch" => "use another --client-token, or leave it out.",
            "Unavailable" => "the control plane is starting or has just lost its leadership: try again.",
            "InternalError" => "this is the control plane's fault; its log tells more.",
            _ => return None,
        })
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        if let Some(reason) = transport_failure(&status) {
            return Self::unreachable("", reason);
        }
        Self::Api(Box::new(ApiFailure::new(&status)))
    }
}

/// The innermost reason when the call did not get to the server at all.
fn transport_failure(status: &Status) -> Option<String> {
    let source = std::error::Error::source(status)?;
    Some(innermost(source)).filter(|_| matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal))
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut current = error.source();
    while let Some(error) = current {
        text = error.to_string();
        current = error.source();
    }
    text
}

impl CliError {
    /// A connection that failed, with advice that fits the reason.
    pub fn unreachable(endpoint: &str, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        let lower = reason.to_lowercase();
        let advice = if lower.contains("refused") || lower.contains("reset") || lower.contains("closed") {
            "is it running? Start it with `hearthd up` (or scripts/up); --endpoint or HEARTH_ENDPOINT names another one."
        } else if lower.contains("certificate") || lower.contains("unknownissuer") || lower.contains("invalid peer") {
            "the server is not the one whose CA you have: --ca, HEARTH_CA or --credentials name the right one."
        } else if lower.contains("dns") || lower.contains("lookup") || lower.contains("name or service") {
            "the host's name is not known: check --endpoint or HEARTH_ENDPOINT."
        } else {
            "check --endpoint or HEARTH_ENDPOINT, and whether hearthd runs there."
        };
        Self::Connect { endpoint: endpoint.to_owned(), reason, advice: advice.to_owned() }
    }

    /// A connection that failed, from the transport's error.
    pub fn transport(endpoint: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::unreachable(endpoint, innermost(error))
    }

    /// The same with the endpoint filled in.
    pub fn at(self, endpoint: &str) -> Self {
        match self {
            Self::Connect { reason, advice, .. } => Self::Connect { endpoint: endpoint.to_owned(), reason, advice },
            other => other,
        }
    }

    /// A local operation that failed.
    pub fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }

    /// Whether the call may be repeated because the server was not there or is just starting.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { advice, .. } => !advice.contains("CA you have"),
            Self::Api(failure) => matches!(failure.code, Code::Unavailable | Code::Aborted),
            _ => false,
        }
    }

    /// Whether a dry run went as far as one goes: EC2 answers it with an error in any case.
    pub fn is_passed_dry_run(&self) -> bool {
        matches!(self, Self::Api(failure) if failure.reason == "DryRunOperation")
    }

    /// 1 error, 2 usage, 3 not found, 4 conflict, limit or no capacity, 5 time-out.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Api(failure) => failure.exit_code(),
            Self::Usage(_) => 2,
            Self::NotFound { .. } => 3,
            Self::Ambiguous(_) | Self::Blocked { .. } => 4,
            Self::Failed { reason, .. } if reason.contains("InsufficientInstanceCapacity") => 4,
            Self::Timeout(_) => 5,
            _ => 1,
        }
    }

    /// The whole message.
    pub fn text(&self) -> String {
        let mut text = format!("error: {self}");
        match self {
            Self::Api(failure) => {
                for (field, what) in &failure.fields {
                    let _ = write!(text, "\n  {field}: {what}");
                }
                if let Some(advice) = failure.advice() {
                    let _ = write!(text, "\nhint: {advice}");
                }
            }
            Self::Connect { advice, .. } | Self::NotFound { advice, .. } | Self::Blocked { advice, .. } => {
                let _ = write!(text, "\nhint: {advice}");
            }
            _ => {}
        }
        text
    }

    /// Prints the message on standard error.
    pub fn print(&self) {
        let text = self.text();
        if io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
            let rest = text.strip_prefix("error:").unwrap_or(&text);
            eprintln!("\x1b[1;31merror:\x1b[0m{rest}");
        } else {
            eprintln!("{text}");
        }
    }
}

#[cfg(test)]
#[path = "error_test.rs"]
mod tests;
