//! What happens to every call before its service sees it: a request id, authentication, one log line.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use hearth_types::credentials::{AUTHORIZATION_METADATA, REQUEST_ID_METADATA};
use http::{HeaderValue, Request, Response};
use tonic::body::Body;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::api_error::{ApiError, ApiResult};
use crate::auth::{self, Agent, Caller};
use crate::core::Core;

const API_PREFIX: &str = "/hearth.v1.";
/// Services that agents alone use.
const AGENT_PREFIXES: [&str; 2] = ["/hearth.v1.AgentService/", "/hearth.v1.ObjectService/"];
const ENROLL: &str = "/hearth.v1.AgentService/Enroll";

/// Puts [`ApiService`] around the services.
#[derive(Clone)]
pub(crate) struct ApiLayer {
    pub core: Arc<Core>,
}

impl<S> Layer<S> for ApiLayer {
    type Service = ApiService<S>;
    fn layer(&self, inner: S) -> ApiService<S> {
        ApiService { core: self.core.clone(), inner }
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct ApiService<S> {
    core: Arc<Core>,
    inner: S,
}

/// Who is behind a request, for the log.
enum Who {
    Nobody,
    Account(String),
    Host(String),
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nobody => f.write_str("-"),
            Self::Account(id) | Self::Host(id) => f.write_str(id),
        }
    }
}

fn identify(core: &Core, request: &mut Request<Body>) -> ApiResult<Who> {
    let path = request.uri().path();
    if !path.starts_with(API_PREFIX) || path == ENROLL {
        return Ok(Who::Nobody);
    }
    if AGENT_PREFIXES.iter().any(|prefix| path.starts_with(prefix)) {
        let certificates = request
            .extensions()
            .get::<TlsConnectInfo<TcpConnectInfo>>()
            .and_then(TlsConnectInfo::peer_certs)
            .ok_or_else(|| ApiError::auth_failure("an agent's client certificate is needed"))?;
        let host_id = certificates
            .first()
            .and_then(|leaf| core.pki.agent_of(leaf))
            .ok_or_else(|| ApiError::auth_failure("the client certificate is not an agent's of this cluster"))?;
        if core.tables().host(host_id.as_str()).is_none() {
            return Err(ApiError::unauthorized(format!("host {host_id} has been removed; join it again")));
        }
        let who = Who::Host(host_id.to_string());
        request.extensions_mut().insert(Agent { host_id });
        return Ok(who);
    }
    let authorization = request.headers().get(AUTHORIZATION_METADATA).map(HeaderValue::as_bytes);
    let caller: Caller = auth::authenticate(core, authorization)?;
    let who = Who::Account(caller.account_id.clone());
    request.extensions_mut().insert(caller);
    Ok(who)
}

/// 16 hex digits; only to find a call in the log, so a failing random source is no reason to fail the call.
fn new_request_id() -> String {
    let mut bytes = [0u8; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => hex::encode(bytes),
        Err(_) => "0".repeat(16),
    }
}

impl<S> Service<Request<Body>> for ApiService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let core = self.core.clone();
        // The clone may not be ready; the original, which was polled, is.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        Box::pin(async move {
            let begun = Instant::now();
            let request_id = new_request_id();
            let method = request.uri().path().to_owned();
            let (who, mut response) = match identify(&core, &mut request) {
                Ok(who) => (who, inner.call(request).await?),
                Err(error) => (Who::Nobody, Status::from(error).into_http()),
            };
            log(&method, &who, &request_id, begun, &response);
            if let Ok(value) = HeaderValue::from_str(&request_id) {
                response.headers_mut().insert(REQUEST_ID_METADATA, value);
            }
            Ok(response)
        })
    }
}

/// A streaming call is logged when its answer begins. A status in the headers is an error: successes end in trailers. Calls
/// that change nothing are for debugging.
fn log(method: &str, who: &Who, request_id: &str, begun: Instant, response: &Response<Body>) {
    let micros = begun.elapsed().as_micros();
    if let Some(status) = Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok) {
        let code = format!("{:?}", status.code());
        return tracing::info!(method, %who, request_id, micros, code, error = status.message(), "call failed");
    }
    let name = method.rsplit('/').next().unwrap_or_default();
    let reads = ["List", "Get", "Watch", "Check", "ServerReflectionInfo"];
    if reads.iter().any(|read| name.starts_with(read)) {
        tracing::debug!(method, %who, request_id, micros, "call");
    } else {
        tracing::info!(method, %who, request_id, micros, "call");
    }
}
