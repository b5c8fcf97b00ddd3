//! Tests of the NBD client: its parts by themselves, against a server of ours that loses its cache, and against other people's.

mod brought;
mod cache_loss;
mod hostile;
mod parts;
mod servers;
mod workload;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{NbdError, NbdEvents};

/// Counts.
#[derive(Debug, Default)]
struct Seen {
    lost: AtomicUsize,
    recovered: AtomicUsize,
}

impl Seen {
    fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }

    fn recovered(&self) -> usize {
        self.recovered.load(Ordering::Relaxed)
    }
}

impl NbdEvents for Seen {
    fn lost(&self, error: &NbdError) {
        // Shown when the test fails.
        eprintln!("lost: {error}");
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn recovered(&self) {
        self.recovered.fetch_add(1, Ordering::Relaxed);
    }
}

/// xorshift64*: enough for test data.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}
