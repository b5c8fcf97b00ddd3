//! Property tests that double as fuzzers: a short run by default, minutes with `HEARTH_FUZZ_SECONDS=n`.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseResult, TestRunner};

/// Runs `test` on `cases` random inputs, or again and again for as many seconds as the environment asks. A failure is
/// shrunk and printed with its input.
pub fn fuzz<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> TestCaseResult)
where
    S::Value: Debug,
{
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let seconds = std::env::var("HEARTH_FUZZ_SECONDS").ok().map(|text| text.parse().expect("a number of seconds"));
    let started = Instant::now();
    let mut rounds = 0u64;
    loop {
        rounds += 1;
        if let Err(error) = TestRunner::new(config.clone()).run(strategy, &test) {
            panic!("{error}");
        }
        match seconds {
            Some(seconds) if started.elapsed() < Duration::from_secs(seconds) => {}
            _ => break,
        }
    }
    if seconds.is_some() {
        eprintln!("{} inputs in {:?}", rounds * u64::from(cases), started.elapsed());
    }
}
