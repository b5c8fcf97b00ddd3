//! Waiting for snapshots.

use hearth_proto::v1::{Snapshot, SnapshotState, WatchSnapshotsRequest};

use super::{Changes, Followed, Shown, Verdict, missed};
use crate::client::Client;
use crate::commands::lookup;
use crate::error::CliError;
use crate::human;
use crate::view::snapshot::state_name;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed;

impl Followed for Snapshot {
    type Goal = Completed;

    fn id(&self) -> &str {
        &self.snapshot_id
    }

    fn shown(&self) -> Shown {
        let state = state_name(self.state());
        match self.state() {
            SnapshotState::Pending | SnapshotState::Unspecified => Shown::percent(state, self.progress),
            SnapshotState::Completed => Shown::text(format!("{state}, {} added", human::bytes(self.incremental_bytes))),
            SnapshotState::Error => Shown::text(state),
        }
    }

    fn judge(&self, goal: &Completed) -> Verdict {
        match self.state() {
            SnapshotState::Completed => Verdict::Reached,
            SnapshotState::Pending | SnapshotState::Unspecified => Verdict::Open,
            SnapshotState::Error => {
                let state = state_name(self.state());
                let wanted = Self::goal_name(goal);
                Verdict::Missed(missed(&self.snapshot_id, &format!("in {state}"), &wanted, self.state_reason.as_ref()))
            }
        }
    }

    fn goal_name(_: &Completed) -> String {
        state_name(SnapshotState::Completed)
    }

    fn gone_is_reached(_: &Completed) -> bool {
        false
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let request = WatchSnapshotsRequest { snapshot_ids: ids };
        Ok(Box::pin(client.unwrap(client.snapshots().watch_snapshots(request).await)?))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        lookup::list_snapshots(client, &[], &[lookup::any_of("snapshot-id", ids)]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hearth_proto::v1::StateReason;

    #[test]
    fn a_snapshot_is_completed_or_will_never_be() {
        let reason = StateReason { code: "Server.InternalError".to_owned(), message: "the host is gone".to_owned() };
        let mut snapshot = Snapshot {
            snapshot_id: "snap-1".to_owned(),
            state: SnapshotState::Pending.into(),
            progress: 30,
            incremental_bytes: 5 << 20,
            state_reason: Some(reason),
            ..Snapshot::default()
        };
        assert!(matches!(snapshot.judge(&Completed), Verdict::Open));
        assert_eq!(snapshot.shown(), Shown::percent("pending", 30));
        snapshot.set_state(SnapshotState::Completed);
        assert!(matches!(snapshot.judge(&Completed), Verdict::Reached));
        assert_eq!(snapshot.shown(), Shown::text("completed, 5 MiB added"));
        snapshot.set_state(SnapshotState::Error);
        let Verdict::Missed(error) = snapshot.judge(&Completed) else { panic!() };
        let wanted = "snap-1 is in error and will not be completed: the host is gone (Server.InternalError)";
        assert_eq!(error.to_string(), wanted);
    }
}
