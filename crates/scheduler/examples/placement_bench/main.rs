//! Measures the scheduler: decisions per second on one core, and hosts needed against exact best fit.
//!
//! Usage: `placement_bench [--json FILE] [--seed N] [--placements N] [--hosts N,N,...] [--rules anti-affinity|everything]
//! [--packing yes|no]`
#![allow(clippy::indexing_slicing)]

mod packing;
mod speed;
mod workload;

use std::process::ExitCode;

use hearth_scheduler::ResourceVector;
use serde_json::{Value, json};

use crate::speed::{Cloud, Control, Figures, Ids, Numbers, Scenario};
use crate::workload::Stay;

struct Options {
    json: Option<String>,
    seed: u64,
    placements: usize,
    hosts: Vec<u32>,
    rules: Option<String>,
    packing: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        json: None,
        seed: 1,
        placements: 1_000_000,
        hosts: vec![100, 10_000, 100_000],
        rules: None,
        packing: true,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        let number = |text: &str| text.parse().map_err(|_| format!("{argument}: '{text}' is not a number"));
        match argument.as_str() {
            "--json" => options.json = Some(value),
            "--seed" => options.seed = number(&value)?,
            "--placements" => options.placements = number(&value)? as usize,
            "--rules" => options.rules = Some(value),
            "--packing" => options.packing = value == "yes",
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
    let speed = speed_figures(&options)?;
    let packing = if options.packing { packing_figures(&options)? } else { json!([]) };
    if let Some(file) = &options.json {
        let report = json!({ "seed": options.seed, "speed": speed, "packing": packing });
        std::fs::write(file, format!("{report:#}\n")).map_err(|problem| format!("{file}: {problem}"))?;
    }
    Ok(())
}

fn speed_figures(options: &Options) -> Result<Vec<Value>, String> {
    println!("Decisions on one core (its processor time), hosts 80 % full, machines come and go at random:");
    println!(
        "{:>8}  {:14} {:8} {:>9}  {:>12} {:>12}  {:>8} {:>8} {:>8}",
        "hosts", "rules", "ids", "live", "placements/s", "releases/s", "p50 ns", "p99 ns", "p99.9 ns"
    );
    let mut speeds = Vec::new();
    for hosts in &options.hosts {
        for (rules, scenario) in [("anti-affinity", Scenario::AntiAffinity), ("everything", Scenario::Everything)] {
            if options.rules.as_deref().is_some_and(|wanted| wanted != rules) {
                continue;
            }
            for measure in [measure::<Numbers>, measure::<Control>] {
                let (ids, figures) = measure(options, *hosts, scenario)?;
                print_speed(rules, ids, &figures);
                speeds.push(speed_json(rules, ids, &figures));
            }
        }
    }
    Ok(speeds)
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

fn speed_json(rules: &str, ids: &str, figures: &Figures) -> Value {
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

fn packing_figures(options: &Options) -> Result<Value, String> {
    let stays = workload::stays(options.seed, 7.0, 500.0);
    let events = packing::events(&stays);
    println!("\nMost hosts in use at once for {} machines over 7 days, nothing refused:", stays.len());
    println!(
        "{:>6} {:>6}  {:>12} {:>8} {:>15} {:>10}",
        "vCPUs", "GiB", "volume bound", "hearth", "exact best fit", "first fit"
    );
    let mut results = Vec::new();
    for (vcpus, memory_gib) in [(64, 128u64), (64, 192), (64, 384), (16, 32), (16, 64), (16, 96)] {
        let host = ResourceVector { vcpus, memory_mib: memory_gib << 10, ..ResourceVector::default() };
        let fitting: Vec<Stay> = stays.iter().filter(|stay| host.fits(&stay.resources)).cloned().collect();
        let events = if fitting.len() == stays.len() { &events } else { &packing::events(&fitting) };
        let bound = packing::volume_bound(&fitting, events, &host);
        let hearth = packing::hosts_with_scheduler(&fitting, events, &host, bound as u32 * 2 + 100)?;
        let exact = packing::hosts_with_scan(&fitting, events, &host, |memory, vcpus, _| (memory, u64::from(vcpus)));
        let first = packing::hosts_with_scan(&fitting, events, &host, |_, _, number| (number as u64, 0));
        println!("{vcpus:>6} {memory_gib:>6}  {bound:>12} {hearth:>8} {exact:>15} {first:>10}");
        results.push(json!({
            "host_vcpus": vcpus, "host_memory_gib": memory_gib, "machines": fitting.len(), "volume_bound": bound,
            "hearth": hearth, "exact_best_fit": exact, "first_fit": first,
            "hearth_to_exact": hearth as f64 / exact as f64,
        }));
    }
    Ok(json!(results))
}
