//! Who calls: bearer tokens of accounts (only their SHA-256 is kept), client certificates of agents.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hearth_proto::record::v1 as rec;
use hearth_types::HostId;
use hearth_types::credentials::API_TOKEN_PREFIX;
use subtle::ConstantTimeEq;
use tonic::Request;

use crate::api_error::{ApiError, ApiResult};
use crate::core::Core;
use crate::keys;

/// Longest accepted `authorization` value.
const MAX_AUTHORIZATION_BYTES: usize = 200;

/// The account that calls; put into each request of a user service.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub account_id: String,
    pub is_operator: bool,
    /// Id of the token it came with.
    pub token_id: String,
}

/// The agent that calls; put into each request of the agent service that came with a certificate.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    pub host_id: HostId,
}

/// A new API token and the hash to keep.
pub(crate) fn new_api_token() -> Result<(String, String), getrandom::Error> {
    let mut secret = [0u8; 32];
    getrandom::fill(&mut secret)?;
    let token = format!("{API_TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(secret));
    let hash = keys::sha256_hex(token.as_bytes());
    Ok((token, hash))
}

/// What a token with this hash is called. Telling so much of the hash of 256 random bits helps nobody to find them.
pub(crate) fn token_id(hash: &str) -> String {
    format!("tok-{}", hash.get(..17).unwrap_or(hash))
}

/// Finds the account of a token.
pub(crate) fn account_of_token(core: &Core, token: &str) -> Option<Arc<rec::Account>> {
    account_of_hash(core, &keys::sha256_hex(token.as_bytes()))
}

fn account_of_hash(core: &Core, hash: &str) -> Option<Arc<rec::Account>> {
    let tables = core.tables();
    // The map is searched by hash, whose bytes a caller cannot choose; the comparison of the whole is constant-time.
    let (kept, record) = tables.api_tokens.get_key_value(hash)?;
    if !bool::from(kept.as_bytes().ct_eq(hash.as_bytes())) {
        return None;
    }
    tables.accounts.get(&record.account_id).map(|account| account.value.clone())
}

/// Checks an `authorization` value.
pub(crate) fn authenticate(core: &Core, authorization: Option<&[u8]>) -> ApiResult<Caller> {
    let value =
        authorization.ok_or_else(|| ApiError::auth_failure("no authorization metadata; send 'Bearer <token>'"))?;
    let text = std::str::from_utf8(value).ok().filter(|text| text.len() <= MAX_AUTHORIZATION_BYTES);
    let token = text
        .and_then(|text| text.strip_prefix("Bearer ").or_else(|| text.strip_prefix("bearer ")))
        .filter(|token| token.starts_with(API_TOKEN_PREFIX))
        .ok_or_else(|| {
            ApiError::auth_failure(format!("authorization must be 'Bearer {API_TOKEN_PREFIX}…', an account's token"))
        })?;
    let hash = keys::sha256_hex(token.as_bytes());
    let account = account_of_hash(core, &hash).ok_or_else(|| ApiError::auth_failure("the token is not valid"))?;
    Ok(Caller { account_id: account.account_id.clone(), is_operator: account.is_operator, token_id: token_id(&hash) })
}

/// The account that made a request.
pub(crate) fn caller<T>(request: &Request<T>) -> ApiResult<Caller> {
    request.extensions().get::<Caller>().cloned().ok_or_else(|| ApiError::auth_failure("the call carries no account"))
}

/// The operator account that made a request.
pub(crate) fn operator<T>(request: &Request<T>) -> ApiResult<Caller> {
    let caller = caller(request)?;
    match caller.is_operator {
        true => Ok(caller),
        false => Err(ApiError::unauthorized("only operator accounts may do this")),
    }
}

/// The host that made a request.
pub(crate) fn agent<T>(request: &Request<T>) -> ApiResult<HostId> {
    request
        .extensions()
        .get::<Agent>()
        .map(|agent| agent.host_id.clone())
        .ok_or_else(|| ApiError::auth_failure("an agent's client certificate is needed"))
}
