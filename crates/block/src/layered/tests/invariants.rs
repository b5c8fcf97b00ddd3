//! The invariants of the volume format under random schedules, power cuts and kills. `HEARTH_SEED` repeats one run,
//! `HEARTH_CRASHES` sets how many crashes a test makes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::process::{Crashes, During, End};
use super::world::{BASE, CHUNK_SECTORS, CHUNKS, Faults, World};
use crate::{Cause, Operation};

/// Power cuts of the first test, and crashes that the others are a part of, unless the environment says otherwise.
const CRASHES: u64 = 20_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Whether somebody repeats one life or chose how many there are: then they decide what is enough.
fn by_hand() -> bool {
    number("HEARTH_SEED").or(number("HEARTH_CRASHES")).is_some()
}

/// What a run went through, so that one that tests nothing is noticed.
#[derive(Default)]
struct Seen {
    crashes: Crashes,
    requests: u64,
    snapshots: u64,
    impaired: u64,
}

impl Seen {
    fn power_cuts(&self) -> u64 {
        self.crashes.power_cuts.values().sum()
    }

    fn crashes(&self) -> u64 {
        self.crashes.kills + self.power_cuts()
    }

    fn cuts(&self, during: During) -> u64 {
        self.crashes.power_cuts.get(&during).copied().unwrap_or(0)
    }
}

/// One volume's life of several processes, each of which ends by a crash or in order.
fn life(seed: u64, steps: u64, ends: &[End], faults: Faults, seen: &mut Seen) {
    let mut world = World::new(seed);
    world.eventful = true;
    for _ in 0..8 {
        world.faults = faults;
        for _ in 0..20 + world.rng.below(steps) {
            world.step();
            if world.disk.died().is_some() {
                break;
            }
        }
        let end = ends[world.rng.below(ends.len() as u64) as usize];
        world.end(end);
    }
    world.quiesce();
    assert!(!world.agent.impaired.load(Ordering::Relaxed) || faults.stage > 0, "nobody told that the volume recovered");
    seen.crashes.kills += world.crashes.kills;
    for (during, count) in &world.crashes.power_cuts {
        *seen.crashes.power_cuts.entry(*during).or_default() += count;
    }
    seen.requests += world.completed;
    seen.snapshots += world.snapshots;
    seen.impaired += world.agent.causes.lock().unwrap().len() as u64;
}

/// Lives with new seeds until `enough` says so; names the seed that fails.
fn lives(steps: u64, ends: &[End], faults: Faults, enough: impl Fn(&Seen, Option<u64>) -> bool) -> Seen {
    let fixed = number("HEARTH_SEED");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let first = fixed.unwrap_or(now.as_nanos() as u64 >> 10);
    let mut seed = first;
    let mut seen = Seen::default();
    let wanted = number("HEARTH_CRASHES");
    while !enough(&seen, wanted) {
        let lived = catch_unwind(AssertUnwindSafe(|| life(seed, steps, ends, faults, &mut seen)));
        if let Err(panic) = lived {
            eprintln!("failed with HEARTH_SEED={seed}");
            resume_unwind(panic);
        }
        seed = seed.wrapping_add(1);
        if fixed.is_some() {
            break;
        }
    }
    let Seen { crashes: Crashes { kills, power_cuts }, requests, snapshots, impaired } = &seen;
    eprintln!(
        "seeds {first} to {}: {} power cuts {power_cuts:?}, {kills} kills, {requests} requests, {snapshots} snapshots, \
         {impaired} impairments",
        seed.wrapping_sub(1),
        seen.power_cuts(),
    );
    seen
}

fn crashes(crashes: u64) -> impl Fn(&Seen, Option<u64>) -> bool {
    move |seen, wanted| seen.crashes() >= wanted.unwrap_or(crashes)
}

