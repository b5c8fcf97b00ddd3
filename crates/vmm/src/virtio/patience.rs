//! How long the I/O thread looks for work before it sleeps.
//!
//! To sleep and be woken costs more than to look again a few times, and a driver need not notify a device that looks. So while
//! sleeps turn out short the thread polls instead, up to a bound, and one that sleeps long does not poll at all: the rule by which KVM
//! polls for a halted vCPU (Linux Documentation/virt/kvm/halt-polling.rst). Where there is one processor, what is waited for could not
//! come while it polls.

use std::time::Duration;

/// The longest poll, in looks: what a sleep, a wake-up and a notification cost, roughly.
const LOOKS: u32 = 200;
/// Whatever a look is found to cost.
const BOUNDS: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));
/// The shortest poll is this part of the longest.
const STEPS: u32 = 8;

/// The adaptive window.
pub(super) struct Patience {
    window: Duration,
    longest: Duration,
}

impl Patience {
    /// For a thread to which one look costs `look`, on a host with so many processors.
    pub(super) fn new(look: Duration, processors: usize) -> Self {
        let longest = if processors > 1 { (look * LOOKS).clamp(BOUNDS.0, BOUNDS.1) } else { Duration::ZERO };
        Self { window: Duration::ZERO, longest }
    }

    /// Always the same, for tests.
    #[cfg(test)]
    pub(super) fn of(window: Duration) -> Self {
        Self { window, longest: window }
    }

    /// How long to look for work before sleeping.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// No work was found in time; it came after `waited` in all.
    pub(super) fn slept(&mut self, waited: Duration) {
        let shortest = self.longest / STEPS;
        if waited < self.longest {
            self.window = (self.window * 2).clamp(shortest, self.longest);
        } else {
            self.window /= 2;
            if self.window < shortest {
                self.window = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sleeps_briefly_polls_and_who_sleeps_long_does_not() {
        let us = Duration::from_micros;
        let mut patience = Patience::new(Duration::from_nanos(400), 2);
        assert_eq!((patience.window(), patience.longest), (Duration::ZERO, us(80)));
        for window in [10, 20, 40, 80, 80] {
            patience.slept(us(79));
            assert_eq!(patience.window(), us(window));
        }
        for window in [40, 20, 10, 0, 0] {
            patience.slept(us(80));
            assert_eq!(patience.window(), us(window));
        }
    }

    #[test]
    fn a_look_that_costs_nothing_or_very_much_does_not_make_it_absurd() {
        assert_eq!(Patience::new(Duration::ZERO, 2).longest, BOUNDS.0);
        assert_eq!(Patience::new(Duration::from_secs(1), 64).longest, BOUNDS.1);
    }

    #[test]
    fn one_processor_never_polls() {
        let mut patience = Patience::new(Duration::from_nanos(400), 1);
        patience.slept(Duration::ZERO);
        patience.slept(Duration::from_micros(1));
        assert_eq!(patience.window(), Duration::ZERO);
    }
}
