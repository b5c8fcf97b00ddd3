//! Waiting for bundles. The API has no watch of them: they are asked for again and again.

use hearth_proto::v1::{BundleTask, BundleTaskState};

use super::{Changes, Followed, Shown, Verdict, missed, polled};
use crate::client::Client;
use crate::commands::lookup;
use crate::error::CliError;
use crate::view::bundle::state_name;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Complete;

impl Followed for BundleTask {
    type Goal = Complete;

    fn id(&self) -> &str {
        &self.bundle_id
    }

    fn shown(&self) -> Shown {
        let state = state_name(self.state());
        match self.state() {
            BundleTaskState::Storing => Shown::percent(state, self.progress),
            _ => Shown::text(state),
        }
    }

    fn judge(&self, goal: &Complete) -> Verdict {
        match self.state() {
            BundleTaskState::Complete => Verdict::Reached,
            BundleTaskState::Pending | BundleTaskState::Storing | BundleTaskState::Unspecified => Verdict::Open,
            BundleTaskState::Failed => {
                let (state, wanted) = (state_name(self.state()), Self::goal_name(goal));
                Verdict::Missed(missed(&self.bundle_id, &state, &wanted, self.state_reason.as_ref()))
            }
        }
    }

    fn goal_name(_: &Complete) -> String {
        state_name(BundleTaskState::Complete)
    }

    fn gone_is_reached(_: &Complete) -> bool {
        false
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let client = client.clone();
        let first = lookup::list_bundle_tasks(&client, &ids, &[]).await?;
        Ok(polled(first, move || {
            let (client, ids) = (client.clone(), ids.clone());
            async move { lookup::list_bundle_tasks(&client, &ids, &[]).await }
        }))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        let all = lookup::list_bundle_tasks(client, &[], &[]).await?;
        Ok(all.into_iter().filter(|task| ids.contains(&task.bundle_id)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hearth_proto::v1::StateReason;

    #[test]
    fn a_bundle_is_complete_or_will_never_be() {
        let mut task = BundleTask { bundle_id: "bun-1".to_owned(), progress: 30, ..BundleTask::default() };
        task.set_state(BundleTaskState::Storing);
        assert!(matches!(task.judge(&Complete), Verdict::Open));
        assert_eq!(task.shown(), Shown::percent("storing", 30));
        task.set_state(BundleTaskState::Complete);
        assert!(matches!(task.judge(&Complete), Verdict::Reached));
        task.set_state(BundleTaskState::Failed);
        task.state_reason = Some(StateReason { code: "Server.X".into(), message: "the disk broke".into() });
        let Verdict::Missed(error) = task.judge(&Complete) else { panic!() };
        assert_eq!(error.to_string(), "bun-1 is failed and will not be complete: the disk broke (Server.X)");
    }
}
