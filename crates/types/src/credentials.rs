//! What a client needs to call the API: kept as a JSON file that only its owner may read.

use std::fmt;

use serde::{Deserialize, Serialize};

/// First part of every API bearer token.
pub const API_TOKEN_PREFIX: &str = "hearth_";

/// Name of the metadata entry that carries `Bearer <token>`.
pub const AUTHORIZATION_METADATA: &str = "authorization";

/// Name of the response metadata entry that carries the request's id.
pub const REQUEST_ID_METADATA: &str = "x-hearth-request-id";

/// Endpoint, CA and token of an account. The control plane writes one for the first operator account.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// URL of the control plane, `https://host:port`.
    pub endpoint: String,
    /// The cluster's CA certificate, PEM.
    pub ca_certificate: String,
    /// Bearer token, `hearth_…`.
    pub token: String,
    /// The account it belongs to.
    pub account_id: String,
}

/// Leaves the token out.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("endpoint", &self.endpoint)
            .field("account_id", &self.account_id)
            .finish_non_exhaustive()
    }
}
