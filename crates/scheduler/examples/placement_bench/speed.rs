//! How fast decisions are.
//!
//! Ids are measured in two forms: as bare numbers, and as the control plane has them: texts outside, packed into numbers inside,
//! both ways within the measured time.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_scheduler::{
    Config, GroupStrategy, HostSpec, Key, Overcommit, PlacementGroup, Request, ResourceVector, Scheduler, SpreadLevel,
};
use hearth_types::{HostId, InstanceId, Packed};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use crate::workload::Random;

/// A kind of ids.
pub trait Ids {
    const NAME: &'static str;
    type Host: Key;
    type Instance: Key;
    /// What the caller knows an instance by.
    type Name: Clone;
    fn host(number: u32) -> Result<Self::Host, String>;
    /// Spread over the whole range, as random ids are.
    fn instance(number: u64) -> Self::Name;
    /// What the scheduler is asked for.
    fn key(name: &Self::Name) -> Self::Instance;
    /// Makes of the answer what the caller wants of it.
    fn told(host: Self::Host);
}

pub struct Numbers;

impl Ids for Numbers {
    const NAME: &'static str = "numbers";
    type Host = u64;
    type Instance = u128;
    type Name = u128;

    fn host(number: u32) -> Result<u64, String> {
        Ok(u64::from(number))
    }

    fn instance(number: u64) -> u128 {
        u128::from(number).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835) >> 60
    }

    fn key(name: &u128) -> u128 {
        *name
    }

    fn told(host: u64) {
        black_box(host);
    }
}

/// As `hearth-control` does it.
pub struct Control;

impl Ids for Control {
    const NAME: &'static str = "control";
    type Host = Packed<HostId>;
    type Instance = Packed<InstanceId>;
    type Name = String;

    fn host(number: u32) -> Result<Packed<HostId>, String> {
        let text = format!("h-{number:017x}");
        Packed::parse(&text).ok_or_else(|| format!("{text} is no id"))
    }

    fn instance(number: u64) -> String {
        format!("i-{:017x}", Numbers::instance(number))
    }

    #[allow(clippy::unwrap_used)]
    fn key(name: &String) -> Packed<InstanceId> {
        Packed::parse(name).unwrap()
    }

    fn told(host: Packed<HostId>) {
        black_box(host.text());
    }
}

/// What requests ask for besides vCPUs and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// One anti-affinity rule: groups of 8 machines on distinct hosts.
    AntiAffinity,
    /// Everything: 3 zones, two architectures, ECU, instance store, bandwidths, rack-spread placement groups, an image
    /// that a tenth of the hosts hold.
    Everything,
}

#[derive(Debug)]
pub struct Figures {
    pub hosts: u32,
    pub live: usize,
    pub placements_per_second: f64,
    pub releases_per_second: f64,
    pub p50: Duration,
    pub p99: Duration,
    pub p999: Duration,
    pub refusals: u64,
}

const GROUP_SIZE: u64 = 8;
const BATCH: usize = 100;
/// Part of the memory that is in use while decisions are timed.
const FILL_PERCENT: u64 = 80;

/// This thread's own processor time, which other programs on the machine do not lengthen by taking turns.
struct CpuClock(TimeSpec);

impl CpuClock {
    fn now() -> Result<Self, String> {
        let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
        time.map(Self).map_err(|problem| format!("clock_gettime: {problem}"))
    }

    fn elapsed(&self) -> Result<Duration, String> {
        Ok(Duration::from(Self::now()?.0 - self.0))
    }
}

pub struct Cloud<I: Ids> {
    scenario: Scenario,
    scheduler: Scheduler<I::Host, I::Instance>,
    random: Random,
    live: Vec<I::Name>,
    next: u64,
    images: Vec<Arc<str>>,
    zones: Vec<Arc<str>>,
    refusals: u64,
}

impl<I: Ids> Cloud<I> {
    /// A cloud whose hosts (64 vCPUs, 192 GiB) are filled for the most part.
    pub fn new(hosts: u32, scenario: Scenario, seed: u64) -> Result<Self, String> {
        let zones: Vec<Arc<str>> = ["az-a", "az-b", "az-c"].map(Arc::from).into();
        let images: Vec<Arc<str>> = (0..10).map(|n| Arc::from(format!("ami-{n:017x}"))).collect();
        let mut scheduler = Scheduler::new(Config { seed, ..Config::default() });
        for number in 0..hosts {
            let capacity = ResourceVector { vcpus: 64, memory_mib: 192 << 10, ..ResourceVector::default() };
            let mut spec = HostSpec::new(I::host(number)?, "az-a", capacity);
            if scenario == Scenario::Everything {
                spec.zone = zones[number as usize % 3].clone();
                spec.rack = Some(format!("rack-{}", number / if hosts < 1000 { 12 } else { 120 }).into());
                spec.capacity.ecu_milli = 256_000;
                spec.capacity.instance_store_bytes = 4 << 40;
                spec.capacity.ebs_mbps = 40_000;
                spec.capacity.network_mbps = 50_000;
                spec.overcommit = Overcommit { vcpus_permille: 2000, ..Overcommit::default() };
                let arch = if number % 5 == 0 { "arm64" } else { "x86_64" };
                spec.labels.insert("arch".into(), arch.into());
                spec.images.insert(images[number as usize / 3 % images.len()].clone());
            }
            scheduler.upsert_host(spec);
        }
        let random = Random(seed ^ 0x5eed);
        let mut cloud = Self { scenario, scheduler, random, live: Vec::new(), next: 0, images, zones, refusals: 0 };
        let total = u64::from(hosts) * (192 << 10);
        let mut used = 0;
        while used < total * FILL_PERCENT / 100 {
            let (id, request) = cloud.request();
            if cloud.place(id, &request) {
                used += request.resources.memory_mib;
            } else if cloud.refusals > 1000 {
                break;
            }
        }
        cloud.refusals = 0;
        Ok(cloud)
    }

