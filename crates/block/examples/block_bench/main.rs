//! The volume engine against plain io_uring on the same file, and against qcow2: 4 KiB operations with `O_DIRECT`, in
//! interleaved rounds. Prints one line of JSON: medians of operations per second, and the median of the rounds' ratios
//! (engine / other).
//!
//! `block_bench [FOLDER] [MIB] [ROUNDS] [CASES]`: FOLDER on a file system with direct I/O (default: the current one), size of the
//! test files (default 256), rounds (default 7), only cases with this text in their names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod loads;
mod nbd_server;
mod qcow2;
mod volumes;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use hearth_block::{Volume, XtsKey};
use loads::{BLOCK, Load, engine, median, raw, shuffled};
use volumes::{Folder, clone_cost, fill, open};

type Figures = BTreeMap<&'static str, Vec<(f64, f64)>>;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().map_or_else(|| std::env::current_dir().unwrap(), PathBuf::from);
    let mib: u64 = arguments.next().map_or(256, |text| text.parse().unwrap());
    let rounds: u64 = arguments.next().map_or(7, |text| text.parse().unwrap());
    let part = arguments.next().unwrap_or_default();
    let wanted = |name: &str| name.contains(&part);
    // qemu-img takes relative names of a base for relative to the image.
    let folder = Folder { path: path.canonicalize().unwrap(), bytes: mib << 20 };
    let base = fill(&folder.file("raw"), folder.bytes);
    let clones = [clone_cost(&folder, 4 << 30), clone_cost(&folder, 1 << 40)];
    let mut figures = Figures::new();
    steady(&folder, rounds, &wanted, &mut figures);
    first_writes(&folder, &base, rounds, &wanted, &mut figures);
    figures.append(&mut qcow2::compare(&folder, rounds, &wanted));
    let lines: Vec<String> = figures
        .iter_mut()
        .map(|(name, rounds)| {
            let other = median(&mut rounds.iter().map(|(other, _)| *other).collect::<Vec<_>>());
            let engine = median(&mut rounds.iter().map(|(_, engine)| *engine).collect::<Vec<_>>());
            let ratio = median(&mut rounds.iter().map(|(other, engine)| engine / other).collect::<Vec<_>>());
            format!("\"{name}\":{{\"other_per_s\":{other:.0},\"engine_per_s\":{engine:.0},\"ratio\":{ratio:.3}}}")
        })
        .collect();
    let [(small, small_kib), (large, large_kib)] = clones;
    let sizes = [("4_gib", small, small_kib), ("1_tib", large, large_kib)];
    let clones = sizes.map(|(size, ms, kib)| format!("\"clone_{size}_ms\":{ms:.2},\"clone_{size}_kib\":{kib}"));
    println!("{{{}}}", [&clones[..], &lines].concat().join(","));
}

/// Reads and overwrites of a file that has all its blocks.
fn steady(folder: &Folder, rounds: u64, wanted: &dyn Fn(&str) -> bool, figures: &mut Figures) {
    let load = |write, depth, sync| Load { write, depth, sync };
    let cases = [
        ("random_read_qd32", load(false, 32, false), 24_000),
        ("random_read_qd1", load(false, 1, false), 3000),
        ("random_write_qd32", load(true, 32, false), 24_000),
        ("random_write_qd1", load(true, 1, false), 3000),
        ("synced_overwrite", load(true, 1, true), 800),
        ("encrypted_random_read_qd32", load(false, 32, false), 24_000),
        ("encrypted_random_write_qd32", load(true, 32, false), 24_000),
    ];
    let cases: Vec<_> = cases.into_iter().filter(|(name, ..)| wanted(name)).collect();
    if cases.is_empty() {
        return;
    }
    let data = fill(&folder.file("steady-data"), folder.bytes);
    let plain = folder.volume("steady", false, None);
    let mut plain = plain.open_queue(64).unwrap();
    fill(&folder.file("secret-data"), folder.bytes);
    let mut key = [3; 64];
    key[0] = 4;
    let secret = folder.volume("secret", false, XtsKey::new(key));
    let mut secret = secret.open_queue(64).unwrap();
    for round in 0..rounds {
        for (name, load, count) in cases.iter().copied() {
            let queue = if name.starts_with("encrypted") { &mut secret } else { &mut plain };
            let order = shuffled(folder.bytes / BLOCK as u64, count, round * 2 + 1);
            // Whoever goes second may find the device warmer.
            let (by_raw, by_engine) = if round % 2 == 0 {
                let by_raw = raw(&data, load, &order);
                (by_raw, engine(queue.as_mut(), load, &order))
            } else {
                let by_engine = engine(queue.as_mut(), load, &order);
                (raw(&data, load, &order), by_engine)
            };
            figures.entry(name).or_default().push((count as f64 / by_raw, count as f64 / by_engine));
        }
    }
}

/// First writes to a volume over a base. They are compared with overwrites of a file that has all its blocks (`base`), and with first
/// writes to a hole.
fn first_writes(folder: &Folder, base: &File, rounds: u64, wanted: &dyn Fn(&str) -> bool, figures: &mut Figures) {
    let load = |depth, sync| Load { write: true, depth, sync };
    let blocks = folder.bytes / BLOCK as u64;
    let cases = [
        (["first_write_qd32", "first_write_qd32_against_hole"], load(32, false), blocks.min(24_000) as usize),
        (["synced_first_write", "synced_first_write_against_hole"], load(1, true), 800),
    ];
    for round in 0..rounds {
        for (names, load, count) in cases {
            if !names.iter().any(|name| wanted(name)) {
                continue;
            }
            let order = shuffled(blocks, count, round * 2 + 77);
            let mut seconds = [0.0; 3];
            for turn in 0..3 {
                let which = ((round + turn) % 3) as usize;
                seconds[which] = match which {
                    0 => {
                        let fresh = folder.volume("first", true, None);
                        engine(fresh.open_queue(64).unwrap().as_mut(), load, &order)
                    }
                    1 => raw(base, load, &order),
                    _ => {
                        let _ = std::fs::remove_file(folder.file("sparse"));
                        let sparse = open(&folder.file("sparse"), true);
                        sparse.set_len(folder.bytes).unwrap();
                        raw(&sparse, load, &order)
                    }
                };
            }
            let [first, overwrite, hole] = seconds.map(|seconds| count as f64 / seconds);
            for (name, other) in names.into_iter().zip([overwrite, hole]) {
                figures.entry(name).or_default().push((other, first));
            }
        }
    }
}
