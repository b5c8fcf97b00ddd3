//! Consoles: questions to agents about the last output, and relays between a user's call and an agent's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use hearth_proto::v1;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::api_error::ApiResult;

/// Messages in flight in each direction of a relay.
pub(crate) const RELAY_QUEUE: usize = 64;

/// The agent's half of a relay, handed over when the agent calls.
pub(crate) struct RelayEnds {
    /// To the guest.
    pub input: mpsc::Receiver<Bytes>,
    /// From the guest; an error text ends it.
    pub output: mpsc::Sender<Result<Bytes, String>>,
}

struct Waiting {
    host: String,
    ends: RelayEnds,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Consoles {
    next_request: AtomicU64,
    requests: Mutex<HashMap<u64, (String, oneshot::Sender<v1::ConsoleOutputReport>)>>,
    relays: Mutex<HashMap<String, Waiting>>,
}

/// Forgets a question when its call ends, answered or not.
pub(crate) struct Question<'a> {
    consoles: &'a Consoles,
    pub id: u64,
    pub answer: oneshot::Receiver<v1::ConsoleOutputReport>,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        self.consoles.requests.lock().remove(&self.id);
    }
}

/// Forgets a relay that no agent has taken when its call ends.
pub(crate) struct RelayOffer<'a> {
    consoles: &'a Consoles,
    pub session_id: String,
}

impl Drop for RelayOffer<'_> {
    fn drop(&mut self) {
        self.consoles.relays.lock().remove(&self.session_id);
    }
}

impl Consoles {
    /// Registers a question to `host`.
    pub fn ask(&self, host: &str) -> Question<'_> {
        let id = self.next_request.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, answer) = oneshot::channel();
        self.requests.lock().insert(id, (host.to_owned(), sender));
        Question { consoles: self, id, answer }
    }

    /// An agent's answer. One that nobody waits for, or of another host, is dropped.
    pub fn answer(&self, host: &str, report: v1::ConsoleOutputReport) {
        let mut requests = self.requests.lock();
        if requests.get(&report.request_id).is_none_or(|(asked, _)| asked != host) {
            return;
        }
        if let Some((_, sender)) = requests.remove(&report.request_id) {
            // The call may have ended.
            let _ = sender.send(report);
        }
    }

    /// Offers a relay to `host` under a new secret name that works once.
    pub fn offer(&self, host: &str, ends: RelayEnds) -> ApiResult<RelayOffer<'_>> {
        let mut secret = [0u8; 16];
        getrandom::fill(&mut secret)?;
        let session_id = hex::encode(secret);
        self.relays.lock().insert(session_id.clone(), Waiting { host: host.to_owned(), ends });
        Ok(RelayOffer { consoles: self, session_id })
    }

    /// The relay that was offered to this host under this name.
    pub fn take(&self, host: &str, session_id: &str) -> Option<RelayEnds> {
        let mut relays = self.relays.lock();
        if relays.get(session_id)?.host != host {
            return None;
        }
        relays.remove(session_id).map(|waiting| waiting.ends)
    }
}
