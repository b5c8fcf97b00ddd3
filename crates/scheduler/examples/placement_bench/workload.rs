//! A made-up but realistic demand for virtual machines, fixed by its seed.
//!
//! - **Sizes**: the mix below. Small shapes dominate by number, large ones by volume, as in public clouds (the published
//!   Azure trace of 2017 has 57 % one-vCPU and 20 % two-vCPU machines); GiB per vCPU runs from 1 to 8.
//! - **Arrivals**: tenants come as a Poisson process whose rate swings by 40 % over each day; each brings a batch of
//!   machines of one size (geometric, 3 on average, 64 at most).
//! - **Lifetimes**: one for the whole batch: 55 % short (log-normal, median 15 minutes), 30 % medium (log-normal, median 4
//!   hours), 15 % long (Pareto from 1 day, alpha 1.2): most machines are short-lived, most volume is long-lived.
//! - **Rule**: a third of the batches must spread over distinct hosts.

use hearth_scheduler::ResourceVector;

/// vCPUs, MiB, weight.
const SIZES: [(u32, u64, u32); 13] = [
    (1, 512, 6),
    (1, 1024, 10),
    (1, 2048, 18),
    (1, 4096, 8),
    (2, 4096, 14),
    (2, 8192, 12),
    (2, 16384, 4),
    (4, 8192, 7),
    (4, 16384, 8),
    (4, 32768, 3),
    (8, 16384, 3),
    (8, 32768, 5),
    (8, 65536, 2),
];

const MINUTE: f64 = 60.0;
const HOUR: f64 = 60.0 * MINUTE;
const DAY: f64 = 24.0 * HOUR;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// In the open interval 0..1.
    pub fn unit(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    pub fn size(&mut self) -> ResourceVector {
        let total: u32 = SIZES.iter().map(|(_, _, weight)| weight).sum();
        let mut drawn = self.below(u64::from(total)) as u32;
        for (vcpus, memory_mib, weight) in SIZES {
            if drawn < weight {
                return ResourceVector { vcpus, memory_mib, ..ResourceVector::default() };
            }
            drawn -= weight;
        }
        ResourceVector::default()
    }

    fn lifetime(&mut self) -> f64 {
        match self.below(100) {
            0..55 => 15.0 * MINUTE * (self.normal() * 1.2).exp(),
            55..85 => 4.0 * HOUR * (self.normal() * 1.0).exp(),
            _ => DAY * self.unit().powf(-1.0 / 1.2),
        }
    }
}

/// One machine's stay.
#[derive(Clone, Debug)]
pub struct Stay {
    pub arrives: f64,
    pub leaves: f64,
    pub resources: ResourceVector,
    /// The batch, if its members must not share a host.
    pub spread: Option<u32>,
}

/// Stays in order of arrival over some days.
pub fn stays(seed: u64, days: f64, batches_per_hour: f64) -> Vec<Stay> {
    let mut random = Random(seed);
    let mut all = Vec::new();
    let (mut now, mut batch) = (0.0, 0);
    while now < days * DAY {
        let swing = 1.0 + 0.4 * (std::f64::consts::TAU * now / DAY).sin();
        now += -random.unit().ln() * HOUR / (batches_per_hour * swing);
        let resources = random.size();
        let count = (1.0 + random.unit().ln() / (2.0f64 / 3.0).ln()).floor().min(64.0) as u32;
        let leaves = now + random.lifetime();
        let spread = (random.below(3) == 0).then_some(batch);
        all.extend((0..count).map(|_| Stay { arrives: now, leaves, resources, spread }));
        batch += 1;
    }
    all
}
