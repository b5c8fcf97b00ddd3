//! `--wait`: follows instances until they are where they should be.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hearth_proto::v1::{Instance, InstanceState, StatusCheck, WatchInstancesRequest};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::client::Client;
use crate::error::CliError;
use crate::human;
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

    /// Whether the goal cannot be reached any more without another call.
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

    fn name(self) -> String {
        match self {
            Self::State(state) => state_name(state),
            Self::StatusOk => "running with passed status checks".to_owned(),
        }
    }
}

/// Shows how instances change: bars on a terminal, lines elsewhere. All on standard error.
struct Reporter {
    terminal: bool,
    bars: MultiProgress,
    shown: BTreeMap<String, (ProgressBar, String)>,
    began: Instant,
}

impl Reporter {
    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { terminal, bars: MultiProgress::new(), shown: BTreeMap::new(), began: Instant::now() }
    }

    fn show(&mut self, instance: &Instance, reached: bool) {
        let mut text = state_name(instance.state());
        let mut share = String::new();
        if let Some(progress) = instance.progress.as_ref().filter(|progress| !progress.step.is_empty() && !reached) {
            text = format!("{text}: {}", progress.step);
            share = human::progress(progress.done_bytes, progress.total_bytes);
        }
        let id = &instance.instance_id;
        let bars = &self.bars;
        let (bar, last) = self.shown.entry(id.clone()).or_insert_with(|| {
            let bar = bars.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.set_prefix(id.clone());
            bar.enable_steady_tick(Duration::from_millis(200));
            (bar, String::new())
        });
        if !self.terminal {
            // Lines of a log: one for each step, not for each percent.
            if *last != text {
                eprintln!("{id} {text} after {}", human::duration(self.began.elapsed()));
                *last = text;
            }
        } else if reached {
            bar.finish_with_message(text);
        } else {
            bar.set_message(format!("{text} {share}"));
        }
    }

    fn end(&self) {
        for (bar, _) in self.shown.values() {
            if !bar.is_finished() {
                bar.abandon();
            }
        }
    }
}

/// Waits until every instance has reached the goal. Survives restarts of the control plane.
pub async fn instances(client: &Client, ids: &[String], goal: Goal, timeout: Duration) -> Result<(), CliError> {
    let mut reporter = Reporter::new();
    let mut open: BTreeMap<String, String> = ids.iter().map(|id| (id.clone(), "not seen yet".to_owned())).collect();
    let result = tokio::time::timeout(timeout, follow(client, &mut open, goal, &mut reporter)).await;
    reporter.end();
    match result {
        Ok(result) => result,
        Err(_) => {
            let rest: Vec<_> = open.iter().map(|(id, state)| format!("{id} is {state}")).collect();
            let text = format!("not {} after {}: {}", goal.name(), human::duration(timeout), rest.join(", "));
            Err(CliError::Timeout(text))
        }
    }
}

async fn follow(
    client: &Client,
    open: &mut BTreeMap<String, String>,
    goal: Goal,
    reporter: &mut Reporter,
) -> Result<(), CliError> {
    let mut pause = Duration::from_millis(100);
    while !open.is_empty() {
        match watch(client, open, goal, reporter).await {
            Err(error) if error.is_transient() => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
            Ok(()) if !open.is_empty() => tokio::time::sleep(pause).await,
            // Terminated so long ago that it is forgotten.
            Err(error) if goal == Goal::State(InstanceState::Terminated) && error.exit_code() == 3 => return Ok(()),
            result => return result,
        }
    }
    Ok(())
}

/// One stream, until all goals are reached or it ends.
async fn watch(
    client: &Client,
    open: &mut BTreeMap<String, String>,
    goal: Goal,
    reporter: &mut Reporter,
) -> Result<(), CliError> {
    let request = WatchInstancesRequest { instance_ids: open.keys().cloned().collect() };
    let mut stream = client.unwrap(client.instances().watch_instances(request).await)?;
    while !open.is_empty() {
        let Some(instance) = stream.message().await.map_err(|status| client.failure(status))? else { return Ok(()) };
        let reached = goal.reached(&instance);
        if let Some(state) = open.get_mut(&instance.instance_id) {
            *state = state_name(instance.state());
            reporter.show(&instance, reached);
        }
        if reached {
            open.remove(&instance.instance_id);
        } else if goal.missed(&instance) && open.contains_key(&instance.instance_id) {
            return Err(missed(&instance, goal));
        }
    }
    Ok(())
}

fn missed(instance: &Instance, goal: Goal) -> CliError {
    let why = instance.state_reason.clone().unwrap_or_default();
    let mut message =
        format!("{} is {} and will not be {}", instance.instance_id, state_name(instance.state()), goal.name());
    match (why.message.is_empty(), why.code.is_empty()) {
        (false, _) => message = format!("{message}: {} ({})", why.message.trim_end_matches('.'), why.code),
        (true, false) => message = format!("{message} ({})", why.code),
        (true, true) => {}
    }
    CliError::Failed { message, reason: why.code }
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
        let error = missed(&instance, Goal::State(InstanceState::Running));
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("no host has 4 vCPUs free (Server.Insufficient"), "{error}");
    }
}
