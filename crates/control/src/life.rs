//! The life of an instance as pure functions of its two records: what is wanted (spec), what was seen (status), and what an
//! agent's report changes in them. The state that users see is derived, so an API call needs to write nothing but the spec.

use hearth_proto::record::v1::{InstanceSpec, InstanceStatus};
use hearth_proto::v1;
use hearth_types::{InstanceState, StateReason};
use v1::{ObservedState, RunState};

use crate::clock;
use crate::tables::SCHEMA_VERSION;
use crate::volumes;

/// What a power-off from inside does.
pub(crate) const SHUTDOWN_STOP: &str = "stop";
/// See [`SHUTDOWN_STOP`].
pub(crate) const SHUTDOWN_TERMINATE: &str = "terminate";

/// EC2's state of an instance. Once what is wanted was seen, the state stays until somebody wants otherwise: a host that reboots
/// or an agent that talks nonsense shows in the status checks, as with EC2.
pub(crate) fn state_of(spec: &InstanceSpec, status: Option<&InstanceStatus>) -> InstanceState {
    let reached = status.is_some_and(|status| status.reached_generation >= spec.run_generation);
    match (spec.run(), reached) {
        (RunState::Terminated, true) => InstanceState::Terminated,
        (RunState::Terminated, false) => InstanceState::ShuttingDown,
        (RunState::Stopped, true) => InstanceState::Stopped,
        (RunState::Stopped, false) => InstanceState::Stopping,
        (RunState::Running | RunState::Unspecified, true) => InstanceState::Running,
        (RunState::Running | RunState::Unspecified, false) => InstanceState::Pending,
    }
}

/// Whether what was observed is what is wanted.
fn fulfils(run: RunState, observed: ObservedState) -> bool {
    match run {
        RunState::Terminated => observed == ObservedState::Gone,
        RunState::Stopped => matches!(observed, ObservedState::Stopped | ObservedState::Gone),
        RunState::Running | RunState::Unspecified => observed == ObservedState::Running,
    }
}

/// Whether the instance takes vCPUs, memory, ECU and instance store of its host. A stopped one does not (it keeps its root
/// volume); starting it admits it again.
pub(crate) fn holds_resources(spec: &InstanceSpec, status: Option<&InstanceStatus>) -> bool {
    !matches!(state_of(spec, status), InstanceState::Stopped | InstanceState::Terminated)
}

/// Whether its root disk is its host's, made of a bundle: it cannot be stopped, and ends when its guest powers off.
pub(crate) fn has_store_root(spec: &InstanceSpec) -> bool {
    spec.spec.as_ref().is_some_and(|spec| spec.bundle_root.is_some())
}

/// What the host should make of it.
pub(crate) fn desired(spec: &InstanceSpec) -> v1::DesiredInstance {
    v1::DesiredInstance {
        instance_id: spec.instance_id.clone(),
        generation: spec.generation,
        run: spec.run,
        force: spec.force,
        reboot_generation: spec.reboot_generation,
        spec: spec.spec.clone(),
    }
}

/// Changes what is wanted; the generation tells the host that it changed.
pub(crate) fn want(
    spec: &InstanceSpec,
    run: RunState,
    force: bool,
    reason: Option<StateReason>,
    transition_reason: String,
) -> InstanceSpec {
    let generation = spec.generation.saturating_add(1);
    InstanceSpec {
        generation,
        run_generation: if spec.run() == run { spec.run_generation } else { generation },
        run: run.into(),
        force,
        reason: reason.map(to_proto),
        transition_reason,
        ..spec.clone()
    }
}

/// A reason as the API and the records have it.
pub(crate) fn to_proto(reason: StateReason) -> v1::StateReason {
    v1::StateReason { code: reason.code, message: reason.message }
}

/// The user asked for it.
pub(crate) fn by_user(now_ms: u64) -> (Option<StateReason>, String) {
    let reason = StateReason::new(
        StateReason::USER_INITIATED_SHUTDOWN,
        format!("{}: User initiated shutdown", StateReason::USER_INITIATED_SHUTDOWN),
    );
    (Some(reason), format!("User initiated ({})", clock::gmt(now_ms)))
}

