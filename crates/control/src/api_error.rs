//! Errors of API calls: EC2's error codes as the reason of a `google.rpc.ErrorInfo` in domain `hearth.v1`, field violations as
//! `google.rpc.BadRequest`.
//! Sources: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html>,
//! <https://google.aip.dev/193>

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of every [`ErrorInfo`](tonic_types::ErrorInfo).
pub(crate) const ERROR_DOMAIN: &str = "hearth.v1";

/// An API call's error.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    code: Code,
    reason: &'static str,
    message: String,
    metadata: HashMap<String, String>,
    violations: Vec<(String, String)>,
}

pub(crate) type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), metadata: HashMap::new(), violations: Vec::new() }
    }

    /// Adds a machine-readable detail.
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// The same error under a code that EC2 has for just this.
    pub fn with_reason(mut self, reason: &'static str) -> Self {
        self.reason = reason;
        self
    }

    /// In words.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// EC2's code.
    pub fn reason(&self) -> &'static str {
        self.reason
    }

    fn with_violation(mut self, field: &str, description: &str) -> Self {
        self.violations.push((field.to_owned(), description.to_owned()));
        self
    }

    /// A request field holds a value that is not allowed.
    pub fn invalid(field: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::new(Code::InvalidArgument, "InvalidParameterValue", format!("{field}: {message}"))
            .with_violation(field, &message)
            .with("parameter", field)
    }

    /// A request field that must be set is not.
    pub fn missing(field: &str) -> Self {
        Self::new(Code::InvalidArgument, "MissingParameter", format!("{field} must be given"))
            .with_violation(field, "must be given")
            .with("parameter", field)
    }

    /// A text is no id of the wanted kind.
    pub fn malformed_id(reason: &'static str, field: &str, error: &hearth_types::id::IdError) -> Self {
        let message = error.to_string();
        Self::new(Code::InvalidArgument, reason, message.clone()).with_violation(field, &message)
    }

    /// No such resource (or it is another account's).
    pub fn not_found(reason: &'static str, what: &str, ids: &[&str]) -> Self {
        let verb = if ids.len() == 1 { "does" } else { "do" };
        Self::new(Code::NotFound, reason, format!("{what} {} {verb} not exist", ids.join(", ")))
            .with("resource_ids", ids.join(","))
    }

    /// A name is taken.
    pub fn duplicate(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::AlreadyExists, reason, message)
    }

    /// The resource is not in a state for this.
    pub fn wrong_state(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, reason, message)
    }

    /// No capacity, or a limit.
    pub fn exhausted(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::ResourceExhausted, reason, message)
    }

    /// Try again later.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, "Unavailable", message)
    }

    /// The caller may not do this.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(Code::PermissionDenied, "UnauthorizedOperation", message)
    }

    /// The caller is not known.
    pub fn auth_failure(message: impl Into<String>) -> Self {
        Self::new(Code::Unauthenticated, "AuthFailure", message)
    }

    /// The control plane's own fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, "InternalError", message)
    }

    /// A client token was used before with another request.
    pub fn idempotent_mismatch(token: &str) -> Self {
        let message = format!("client token '{token}' was used before with other parameters");
        Self::new(Code::InvalidArgument, "IdempotentParameterMismatch", message).with("client_token", token)
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason, ERROR_DOMAIN, error.metadata);
        for (field, description) in error.violations {
            details.add_bad_request_violation(field, description);
        }
        Status::with_error_details(error.code, error.message, details)
    }
}

impl From<hearth_store::Error> for ApiError {
    fn from(error: hearth_store::Error) -> Self {
        use hearth_store::Error as E;
        match error {
            E::NoSpace { .. } | E::WritesStopped { .. } | E::Closed | E::LeadershipLost { .. } => {
                Self::unavailable(error.to_string())
            }
            error => Self::internal(format!("store: {error}")),
        }
    }
}

impl From<getrandom::Error> for ApiError {
    fn from(error: getrandom::Error) -> Self {
        Self::internal(format!("random numbers: {error}"))
    }
}

impl From<hearth_types::FilterError> for ApiError {
    fn from(error: hearth_types::FilterError) -> Self {
        Self::invalid("filters", error.to_string())
    }
}

impl From<hearth_types::TagError> for ApiError {
    fn from(error: hearth_types::TagError) -> Self {
        Self::invalid("tags", error.to_string())
    }
}
