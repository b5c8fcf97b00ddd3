//! 4 KiB at random in the guest: operations per second, and KVM exits for each.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::guests::{Bare, Guest};
use crate::median;

/// Name, what is done, and how many are in flight.
const LOADS: [(&str, &str, u32); 5] = [
    ("random_read_qd1", "read", 1),
    ("random_read_qd32", "read", 32),
    ("random_write_qd1", "write", 1),
    ("random_write_qd32", "write", 32),
    ("synced_write_qd1", "synced", 1),
];

/// What one load found.
pub struct Found {
    pub operations: f64,
    /// Until all of it was durable,
    pub seconds: f64,
    /// and until all of it was answered.
    pub accepted_seconds: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

impl Found {
    /// Of a line of the guest's program.
    pub fn read(line: &str) -> Self {
        let value = |name: &str| {
            let word = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            word.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {line}"))
        };
        Self {
            operations: value("operations"),
            seconds: value("seconds"),
            accepted_seconds: value("accepted_seconds"),
            p50_us: value("p50_us"),
            p99_us: value("p99_us"),
            max_us: value("max_us"),
        }
    }
}

/// What one guest, or the host itself, did with one load in one round.
struct Round {
    /// Operations per second, until they were durable and until they were answered.
    rate: f64,
    accepted: f64,
    exits: f64,
    p99_us: f64,
}

/// Who is given loads.
pub enum Subject<'a> {
    Guest(&'a mut Guest),
    Bare(Bare),
}

impl Subject<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Guest(guest) => &guest.name,
            Self::Bare(bare) => bare.name,
        }
    }

    fn load(&mut self, what: &str, depth: u32, seconds: f64) -> Round {
        let (line, exits) = match self {
            Self::Bare(bare) => (bare.load(what, depth, seconds), 0),
            Self::Guest(guest) => {
                guest.console.send(&format!("load {what} {depth} {seconds} /dev/vda"));
                guest.console.wait_for("BENCH-BEGIN");
                let before = guest.exits();
                guest.console.wait_for("BENCH-END");
                let exits = guest.exits() - before;
                guest.console.wait_for("BENCH-FOUND");
                (guest.console.wait_for("\n"), exits)
            }
        };
        let found = Found::read(&line);
        Round {
            rate: found.operations / found.seconds,
            accepted: found.operations / found.accepted_seconds,
            exits: exits as f64 / found.operations,
            p99_us: found.p99_us,
        }
    }
}

/// Rounds of all loads on all subjects that take turns.
pub fn run(subjects: &mut [Subject], rounds: usize, seconds: f64) -> Value {
    let mut figures: BTreeMap<(&str, String), Vec<Round>> = BTreeMap::new();
    for round in 0..rounds {
        for (name, what, depth) in LOADS {
            for turn in 0..subjects.len() {
                // Whoever goes first finds the disk otherwise.
                let count = subjects.len();
                let subject = &mut subjects[(turn + round) % count];
                let measured = subject.load(what, depth, seconds);
                let Round { rate, accepted, exits, .. } = measured;
                eprintln!(
                    "{}/{rounds} {name} {}: {rate:.0}/s, answered {accepted:.0}/s, {exits:.2} exits each",
                    round + 1,
                    subject.name()
                );
                figures.entry((name, subject.name().to_owned())).or_default().push(measured);
            }
        }
    }
    let mut report = json!({});
    for ((name, guest), rounds) in &figures {
        let of = |part: fn(&Round) -> f64| median(rounds.iter().map(part));
        // Of the same round: what the machine does otherwise hits both.
        let against = |own: &str, part: fn(&Round) -> f64| {
            let own = &figures[&(*name, own.to_owned())];
            median(own.iter().zip(rounds).map(|(own, other)| part(own) / part(other)))
        };
        report[name][guest] = json!({
            "per_s": of(|r| r.rate), "accepted_per_s": of(|r| r.accepted), "exits": of(|r| r.exits), "p99_us": of(|r| r.p99_us),
            "hearth_ratio": against("hearth-vmm", |r| r.rate),
            "cached_ratio": against("hearth-vmm cached", |r| r.rate),
            "accepted_ratio": against("hearth-vmm", |r| r.accepted),
        });
    }
    report
}
