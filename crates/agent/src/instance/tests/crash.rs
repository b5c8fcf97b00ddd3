//! Random wishes, random ends of guests, and agents that are killed between any two steps: it converges, there are never two
//! VMMs of one instance, and in the end nothing is left.

use std::time::Duration;

use proptest::prelude::*;

use super::world::*;
use crate::boot::tests::support::cases;
use crate::launch::VmmEnd;
use hearth_proto::v1::{ObservedState as State, RunState};

#[derive(Clone, Debug)]
enum Step {
    Want(u32, RunState),
    Force(u32),
    Reboot(u32),
    End(u32, VmmEnd),
    Button(bool),
    LaunchesFail(u32),
    Sleep(u64),
    /// The agent dies after so many of its steps and another one takes over.
    Crash(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let instance = 1u32..4;
    let run = prop_oneof![4 => Just(RunState::Running), 2 => Just(RunState::Stopped), 1 => Just(RunState::Terminated)];
    let end = prop_oneof![
        Just(VmmEnd::PoweredOff),
        Just(VmmEnd::Reset),
        Just(VmmEnd::GuestCrashed),
        Just(VmmEnd::Died),
        Just(VmmEnd::Failed(13))
    ];
    prop_oneof![
        6 => (instance.clone(), run).prop_map(|(i, run)| Step::Want(i, run)),
        1 => instance.clone().prop_map(Step::Force),
        2 => instance.clone().prop_map(Step::Reboot),
        3 => (instance, end).prop_map(|(i, end)| Step::End(i, end)),
        1 => any::<bool>().prop_map(Step::Button),
        1 => (0u32..7).prop_map(Step::LaunchesFail),
        3 => (0u64..20_000).prop_map(Step::Sleep),
        4 => (0u32..30).prop_map(Step::Crash),
    ]
}

/// Ends an agent. Its threads go on, unlike a real one's: all that it asked for have begun when this returns, so that the next agent
/// can see what they are making.
async fn bury(agent: Agent) {
    drop(agent);
    // Tasks that were aborted are dropped when it is their turn.
    tokio::task::yield_now().await;
    tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(2))).await.unwrap();
}

async fn live(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let mut agent = Agent::start(&world);
    for step in steps {
        let changed = match step {
            Step::Want(instance, run) => Some(wanted.want(&id(instance), run)),
            Step::Force(instance) => wanted.change(&id(instance), |desired| desired.force = true),
            Step::Reboot(instance) => wanted.change(&id(instance), |desired| desired.reboot_generation += 1),
            Step::End(instance, end) => {
                world.end(&id(instance), end);
                None
            }
            Step::Button(ignored) => {
                world.table.lock().guests_ignore_the_button = ignored;
                None
            }
            Step::LaunchesFail(count) => {
                world.table.lock().failing_launches = count;
                None
            }
            Step::Sleep(milliseconds) => {
                tokio::time::sleep(Duration::from_millis(milliseconds)).await;
                None
            }
            Step::Crash(after) => {
                agent.crash.after(after);
                agent.crash.dead_or(Duration::from_secs(30)).await;
                agent.crash.after(0);
                bury(agent).await;
                agent = Agent::start(&world);
                agent.supervisor.apply_host(wanted.all());
                None
            }
        };
        if let Some(desired) = changed {
            agent.supervisor.apply(desired);
        }
    }
    {
        let mut table = world.table.lock();
        table.guests_ignore_the_button = false;
        table.failing_launches = 0;
    }
    agent.crash.disarm();
    // A guest that powers off at the moment of a wish counts as having done so after it: let the ends be seen first.
    tokio::time::sleep(Duration::from_secs(1)).await;
    // The last word: everybody gets a new generation, so that holds are over.
    let layout = world.layout();
    for instance in wanted.0.keys().cloned().collect::<Vec<_>>() {
        let desired = wanted.change(&instance, |_| ()).unwrap();
        let (generation, run, reboot) = (desired.generation, desired.run(), desired.reboot_generation);
        agent.supervisor.apply(desired);
        match run {
            RunState::Terminated => {
                agent.until(&instance, State::Gone, generation).await;
                prop_assert!(!layout.instance(&instance).exists() && !world.runs(&instance));
            }
            RunState::Running => {
                let mut report = agent.until(&instance, State::Running, generation).await;
                while report.observed_reboot_generation < reboot || !world.runs(&instance) {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    report = agent.until(&instance, State::Running, generation).await;
                }
                prop_assert!(world.table.lock().registered.contains(&instance));
                prop_assert!(layout.ephemeral_disk(&instance, 0).exists());
            }
            RunState::Stopped | RunState::Unspecified => {
                agent.until(&instance, State::Stopped, generation).await;
                prop_assert!(!world.runs(&instance) && !layout.ephemeral_disk(&instance, 0).exists());
            }
        }
    }
    // One more agent finds the same.
    let before: Vec<_> = agent.host.reports.full().instances.iter().map(|r| (r.instance_id.clone(), r.state)).collect();
    bury(agent).await;
    let agent = Agent::start(&world);
    agent.supervisor.apply_host(wanted.all());
    for (instance, state) in before {
        let instance = instance.parse().unwrap();
        agent.until(&instance, State::try_from(state).unwrap(), wanted.0[&instance].generation).await;
    }
    for instance in wanted.0.keys().cloned().collect::<Vec<_>>() {
        agent.supervisor.apply(wanted.want(&instance, RunState::Terminated));
        agent.until(&instance, State::Gone, wanted.0[&instance].generation).await;
    }
    let table = world.table.lock();
    prop_assert_eq!(&table.violations, &Vec::<String>::new());
    prop_assert!(table.vmms.is_empty() && table.registered.is_empty());
    for folder in [layout.instances(), layout.run_root().to_owned(), layout.stages(), layout.staged()] {
        let entries = std::fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.path());
        let left: Vec<_> = entries.filter(|path| *path != layout.staged()).collect();
        prop_assert!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(60))]
    #[test]
    fn whatever_happens_it_converges_and_leaves_nothing(steps in prop::collection::vec(step(), 0..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(live(steps))?;
    }
}
