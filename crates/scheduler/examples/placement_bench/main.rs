//! Measures the scheduler: decisions per second on one core, and hosts needed against exact best fit.
//!
//! Usage: `placement_bench [--json] [--seed N] [--placements N] [--hosts N,N,...]
//! [--rules anti-affinity|everything] [--no-packing]`
#![allow(clippy::indexing_slicing)]

mod packing;
mod speed;
mod workload;

use std::process::ExitCode;

use hearth_scheduler::{ResourceVector, Strategy};
use serde_json::json;

use crate::speed::{Cloud, Figures, Ids, Numbers, Scenario, Texts};

struct Options {
    json: bool,
    seed: u64,
    placements: usize,
    hosts: Vec<u32>,
    rules: Option<String>,
    no_packing: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        json: false,
        seed: 1,
        placements: 1_000_000,
        hosts: vec![100, 10_000, 100_000],
        rules: None,
        no_packing: false,
    };
    let mut arguments = std::env::args().skip(1);
    let mut is_value = false;
    while let Some(argument) = arguments.next() {
        let flag = match argument.as_str() {
            "--json" => &mut options.json,
            "--no-packing" => &mut options.no_packing,
            _ => &mut is_value,
        };
        *flag = true;
        if !std::mem::take(&mut is_value) {
            continue;
        }
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        let number = |text: &str| text.parse().map_err(|_| format!("{argument}: '{text}' is not a number"));
        match argument.as_str() {
            "--seed" => options.seed = number(&value)?,
            "--rules" => options.rules = Some(value),
            "--placements" => options.placements = number(&value)? as usize,
            "--hosts" => {
                let hosts = value.split(',').map(|text| number(text).map(|n| n.clamp(1, 1_000_000) as u32));
                options.hosts = hosts.collect::<Result<_, _>>()?;
            }
            _ => return Err(format!("unknown option {argument}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("placement_bench: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let options = options()?;
    let mut speeds = Vec::new();
    if !options.json {
        println!("Decisions on one core, hosts 80 % full, machines come and go at random:");
        println!(
            "{:>8}  {:14} {:8} {:>9}  {:>12} {:>12}  {:>8} {:>8} {:>8}",
            "hosts", "rules", "ids", "live", "placements/s", "releases/s", "p50 ns", "p99 ns", "p99.9 ns"
        );
    }
    for hosts in &options.hosts {
        for (rules, scenario) in [("anti-affinity", Scenario::AntiAffinity), ("everything", Scenario::Everything)] {
            if options.rules.as_deref().is_some_and(|wanted| wanted != rules) {
                continue;
            }
            for measure in [measure::<Numbers>, measure::<Texts>] {
                let (ids, figures) = measure(&options, *hosts, scenario)?;
                if !options.json {
                    print_speed(rules, ids, &figures);
                }
                speeds.push(speed_json(rules, ids, &figures));
            }
        }
    }
    if options.no_packing {
        if options.json {
            println!("{:#}", json!({ "seed": options.seed, "speed": speeds }));
        }
        return Ok(());
    }
    let packing = packing_figures(&options)?;
    if options.json {
        println!("{:#}", json!({ "seed": options.seed, "speed": speeds, "packing": packing }));
    }
    Ok(())
}

fn measure<I: Ids>(options: &Options, hosts: u32, scenario: Scenario) -> Result<(&'static str, Figures), String> {
    Ok((I::NAME, Cloud::<I>::new(hosts, scenario, options.seed)?.measure(options.placements)?))
}

fn print_speed(rules: &str, ids: &str, figures: &Figures) {
    let Figures { hosts, live, placements_per_second, releases_per_second, p50, p99, p999, refusals } = figures;
    let (p50, p99, p999) = (p50.as_nanos(), p99.as_nanos(), p999.as_nanos());
    print!("{hosts:>8}  {rules:14} {ids:8} {live:>9}  {placements_per_second:>12.0} {releases_per_second:>12.0}  ");
    println!(
        "{p50:>8} {p99:>8} {p999:>8}{}",
        if *refusals > 0 { format!("  ({refusals} refused)") } else { String::new() }
    );
}

fn speed_json(rules: &str, ids: &str, figures: &Figures) -> serde_json::Value {
    json!({
        "hosts": figures.hosts,
        "rules": rules,
        "ids": ids,
        "live_allocations": figures.live,
        "placements_per_second": figures.placements_per_second.round(),
        "releases_per_second": figures.releases_per_second.round(),
        "p50_ns": figures.p50.as_nanos() as u64,
        "p99_ns": figures.p99.as_nanos() as u64,
        "p999_ns": figures.p999.as_nanos() as u64,
        "refusals": figures.refusals,
    })
}

fn packing_figures(options: &Options) -> Result<serde_json::Value, String> {
    let stays = workload::stays(options.seed, 7.0, 500.0);
    let events = packing::events(&stays);
    let mut results = Vec::new();
    for (name, memory_gib) in [("memory scarce", 128u64), ("even", 192), ("vCPU scarce", 384)] {
        let host = ResourceVector { vcpus: 64, memory_mib: memory_gib << 10, ..ResourceVector::default() };
        let bound = packing::volume_bound(&stays, &events, &host);
        let at_hand = bound as u32 * 4 + 100;
        let pack = packing::hosts_with_scheduler(&stays, &events, &host, Strategy::Pack, at_hand)?;
        let spread = packing::hosts_with_scheduler(&stays, &events, &host, Strategy::Spread, at_hand)?;
        let exact = packing::hosts_with_scan(&stays, &events, &host, |memory, vcpus, _| (memory, u64::from(vcpus)));
        let first = packing::hosts_with_scan(&stays, &events, &host, |_, _, number| (number as u64, 0));
        if !options.json {
            if results.is_empty() {
                println!("\nHosts needed (64 vCPUs each) for {} machines of 7 days:", stays.len());
                println!(
                    "{:>14} {:>8}  {:>12} {:>14} {:>15} {:>10} {:>14}",
                    "workload",
                    "GiB",
                    "volume bound",
                    "hearth (pack)",
                    "exact best fit",
                    "first fit",
                    "hearth (spread)"
                );
            }
            println!("{name:>14} {memory_gib:>8}  {bound:>12} {pack:>14} {exact:>15} {first:>10} {spread:>14}");
        }
        results.push(json!({
            "workload": name, "host_vcpus": 64, "host_memory_gib": memory_gib, "machines": stays.len(),
            "volume_bound": bound, "hearth_pack": pack, "exact_best_fit": exact, "first_fit": first,
            "hearth_spread": spread, "hearth_to_exact": pack as f64 / exact as f64,
        }));
    }
    Ok(json!(results))
}
