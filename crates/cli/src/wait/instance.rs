//! Waiting for instances.

use hearth_proto::v1::{Instance, InstanceState, StatusCheck, WatchInstancesRequest};

use super::{Changes, Followed, Shown, Verdict, missed};
use crate::client::Client;
use crate::commands::lookup;
use crate::error::CliError;
use crate::view::instance::state_name;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// This state.
    State(InstanceState),
    /// Running, and the guest has answered.
    StatusOk,
}

impl Goal {
    fn reached(self, instance: &Instance) -> bool {
        match self {
            Self::State(state) => instance.state() == state,
            Self::StatusOk => {
                instance.state() == InstanceState::Running
                    && instance.instance_status() == StatusCheck::Ok
                    && instance.system_status() == StatusCheck::Ok
            }
        }
    }

    fn missed(self, instance: &Instance) -> bool {
        use InstanceState::{Running, ShuttingDown, Stopped, Stopping, Terminated};
        let state = instance.state();
        match self {
            Self::State(Terminated) => false,
            Self::State(Stopped) => matches!(state, ShuttingDown | Terminated),
            Self::State(Running) | Self::StatusOk => matches!(state, Stopping | Stopped | ShuttingDown | Terminated),
            Self::State(_) => state == Terminated,
        }
    }
}

impl Followed for Instance {
    type Goal = Goal;

    fn id(&self) -> &str {
        &self.instance_id
    }

    fn shown(&self) -> Shown {
        let state = state_name(self.state());
        let stable =
            matches!(self.state(), InstanceState::Running | InstanceState::Stopped | InstanceState::Terminated);
        match self.progress.as_ref().filter(|progress| !progress.step.is_empty() && !stable) {
            Some(progress) => Shown {
                text: format!("{state}: {}", progress.step),
                done: progress.done_bytes,
                total: progress.total_bytes,
                bytes: true,
            },
            None => Shown::text(state),
        }
    }

    fn judge(&self, goal: &Goal) -> Verdict {
        if goal.reached(self) {
            return Verdict::Reached;
        }
        if !goal.missed(self) {
            return Verdict::Open;
        }
        let (state, wanted) = (state_name(self.state()), Self::goal_name(goal));
        Verdict::Missed(missed(&self.instance_id, &state, &wanted, self.state_reason.as_ref()))
    }

    fn goal_name(goal: &Goal) -> String {
        match goal {
            Goal::State(state) => state_name(*state),
            Goal::StatusOk => "running with passed status checks".to_owned(),
        }
    }

    /// Terminated so long ago that it is forgotten.
    fn gone_is_reached(goal: &Goal) -> bool {
        *goal == Goal::State(InstanceState::Terminated)
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let request = WatchInstancesRequest { instance_ids: ids };
        Ok(Box::pin(client.unwrap(client.instances().watch_instances(request).await)?))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        lookup::list_instances(client, &[], &[lookup::any_of("instance-id", ids)]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(state: InstanceState, check: StatusCheck) -> Instance {
        Instance {
            instance_id: "i-1".to_owned(),
            state: state.into(),
            system_status: check.into(),
            instance_status: check.into(),
            ..Instance::default()
        }
    }

    #[test]
    fn goals_are_reached_missed_or_open() {
        use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
        let judge = |goal: Goal, state| {
            let instance = instance(state, StatusCheck::Initializing);
            (goal.reached(&instance), goal.missed(&instance))
        };
        let running = Goal::State(Running);
        assert_eq!(judge(running, Pending), (false, false));
        assert_eq!(judge(running, Running), (true, false));
        for state in [Stopping, Stopped, ShuttingDown, Terminated] {
            assert_eq!(judge(running, state), (false, true));
        }
        assert_eq!(judge(Goal::State(Stopped), Stopping), (false, false));
        assert_eq!(judge(Goal::State(Stopped), Terminated), (false, true));
        assert_eq!(judge(Goal::State(Terminated), Running), (false, false));
        assert_eq!(judge(Goal::StatusOk, Running), (false, false));
        assert!(Goal::StatusOk.reached(&instance(Running, StatusCheck::Ok)));
    }

    #[test]
    fn a_launch_without_room_is_told_as_such() {
        let mut instance = instance(InstanceState::Terminated, StatusCheck::Unspecified);
        instance.state_reason = Some(hearth_proto::v1::StateReason {
            code: "Server.InsufficientInstanceCapacity".to_owned(),
            message: "no host has 4 vCPUs free.".to_owned(),
        });
        let Verdict::Missed(error) = instance.judge(&Goal::State(InstanceState::Running)) else { panic!() };
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("no host has 4 vCPUs free (Server.Insufficient"), "{error}");
    }
}
