//! Waiting for hosts that fetch snapshots.

use hearth_proto::v1::{FastSnapshotRestore, FastSnapshotRestoreState as State};

use super::{Changes, Followed, Shown, Verdict, polled};
use crate::client::Client;
use crate::commands::lookup;
use crate::error::CliError;
use crate::view::fast_restore::{key, state};

/// That the host has everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole;

/// Snapshots of `snapshot/host` names.
fn snapshots(keys: &[String]) -> Vec<String> {
    let mut ids: Vec<String> = keys.iter().filter_map(|key| Some(key.split_once('/')?.0.to_owned())).collect();
    ids.dedup();
    ids
}

async fn find(client: &Client, keys: &[String]) -> Result<Vec<FastSnapshotRestore>, CliError> {
    let found = lookup::list_fast_restores(client, &snapshots(keys), &[]).await?;
    Ok(found.into_iter().map(key).filter(|one| keys.contains(&one.snapshot_id)).collect())
}

impl Followed for FastSnapshotRestore {
    type Goal = Whole;

    fn id(&self) -> &str {
        &self.snapshot_id
    }

    fn shown(&self) -> Shown {
        let words = if self.reason.is_empty() { state(self.state()) } else { self.reason.clone() };
        Shown::percent(words, self.progress)
    }

    fn judge(&self, _: &Whole) -> Verdict {
        if self.state() == State::Enabled { Verdict::Reached } else { Verdict::Open }
    }

    fn goal_name(_: &Whole) -> String {
        state(State::Enabled)
    }

    fn gone_is_reached(_: &Whole) -> bool {
        false
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let client = client.clone();
        let first = find(&client, &ids).await?;
        Ok(polled(first, move || {
            let (client, ids) = (client.clone(), ids.clone());
            async move { find(&client, &ids).await }
        }))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        find(client, ids).await
    }
}
