//! How long the I/O thread looks for work before it sleeps.
//!
//! To sleep and be woken costs more than to look again a few times, and a driver need not notify a device that looks. So while
//! sleeps turn out short the thread polls instead, up to a bound, and one that sleeps long does not poll at all: the rule by which KVM
//! polls for a halted vCPU (Linux Documentation/virt/kvm/halt-polling.rst), with its bound. Where there is one processor, what is
//! waited for could not come while it polls, and one that others want is theirs.

use std::time::{Duration, Instant};

/// The longest poll, in looks: about the 200 us for which KVM polls, where a look takes 200 ns. Emulated processors take longer for both.
const LOOKS: u32 = 1000;
/// Whatever a look is found to cost.
const BOUNDS: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));
/// The shortest poll is this part of the longest.
const STEPS: u32 = 8;
/// No polls for so long after somebody else took the processor.
const MODESTY: Duration = Duration::from_millis(100);

/// The adaptive window.
pub(super) struct Patience {
    window: Duration,
    longest: Duration,
    /// Others had the processor.
    modest_until: Option<Instant>,
}

impl Patience {
    /// For a thread to which one look costs `look`, on a host with so many processors.
    pub(super) fn new(look: Duration, processors: usize) -> Self {
        let longest = if processors > 1 { (look * LOOKS).clamp(BOUNDS.0, BOUNDS.1) } else { Duration::ZERO };
        Self { window: Duration::ZERO, longest, modest_until: None }
    }

    /// Always the same, for tests.
    #[cfg(test)]
    pub(super) fn of(window: Duration) -> Self {
        Self { window, longest: window, modest_until: None }
    }

    /// How long to look for work before sleeping.
    pub(super) fn window(&self, now: Instant) -> Duration {
        if self.modest_until.is_some_and(|until| now < until) { Duration::ZERO } else { self.window }
    }

    /// One look, which ended `now`, took so long. `false`: somebody else ran in between; no more of it.
    pub(super) fn looked(&mut self, took: Duration, now: Instant) -> bool {
        let alone = took < self.longest;
        if !alone {
            self.modest_until = Some(now + MODESTY);
        }
        alone
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
        let (us, now) = (Duration::from_micros, Instant::now());
        let mut patience = Patience::new(Duration::from_nanos(80), 2);
        assert_eq!((patience.window(now), patience.longest), (Duration::ZERO, us(80)));
        for window in [10, 20, 40, 80, 80] {
            patience.slept(us(79));
            assert_eq!(patience.window(now), us(window));
        }
        for window in [40, 20, 10, 0, 0] {
            patience.slept(us(80));
            assert_eq!(patience.window(now), us(window));
        }
    }

    #[test]
    fn a_look_that_costs_nothing_or_very_much_does_not_make_it_absurd() {
        assert_eq!(Patience::new(Duration::ZERO, 2).longest, BOUNDS.0);
        assert_eq!(Patience::new(Duration::from_secs(1), 64).longest, BOUNDS.1);
    }

    #[test]
    fn one_processor_never_polls() {
        let mut patience = Patience::new(Duration::from_nanos(80), 1);
        patience.slept(Duration::ZERO);
        patience.slept(Duration::from_micros(1));
        assert_eq!(patience.window(Instant::now()), Duration::ZERO);
    }

    #[test]
    fn a_processor_that_others_want_is_theirs() {
        let (us, now) = (Duration::from_micros, Instant::now());
        let mut patience = Patience::new(Duration::from_nanos(80), 2);
        patience.slept(us(1));
        assert!(patience.looked(us(79), now) && patience.window(now) == us(10));
        assert!(!patience.looked(us(80), now) && patience.window(now).is_zero());
        patience.slept(us(1));
        assert!(patience.window(now + MODESTY - us(1)).is_zero());
        assert_eq!(patience.window(now + MODESTY), us(20));
    }
}