/// Invariant 1: flushed data survives any crash. (The model looks at all the others, too.)
#[test]
fn invariant_1_flushed_data_survives_any_crash() {
    let ends = [End::Power, End::Power, End::Kill, End::Clean];
    let enough = |seen: &Seen, wanted: Option<u64>| seen.power_cuts() >= wanted.unwrap_or(CRASHES);
    let seen = lives(260, &ends, Faults { short: 20, ..Faults::default() }, enough);
    assert!(seen.requests > seen.crashes() * 5);
    if by_hand() {
        return;
    }
    assert!(seen.power_cuts() >= CRASHES, "{} power cuts", seen.power_cuts());
    assert!(seen.crashes.kills >= CRASHES / 10, "{} kills", seen.crashes.kills);
    // Not only in the middle of a guest's requests.
    for (during, least) in [
        (During::Traffic, CRASHES / 3),
        (During::Opening, CRASHES / 10),
        (During::Replay, CRASHES / 250),
        (During::Closing, CRASHES / 50),
        (During::Growth, CRASHES / 50),
        (During::Clearing, CRASHES / 200),
    ] {
        assert!(seen.cuts(during) >= least, "{during:?}: {} power cuts instead of {least}", seen.cuts(during));
    }
}

/// Invariant 2: a block never returns anything but what was written to it since the last flush, or what was flushed, or the base, or
/// zeros where it was blank, discarded or zeroed; whatever ends the process, also right after it began.
#[test]
fn invariant_2_a_block_holds_what_was_written_to_it_and_nothing_else() {
    let ends = [End::Kill, End::Clean, End::Power];
    let faults = Faults { short: 6, no_space: 40, ..Faults::default() };
    let seen = lives(120, &ends, faults, crashes(CRASHES / 8));
    assert!(seen.requests > seen.crashes() * 2);
}

/// Invariant 3: a snapshot is the volume at its instant, whatever crashes, fails or is written meanwhile; and what a snapshot
/// does not read is what the ones before it had.
#[test]
fn invariant_3_a_snapshot_is_its_instant_whatever_crashes() {
    let ends = [End::Kill, End::Kill, End::Clean, End::Power];
    let seen = lives(900, &ends, Faults::default(), crashes(CRASHES / 8));
    assert!(seen.snapshots > seen.crashes() / 10, "{} snapshots", seen.snapshots);
    let faults = Faults { stage: 12, short: 20, ..Faults::default() };
    let seen = lives(900, &[End::Kill, End::Clean], faults, crashes(CRASHES / 16));
    assert!(seen.snapshots > seen.crashes() / 10 && seen.impaired > seen.crashes() / 100);
}

/// Writes wait for space instead of failing, and nothing is lost meanwhile.
#[test]
fn a_full_host_stalls_and_loses_nothing() {
    let faults = Faults { no_space: 6, short: 20, ..Faults::default() };
    let seen = lives(260, &[End::Power, End::Kill, End::Clean], faults, crashes(CRASHES / 8));
    assert!(seen.impaired > seen.crashes() / 4);
}

/// A failed sync is final: no later write or flush succeeds, and the map is never marked clean.
#[test]
fn a_failed_sync_is_final() {
    for seed in 0..200 {
        let mut world = World::new(seed);
        for _ in 0..100 {
            world.step();
        }
        world.quiesce();
        world.faults.sync = 1;
        world.expects_failure = true;
        world.start(0, Operation::Write, 8 * 64, 8);
        world.start(0, Operation::Flush, 0, 0);
        // The write is in flight beside the flush; a second one cannot be missed.
        world.run_dry();
        world.start(0, Operation::Flush, 0, 0);
        world.run_dry();
        world.faults.sync = 0;
        let failures = world.failures;
        assert!(failures > 0);
        world.start(0, Operation::Flush, 0, 0);
        world.start(0, Operation::Write, 8 * 80, 8);
        world.start(0, Operation::Discard, 8 * 90, 8);
        world.run_dry();
        assert_eq!(world.failures, failures + 3, "seed {seed}");
        assert!(world.agent.causes.lock().unwrap().iter().any(|cause| matches!(cause, Cause::SyncFailed { .. })));
        // Reads go on.
        world.start(0, Operation::Read, 8 * 200, 8);
        world.run_dry();
        assert_eq!(world.failures, failures + 3);
    }
}

