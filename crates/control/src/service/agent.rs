//! The service that agents call.

use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::pin::Pin;

use bytes::Bytes;
use hearth_proto::v1;
use hearth_types::ImageId;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{Api, detached, enroll, import, session};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::console::RelayEnds;

/// Bytes of one piece of an image.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces read ahead.
const FETCH_QUEUE: usize = 4;
/// Longest wait for the first message of a relay.
const RELAY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

type Answer<T> = Result<Response<T>, Status>;
type Piece = Result<v1::FetchImageResponse, Status>;

/// Reads an image's file from `offset` on and sends it; holes as such. Ends early when nobody listens.
fn send_image(path: PathBuf, offset: u64, pieces: &mpsc::Sender<Piece>) -> ApiResult<()> {
    let failed = |error: std::io::Error| ApiError::internal(format!("read {}: {error}", path.display()));
    let mut file = std::fs::File::open(&path).map_err(failed)?;
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if offset > size {
        return Err(ApiError::invalid("offset", format!("is {offset}, the image has {size} bytes")));
    }
    let mut at = offset;
    while at < size {
        let data_at = match lseek(&file, at.try_into().unwrap_or(i64::MAX), Whence::SeekData) {
            Ok(data) => u64::try_from(data).unwrap_or(at).clamp(at, size),
            // Nothing but hole up to the end.
            Err(Errno::ENXIO) => size,
            Err(error) => return Err(failed(error.into())),
        };
        let content = if data_at > at {
            v1::fetch_image_response::Content::Zeros(data_at - at)
        } else {
            let mut buffer = Vec::new();
            let count = file.seek(SeekFrom::Start(at)).and_then(|_| (&file).take(PIECE_BYTES).read_to_end(&mut buffer));
            if count.map_err(failed)? == 0 {
                return Err(failed(ErrorKind::UnexpectedEof.into()));
            }
            v1::fetch_image_response::Content::Data(buffer.into())
        };
        let length = match &content {
            v1::fetch_image_response::Content::Data(data) => data.len() as u64,
            v1::fetch_image_response::Content::Zeros(zeros) => *zeros,
        };
        let piece = v1::FetchImageResponse { offset: at, content: Some(content) };
        if pieces.blocking_send(Ok(piece)).is_err() {
            return Ok(());
        }
        at += length;
    }
    Ok(())
}

impl Api {
    fn do_fetch_image(&self, request: &v1::FetchImageRequest) -> ApiResult<ReceiverStream<Piece>> {
        let id: ImageId = request
            .image_id
            .parse()
            .map_err(|error| ApiError::malformed_id("InvalidAMIID.Malformed", "image_id", &error))?;
        let available = self
            .core
            .tables()
            .images
            .get(id.as_str())
            .and_then(|entry| entry.status.as_ref())
            .is_some_and(|status| status.state() == v1::ImageState::Available);
        if !available {
            return Err(ApiError::not_found("InvalidAMIID.NotFound", "image", &[id.as_str()]));
        }
        let path = import::image_path(&self.core, id.as_str());
        let offset = request.offset;
        let (sender, stream) = mpsc::channel(FETCH_QUEUE);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_image(path, offset, &sender) {
                // The agent may be gone.
                let _ = sender.blocking_send(Err(error.into()));
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    async fn do_console_relay(
        &self,
        host: &str,
        mut agent: Streaming<v1::ConsoleRelayUp>,
    ) -> ApiResult<ReceiverStream<Result<v1::ConsoleRelayDown, Status>>> {
        let unknown = || {
            ApiError::new(
                tonic::Code::NotFound,
                "InvalidConsoleSession",
                "no such console session, or its time is over",
            )
        };
        let first = tokio::time::timeout(RELAY_TIMEOUT, agent.message()).await;
        let Ok(Ok(Some(first))) = first else { return Err(unknown()) };
        let RelayEnds { mut input, output } = self.core.consoles.take(host, &first.session_id).ok_or_else(unknown)?;
        let greeting = if first.error.is_empty() { Ok(first.data) } else { Err(first.error) };
        // The caller may have gone.
        let _ = output.send(greeting).await;
        let stop = self.core.stop.clone();
        self.core.tasks.spawn(async move {
            loop {
                let message = tokio::select! {
                    message = agent.message() => message,
                    () = stop.cancelled() => return,
                    () = output.closed() => return,
                };
                let piece: Result<Bytes, String> = match message {
                    Ok(Some(up)) if up.error.is_empty() => Ok(up.data),
                    Ok(Some(up)) => Err(up.error),
                    Ok(None) => return,
                    Err(status) => Err(format!("the host's connection broke: {}", status.message())),
                };
                let last = piece.is_err();
                if output.send(piece).await.is_err() || last {
                    return;
                }
            }
        });
        let (down, stream) = mpsc::channel(crate::console::RELAY_QUEUE);
        self.core.tasks.spawn(async move {
            while let Some(data) = input.recv().await {
                if down.send(Ok(v1::ConsoleRelayDown { data })).await.is_err() {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(stream))
    }
}

#[tonic::async_trait]
impl v1::agent_service_server::AgentService for Api {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Answer<v1::EnrollResponse> {
        let core = self.core.clone();
        let request = request.into_inner();
        Ok(Response::new(detached(&self.core, async move { enroll::enroll(&core, request).await }).await?))
    }

    async fn renew_certificate(
        &self,
        request: Request<v1::RenewCertificateRequest>,
    ) -> Answer<v1::RenewCertificateResponse> {
        let host = auth::agent(&request)?;
        Ok(Response::new(enroll::renew(&self.core, &host, &request.get_ref().certificate_request)?))
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::ControlMessage, Status>> + Send>>;

    async fn session(&self, request: Request<Streaming<v1::AgentMessage>>) -> Answer<Self::SessionStream> {
        let host = auth::agent(&request)?;
        let stream = session::open(self.core.clone(), host, request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    type FetchImageStream = ReceiverStream<Piece>;

    async fn fetch_image(&self, request: Request<v1::FetchImageRequest>) -> Answer<Self::FetchImageStream> {
        auth::agent(&request)?;
        Ok(Response::new(self.do_fetch_image(request.get_ref())?))
    }

    type ConsoleRelayStream = Pin<Box<dyn Stream<Item = Result<v1::ConsoleRelayDown, Status>> + Send>>;

    async fn console_relay(&self, request: Request<Streaming<v1::ConsoleRelayUp>>) -> Answer<Self::ConsoleRelayStream> {
        let host = auth::agent(&request)?;
        let stream = self.do_console_relay(host.as_str(), request.into_inner()).await?;
        let stop = self.core.stop.clone();
        let stream = StreamExt::map(stream, |item| item);
        Ok(Response::new(Box::pin(futures::StreamExt::take_until(stream, stop.cancelled_owned()))))
    }
}
