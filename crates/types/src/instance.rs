//! The life of an instance: states, codes, legal transitions and reasons, as EC2 has them.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-lifecycle.html>

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// EC2's instance states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// Being placed or booted.
    Pending,
    /// Its VMM runs.
    Running,
    /// On its way to terminated.
    ShuttingDown,
    /// Gone; described for a while, then forgotten.
    Terminated,
    /// On its way to stopped.
    Stopping,
    /// Not running; its volumes are kept.
    Stopped,
}

impl InstanceState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Pending, Self::Running, Self::ShuttingDown, Self::Terminated, Self::Stopping, Self::Stopped];

    /// EC2's numeric code (low byte of `InstanceState.Code`).
    pub fn code(self) -> i32 {
        match self {
            Self::Pending => 0,
            Self::Running => 16,
            Self::ShuttingDown => 32,
            Self::Terminated => 48,
            Self::Stopping => 64,
            Self::Stopped => 80,
        }
    }

    /// EC2's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::ShuttingDown => "shutting-down",
            Self::Terminated => "terminated",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }

    /// Whether an instance may go from here to `next` in one step. Staying is not a step.
    pub fn may_become(self, next: Self) -> bool {
        use InstanceState::*;
        matches!(
            (self, next),
            (Pending, Running | Stopping | Stopped | ShuttingDown | Terminated)
                | (Running, Stopping | Stopped | ShuttingDown | Terminated)
                | (Stopping, Stopped | ShuttingDown | Terminated)
                | (Stopped, Pending | ShuttingDown | Terminated)
                | (ShuttingDown, Terminated)
        )
    }

    /// `Ok` when [`Self::may_become`] allows it.
    pub fn transition(self, next: Self) -> Result<Self, StateTransitionError> {
        if self.may_become(next) { Ok(next) } else { Err(StateTransitionError { from: self, to: next }) }
    }

    /// Nothing follows.
    pub fn is_final(self) -> bool {
        self == Self::Terminated
    }
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of EC2's instance states.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("'{0}' is not an instance state; states are pending, running, shutting-down, terminated, stopping, stopped")]
pub struct UnknownState(pub String);

impl FromStr for InstanceState {
    type Err = UnknownState;
    fn from_str(text: &str) -> Result<Self, UnknownState> {
        Self::ALL.into_iter().find(|state| state.name() == text).ok_or_else(|| UnknownState(text.to_owned()))
    }
}

/// A step the life of an instance does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("an instance cannot go from {from} to {to}")]
pub struct StateTransitionError {
    /// Where it stands.
    pub from: InstanceState,
    /// Where it was to go.
    pub to: InstanceState,
}

/// Why an instance is in its state; EC2's `StateReason`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateReason {
    /// EC2's code, e.g. `Client.UserInitiatedShutdown`.
    pub code: String,
    /// Text for people.
    pub message: String,
}

impl StateReason {
    /// The user asked for stop or terminate.
    pub const USER_INITIATED_SHUTDOWN: &'static str = "Client.UserInitiatedShutdown";
    /// The guest powered itself off.
    pub const INSTANCE_INITIATED_SHUTDOWN: &'static str = "Client.InstanceInitiatedShutdown";
    /// No host has room.
    pub const INSUFFICIENT_CAPACITY: &'static str = "Server.InsufficientInstanceCapacity";
    /// The host failed while launching.
    pub const INTERNAL_ERROR: &'static str = "Server.InternalError";
    /// The guest crashed (triple fault), its VMM died, or its root volume, which has booted before, does not boot any more.
    pub const CLIENT_INTERNAL_ERROR: &'static str = "Client.InternalError";
    /// The image has nothing to boot or is damaged.
    pub const INVALID_IMAGE: &'static str = "Client.InvalidImage";
    /// The host is gone.
    pub const HOST_FAILURE: &'static str = "Server.HostFailure";

    /// A reason with its code.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_are_ec2s() {
        let codes: Vec<_> = InstanceState::ALL.iter().map(|s| (s.name(), s.code())).collect();
        assert_eq!(
            codes,
            [
                ("pending", 0),
                ("running", 16),
                ("shutting-down", 32),
                ("terminated", 48),
                ("stopping", 64),
                ("stopped", 80)
            ]
        );
        for state in InstanceState::ALL {
            assert_eq!(state.name().parse::<InstanceState>().unwrap(), state);
        }
        assert!("gone".parse::<InstanceState>().is_err());
    }

    #[test]
    fn terminated_is_the_end_and_reachable_from_everywhere_else() {
        for state in InstanceState::ALL {
            assert!(!InstanceState::Terminated.may_become(state));
            assert!(!state.may_become(state));
            assert_eq!(state.may_become(InstanceState::Terminated), !state.is_final());
        }
    }

    #[test]
    fn shutting_down_never_turns_back() {
        for state in InstanceState::ALL {
            assert_eq!(InstanceState::ShuttingDown.may_become(state), state == InstanceState::Terminated);
        }
        assert!(InstanceState::Stopped.transition(InstanceState::Running).is_err());
    }
}