/// From where and when a report came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin<'a> {
    pub host_id: &'a str,
    pub agent_epoch: u64,
    pub now_ms: u64,
}

/// What follows from a report.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Change {
    /// The new status; `None` = nothing worth writing.
    pub status: Option<InstanceStatus>,
    /// The new spec, where EC2 changes what is wanted by itself.
    pub spec: Option<InstanceSpec>,
    /// The host refused the launch for want of room: another one may be tried before `spec` (which gives up) is written.
    pub refused: bool,
    /// Volumes that have left the instance, with `spec`.
    pub detached: Vec<String>,
}

/// Whether a report is older than what is known already.
pub(crate) fn is_stale(status: Option<&InstanceStatus>, report: &v1::InstanceReport, origin: Origin<'_>) -> bool {
    status.is_some_and(|status| {
        status.host_id == origin.host_id
            && (origin.agent_epoch, report.sequence) < (status.agent_epoch, status.sequence)
    })
}

/// Applies an agent's report of an instance that is placed on its host.
pub(crate) fn apply_report(
    spec: &InstanceSpec,
    status: Option<&InstanceStatus>,
    report: &v1::InstanceReport,
    origin: Origin<'_>,
) -> Change {
    // An agent cannot have seen what was never said; believing it would settle later wishes in advance.
    let observed_generation = report.observed_generation.min(spec.generation);
    if is_stale(status, report, origin) {
        return Change::default();
    }
    let old = status.cloned().unwrap_or_default();
    let heard = observed_generation >= spec.run_generation;
    let mut new = InstanceStatus {
        schema_version: SCHEMA_VERSION,
        state: report.state,
        observed_generation: observed_generation.max(old.observed_generation),
        observed_reboot_generation: report.observed_reboot_generation.max(old.observed_reboot_generation),
        reason: report.reason.clone(),
        guest_responded: report.guest_responded,
        boot_count: report.boot_count,
        volumes: report.volumes.clone(),
        host_id: origin.host_id.to_owned(),
        agent_epoch: origin.agent_epoch,
        sequence: report.sequence,
        ..old.clone()
    };
    if heard && fulfils(spec.run(), report.state()) {
        new.reached_generation = spec.run_generation;
    }
    if report.state() == ObservedState::Running {
        new.has_run = true;
        if old.state() != ObservedState::Running || old.boot_count != report.boot_count {
            new.running_since_ms = origin.now_ms;
        }
    } else {
        new.guest_responded = false;
    }
    if state_of(spec, Some(&new)) == InstanceState::Terminated && old.terminated_ms == 0 {
        new.terminated_ms = origin.now_ms;
    }
    let mut change = Change::default();
    if heard && spec.run() == RunState::Running {
        follow_up(spec, &new, report, origin, &mut change);
    }
    let wanted = change.spec.as_ref().unwrap_or(spec);
    // What the host says now, not what it once reached: a guest that runs after all has its volumes open.
    let stopped = state_of(wanted, Some(&new)) == InstanceState::Stopped
        && matches!(report.state(), ObservedState::Stopped | ObservedState::Gone);
    if let Some((spec, detached)) = volumes::take_detached(wanted, &report.volumes, stopped) {
        change.spec = Some(spec);
        change.detached = detached;
    }
    if differs(&old, &new) {
        change.status = Some(new);
    }
    change
}

/// Whether a status says anything new besides where in the stream of reports it stands.
fn differs(old: &InstanceStatus, new: &InstanceStatus) -> bool {
    let position = |status: &InstanceStatus| InstanceStatus { agent_epoch: 0, sequence: 0, ..status.clone() };
    position(old) != position(new)
}

