//! When a VMM that ended by itself is started again.

use std::time::Duration;

use crate::launch::VmmEnd;

/// A run this long clears the past.
const HEALTHY: Duration = Duration::from_secs(300);
/// Ends of the VMM that are not the guest's doing, in a row, after which the instance is given up.
const MOST_FAILURES: u32 = 5;
/// Quick resets that are not delayed: installers and kernel upgrades reset two or three times.
const FREE_RESETS: u32 = 3;

/// What to do after an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Start again after this time.
    Restart(Duration),
    /// The guest is off.
    PowerOff,
    /// It does not stay up.
    GiveUp,
}

/// Ends in quick succession.
#[derive(Clone, Copy, Debug, Default)]
pub struct Restarts {
    resets: u32,
    crashes: u32,
    failures: u32,
}

fn doubled(exponent: u32, most: u64) -> Duration {
    Duration::from_secs(1u64.checked_shl(exponent).unwrap_or(most).min(most))
}

impl Restarts {
    /// Decides after a run of this length.
    pub fn after(&mut self, end: VmmEnd, uptime: Duration) -> Next {
        if uptime >= HEALTHY {
            *self = Self::default();
        }
        match end {
            VmmEnd::PoweredOff => Next::PowerOff,
            VmmEnd::Reset => {
                self.resets += 1;
                let over = self.resets.checked_sub(FREE_RESETS + 1);
                Next::Restart(over.map_or(Duration::ZERO, |over| doubled(over, 30)))
            }
            VmmEnd::GuestCrashed => {
                self.crashes += 1;
                Next::Restart(doubled(self.crashes - 1, 60))
            }
            VmmEnd::Killed | VmmEnd::Failed(_) | VmmEnd::Died => {
                self.failures += 1;
                match self.failures {
                    1 => Next::Restart(Duration::ZERO),
                    n if n > MOST_FAILURES => Next::GiveUp,
                    n => Next::Restart(doubled(n - 2, 60)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_secs(2);

    fn seconds(restarts: &mut Restarts, end: VmmEnd, times: usize) -> Vec<u64> {
        (0..times)
            .map(|_| match restarts.after(end, QUICK) {
                Next::Restart(delay) => delay.as_secs(),
                _ => 999,
            })
            .collect()
    }

    #[test]
    fn resets_are_free_then_slow_and_never_given_up() {
        let mut restarts = Restarts::default();
        assert_eq!(seconds(&mut restarts, VmmEnd::Reset, 10), [0, 0, 0, 1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(restarts.after(VmmEnd::Reset, HEALTHY), Next::Restart(Duration::ZERO));
        assert_eq!(seconds(&mut restarts, VmmEnd::Reset, 200).last(), Some(&30));
    }

    #[test]
    fn crashes_are_delayed_and_never_given_up() {
        assert_eq!(seconds(&mut Restarts::default(), VmmEnd::GuestCrashed, 8), [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_vmm_that_keeps_dying_is_given_up_unless_it_ran_well_in_between() {
        for end in [VmmEnd::Died, VmmEnd::Failed(13), VmmEnd::Killed] {
            let mut restarts = Restarts::default();
            assert_eq!(seconds(&mut restarts, end, 6), [0, 1, 2, 4, 8, 999]);
            assert_eq!(restarts.after(end, HEALTHY), Next::Restart(Duration::ZERO));
        }
        assert_eq!(Restarts::default().after(VmmEnd::PoweredOff, QUICK), Next::PowerOff);
    }
}
