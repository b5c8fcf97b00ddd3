//! The lasting connection to one VMM: commands go down, events come up. A VMM serves one connection at a time and tells what it
//! still waits for to each new one, so a restarted agent misses nothing.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hearth_vmm::control::client::{Client, ClientError};
use hearth_vmm::control::protocol::{Command, Event, Outcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::LaunchError;

/// Pause before connecting again.
const PAUSE: Duration = Duration::from_millis(200);

struct Call {
    command: Command,
    fds: Vec<OwnedFd>,
    timeout: Duration,
    answer: oneshot::Sender<Result<Outcome, LaunchError>>,
}

struct Shared {
    calls: Mutex<Queue>,
    bell: EventFd,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Call>,
    /// Nobody will call any more, or the VMM is gone.
    over: bool,
}

/// A connection with its thread. Dropping it ends both.
pub struct Conversation {
    shared: Arc<Shared>,
}

/// Makes a new connection; `None` = the VMM is gone for good.
pub type Connect = Box<dyn FnMut() -> Option<Result<Client, LaunchError>> + Send>;

impl Conversation {
    /// Begins with `client`, if there is one; `connect` makes the next one when that breaks. Events go to `events` until its receiver is gone.
    pub fn begin(
        name: &str,
        client: Option<Client>,
        connect: Connect,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<Self, LaunchError> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| LaunchError::host("making an eventfd")(errno.into()))?;
        let shared = Arc::new(Shared { calls: Mutex::default(), bell });
        let talk = Talk { shared: shared.clone(), client, connect, events };
        std::thread::Builder::new()
            .name(format!("vmm {name}"))
            .spawn(move || talk.run())
            .map_err(LaunchError::host("starting a thread"))?;
        Ok(Self { shared })
    }

    /// Sends a command with descriptors, which are closed here once they are sent, and waits for its answer.
    pub async fn call(&self, command: Command, fds: Vec<OwnedFd>, timeout: Duration) -> Result<Outcome, LaunchError> {
        let gone = || LaunchError::Vmm("it has ended".to_owned());
        let (answer, outcome) = oneshot::channel();
        {
            let mut calls = self.shared.calls.lock();
            if calls.over {
                return Err(gone());
            }
            calls.waiting.push_back(Call { command, fds, timeout, answer });
        }
        self.shared.ring();
        outcome.await.map_err(|_| gone())?
    }
}

impl Shared {
    fn ring(&self) {
        // A full counter rings as well.
        let _ = self.bell.write(1);
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.shared.calls.lock().over = true;
        self.shared.ring();
    }
}

struct Talk {
    shared: Arc<Shared>,
    client: Option<Client>,
    connect: Connect,
    events: mpsc::UnboundedSender<Event>,
}

impl Talk {
    fn run(mut self) {
        while self.turn() {}
        let mut calls = self.shared.calls.lock();
        calls.over = true;
        // Their callers learn of it by the closed channel.
        calls.waiting.clear();
    }

    /// One step; `false` at the end.
    fn turn(&mut self) -> bool {
        if self.shared.calls.lock().over {
            return false;
        }
        let Some(client) = &mut self.client else {
            match (self.connect)() {
                None => return false,
                Some(Ok(client)) => self.client = Some(client),
                Some(Err(error)) => {
                    tracing::debug!(%error, "connecting to a VMM again");
                    // A VMM that is ending leaves its socket behind: nobody may wait for an answer until it is removed.
                    for call in self.shared.calls.lock().waiting.drain(..) {
                        let _ = call.answer.send(Err(LaunchError::Vmm(error.to_string())));
                    }
                    self.rest(PAUSE);
                }
            }
            return true;
        };
        let next = self.shared.calls.lock().waiting.pop_front();
        let broken = match next {
            Some(call) => {
                let fds: Vec<BorrowedFd<'_>> = call.fds.iter().map(AsFd::as_fd).collect();
                let outcome = client.call(call.command, &fds, call.timeout);
                let broken = matches!(outcome, Err(ClientError::Closed | ClientError::Socket(_)));
                // The caller may have given up.
                let _ = call.answer.send(outcome.map_err(|error| LaunchError::Vmm(error.to_string())));
                broken
            }
            None => match client.next_event(Duration::ZERO) {
                Ok(Some(event)) => {
                    // Without a listener the thread goes on for the sake of commands.
                    let _ = self.events.send(event);
                    false
                }
                Ok(None) => {
                    wait(&[self.shared.bell.as_fd(), client.as_fd()], None);
                    let _ = self.shared.bell.read();
                    false
                }
                Err(error) => {
                    tracing::debug!(%error, "the connection to a VMM broke");
                    true
                }
            },
        };
        if broken {
            self.client = None;
        }
        true
    }

    fn rest(&self, time: Duration) {
        wait(&[self.shared.bell.as_fd()], Some(time));
        let _ = self.shared.bell.read();
    }
}

/// Until one is readable, or the time is over.
fn wait(fds: &[BorrowedFd<'_>], time: Option<Duration>) {
    let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let time = time.and_then(|time| PollTimeout::try_from(time).ok()).unwrap_or(PollTimeout::NONE);
    // Woken for nothing is no harm: the caller looks again.
    let _ = poll(&mut fds, time);
}
