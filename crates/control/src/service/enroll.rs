//! How hosts join: one-time tokens, certificates, their records.

use std::time::Duration;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::{HostId, JoinToken};

use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode, id_value};
use crate::keys;
use crate::tables::SCHEMA_VERSION;

const DEFAULT_TTL: Duration = Duration::from_secs(900);
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// Most join tokens waiting to be used.
const MAX_JOIN_TOKENS: usize = 10_000;
/// Names tried for a host whose name is taken.
const MAX_NAME_ATTEMPTS: u32 = 100;

pub(crate) fn join_token_ttl(seconds: u32) -> ApiResult<Duration> {
    let ttl = Duration::from_secs(seconds.into());
    match ttl {
        Duration::ZERO => Ok(DEFAULT_TTL),
        ttl if ttl <= MAX_TTL => Ok(ttl),
        _ => Err(ApiError::invalid("ttl_seconds", format!("must be at most {}", MAX_TTL.as_secs()))),
    }
}

/// A new join token and when it expires. Only the hash of its secret is kept.
pub(crate) async fn create_join_token(core: &Core, ttl: Duration) -> ApiResult<(JoinToken, u64)> {
    if core.tables().join_tokens.len() >= MAX_JOIN_TOKENS {
        return Err(ApiError::exhausted(
            "ResourceCountExceeded",
            "too many unused join tokens; wait for some to expire",
        ));
    }
    let mut secret = [0u8; 32];
    getrandom::fill(&mut secret)?;
    let created_ms = clock::now_ms();
    let expires_ms = created_ms.saturating_add(clock::as_ms(ttl));
    let record = rec::JoinToken { schema_version: SCHEMA_VERSION, created_ms, expires_ms };
    core.commit(Txn::new().put(keys::join_token(&keys::sha256_hex(&secret)), encode(&record))).await?;
    Ok((JoinToken { ca_sha256: core.pki.ca_sha256(), secret }, expires_ms))
}

/// Trades a join token and a certificate request for a host id and a certificate. The token is used up in the same
/// transaction that makes the host.
pub(crate) async fn enroll(core: &Core, request: v1::EnrollRequest) -> ApiResult<v1::EnrollResponse> {
    let refused = || {
        ApiError::auth_failure("the join token is unknown, used or expired; make a new one with `hearth host token`")
    };
    let token: JoinToken = request.token.parse().map_err(|_| refused())?;
    if token.ca_sha256 != core.pki.ca_sha256() {
        return Err(ApiError::auth_failure("the join token is another cluster's"));
    }
    check::name("host_name", &request.host_name)?;
    let hash = keys::sha256_hex(&token.secret);
    let host_id = HostId::generate()?;
    // Before the token is used up, so that a bad request costs nothing.
    let certificate_chain = core
        .pki
        .sign_agent(&request.certificate_request, &host_id)
        .map_err(|why| ApiError::invalid("certificate_request", why))?;
    for attempt in 1..=MAX_NAME_ATTEMPTS {
        let kept = core.tables().join_tokens.get(&hash).cloned();
        let kept = kept.filter(|kept| clock::now_ms() < kept.expires_ms).ok_or_else(refused)?;
        let name = match attempt {
            1 => request.host_name.clone(),
            n => format!("{}-{n}", request.host_name),
        };
        let spec = rec::HostSpec {
            schema_version: SCHEMA_VERSION,
            host_id: host_id.to_string(),
            name: name.clone(),
            state: v1::HostState::Active.into(),
            created_ms: clock::now_ms(),
        };
        let token_key = keys::join_token(&hash);
        let txn = Txn::new()
            .compare_mod_revision(&token_key, kept.revision)
            .compare_absent(keys::host_name(&name))
            .delete(&token_key)
            .put(keys::host_name(&name), id_value(host_id.as_str()))
            .put(keys::host_spec(host_id.as_str()), encode(&spec));
        match core.commit(txn).await? {
            Commit::Done => {
                tracing::info!(host = %host_id, name, "host joined");
                return Ok(v1::EnrollResponse {
                    host_id: host_id.to_string(),
                    certificate_chain: bytes(certificate_chain),
                });
            }
            Commit::Conflict(0) => return Err(refused()),
            Commit::Conflict(_) => {}
        }
    }
    Err(ApiError::duplicate("HostAlreadyExists", format!("too many hosts are named '{}'", request.host_name)))
}

/// A fresh certificate for a host that has one.
pub(crate) fn renew(core: &Core, host: &HostId, request: &[u8]) -> ApiResult<v1::RenewCertificateResponse> {
    let chain = core.pki.sign_agent(request, host).map_err(|why| ApiError::invalid("certificate_request", why))?;
    Ok(v1::RenewCertificateResponse { certificate_chain: bytes(chain) })
}

fn bytes(chain: Vec<Vec<u8>>) -> Vec<bytes::Bytes> {
    chain.into_iter().map(Into::into).collect()
}
