//! The service that agents call.

use std::pin::Pin;

use bytes::Bytes;
use hearth_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{Api, detached, enroll, session};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::console::RelayEnds;

/// Longest wait for the first message of a relay.
const RELAY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

type Answer<T> = Result<Response<T>, Status>;

impl Api {
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

    type ConsoleRelayStream = Pin<Box<dyn Stream<Item = Result<v1::ConsoleRelayDown, Status>> + Send>>;

    async fn console_relay(&self, request: Request<Streaming<v1::ConsoleRelayUp>>) -> Answer<Self::ConsoleRelayStream> {
        let host = auth::agent(&request)?;
        let stream = self.do_console_relay(host.as_str(), request.into_inner()).await?;
        let stop = self.core.stop.clone();
        let stream = StreamExt::map(stream, |item| item);
        Ok(Response::new(Box::pin(futures::StreamExt::take_until(stream, stop.cancelled_owned()))))
    }
}
