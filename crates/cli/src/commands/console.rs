//! `hearth instance console`: the serial console on this terminal, or between pipes.

use std::io::{Read, Write};
use std::time::Duration;

use hearth_proto::v1::ConsoleInput;
use hearth_proto::v1::console_input::Message;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::terminal::{EscapeKeys, Finder, RawMode};
use crate::args::instance::ConsoleArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::human;

/// After the end of piped input, the console is left when nothing was said for this long.
const QUIET: Duration = Duration::from_secs(1);

/// Why a console was left.
enum End {
    Asked,
    Found,
    Closed,
    Quiet,
    TimedOut,
}

pub async fn run(client: &Client, instance_id: &str, args: &ConsoleArgs) -> Result<(), CliError> {
    let (sender, receiver) = mpsc::channel(64);
    let first = ConsoleInput { message: Some(Message::InstanceId(instance_id.to_owned())) };
    // The queue is empty and its other end is held here.
    let _ = sender.send(first).await;
    let answer = client.instances().console(ReceiverStream::new(receiver)).await;
    let mut output = client.unwrap(answer)?;

    let raw = RawMode::enter().map_err(CliError::io("set up the terminal"))?;
    let on_terminal = raw.is_some();
    if on_terminal {
        eprint!("Console of {instance_id}. Ctrl-] or ~. at the start of a line ends it.\r\n");
    }
    let mut typed = read_input();
    let mut keys = EscapeKeys::default();
    let mut finder = args.until.as_deref().map(Finder::new);
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::io("watch for signals"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(CliError::io("watch for signals"))?;
    let far = Duration::from_secs(365 * 24 * 3600);
    let deadline = tokio::time::sleep(args.timeout.unwrap_or(far));
    tokio::pin!(deadline);
    let mut input_open = true;
    let end = loop {
        let leave_when_quiet = !input_open && finder.is_none() && !args.follow;
        tokio::select! {
            message = output.message() => match message {
                Ok(Some(piece)) => {
                    show(&piece.data)?;
                    if finder.as_mut().is_some_and(|finder| finder.push(&piece.data)) {
                        break Ok(End::Found);
                    }
                }
                Ok(None) => break Ok(End::Closed),
                Err(status) => break Err(client.failure(status)),
            },
            piece = typed.recv(), if input_open => match piece {
                Some(piece) => {
                    let (data, end) = if on_terminal { keys.filter(&piece) } else { (piece, false) };
                    let message = ConsoleInput { message: Some(Message::Data(data.into())) };
                    // A console that is closed tells so on its output.
                    let _ = sender.send(message).await;
                    if end {
                        break Ok(End::Asked);
                    }
                }
                None => input_open = false,
            },
            () = tokio::time::sleep(QUIET), if leave_when_quiet => break Ok(End::Quiet),
            () = &mut deadline => break Ok(End::TimedOut),
            _ = terminate.recv() => break Ok(End::Asked),
            _ = hangup.recv() => break Ok(End::Asked),
        }
    };
    drop(raw);
    let end = end?;
    if on_terminal {
        eprintln!("\nConsole of {instance_id} left.");
    }
    match (end, &args.until) {
        (End::Found, _) | (End::Asked | End::Closed | End::Quiet, None) => Ok(()),
        (End::TimedOut, None) if args.follow => Ok(()),
        (End::Asked | End::Closed | End::Quiet, Some(text)) => {
            Err(CliError::Program(format!("the console ended before it showed '{text}'")))
        }
        (End::TimedOut, text) => {
            let after = human::duration(args.timeout.unwrap_or_default());
            let what = text.as_ref().map(|text| format!(" without showing '{text}'")).unwrap_or_default();
            Err(CliError::Timeout(format!("the console was watched for {after}{what}")))
        }
    }
}

fn show(data: &[u8]) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(data).and_then(|()| out.flush()).map_err(CliError::io("write the console's output"))
}

/// Standard input, read by a thread of its own: nothing can interrupt such a read.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = [0; 1024];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    if sender.blocking_send(buffer.get(..count).unwrap_or_default().to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
