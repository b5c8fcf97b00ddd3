//! 4 KiB at random in the guest: operations per second, and KVM exits for each.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::guests::Guest;
use crate::median;

/// Name, what is done, and how many are in flight.
const LOADS: [(&str, &str, u32); 4] = [
    ("random_read_qd1", "read", 1),
    ("random_read_qd32", "read", 32),
    ("random_write_qd1", "write", 1),
    ("random_write_qd32", "write", 32),
];

/// What one load found.
pub struct Found {
    pub operations: f64,
    pub seconds: f64,
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
            p50_us: value("p50_us"),
            p99_us: value("p99_us"),
            max_us: value("max_us"),
        }
    }
}

/// Operations per second, exits for each, and the 99th percentile of latencies in microseconds.
type Round = (f64, f64, f64);

/// Rounds of all loads on all guests that take turns.
pub fn run(guests: &mut [Guest], rounds: usize, seconds: f64) -> Value {
    let mut figures: BTreeMap<(&str, String), Vec<Round>> = BTreeMap::new();
    for round in 0..rounds {
        for (name, what, depth) in LOADS {
            for turn in 0..guests.len() {
                // Whoever goes first finds the disk otherwise.
                let count = guests.len();
                let guest = &mut guests[(turn + round) % count];
                guest.console.send(&format!("load {what} {depth} {seconds} /dev/vda"));
                guest.console.wait_for("BENCH-BEGIN");
                let before = guest.exits();
                guest.console.wait_for("BENCH-END");
                let exits = guest.exits() - before;
                guest.console.wait_for("BENCH-FOUND");
                let found = Found::read(&guest.console.wait_for("\n"));
                let (rate, each) = (found.operations / found.seconds, exits as f64 / found.operations);
                eprintln!("{}/{rounds} {name} {}: {rate:.0}/s, {each:.2} exits each", round + 1, guest.name);
                figures.entry((name, guest.name.clone())).or_default().push((rate, each, found.p99_us));
            }
        }
    }
    let mut report = json!({});
    for ((name, guest), rounds) in &figures {
        let of = |part: fn(&(f64, f64, f64)) -> f64| median(rounds.iter().map(part));
        // Of the same round: what the machine does otherwise hits both.
        let against = |own: &str| {
            let own = &figures[&(*name, own.to_owned())];
            median(own.iter().zip(rounds).map(|(own, other)| own.0 / other.0))
        };
        report[name][guest] = json!({
            "per_s": of(|r| r.0), "exits": of(|r| r.1), "p99_us": of(|r| r.2),
            "hearth_ratio": against("hearth-vmm"), "cached_ratio": against("hearth-vmm cached"),
        });
    }
    report
}
