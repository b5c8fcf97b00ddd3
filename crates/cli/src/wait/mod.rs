//! `--wait`: follows resources until they are where they should be.

pub mod bundle;
pub mod fast_restore;
pub mod image;
pub mod instance;
mod reporter;
pub mod snapshot;
pub mod task;
pub mod volume;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use hearth_proto::v1::StateReason;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

use crate::client::Client;
use crate::error::CliError;
use crate::human;
use reporter::Reporter;

/// What the control plane sends of watched resources.
pub type Changes<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// How far a resource is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// State and step, in a few words.
    pub text: String,
    /// In the unit of `total`.
    pub done: u64,
    /// 0 = not known.
    pub total: u64,
    /// Whether both are bytes; percent otherwise.
    pub bytes: bool,
}

impl Shown {
    /// Only words.
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    /// With percent of it done.
    pub fn percent(text: impl Into<String>, percent: u32) -> Self {
        Self { text: text.into(), done: percent.min(100).into(), total: 100, bytes: false }
    }

    fn share(&self) -> String {
        match (self.total, self.bytes) {
            (0, false) => String::new(),
            _ => human::progress(self.done, self.total),
        }
    }
}

/// Whether waiting goes on.
#[derive(Debug)]
pub enum Verdict {
    /// It does.
    Open,
    /// The goal is reached.
    Reached,
    /// The goal cannot be reached any more without another call.
    Missed(CliError),
}

/// A kind of resource that can be waited for.
pub trait Followed: Sized {
    /// What it is waited for to become.
    type Goal: Clone;

    /// Id.
    fn id(&self) -> &str;
    /// How far it is.
    fn shown(&self) -> Shown;
    /// Where it stands to the goal.
    fn judge(&self, goal: &Self::Goal) -> Verdict;
    /// "running", "available": behind "is not".
    fn goal_name(goal: &Self::Goal) -> String;
    /// Whether one that is gone for good is where it should be.
    fn gone_is_reached(goal: &Self::Goal) -> bool;
    /// Each resource at once and again at every change.
    fn watch(client: &Client, ids: Vec<String>) -> impl Future<Output = Result<Changes<Self>, CliError>>;
    /// Those of the resources that exist.
    fn existing(client: &Client, ids: &[String]) -> impl Future<Output = Result<Vec<Self>, CliError>>;
}

/// Time between two looks at what the API has no watch of.
const INTERVAL: Duration = Duration::from_secs(1);

