//! The serial console, as last output and interactively. Both go through the host's session.

use std::pin::Pin;

use bytes::Bytes;
use hearth_proto::v1;
use hearth_types::InstanceState;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};

use super::Api;
use crate::api_error::{ApiError, ApiResult};
use crate::clock;
use crate::console::{RELAY_QUEUE, RelayEnds};
use crate::live::SessionHandle;

type OutputStream = Pin<Box<dyn Stream<Item = Result<v1::ConsoleOutput, Status>> + Send>>;

/// EC2's limit of what GetConsoleOutput returns.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// Largest piece of console input passed on at once.
const MAX_INPUT_BYTES: usize = 64 * 1024;

impl Api {
    fn session_of(&self, host: &str, id: &str) -> ApiResult<SessionHandle> {
        self.core.live.session(host).ok_or_else(|| {
            let message = format!("host {host}, where instance {id} is, is not connected; try again later");
            ApiError::unavailable(message).with("host_id", host).with("instance_id", id)
        })
    }

    async fn command(&self, host: &str, id: &str, command: v1::control_message::Message) -> ApiResult<()> {
        let session = self.session_of(host, id)?;
        let sent = tokio::time::timeout(self.core.config.console_timeout, session.commands.send(command)).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            _ => Err(ApiError::unavailable(format!("host {host} does not take commands now; try again later"))),
        }
    }

    fn no_answer(&self, host: &str) -> ApiError {
        let seconds = self.core.config.console_timeout.as_secs();
        ApiError::new(
            tonic::Code::DeadlineExceeded,
            "Unavailable",
            format!("host {host} did not answer within {seconds} s"),
        )
        .with("host_id", host)
    }

    pub(crate) async fn do_get_console_output(
        &self,
        account: &str,
        id: &str,
    ) -> ApiResult<v1::GetConsoleOutputResponse> {
        let (host, state) = self.placed(account, id)?;
        if state.is_final() {
            let message = format!("instance {id} is terminated; its console is gone");
            return Err(ApiError::wrong_state("IncorrectInstanceState", message).with("instance_id", id));
        }
        let mut question = self.core.consoles.ask(&host);
        let command = v1::GetConsoleOutputCommand { request_id: question.id, instance_id: id.to_owned() };
        self.command(&host, id, v1::control_message::Message::GetConsoleOutput(command)).await?;
        let answer = tokio::time::timeout(self.core.config.console_timeout, &mut question.answer).await;
        let Ok(Ok(report)) = answer else { return Err(self.no_answer(&host)) };
        if !report.error.is_empty() {
            return Err(ApiError::unavailable(format!("console of {id}: {}", report.error)).with("instance_id", id));
        }
        let from = report.output.len().saturating_sub(MAX_OUTPUT_BYTES);
        let output = report.output.slice(from..);
        Ok(v1::GetConsoleOutputResponse { output, timestamp: clock::rfc3339(clock::now_ms()) })
    }

    pub(crate) async fn do_console(
        &self,
        account: &str,
        mut user: Streaming<v1::ConsoleInput>,
    ) -> ApiResult<OutputStream> {
        use v1::console_input::Message;
        let timeout = self.core.config.console_timeout;
        let first = tokio::time::timeout(timeout, user.message()).await;
        let Ok(Ok(Some(v1::ConsoleInput { message: Some(Message::InstanceId(id)) }))) = first else {
            return Err(ApiError::invalid("instance_id", "the first message must name the instance"));
        };
        let (host, state) = self.placed(account, &id)?;
        if state != InstanceState::Running {
            let message = format!("instance {id} is {state}; an interactive console needs a running one");
            return Err(ApiError::wrong_state("IncorrectInstanceState", message).with("instance_id", &id));
        }
        let (input, agent_input) = mpsc::channel::<Bytes>(RELAY_QUEUE);
        let (agent_output, mut output) = mpsc::channel::<Result<Bytes, String>>(RELAY_QUEUE);
        let offer = self.core.consoles.offer(&host, RelayEnds { input: agent_input, output: agent_output })?;
        let command = v1::OpenConsoleCommand { session_id: offer.session_id.clone(), instance_id: id.clone() };
        self.command(&host, &id, v1::control_message::Message::OpenConsole(command)).await?;
        // The agent takes the offer and says something (an empty piece at least), or the offer is withdrawn.
        let opened = tokio::time::timeout(timeout, output.recv()).await;
        let first = match opened {
            Ok(Some(Ok(bytes))) => bytes,
            Ok(Some(Err(error))) => return Err(ApiError::unavailable(format!("console of {id}: {error}"))),
            Ok(None) | Err(_) => return Err(self.no_answer(&host)),
        };
        let stop = self.core.stop.clone();
        self.core.tasks.spawn(async move {
            loop {
                let message = tokio::select! {
                    message = user.message() => message,
                    () = stop.cancelled() => return,
                    () = input.closed() => return,
                };
                match message {
                    Ok(Some(v1::ConsoleInput { message: Some(Message::Data(data)) }))
                        if data.len() <= MAX_INPUT_BYTES =>
                    {
                        if input.send(data).await.is_err() {
                            return;
                        }
                    }
                    // The end of the input, a broken call or nonsense: the guest's side ends too.
                    _ => return,
                }
            }
        });
        let stop = self.core.stop.clone();
        let rest = ReceiverStream::new(output).map(|piece| match piece {
            Ok(data) => Ok(v1::ConsoleOutput { data }),
            Err(error) => Err(ApiError::unavailable(error).into()),
        });
        let stream = tokio_stream::once(Ok(v1::ConsoleOutput { data: first })).chain(rest);
        Ok(Box::pin(futures::StreamExt::take_until(stream, stop.cancelled_owned())))
    }
}
