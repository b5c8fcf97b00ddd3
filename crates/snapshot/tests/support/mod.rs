//! A real S3 server (s3s-fs over a folder) that misbehaves on demand, for tests and measurements.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, dead_code, missing_docs)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub const ACCESS_KEY: &str = "hearth";
pub const SECRET_KEY: &str = "not-so-secret";
pub const BUCKET: &str = "cloud";

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// 429, not done.
    Throttled,
    /// 503 SlowDown, not done.
    SlowDown,
    /// 500, not done.
    Broken,
    /// The connection ends without an answer, not done.
    Dropped,
    /// Done, and then 500.
    LostAck,
    /// Done, and then the connection ends without an answer.
    LostConnection,
    /// Half of the request's body arrives; of a request without body, half of the answer's.
    Torn,
    /// Done after a while.
    Slow(Duration),
}

/// Learns of each answer: method, path, status and how many bytes its body has.
pub type Note = Arc<dyn Fn(&Method, &str, StatusCode, usize) + Send + Sync>;

/// Chooses the fault of a request by its number, method and path.
pub type Plan = Arc<dyn Fn(u64, &Method, &str) -> Fault + Send + Sync>;

/// How the server and the line to it are.
#[derive(Clone)]
pub struct Line {
    pub plan: Plan,
    /// Added to every answer.
    pub latency: Duration,
    /// Bits per second of all connections together; 0 = unlimited.
    pub bits_per_second: u64,
    pub note: Note,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            plan: Arc::new(|_, _, _| Fault::None),
            latency: Duration::ZERO,
            bits_per_second: 0,
            note: Arc::new(|_, _, _, _| ()),
        }
    }
}

/// A server that runs until it is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub requests: Arc<AtomicU64>,
    pub faults: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    service: S3Service,
    line: Line,
    requests: Arc<AtomicU64>,
    faults: Arc<AtomicU64>,
    /// When the line is free again.
    free: Mutex<Instant>,
}

/// Serves the buckets (folders) in `root` at `listen`.
pub async fn serve(root: &Path, listen: SocketAddr, line: Line, tls: Option<tokio_rustls::TlsAcceptor>) -> Server {
    std::fs::create_dir_all(root.join(BUCKET)).unwrap();
    let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
    builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
    let (requests, faults) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
    let shared = Arc::new(Shared {
        service: builder.build(),
        line,
        requests: requests.clone(),
        faults: faults.clone(),
        free: Mutex::new(Instant::now()),
    });
    let listener = TcpListener::bind(listen).await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (shared, tls) = (shared.clone(), tls.clone());
            socket.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                match tls {
                    Some(tls) => {
                        if let Ok(socket) = tls.accept(socket).await {
                            connection(socket, shared).await;
                        }
                    }
                    None => connection(socket, shared).await,
                }
            });
        }
    });
    Server { address, requests, faults, task }
}

async fn connection(socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, shared: Arc<Shared>) {
    let service = service_fn(move |request| answer(shared.clone(), request));
    // An error is what dropped connections are made of.
    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
}

type Answer = Result<Response<Reply>, Box<dyn std::error::Error + Send + Sync>>;

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Answer {
    let number = shared.requests.fetch_add(1, Ordering::SeqCst);
    let fault = (shared.line.plan)(number, request.method(), request.uri().path());
    if fault != Fault::None {
        shared.faults.fetch_add(1, Ordering::SeqCst);
    }
    let (head, body) = request.into_parts();
    let (method, path) = (head.method.clone(), head.uri.path().to_owned());
    let body = body.collect().await?.to_bytes();
    let sent = body.len() as u64;
    let refused = |status: StatusCode, code: &str| {
        let xml = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message></Error>");
        Ok(Response::builder().status(status).body(Reply::whole(xml.into()))?)
    };
    match fault {
        Fault::Throttled => return refused(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests"),
        Fault::SlowDown => return refused(StatusCode::SERVICE_UNAVAILABLE, "SlowDown"),
        Fault::Broken => return refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        Fault::Dropped => return Err("dropped".into()),
        Fault::Slow(time) => tokio::time::sleep(time).await,
        _ => {}
    }
    let torn_request = fault == Fault::Torn && !body.is_empty();
    let body = match torn_request {
        true => s3s::Body::http_body(Torn(Some(body.slice(..body.len() / 2)))),
        false => s3s::Body::from(body),
    };
    let response = shared.service.call(Request::from_parts(head, body)).await;
    if torn_request {
        return Err("the request was torn".into());
    }
    let (mut head, body) = response.map_err(|error| format!("{error:?}"))?.into_parts();
    let body = body.collect().await.map_err(|error| format!("{error:?}"))?.to_bytes();
    match fault {
        Fault::LostAck => return refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        Fault::LostConnection => return Err("the answer was lost".into()),
        _ => {}
    }
    shared.delay(sent + body.len() as u64).await;
    (shared.line.note)(&method, &path, head.status, body.len());
    let reply = match fault {
        Fault::Torn if body.len() > 1 => {
            head.headers.insert(http::header::CONTENT_LENGTH, body.len().into());
            Reply { left: Some(body.slice(..body.len() / 2)), torn: true }
        }
        _ => Reply::whole(body),
    };
    Ok(Response::from_parts(head, reply))
}

impl Shared {
    async fn delay(&self, bytes: u64) {
        let mut until = Instant::now();
        if self.line.bits_per_second > 0 {
            let mut free = self.free.lock().await;
            *free = (*free).max(until) + Duration::from_secs_f64(bytes as f64 * 8. / self.line.bits_per_second as f64);
            until = *free;
        }
        tokio::time::sleep_until(until + self.line.latency).await;
    }
}

/// An answer's body, whole or broken off.
struct Reply {
    left: Option<Bytes>,
    torn: bool,
}

impl Reply {
    fn whole(content: Bytes) -> Self {
        Self { left: Some(content).filter(|content| !content.is_empty()), torn: false }
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(match self.left.take() {
            Some(content) => Some(Ok(Frame::data(content))),
            None if self.torn => Some(Err("the answer was torn".into())),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_none() && !self.torn
    }

    fn size_hint(&self) -> SizeHint {
        match &self.left {
            Some(_) if self.torn => SizeHint::default(),
            left => SizeHint::with_exact(left.as_ref().map_or(0, |left| left.len() as u64)),
        }
    }
}

/// A request's body that breaks off.
struct Torn(Option<Bytes>);

impl Body for Torn {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(Some(match self.0.take() {
            Some(content) => Ok(Frame::data(content)),
            None => Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
        }))
    }
}

/// Every `percent` of a hundred requests, chosen by `seed`, has one of the faults.
pub fn random_faults(seed: u64, percent: u64) -> Plan {
    Arc::new(move |number, _, _| {
        let mut dice = (seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        dice ^= dice >> 31;
        if dice % 100 >= percent {
            return Fault::None;
        }
        match dice / 100 % 9 {
            0 => Fault::Throttled,
            1 => Fault::SlowDown,
            2 => Fault::Broken,
            3 => Fault::Dropped,
            4 => Fault::LostAck,
            5 => Fault::LostConnection,
            6 | 7 => Fault::Torn,
            _ => Fault::Slow(Duration::from_millis(30)),
        }
    })
}

/// Never returns; for the type checker of callers that serve until they are killed.
pub async fn for_ever() -> Infallible {
    std::future::pending().await
}
