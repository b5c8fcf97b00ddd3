//! Sets of hosts by slot number: few as a sorted list, many as a bitmap.

/// Above this many, the list becomes a bitmap; at half of it, a list again.
const LIST_MAX: usize = 64;

/// A set of host slots with quick membership tests; iterates in ascending order.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostSet {
    /// All members, ascending, while `bits` is empty.
    list: Vec<u32>,
    /// One bit per slot, or empty while the list is used.
    bits: Vec<u64>,
    len: usize,
}

impl HostSet {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(crate) fn contains(&self, slot: u32) -> bool {
        if !self.bits.is_empty() {
            return self.bits.get(word_of(slot)).is_some_and(|word| word & bit_of(slot) != 0);
        }
        if self.list.len() <= 8 { self.list.contains(&slot) } else { self.list.binary_search(&slot).is_ok() }
    }

    /// Adds a slot; `false` if it was there.
    pub(crate) fn insert(&mut self, slot: u32) -> bool {
        if self.bits.is_empty() {
            let Err(position) = self.list.binary_search(&slot) else { return false };
            if self.list.len() < LIST_MAX {
                self.list.insert(position, slot);
                self.len += 1;
                return true;
            }
            let list = std::mem::take(&mut self.list);
            for member in list {
                self.set_bit(member);
            }
        }
        let fresh = self.set_bit(slot);
        self.len += usize::from(fresh);
        fresh
    }

    /// Takes a slot out; `false` if it was not there.
    pub(crate) fn remove(&mut self, slot: u32) -> bool {
        if self.bits.is_empty() {
            let Ok(position) = self.list.binary_search(&slot) else { return false };
            self.list.remove(position);
            self.len -= 1;
            return true;
        }
        let Some(word) = self.bits.get_mut(word_of(slot)) else { return false };
        if *word & bit_of(slot) == 0 {
            return false;
        }
        *word &= !bit_of(slot);
        self.len -= 1;
        if self.len <= LIST_MAX / 2 {
            let list = self.iter().collect();
            self.list = list;
            self.bits = Vec::new();
        }
        true
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let from_bits = self.bits.iter().zip(0u32..).flat_map(|(word, index)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(index * 64 + bit)
            })
        });
        self.list.iter().copied().chain(from_bits)
    }

    fn set_bit(&mut self, slot: u32) -> bool {
        let index = word_of(slot);
        if index >= self.bits.len() {
            self.bits.resize(index + 1, 0);
        }
        let Some(word) = self.bits.get_mut(index) else { return false };
        let fresh = *word & bit_of(slot) == 0;
        *word |= bit_of(slot);
        fresh
    }
}

fn word_of(slot: u32) -> usize {
    slot as usize / 64
}

fn bit_of(slot: u32) -> u64 {
    1 << (slot % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_sorted_set(steps in prop::collection::vec((any::<bool>(), 0u32..300), 0..600)) {
            let mut set = HostSet::default();
            let mut model = BTreeSet::new();
            for (add, slot) in steps {
                if add {
                    prop_assert_eq!(set.insert(slot), model.insert(slot));
                } else {
                    prop_assert_eq!(set.remove(slot), model.remove(&slot));
                }
                prop_assert_eq!(set.len(), model.len());
                prop_assert_eq!(set.is_empty(), model.is_empty());
                prop_assert_eq!(set.contains(slot), model.contains(&slot));
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }
}