    fn request(&mut self) -> (I::Name, Request<I::Host>) {
        let mut resources = self.random.size();
        let group: Arc<str> = format!("group-{}", self.next / GROUP_SIZE).into();
        let id = I::instance(self.next);
        self.next += 1;
        if self.scenario == Scenario::AntiAffinity {
            let mut request = Request::new(resources);
            request.groups = vec![group.clone()];
            request.anti_affinity = vec![group];
            return (id, request);
        }
        resources.ecu_milli = u64::from(resources.vcpus) * 1500;
        resources.ebs_mbps = u64::from(resources.vcpus) * 150;
        resources.network_mbps = u64::from(resources.vcpus) * 200;
        if self.random.below(8) == 0 {
            resources.instance_store_bytes = u64::from(resources.vcpus) * (60 << 30);
        }
        let mut request = Request::new(resources);
        request.zone = Some(self.zones[self.random.below(3) as usize].clone());
        let arch = if self.random.below(5) == 0 { "arm64" } else { "x86_64" };
        request.labels = vec![("arch".into(), arch.into())];
        request.placement_group = Some(PlacementGroup {
            name: group,
            strategy: GroupStrategy::Spread { level: SpreadLevel::Rack, max_per_zone: Some(7) },
        });
        request.prefer_image = Some(self.images[self.random.below(10) as usize].clone());
        (id, request)
    }

    fn place(&mut self, id: I::Name, request: &Request<I::Host>) -> bool {
        match self.scheduler.place(I::key(&id), request) {
            Ok(_) => self.live.push(id),
            Err(_) => {
                self.refusals += 1;
                return false;
            }
        }
        true
    }

    fn draw_victims(&mut self, count: usize) -> Vec<I::Name> {
        let count = count.min(self.live.len());
        (0..count)
            .map(|_| {
                let drawn = self.random.below(self.live.len() as u64) as usize;
                self.live.swap_remove(drawn)
            })
            .collect()
    }

    /// Times `rounds` rounds of releases of random machines and as many placements; then the same once more, each
    /// decision by itself.
    pub fn measure(&mut self, placements: usize) -> Result<Figures, String> {
        let batch = BATCH.min(self.live.len() / 10).max(1);
        let rounds = placements.div_ceil(batch);
        let (mut placing, mut releasing) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..rounds {
            let (victims, requests) = self.round(batch);
            let start = CpuClock::now()?;
            for victim in &victims {
                self.scheduler.release(&I::key(victim));
            }
            releasing += start.elapsed()?;
            let start = CpuClock::now()?;
            let mut placed = 0u64;
            for (id, request) in &requests {
                if let Ok(placement) = self.scheduler.place(I::key(id), request) {
                    I::told(placement.host);
                    placed += 1;
                }
            }
            placing += start.elapsed()?;
            self.refusals += requests.len() as u64 - placed;
            let placed_ids = requests.into_iter().map(|(id, _)| id);
            self.live.extend(placed_ids.filter(|id| self.scheduler.allocation(&I::key(id)).is_some()));
        }
        let mut single = Vec::with_capacity(rounds.min(5000) * batch);
        for _ in 0..rounds.min(5000) {
            let (victims, requests) = self.round(batch);
            for victim in &victims {
                self.scheduler.release(&I::key(victim));
            }
            for (id, request) in requests {
                let start = Instant::now();
                let placed =
                    self.scheduler.place(I::key(&id), &request).map(|placement| I::told(placement.host)).is_ok();
                single.push(start.elapsed());
                if placed {
                    self.live.push(id);
                }
            }
        }
        single.sort_unstable();
        let quantile = |part: f64| single.get((single.len() as f64 * part) as usize).copied().unwrap_or_default();
        let count = (rounds * batch) as f64;
        Ok(Figures {
            hosts: self.scheduler.hosts().count() as u32,
            live: self.live.len(),
            placements_per_second: count / placing.as_secs_f64(),
            releases_per_second: count / releasing.as_secs_f64(),
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            refusals: self.refusals,
        })
    }

    #[allow(clippy::type_complexity)]
    fn round(&mut self, batch: usize) -> (Vec<I::Name>, Vec<(I::Name, Request<I::Host>)>) {
        let victims = self.draw_victims(batch);
        let requests = (0..batch).map(|_| self.request()).collect();
        (victims, requests)
    }
}