/// Across clean closes DIRTY is exact: what was written, and nothing else.
#[test]
fn dirty_bits_are_exact_across_clean_closes() {
    let mut world = World::new(7);
    world.start(0, Operation::Write, 3 * CHUNK_SECTORS, 8);
    world.quiesce();
    world.end(End::Clean);
    assert_eq!(world.dirty(), [3]);
    world.start(0, Operation::Discard, 5 * CHUNK_SECTORS - 8, 16);
    world.start(0, Operation::Read, 0, 8);
    world.quiesce();
    world.end(End::Clean);
    assert_eq!(world.dirty(), [3, 4, 5]);
    world.end(End::Kill);
    let local = (0..CHUNKS).filter(|chunk| !BASE.contains(chunk)).collect::<Vec<_>>();
    assert_eq!(world.dirty(), local);
}

/// Invariant 7 by itself: a base block that was discarded, and a blank one, read as zeros after any power cut that follows a
/// flush.
#[test]
fn invariant_7_discarded_and_blank_ranges_never_show_old_data() {
    for seed in 0..300 {
        let mut world = World::new(seed);
        world.start(0, Operation::Write, 2 * CHUNK_SECTORS, 16);
        world.quiesce();
        world.start(0, Operation::Discard, 0, 64);
        world.start(0, Operation::Discard, 2 * CHUNK_SECTORS, 16);
        world.quiesce();
        world.start(0, Operation::Flush, 0, 0);
        world.quiesce();
        world.end(End::Power);
        assert!((0..64).chain(2 * CHUNK_SECTORS..2 * CHUNK_SECTORS + 32).all(|sector| world.content(sector) == 0));
    }
}

/// Of writes that race one stays, whichever: it is still the same one after a flush and a power cut.
#[test]
fn a_race_is_decided_once() {
    let mut seen = 0;
    for seed in 0..400 {
        let mut world = World::new(seed);
        world.start(0, Operation::Flush, 0, 0);
        world.quiesce();
        for which in [0, world.queues.len() - 1] {
            world.start(which, Operation::Write, 8, 16);
            world.issue(which, usize::MAX);
        }
        for _ in 0..40 {
            let which = world.rng.below(world.queues.len() as u64) as usize;
            if world.rng.chance(2) {
                world.apply(which);
            } else {
                world.answer(which);
            }
        }
        world.start(0, Operation::Flush, 0, 0);
        world.quiesce();
        let before: Vec<_> = (8..24).map(|sector| world.content(sector)).collect();
        seen |= 1 << before[0];
        world.start(0, Operation::Flush, 0, 0);
        world.quiesce();
        world.end(End::Power);
        let after: Vec<_> = (8..24).map(|sector| world.content(sector)).collect();
        assert_eq!(after, before, "seed {seed}");
    }
    assert_eq!(seen, 0b110, "one of two always won");
}

/// A block that is in the log and is overwritten: the log does not bring back what it held before.
#[test]
fn the_log_does_not_undo_a_flushed_overwrite() {
    for seed in 0..100 {
        let mut world = World::new(seed);
        for _ in 0..4 {
            world.start(0, Operation::Flush, 0, 0);
            world.quiesce();
            world.start(0, Operation::Write, 8, 8);
            world.quiesce();
        }
        world.start(0, Operation::Flush, 0, 0);
        world.quiesce();
        let before = world.content(8);
        world.end(if seed % 2 == 0 { End::Power } else { End::Kill });
        assert_eq!(world.content(8), before, "seed {seed}");
    }
}
