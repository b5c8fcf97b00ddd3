//! Disks of guests beside QEMU and Firecracker, and snapshots under a writing guest. Prints one line of JSON.
//!
//! `storage_bench WORK ROUNDS SECONDS MIB CASES [FIRECRACKER]`: WORK has `vmlinux`, `initrd` and `guest_load` as `bench_storage.py`
//! makes them; SECONDS for each load; MIB of each disk; CASES of `attach`, `io` and `snapshot`, with commas between.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unreachable)]

mod attach;
mod guests;
mod io;
mod snapshots;

use guests::{Bare, Guest, Setting};
use io::Subject;
use serde_json::json;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| -> f64 { arguments[at].parse().unwrap() };
    let (rounds, seconds) = (number(1) as usize, number(2));
    let wanted = |case: &str| arguments[4].split(',').any(|one| one == case);
    let scratch = hearth_tests::scratch();
    let setting = Setting {
        work: arguments[0].clone().into(),
        scratch: scratch.path().to_owned(),
        bytes: (number(3) as u64) << 20,
        firecracker: arguments.get(5).filter(|path| !path.is_empty()).map(Into::into),
    };
    let mut report = json!({});
    if wanted("io") || wanted("attach") {
        let mut guests = vec![Guest::hearth(&setting, true), Guest::qemu(&setting)];
        if wanted("attach") {
            report["hotplug"] = attach::run(&mut guests, &setting, rounds);
        }
        if wanted("io") {
            guests.push(Guest::hearth(&setting, false));
            guests.extend(["Sync", "Async"].iter().filter_map(|engine| Guest::firecracker(&setting, engine)));
            let mut subjects: Vec<_> = guests.iter_mut().map(Subject::Guest).collect();
            subjects.extend([true, false].map(|direct| Subject::Bare(Bare::new(&setting, direct))));
            report["io"] = io::run(&mut subjects, rounds, seconds);
        }
    }
    if wanted("snapshot") {
        report["cloud"] = snapshots::run(&setting, rounds, seconds);
    }
    println!("{report}");
}

/// The middle one.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