/// A watch of what is asked for again and again: `first` at once, then what each look sees. A stream that ends is begun again, and the
/// first look tells errors as they are.
fn polled<T, F>(first: Vec<T>, look: impl Fn() -> F + Send + 'static) -> Changes<T>
where
    T: Send + 'static,
    F: Future<Output = Result<Vec<T>, CliError>> + Send,
{
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut seen = first;
        loop {
            for one in seen {
                if sender.send(Ok(one)).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = sender.closed() => return,
            }
            seen = match look().await {
                Ok(seen) => seen,
                Err(_) => return,
            };
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

/// Waits until every resource has reached the goal. Survives restarts of the control plane.
pub async fn until<T: Followed>(
    client: &Client,
    ids: &[String],
    goal: T::Goal,
    timeout: Duration,
) -> Result<(), CliError> {
    let mut reporter = Reporter::new();
    let open = ids.iter().map(|id| (id.clone(), "not seen yet".to_owned())).collect();
    let mut follower = Follower::<T> { client, open, goal, reporter: &mut reporter };
    let result = tokio::time::timeout(timeout, follower.follow()).await;
    let error = match result {
        Ok(result) => result,
        Err(_) => {
            let rest: Vec<_> = follower.open.iter().map(|(id, state)| format!("{id} is {state}")).collect();
            let (goal, time) = (T::goal_name(&follower.goal), human::duration(timeout));
            Err(CliError::Timeout(format!("not {goal} after {time}: {}", rest.join(", "))))
        }
    };
    reporter.end();
    error
}

struct Follower<'a, T: Followed> {
    client: &'a Client,
    /// Ids that are waited for, with what was last seen of them.
    open: BTreeMap<String, String>,
    goal: T::Goal,
    reporter: &'a mut Reporter,
}

impl<T: Followed> Follower<'_, T> {
    async fn follow(&mut self) -> Result<(), CliError> {
        let mut pause = Duration::from_millis(100);
        while !self.open.is_empty() {
            match self.watch().await {
                Err(error) if error.is_transient() => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
                Ok(()) if !self.open.is_empty() => tokio::time::sleep(pause).await,
                Err(error) if T::gone_is_reached(&self.goal) && error.exit_code() == 3 => {
                    match self.forget_gone().await {
                        Err(error) if error.is_transient() => tokio::time::sleep(pause).await,
                        result => result?,
                    }
                }
                result => return result,
            }
        }
        Ok(())
    }

    /// One stream, until all goals are reached or it ends.
    async fn watch(&mut self) -> Result<(), CliError> {
        let mut changes = T::watch(self.client, self.open.keys().cloned().collect()).await?;
        while !self.open.is_empty() {
            let Some(change) = changes.next().await else { return Ok(()) };
            let resource = change.map_err(|status| self.client.failure(status))?;
            let Some(state) = self.open.get_mut(resource.id()) else { continue };
            let shown = resource.shown();
            state.clone_from(&shown.text);
            let verdict = resource.judge(&self.goal);
            self.reporter.show(resource.id(), &shown, matches!(verdict, Verdict::Reached));
            match verdict {
                Verdict::Open => {}
                Verdict::Reached => {
                    self.open.remove(resource.id());
                }
                Verdict::Missed(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes those that are gone for good as having reached the goal.
    async fn forget_gone(&mut self) -> Result<(), CliError> {
        let ids: Vec<String> = self.open.keys().cloned().collect();
        let left = T::existing(self.client, &ids).await?;
        for id in ids.iter().filter(|id| !left.iter().any(|resource| resource.id() == *id)) {
            self.open.remove(id);
            self.reporter.show(id, &Shown::text("gone"), true);
        }
        Ok(())
    }
}

/// "i-1 is stopped and will not be running: why (Code)".
fn missed(id: &str, state: &str, goal: &str, reason: Option<&StateReason>) -> CliError {
    let why = reason.cloned().unwrap_or_default();
    let mut message = format!("{id} is {state} and will not be {goal}");
    match (why.message.is_empty(), why.code.is_empty()) {
        (false, false) => message = format!("{message}: {} ({})", why.message.trim_end_matches('.'), why.code),
        (false, true) => message = format!("{message}: {}", why.message),
        (true, false) => message = format!("{message} ({})", why.code),
        (true, true) => {}
    }
    CliError::Failed { message, reason: why.code }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missed_is_told_with_its_reason() {
        let told = |code: &str, message: &str| {
            let reason = StateReason { code: code.to_owned(), message: message.to_owned() };
            missed("i-1", "stopped", "running", Some(&reason)).to_string()
        };
        assert_eq!(told("", ""), "i-1 is stopped and will not be running");
        assert_eq!(told("Server.X", "no room."), "i-1 is stopped and will not be running: no room (Server.X)");
        assert_eq!(told("", "no room"), "i-1 is stopped and will not be running: no room");
        assert_eq!(told("Server.X", ""), "i-1 is stopped and will not be running (Server.X)");
    }

    #[test]
    fn a_share_is_shown_when_there_is_one() {
        assert_eq!(Shown::text("pending").share(), "");
        assert_eq!(Shown::percent("pending", 45).share(), "45 %");
        assert_eq!(Shown::percent("pending", 450).share(), "100 %");
        assert_eq!(Shown { done: 5, bytes: true, ..Shown::default() }.share(), "5 B");
    }
}
