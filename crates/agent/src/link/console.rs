//! Consoles: what was printed, and typing.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use hearth_proto::v1::ConsoleRelayUp;
use hearth_vmm::console_ring;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Client;

/// Most console output that is answered, in bytes: EC2's 64 KiB.
const OUTPUT_BYTES: usize = 64 << 10;
/// Bytes moved at a time.
const CHUNK: usize = 8 << 10;

/// The last output in a console ring.
pub fn output(ring: &Path) -> Result<Vec<u8>, String> {
    let file = match File::open(ring) {
        Ok(file) => file,
        // It has not been started yet: it has said nothing.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.to_string()),
    };
    let mut bytes = console_ring::read(&file, 0).map_err(|error| error.to_string())?.bytes;
    let surplus = bytes.len().saturating_sub(OUTPUT_BYTES);
    bytes.drain(..surplus);
    Ok(bytes)
}

/// Joins a VMM's console socket and the control plane until one of them leaves.
pub async fn relay(mut client: Client, session_id: String, socket: &Path) {
    let (up, messages) = mpsc::channel(8);
    let console = UnixStream::connect(socket).await;
    let first = ConsoleRelayUp {
        session_id,
        data: Bytes::new(),
        error: console
            .as_ref()
            .err()
            .map(|error| format!("the instance has no console now: {error}"))
            .unwrap_or_default(),
    };
    // The receiver is still here.
    let _ = up.send(first).await;
    let answer = client.console_relay(ReceiverStream::new(messages)).await;
    let (Ok(console), Ok(answer)) = (console, answer) else { return };
    let mut down = answer.into_inner();
    let (mut read, mut write) = console.into_split();
    let output = async move {
        let mut buffer = vec![0u8; CHUNK];
        while let Ok(count @ 1..) = read.read(&mut buffer).await {
            let data = Bytes::copy_from_slice(buffer.get(..count).unwrap_or_default());
            if up.send(ConsoleRelayUp { data, ..ConsoleRelayUp::default() }).await.is_err() {
                return;
            }
        }
    };
    let input = async move {
        while let Ok(Some(message)) = down.message().await {
            if write.write_all(&message.data).await.is_err() {
                return;
            }
        }
    };
    // When the guest's side ends, dropping the sender ends the call; when the user's side ends, the socket is closed.
    tokio::select! {
        () = output => {}
        () = input => {}
    }
}
