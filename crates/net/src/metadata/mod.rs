//! The instance metadata service, version 2 only: every read needs a session token.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html>
//!
//! Guests reach it at 169.254.169.254:80, which nftables redirects to a port on the bridge: the host itself never owns
//! that address, so that a host which is a cloud instance keeps its own metadata. A guest is known by its source address,
//! which the bridge's rules do not let it choose.

mod token;
mod tree;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Semaphore;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::NetError;
use crate::config::HostNetworkConfig;
use crate::host::Registry;
use token::Tokens;

const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
const TOKEN_TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
/// Longest life of a token, seconds.
const MAX_TOKEN_TTL: u32 = 21_600;
/// Connections of all guests together; more wait.
const MAX_CONNECTIONS: usize = 512;
/// A request line with its headers.
const MAX_HEAD_BYTES: usize = 16 * 1024;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// No client needs one connection for longer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// EC2's default: an answer must not be forwarded by the guest to anyone else.
const HOP_LIMIT: u32 = 1;

/// Listens on the bridge's own address at a port of the kernel's choice.
pub(crate) async fn bind(config: &HostNetworkConfig) -> Result<TcpListener, NetError> {
    let action = format!("listen for metadata requests on {}", config.bridge);
    let bind = || {
        let socket = TcpSocket::new_v4()?;
        socket.bind_device(Some(config.bridge.as_bytes()))?;
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv4Ttl, &(HOP_LIMIT as i32))?;
        socket.bind(SocketAddr::new(IpAddr::V4(config.gateway()), 0))?;
        socket.listen(256)
    };
    bind().map_err(NetError::system(action))
}

struct Service {
    registry: Arc<Registry>,
    tokens: Tokens,
    config: HostNetworkConfig,
}

/// Answers until the task is dropped.
pub(crate) async fn serve(listener: TcpListener, config: HostNetworkConfig, registry: Arc<Registry>) {
    let service = Arc::new(Service { registry, tokens: Tokens::default(), config });
    let router = Router::new().fallback(handle).with_state(service);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut http = http1::Builder::new();
    // Simple clients (nc) close their sending half right behind the request and still want the answer.
    http.half_close(true).timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT).max_buf_size(MAX_HEAD_BYTES);
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "metadata service cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let router = router.clone();
        let answer = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            router.clone().oneshot(request.map(Body::new))
        });
        let connection = http.serve_connection(TokioIo::new(stream), answer);
        tokio::spawn(async move {
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await {
                debug!(%error, %peer, "metadata connection ended");
            }
            drop(slot);
        });
    }
}

async fn handle(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    let IpAddr::V4(address) = peer.ip() else { return StatusCode::FORBIDDEN.into_response() };
    let Some(instance) = service.registry.by_address(address) else { return StatusCode::FORBIDDEN.into_response() };
    let headers = request.headers();
    let path = request.uri().path();
    if *request.method() == Method::PUT {
        return if tree::strip_version(path) == Some("/api/token") {
            new_token(&service.tokens, instance.instance_id.as_str(), headers)
        } else {
            StatusCode::METHOD_NOT_ALLOWED.into_response()
        };
    }
    if *request.method() != Method::GET && *request.method() != Method::HEAD {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let token = headers.get(TOKEN_HEADER).and_then(|value| value.to_str().ok());
    let valid = token.is_some_and(|token| service.tokens.is_valid(token, instance.instance_id.as_str()));
    if !valid {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    match tree::lookup(&instance, service.config.instance_cidr, path) {
        Some(body) => ([(header::CONTENT_TYPE, "text/plain")], Body::from(body)).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn new_token(tokens: &Tokens, instance: &str, headers: &HeaderMap) -> Response {
    // A request that came through a proxy inside the guest may be somebody else's (AWS refuses it alike).
    if headers.contains_key("x-forwarded-for") {
        return StatusCode::FORBIDDEN.into_response();
    }
    let ttl = headers.get(TOKEN_TTL_HEADER).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    let Some(ttl) = ttl.filter(|ttl| (1..=MAX_TOKEN_TTL).contains(ttl)) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    match tokens.issue(instance, ttl) {
        Ok(token) => ([(TOKEN_TTL_HEADER, ttl.to_string())], token).into_response(),
        Err(error) => {
            warn!(%error, "no metadata token could be made");
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        }
    }
}
