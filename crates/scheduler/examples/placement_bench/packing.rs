//! How many hosts a workload needs: hearth's scheduler against an exact best fit that looks at every host.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use hearth_scheduler::{Config, HostSpec, Request, ResourceVector, Scheduler};

use crate::workload::Stay;

/// Arrivals and departures in order of time; departures first where both fall together.
pub enum Event {
    Arrive(usize),
    Leave(usize),
}

pub fn events(stays: &[Stay]) -> Vec<Event> {
    let mut events = Vec::with_capacity(stays.len() * 2);
    let mut leaving: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    for (index, stay) in stays.iter().enumerate() {
        while let Some(Reverse((time, leaver))) = leaving.peek()
            && f64::from_bits(*time) <= stay.arrives
        {
            events.push(Event::Leave(*leaver));
            leaving.pop();
        }
        events.push(Event::Arrive(index));
        // The bits of positive floats sort as the floats do.
        leaving.push(Reverse((stay.leaves.to_bits(), index)));
    }
    events
}

/// Hosts that the peak of demand fills if it could be cut to fit.
pub fn volume_bound(stays: &[Stay], events: &[Event], host: &ResourceVector) -> u64 {
    let (mut vcpus, mut memory, mut most) = (0u64, 0u64, 0);
    for event in events {
        match event {
            Event::Arrive(stay) => {
                vcpus += u64::from(stays[*stay].resources.vcpus);
                memory += stays[*stay].resources.memory_mib;
            }
            Event::Leave(stay) => {
                vcpus -= u64::from(stays[*stay].resources.vcpus);
                memory -= stays[*stay].resources.memory_mib;
            }
        }
        most = most.max(vcpus.div_ceil(u64::from(host.vcpus))).max(memory.div_ceil(host.memory_mib));
    }
    most
}

/// Most hosts in use at once under hearth's scheduler, with more hosts at hand than it needs.
pub fn hosts_with_scheduler(
    stays: &[Stay],
    events: &[Event],
    host: &ResourceVector,
    at_hand: u32,
) -> Result<usize, String> {
    let mut scheduler: Scheduler<u32, usize> = Scheduler::new(Config { seed: 1, ..Config::default() });
    for id in 0..at_hand {
        scheduler.upsert_host(HostSpec::new(id, "az-a", *host));
    }
    let mut on_host = vec![0u32; at_hand as usize];
    let mut at = vec![0u32; stays.len()];
    let (mut in_use, mut most) = (0, 0);
    for event in events {
        match event {
            Event::Arrive(index) => {
                let stay = &stays[*index];
                let mut request = Request::new(stay.resources);
                if let Some(batch) = stay.spread {
                    let group: Arc<str> = format!("batch-{batch}").into();
                    request.groups = vec![group.clone()];
                    request.anti_affinity = vec![group];
                }
                let placed = scheduler.place(*index, &request).map_err(|problem| problem.to_string())?;
                at[*index] = placed.host;
                on_host[placed.host as usize] += 1;
                in_use += usize::from(on_host[placed.host as usize] == 1);
                most = most.max(in_use);
            }
            Event::Leave(index) => {
                scheduler.release(index);
                on_host[at[*index] as usize] -= 1;
                in_use -= usize::from(on_host[at[*index] as usize] == 0);
            }
        }
    }
    Ok(most)
}

/// What an exact policy minimises: free memory and free vCPUs of a host with room, and its number.
pub type Score = fn(u64, u32, usize) -> (u64, u64);

/// The same with a linear scan over all hosts in use; a new host is opened only if none of them can.
pub fn hosts_with_scan(stays: &[Stay], events: &[Event], host: &ResourceVector, score: Score) -> usize {
    struct Host {
        free: ResourceVector,
        batches: Vec<Option<u32>>,
    }
    let mut hosts: Vec<Host> = Vec::new();
    let mut vacant: Vec<usize> = Vec::new();
    let mut at = vec![0usize; stays.len()];
    for event in events {
        match event {
            Event::Arrive(index) => {
                let Stay { resources, spread, .. } = &stays[*index];
                let able = hosts.iter().enumerate().filter(|(_, candidate)| {
                    !candidate.batches.is_empty()
                        && candidate.free.fits(resources)
                        && (spread.is_none() || !candidate.batches.contains(spread))
                });
                let best = able.min_by_key(|(i, candidate)| score(candidate.free.memory_mib, candidate.free.vcpus, *i));
                let chosen = best.map(|(i, _)| i).or_else(|| vacant.pop()).unwrap_or_else(|| {
                    hosts.push(Host { free: *host, batches: Vec::new() });
                    hosts.len() - 1
                });
                hosts[chosen].free = hosts[chosen].free.saturating_sub(resources);
                hosts[chosen].batches.push(*spread);
                at[*index] = chosen;
            }
            Event::Leave(index) => {
                let Stay { resources, spread, .. } = &stays[*index];
                let candidate = &mut hosts[at[*index]];
                candidate.free = candidate.free.saturating_add(resources);
                if let Some(position) = candidate.batches.iter().position(|batch| batch == spread) {
                    candidate.batches.swap_remove(position);
                }
                if candidate.batches.is_empty() {
                    vacant.push(at[*index]);
                }
            }
        }
    }
    hosts.len()
}
