//! Resource vectors as the engine counts them: signed, so that a host on which more is reserved than it has (a capacity
//! that shrank, a replayed record) still gives back exactly what it took.

use crate::resources::{Resource, ResourceVector};

const DIMENSIONS: usize = Resource::ALL.len();

/// Amounts above this are held at it. Far above any real machine, and far enough below `i64::MAX` for sums.
const LARGEST: u64 = 1 << 56;

/// One signed amount per [`Resource`], in the order of `Resource::ALL`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amounts([i64; DIMENSIONS]);

impl From<&ResourceVector> for Amounts {
    fn from(vector: &ResourceVector) -> Self {
        Self(Resource::ALL.map(|resource| vector.get(resource).min(LARGEST) as i64))
    }
}

impl Amounts {
    /// Whether `wanted` is here. An amount of 0 is always here, also where there is less than nothing.
    #[inline]
    pub(crate) fn fits(&self, wanted: &Self) -> bool {
        self.0.iter().zip(&wanted.0).fold(true, |all, (have, want)| all & ((want <= have) | (*want == 0)))
    }

    #[inline]
    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = mine.wrapping_add(*theirs);
        }
    }

    #[inline]
    pub(crate) fn sub(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = mine.wrapping_sub(*theirs);
        }
    }

    pub(crate) fn minus(mut self, other: &Self) -> Self {
        self.sub(other);
        self
    }

    /// How many times `wanted` is here; the largest number for a vector of zeroes.
    pub(crate) fn count_of(&self, wanted: &Self) -> usize {
        let counts = self.0.iter().zip(&wanted.0).filter(|(_, want)| **want > 0).map(|(have, want)| have / want);
        counts.min().map_or(usize::MAX, |count| usize::try_from(count).unwrap_or(0))
    }

    /// The amount in one dimension, 0 where it is negative.
    #[inline]
    pub(crate) fn get(&self, resource: Resource) -> u64 {
        self.0.get(resource as usize).map_or(0, |amount| (*amount).max(0) as u64)
    }

    /// As a plain vector, 0 where it is negative.
    pub(crate) fn to_vector(self) -> ResourceVector {
        ResourceVector {
            vcpus: u32::try_from(self.get(Resource::Vcpus)).unwrap_or(u32::MAX),
            memory_mib: self.get(Resource::Memory),
            ecu_milli: self.get(Resource::Ecu),
            instance_store_bytes: self.get(Resource::InstanceStore),
            ebs_mbps: self.get(Resource::EbsBandwidth),
            network_mbps: self.get(Resource::NetworkBandwidth),
        }
    }
}

/// The minor dimensions (all but vCPU and memory) of a vector in one word: a rough logarithmic level of seven bits for
/// each, so that one subtraction tells whether a host can possibly have enough of all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Levels(u32);

/// The top bit of each byte, free for borrows.
const GUARDS: u32 = 0x8080_8080;

impl Levels {
    #[inline]
    pub(crate) fn of(amounts: &Amounts) -> Self {
        let level = |resource, shift: u32| bucket(amounts.get(resource) >> shift, 2).min(127);
        Self(u32::from_le_bytes([
            level(Resource::Ecu, 0) as u8,
            level(Resource::InstanceStore, 20) as u8,
            level(Resource::EbsBandwidth, 0) as u8,
            level(Resource::NetworkBandwidth, 0) as u8,
        ]))
    }

    /// `false` only if some dimension here is certainly below `wanted`'s.
    #[inline]
    pub(crate) fn may_fit(self, wanted: Self) -> bool {
        ((self.0 | GUARDS) - wanted.0) & GUARDS == GUARDS
    }

    /// The larger level in each dimension.
    #[inline]
    pub(crate) fn max(self, other: Self) -> Self {
        let not_below = ((self.0 | GUARDS) - other.0) & GUARDS;
        let mine = (not_below >> 7) * 0xFF;
        Self((self.0 & mine) | (other.0 & !mine))
    }
}

/// A bucket number that grows with the value: exact for small values, then 2^`precision` buckets for each doubling.
#[inline]
pub(crate) fn bucket(value: u64, precision: u32) -> u32 {
    if value < (2 << precision) {
        return value as u32;
    }
    let shift = 63 - value.leading_zeros() - precision;
    (shift << precision) + (value >> shift) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_are_exact_first_and_then_logarithmic() {
        assert_eq!((0..32).map(|v| bucket(v, 4)).collect::<Vec<_>>(), (0..32).collect::<Vec<_>>());
        assert_eq!((bucket(32, 4), bucket(33, 4), bucket(34, 4)), (32, 32, 33));
        assert_eq!((bucket(63, 4), bucket(64, 4), bucket(67, 4), bucket(68, 4)), (47, 48, 48, 49));
        assert_eq!(bucket(u64::MAX, 4), (59 << 4) + 31);
    }

    #[test]
    fn more_reserved_than_there_is_comes_back_exactly() {
        let have = ResourceVector { vcpus: 2, memory_mib: 100, ..Default::default() };
        let take = ResourceVector { vcpus: 5, memory_mib: 300, ecu_milli: u64::MAX, ..Default::default() };
        let mut free = Amounts::from(&have);
        free.sub(&Amounts::from(&take));
        assert_eq!(free.to_vector(), ResourceVector::default());
        assert!(free.fits(&Amounts::default()));
        assert!(!free.fits(&Amounts::from(&ResourceVector { vcpus: 1, ..Default::default() })));
        free.add(&Amounts::from(&take));
        assert_eq!(free.to_vector(), have);
    }

    fn vectors() -> impl Strategy<Value = ResourceVector> {
        let amount = || prop_oneof![Just(0u64), 0u64..100, any::<u64>().prop_map(|v| v >> 20), any::<u64>()];
        (amount(), amount(), amount(), amount()).prop_map(
            |(ecu_milli, instance_store_bytes, ebs_mbps, network_mbps)| ResourceVector {
                vcpus: 1,
                memory_mib: 1,
                ecu_milli,
                instance_store_bytes,
                ebs_mbps,
                network_mbps,
            },
        )
    }

    proptest! {
        #[test]
        fn bucket_never_falls(a in any::<u64>(), b in any::<u64>(), precision in 0u32..6) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(bucket(low, precision) <= bucket(high, precision));
        }

        #[test]
        fn levels_never_rule_out_what_fits(have in vectors(), want in vectors()) {
            let (have, want) = (Amounts::from(&have), Amounts::from(&want));
            if have.fits(&want) {
                prop_assert!(Levels::of(&have).may_fit(Levels::of(&want)));
            }
        }

        #[test]
        fn max_covers_both(a in vectors(), b in vectors()) {
            let (a, b) = (Levels::of(&Amounts::from(&a)), Levels::of(&Amounts::from(&b)));
            let max = a.max(b);
            prop_assert!(max.may_fit(a) && max.may_fit(b));
            prop_assert_eq!(max, b.max(a));
            prop_assert!(a.max(a) == a);
        }
    }
}