/// What EC2 does by itself when a guest powers off or a launch fails.
fn follow_up(
    spec: &InstanceSpec,
    new: &InstanceStatus,
    report: &v1::InstanceReport,
    origin: Origin<'_>,
    change: &mut Change,
) {
    let when = clock::gmt(origin.now_ms);
    match report.state() {
        ObservedState::Stopped | ObservedState::Stopping if report.guest_powered_off => {
            let run = match spec.instance_initiated_shutdown_behavior.as_str() {
                _ if has_store_root(spec) => RunState::Terminated,
                SHUTDOWN_TERMINATE => RunState::Terminated,
                _ => RunState::Stopped,
            };
            let reason = StateReason::new(
                StateReason::INSTANCE_INITIATED_SHUTDOWN,
                format!("{}: Instance initiated shutdown", StateReason::INSTANCE_INITIATED_SHUTDOWN),
            );
            change.spec = Some(want(spec, run, false, Some(reason), format!("Instance initiated ({when})")));
        }
        ObservedState::Failed => {
            let reason = report.reason.clone().map_or_else(
                || StateReason::new(StateReason::INTERNAL_ERROR, "the host gave no reason"),
                |reason| StateReason { code: reason.code, message: reason.message },
            );
            change.refused = reason.code == StateReason::INSUFFICIENT_CAPACITY && !new.has_run;
            // A launch that never ran ends as terminated; what ran before keeps its disks.
            let keeps = new.has_run && !has_store_root(spec);
            let run = if keeps { RunState::Stopped } else { RunState::Terminated };
            let text = format!("{} ({when})", reason.code);
            change.spec = Some(want(spec, run, true, Some(reason), text));
        }
        _ => {}
    }
}

/// A full report of the host lacks an instance that the host had before: its disks are gone.
pub(crate) fn apply_missing(spec: &InstanceSpec, status: Option<&InstanceStatus>, origin: Origin<'_>) -> Change {
    let known = status.filter(|status| {
        status.host_id == origin.host_id && !matches!(status.state(), ObservedState::Gone | ObservedState::Unspecified)
    });
    let Some(old) = known else { return Change::default() };
    let mut new = InstanceStatus {
        state: ObservedState::Gone.into(),
        guest_responded: false,
        agent_epoch: origin.agent_epoch,
        sequence: 0,
        ..old.clone()
    };
    match spec.run() {
        RunState::Running | RunState::Unspecified => {
            new.reason = Some(v1::StateReason {
                code: StateReason::INTERNAL_ERROR.to_owned(),
                message: "the host has lost the instance's disks; it is started anew from its image".to_owned(),
            });
        }
        RunState::Stopped => {
            new.reached_generation = spec.run_generation;
            new.reason = Some(v1::StateReason {
                code: StateReason::INTERNAL_ERROR.to_owned(),
                message: "the host has lost the instance's disks; a start makes new ones from its image".to_owned(),
            });
        }
        RunState::Terminated => {
            new.reached_generation = spec.run_generation;
            new.terminated_ms = origin.now_ms;
        }
    }
    Change { status: Some(new), ..Change::default() }
}

/// The operator vouches that the host is off for good.
pub(crate) fn host_removed(
    spec: &InstanceSpec,
    status: Option<&InstanceStatus>,
    now_ms: u64,
) -> (InstanceSpec, InstanceStatus) {
    let message = format!("the operator removed host {}", spec.host_id);
    let reason = StateReason::new(StateReason::HOST_FAILURE, message);
    let spec = match spec.run() {
        RunState::Terminated => spec.clone(),
        _ => want(spec, RunState::Terminated, true, Some(reason), format!("Host removed ({})", clock::gmt(now_ms))),
    };
    let status = InstanceStatus {
        schema_version: SCHEMA_VERSION,
        state: ObservedState::Gone.into(),
        reached_generation: spec.run_generation,
        terminated_ms: now_ms,
        guest_responded: false,
        ..status.cloned().unwrap_or_default()
    };
    (spec, status)
}

#[cfg(test)]
#[path = "life_test.rs"]
mod tests;
