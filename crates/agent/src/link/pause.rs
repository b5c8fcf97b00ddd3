//! Pauses between two tries to reach the control plane.

use std::time::Duration;

/// The first pause, at most: a control plane that restarts is back within that order of time.
const FIRST: Duration = Duration::from_millis(100);
/// The longest one. Short, since a host without a session takes no new wishes; long enough that a thousand agents without a
/// control plane are no load.
const LONGEST: Duration = Duration::from_secs(3);

/// Growing pauses with jitter, so that a thousand agents do not come back in one moment.
#[derive(Debug, Default)]
pub struct Pause(u32);

impl Pause {
    /// How long to wait before the next try: between half of the present limit and all of it. The limit doubles each time.
    pub fn longer(&mut self) -> Duration {
        let most = FIRST.saturating_mul(1 << self.0.min(8)).min(LONGEST);
        self.0 = self.0.saturating_add(1);
        let mut random = [0u8; 2];
        // Without random numbers: no jitter.
        let _ = getrandom::fill(&mut random);
        most.mul_f64(0.5 + f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_begin_short_grow_and_stay_below_a_few_seconds() {
        for _ in 0..100 {
            let mut pause = Pause::default();
            let pauses: Vec<Duration> = (0..1000).map(|_| pause.longer()).collect();
            let mut limit = FIRST;
            for pause in &pauses {
                assert!(*pause >= limit / 2 && *pause <= limit, "{pause:?} of {limit:?}");
                limit = (limit * 2).min(LONGEST);
            }
            assert!(pauses.iter().take(4).sum::<Duration>() <= Duration::from_millis(1500), "{pauses:?}");
        }
        let mut distinct: Vec<Duration> = (0..100).map(|_| Pause::default().longer()).collect();
        distinct.sort();
        distinct.dedup();
        assert!(distinct.len() > 10, "agents come back at different moments");
    }
}
