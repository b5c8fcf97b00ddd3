use super::*;
use proptest::prelude::*;

const HOST: &str = "h-00000000000000001";

fn spec() -> InstanceSpec {
    InstanceSpec {
        schema_version: 1,
        instance_id: "i-00000000000000001".into(),
        generation: 1,
        run_generation: 1,
        run: RunState::Running.into(),
        host_id: HOST.into(),
        instance_initiated_shutdown_behavior: SHUTDOWN_STOP.into(),
        ..Default::default()
    }
}

fn origin() -> Origin<'static> {
    Origin { host_id: HOST, agent_epoch: 1, now_ms: 1_000 }
}

fn report(state: ObservedState, generation: u64, sequence: u64) -> v1::InstanceReport {
    v1::InstanceReport { state: state.into(), observed_generation: generation, sequence, ..Default::default() }
}

#[test]
fn a_life_goes_as_ec2s() {
    let mut spec = spec();
    let mut status = None;
    let see = |spec: &InstanceSpec, status: &mut Option<InstanceStatus>, state, generation, sequence| {
        let change = apply_report(spec, status.as_ref(), &report(state, generation, sequence), origin());
        assert_eq!(change.spec, None);
        *status = change.status.or(status.take());
        state_of(spec, status.as_ref())
    };
    assert_eq!(state_of(&spec, None), InstanceState::Pending);
    assert_eq!(see(&spec, &mut status, ObservedState::Preparing, 1, 1), InstanceState::Pending);
    assert_eq!(see(&spec, &mut status, ObservedState::Running, 1, 2), InstanceState::Running);
    spec = want(&spec, RunState::Stopped, false, None, String::new());
    assert_eq!(state_of(&spec, status.as_ref()), InstanceState::Stopping);
    // A report about the time before the stop was heard changes nothing.
    assert_eq!(see(&spec, &mut status, ObservedState::Running, 1, 3), InstanceState::Stopping);
    assert_eq!(see(&spec, &mut status, ObservedState::Stopped, 2, 4), InstanceState::Stopped);
    assert!(!holds_resources(&spec, status.as_ref()));
    spec = want(&spec, RunState::Running, false, None, String::new());
    assert_eq!(state_of(&spec, status.as_ref()), InstanceState::Pending);
    assert!(holds_resources(&spec, status.as_ref()));
    // Stopped again before the host heard of the start: it may be starting right now.
    let again = want(&spec, RunState::Stopped, false, None, String::new());
    assert_eq!(state_of(&again, status.as_ref()), InstanceState::Stopping);
    assert_eq!(see(&spec, &mut status, ObservedState::Running, 3, 5), InstanceState::Running);
    spec = want(&spec, RunState::Terminated, false, None, String::new());
    assert_eq!(see(&spec, &mut status, ObservedState::Stopping, 4, 6), InstanceState::ShuttingDown);
    assert_eq!(see(&spec, &mut status, ObservedState::Gone, 4, 7), InstanceState::Terminated);
    assert_eq!(status.unwrap().terminated_ms, 1_000);
}

#[test]
fn stale_reports_and_unheard_of_generations_do_not_count() {
    let spec = spec();
    let running = apply_report(&spec, None, &report(ObservedState::Running, 1, 9), origin()).status.unwrap();
    let late = report(ObservedState::Preparing, 1, 8);
    assert_eq!(apply_report(&spec, Some(&running), &late, origin()), Change::default());
    let next_epoch = Origin { agent_epoch: 2, ..origin() };
    assert!(apply_report(&spec, Some(&running), &late, next_epoch).status.is_some());
    let bold = apply_report(&spec, None, &report(ObservedState::Gone, u64::MAX, 1), origin()).status.unwrap();
    assert_eq!(bold.observed_generation, 1);
    let terminated = want(&spec, RunState::Terminated, false, None, String::new());
    assert_eq!(state_of(&terminated, Some(&bold)), InstanceState::ShuttingDown);
}

#[test]
fn a_power_off_from_inside_does_what_the_instance_says() {
    for (behavior, run) in [(SHUTDOWN_STOP, RunState::Stopped), (SHUTDOWN_TERMINATE, RunState::Terminated)] {
        let spec = InstanceSpec { instance_initiated_shutdown_behavior: behavior.into(), ..spec() };
        let off = v1::InstanceReport { guest_powered_off: true, ..report(ObservedState::Stopped, 1, 2) };
        let change = apply_report(&spec, None, &off, origin());
        let wanted = change.spec.unwrap();
        assert_eq!(wanted.run(), run);
        assert_eq!((wanted.generation, wanted.run_generation), (2, 2));
        assert_eq!(wanted.reason.unwrap().code, StateReason::INSTANCE_INITIATED_SHUTDOWN);
        // The user had stopped and started it meanwhile: the old power-off is history.
        let newer = InstanceSpec { generation: 3, run_generation: 3, ..spec };
        assert_eq!(apply_report(&newer, None, &off, origin()).spec, None);
    }
}

