//! The invariants of the volume format under random schedules, power cuts and kills. `HEARTH_SEED` repeats one run,
//! `HEARTH_CRASHES` sets how many crashes a test makes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::SystemTime;

use super::world::{End, Faults, World};

/// Crashes per test run, unless the environment says otherwise.
const CRASHES: u64 = 22_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs `episode` with new seeds until it has made enough crashes; names the seed that fails.
fn episodes(crashes: u64, mut episode: impl FnMut(u64) -> u64) -> u64 {
    let fixed = number("HEARTH_SEED");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let mut seed = fixed.unwrap_or(now.as_nanos() as u64 >> 10);
    let mut done = 0;
    while done < crashes {
        match catch_unwind(AssertUnwindSafe(|| episode(seed))) {
            Ok(made) => done += made,
            Err(panic) => {
                eprintln!("failed with HEARTH_SEED={seed}");
                resume_unwind(panic);
            }
        }
        if fixed.is_some() {
            break;
        }
        seed = seed.wrapping_add(1);
    }
    done
}

/// One volume's life of several processes, each of which ends by a crash or in order. Returns the number of crashes.
fn life(seed: u64, ends: &[End], faults: Faults) -> u64 {
    let mut world = World::new(seed);
    let mut crashes = 0;
    for _ in 0..8 {
        world.faults = faults;
        for _ in 0..20 + world.rng.below(260) {
            world.step();
        }
        let end = ends[world.rng.below(ends.len() as u64) as usize];
        world.end(end);
        crashes += u64::from(end != End::Clean);
    }
    world.quiesce();
    crashes
}

/// Invariants 1 and 2: flushed data survives any crash, and a block never returns anything but what was written to it since
/// the last flush, or what was flushed, or the base.
#[test]
fn flushed_data_survives_power_cuts_and_nothing_else_appears() {
    let crashes = number("HEARTH_CRASHES").unwrap_or(CRASHES);
    let faults = Faults { short: 20, no_space: 0, stage: 0 };
    let done = episodes(crashes, |seed| life(seed, &[End::Power, End::Power, End::Kill, End::Clean], faults));
    eprintln!("{done} crashes");
}
