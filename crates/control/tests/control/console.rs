//! The console of a guest that is not there.

use hearth_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use v1::agent_service_client::AgentServiceClient;

/// Says back in capitals what it hears.
pub async fn echo_console(mut client: AgentServiceClient<Channel>, command: v1::OpenConsoleCommand) {
    let (up, messages) = mpsc::channel(16);
    let hello = v1::ConsoleRelayUp {
        session_id: command.session_id,
        data: format!("{} login: ", command.instance_id).into(),
        error: String::new(),
    };
    up.send(hello).await.unwrap();
    let Ok(down) = client.console_relay(ReceiverStream::new(messages)).await else { return };
    let mut down = down.into_inner();
    while let Ok(Some(message)) = down.message().await {
        let data = message.data.to_ascii_uppercase().into();
        if up.send(v1::ConsoleRelayUp { data, ..Default::default() }).await.is_err() {
            return;
        }
    }
}
