//! Waiting for tasks that have no watch.

use hearth_proto::v1::{ReplaceRootVolumeTask, ReplaceRootVolumeTaskState, StoreImageTask, StoreImageTaskState};

use super::{Changes, Followed, Shown, Verdict, missed, polled};
use crate::client::Client;
use crate::commands::lookup;
use crate::error::CliError;
use crate::view::task::{replacement_state, store_state};

/// That it has done its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done;

impl Followed for StoreImageTask {
    type Goal = Done;

    fn id(&self) -> &str {
        &self.image_id
    }

    fn shown(&self) -> Shown {
        let state = store_state(self.state());
        match self.state() {
            StoreImageTaskState::InProgress => Shown::percent(state, self.progress),
            _ => Shown::text(state),
        }
    }

    fn judge(&self, goal: &Done) -> Verdict {
        match self.state() {
            StoreImageTaskState::Completed => Verdict::Reached,
            StoreImageTaskState::InProgress | StoreImageTaskState::Unspecified => Verdict::Open,
            StoreImageTaskState::Failed => {
                let (state, wanted) = (store_state(self.state()), Self::goal_name(goal));
                Verdict::Missed(missed(&self.image_id, &state, &wanted, self.state_reason.as_ref()))
            }
        }
    }

    fn goal_name(_: &Done) -> String {
        store_state(StoreImageTaskState::Completed)
    }

    fn gone_is_reached(_: &Done) -> bool {
        false
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let client = client.clone();
        let first = newest(lookup::list_store_tasks(&client, &ids, &[]).await?);
        Ok(polled(first, move || {
            let (client, ids) = (client.clone(), ids.clone());
            async move { Ok(newest(lookup::list_store_tasks(&client, &ids, &[]).await?)) }
        }))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        Ok(newest(lookup::list_store_tasks(client, ids, &[]).await?))
    }
}

/// An image may have been stored before: the last task of each counts.
fn newest(mut tasks: Vec<StoreImageTask>) -> Vec<StoreImageTask> {
    tasks.sort_by(|a, b| (&a.image_id, &b.start_time).cmp(&(&b.image_id, &a.start_time)));
    tasks.dedup_by(|later, first| later.image_id == first.image_id);
    tasks
}

impl Followed for ReplaceRootVolumeTask {
    type Goal = Done;

    fn id(&self) -> &str {
        &self.task_id
    }

    fn shown(&self) -> Shown {
        Shown::text(replacement_state(self.state()))
    }

    fn judge(&self, goal: &Done) -> Verdict {
        use ReplaceRootVolumeTaskState as S;
        match self.state() {
            S::Succeeded => Verdict::Reached,
            S::Pending | S::InProgress | S::Failing | S::Unspecified => Verdict::Open,
            S::Failed | S::FailedDetached => {
                let (state, wanted) = (replacement_state(self.state()), Self::goal_name(goal));
                Verdict::Missed(missed(&self.task_id, &state, &wanted, self.state_reason.as_ref()))
            }
        }
    }

    fn goal_name(_: &Done) -> String {
        "done".to_owned()
    }

    fn gone_is_reached(_: &Done) -> bool {
        false
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let client = client.clone();
        let first = lookup::list_replacements(&client, &ids).await?;
        Ok(polled(first, move || {
            let (client, ids) = (client.clone(), ids.clone());
            async move { lookup::list_replacements(&client, &ids).await }
        }))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        let all = lookup::list_replacements(client, &[]).await?;
        Ok(all.into_iter().filter(|task| ids.contains(&task.task_id)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hearth_proto::v1::StateReason;

    fn reason() -> Option<StateReason> {
        Some(StateReason { code: "Server.X".into(), message: "it broke".into() })
    }

    #[test]
    fn tasks_are_done_or_will_never_be() {
        let mut store = StoreImageTask { image_id: "ami-1".into(), progress: 7, ..Default::default() };
        store.set_state(StoreImageTaskState::InProgress);
        assert!(matches!(store.judge(&Done), Verdict::Open));
        assert_eq!(store.shown(), Shown::percent("in-progress", 7));
        store.set_state(StoreImageTaskState::Completed);
        assert!(matches!(store.judge(&Done), Verdict::Reached));
        store.set_state(StoreImageTaskState::Failed);
        store.state_reason = reason();
        let Verdict::Missed(error) = store.judge(&Done) else { panic!() };
        assert_eq!(error.to_string(), "ami-1 is failed and will not be completed: it broke (Server.X)");

        let mut replace = ReplaceRootVolumeTask { task_id: "replacevol-1".into(), ..Default::default() };
        replace.set_state(ReplaceRootVolumeTaskState::InProgress);
        assert!(matches!(replace.judge(&Done), Verdict::Open));
        replace.set_state(ReplaceRootVolumeTaskState::Succeeded);
        assert!(matches!(replace.judge(&Done), Verdict::Reached));
        replace.set_state(ReplaceRootVolumeTaskState::FailedDetached);
        replace.state_reason = reason();
        let Verdict::Missed(error) = replace.judge(&Done) else { panic!() };
        assert!(error.to_string().starts_with("replacevol-1 is failed-detached"), "{error}");
    }

    #[test]
    fn the_last_task_of_an_image_counts() {
        let task = |image: &str, start: &str, id: &str| StoreImageTask {
            image_id: image.into(),
            start_time: start.into(),
            task_id: id.into(),
            ..Default::default()
        };
        let found = newest(vec![task("ami-1", "1", "a"), task("ami-2", "1", "b"), task("ami-1", "2", "c")]);
        assert_eq!(found.iter().map(|task| task.task_id.as_str()).collect::<Vec<_>>(), ["c", "b"]);
    }
}