#[test]
fn failures_end_a_launch_but_only_stop_what_ran() {
    let spec = spec();
    let failed = |code: &str| v1::InstanceReport {
        reason: Some(v1::StateReason { code: code.into(), message: "why".into() }),
        ..report(ObservedState::Failed, 1, 3)
    };
    let change = apply_report(&spec, None, &failed(StateReason::INVALID_IMAGE), origin());
    assert!(!change.refused);
    let wanted = change.spec.unwrap();
    assert_eq!(wanted.run(), RunState::Terminated);
    assert_eq!(wanted.reason.unwrap().code, StateReason::INVALID_IMAGE);
    assert!(apply_report(&spec, None, &failed(StateReason::INSUFFICIENT_CAPACITY), origin()).refused);
    let ran = apply_report(&spec, None, &report(ObservedState::Running, 1, 1), origin()).status.unwrap();
    let change = apply_report(&spec, Some(&ran), &failed(StateReason::CLIENT_INTERNAL_ERROR), origin());
    assert_eq!(change.spec.unwrap().run(), RunState::Stopped);
    assert!(!apply_report(&spec, Some(&ran), &failed(StateReason::INSUFFICIENT_CAPACITY), origin()).refused);
}

#[test]
fn lost_disks_are_told_and_a_lost_terminated_instance_is_terminated() {
    let spec = spec();
    assert_eq!(apply_missing(&spec, None, origin()), Change::default(), "never seen there, nothing lost");
    let ran = apply_report(&spec, None, &report(ObservedState::Running, 1, 1), origin()).status.unwrap();
    let lost = apply_missing(&spec, Some(&ran), origin()).status.unwrap();
    assert_eq!(state_of(&spec, Some(&lost)), InstanceState::Running);
    assert!(lost.reason.as_ref().unwrap().message.contains("disks"));
    let stopped = want(&spec, RunState::Stopped, false, None, String::new());
    let lost = apply_missing(&stopped, Some(&ran), origin()).status.unwrap();
    assert_eq!(state_of(&stopped, Some(&lost)), InstanceState::Stopped);
    let terminated = want(&spec, RunState::Terminated, false, None, String::new());
    let lost = apply_missing(&terminated, Some(&ran), origin()).status.unwrap();
    assert_eq!(state_of(&terminated, Some(&lost)), InstanceState::Terminated);
    assert_eq!(apply_missing(&terminated, Some(&lost), origin()), Change::default());
}

#[derive(Clone, Debug)]
enum Step {
    Stop,
    Start,
    Terminate,
    Report { state: i32, back: u64, off: bool, capacity: bool },
    Missing,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => Just(Step::Stop),
        1 => Just(Step::Start),
        1 => Just(Step::Terminate),
        6 => (0..=6i32, 0..3u64, any::<bool>(), any::<bool>())
            .prop_map(|(state, back, off, capacity)| Step::Report { state, back, off, capacity }),
        1 => Just(Step::Missing),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Whatever agents report and users ask, an instance only takes steps that EC2's life has, and terminated is for good.
    #[test]
    fn no_sequence_takes_an_illegal_step(steps in steps()) {
        let mut spec = spec();
        let mut status: Option<InstanceStatus> = None;
        let mut before = state_of(&spec, None);
        let mut sequence = 0;
        for step in steps {
            match step {
                Step::Stop if matches!(before, InstanceState::Pending | InstanceState::Running) => {
                    spec = want(&spec, RunState::Stopped, false, None, String::new());
                }
                Step::Start if before == InstanceState::Stopped => {
                    spec = want(&spec, RunState::Running, false, None, String::new());
                }
                Step::Terminate if spec.run() != RunState::Terminated => {
                    spec = want(&spec, RunState::Terminated, false, None, String::new());
                }
                Step::Report { state, back, off, capacity } => {
                    sequence += 1;
                    let code = if capacity { StateReason::INSUFFICIENT_CAPACITY } else { StateReason::INVALID_IMAGE };
                    let report = v1::InstanceReport {
                        state,
                        sequence,
                        observed_generation: spec.generation.saturating_sub(back),
                        guest_powered_off: off,
                        reason: Some(v1::StateReason { code: code.into(), message: String::new() }),
                        ..Default::default()
                    };
                    let change = apply_report(&spec, status.as_ref(), &report, origin());
                    spec = change.spec.unwrap_or(spec);
                    status = change.status.or(status);
                }
                Step::Missing => {
                    let change = apply_missing(&spec, status.as_ref(), origin());
                    status = change.status.or(status);
                }
                _ => {}
            }
            let after = state_of(&spec, status.as_ref());
            prop_assert!(after == before || before.may_become(after), "{} -> {}", before, after);
            before = after;
        }
    }
}
