use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn limiter(iops: u64, bytes_per_second: u64) -> Limiter {
    let mut limiter = Limiter::default();
    limiter.set(RateLimits { iops, bytes_per_second });
    limiter
}

/// Admits requests back to back until `until`, waiting exactly as long as told. Returns their number.
fn drive(limiter: &mut Limiter, bytes: u64, mut now: u64, until: u64) -> u64 {
    let mut admitted = 0;
    loop {
        match limiter.admit(bytes, now) {
            Ok(()) => admitted += 1,
            Err(at) => {
                assert!(at > now, "told to wait until the past");
                if at >= until {
                    return admitted;
                }
                // Not a nanosecond earlier.
                assert!(limiter.admit(bytes, at - 1).is_err());
                now = at;
            }
        }
    }
}

#[test]
fn zero_is_no_limit() {
    let mut limiter = limiter(0, 0);
    assert!(limiter.is_off());
    assert!((0..100_000).all(|_| limiter.admit(1 << 30, 5).is_ok()));
}

#[test]
fn large_requests_count_once_per_256_kib() {
    assert_eq!(drive(&mut limiter(3000, 0), IO_UNIT_BYTES, SECOND, 11 * SECOND), 30_000 + 151);
    let mut limiter = limiter(3000, 0);
    let two_units = drive(&mut limiter, IO_UNIT_BYTES + 1, SECOND, 11 * SECOND);
    assert!((15_000..15_100).contains(&two_units), "{two_units}");
}

#[test]
fn the_tighter_of_both_limits_holds() {
    // gp3: 125 MiB/s in 1 MiB requests, 3000 IOPS in 4 KiB ones.
    let admitted = drive(&mut limiter(3000, 125 << 20), 1 << 20, SECOND, 11 * SECOND);
    assert!((1250..1260).contains(&admitted), "{admitted}");
    let admitted = drive(&mut limiter(3000, 125 << 20), 4096, SECOND, 11 * SECOND);
    assert!((30_000..30_200).contains(&admitted), "{admitted}");
}

#[test]
fn a_request_larger_than_a_second_of_the_rate_gets_through_and_is_paid_for() {
    let mut limiter = limiter(0, 1 << 20);
    limiter.admit(10 << 20, SECOND).unwrap();
    let next = limiter.admit(512, SECOND).unwrap_err();
    assert_eq!(next, 11 * SECOND - BURST_NS);
}

proptest! {
    #[test]
    fn no_window_exceeds_rate_and_burst(
        iops in 1u64..100_000,
        gaps in prop::collection::vec(0u64..5_000_000, 1..400),
        units in prop::collection::vec(1u64..8, 400),
    ) {
        let mut limiter = limiter(iops, 0);
        let mut now = SECOND;
        let mut spent: Vec<(u64, u64)> = Vec::new();
        for (gap, units) in gaps.iter().zip(units) {
            now += gap;
            if let Err(at) = limiter.admit(units * IO_UNIT_BYTES, now) {
                now = at;
                prop_assert!(limiter.admit(units * IO_UNIT_BYTES, now).is_ok());
            }
            spent.push((now, units));
        }
        let (first, last) = (spent[0].0, now);
        // All but the last request were paid for within the window and what a full bucket gives.
        let paid: u64 = spent.iter().rev().skip(1).map(|(_, units)| units).sum();
        let allowed = (last - first + BURST_NS) as f64 * iops as f64 / 1e9;
        prop_assert!(paid as f64 <= allowed + 8.0, "{paid} > {allowed}");
    }
}
