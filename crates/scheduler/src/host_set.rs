//! Sets of hosts by slot number: a handful in place, more as a sorted list, many as a bitmap.

/// So many are kept in place, without memory of their own: most groups are no larger.
const FEW: usize = 7;

/// Above this many, the list becomes a bitmap; at half of it, a list again.
const LIST_MAX: usize = 64;

/// A set of host slots with quick membership tests; iterates in ascending order.
#[derive(Debug, Default)]
pub(crate) struct HostSet {
    len: u32,
    /// All members, ascending, while `more` is absent.
    few: [u32; FEW],
    /// All members once they were more than a few.
    more: Option<Box<Many>>,
}

#[derive(Debug)]
enum Many {
    /// Ascending.
    List(Vec<u32>),
    /// One bit per slot.
    Bits(Vec<u64>),
}

impl HostSet {
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn few(&self) -> &[u32] {
        let count = if self.more.is_some() { 0 } else { self.len as usize };
        self.few.get(..count).unwrap_or_default()
    }

    #[inline]
    pub(crate) fn contains(&self, slot: u32) -> bool {
        match self.more.as_deref() {
            None => self.few().contains(&slot),
            Some(Many::List(list)) => list.binary_search(&slot).is_ok(),
            Some(Many::Bits(bits)) => bits.get(word_of(slot)).is_some_and(|word| word & bit_of(slot) != 0),
        }
    }

    /// Adds a slot; `false` if it was there.
    pub(crate) fn insert(&mut self, slot: u32) -> bool {
        let fresh = match self.more.as_deref_mut() {
            None => return self.insert_few(slot),
            Some(Many::Bits(bits)) => set_bit(bits, slot),
            Some(Many::List(list)) => match list.binary_search(&slot) {
                Ok(_) => false,
                Err(position) if list.len() < LIST_MAX => {
                    list.insert(position, slot);
                    true
                }
                Err(_) => {
                    let mut bits = Vec::new();
                    for member in list.iter().chain([&slot]) {
                        set_bit(&mut bits, *member);
                    }
                    self.more = Some(Box::new(Many::Bits(bits)));
                    true
                }
            },
        };
        self.len += u32::from(fresh);
        fresh
    }

    fn insert_few(&mut self, slot: u32) -> bool {
        let Err(position) = self.few().binary_search(&slot) else { return false };
        let len = self.len as usize;
        if len < FEW {
            if let Some(tail) = self.few.get_mut(position..=len) {
                tail.rotate_right(1);
                if let Some(first) = tail.first_mut() {
                    *first = slot;
                }
            }
        } else {
            let mut list = self.few.to_vec();
            list.insert(position, slot);
            self.more = Some(Box::new(Many::List(list)));
        }
        self.len += 1;
        true
    }

    /// Takes a slot out; `false` if it was not there.
    pub(crate) fn remove(&mut self, slot: u32) -> bool {
        match self.more.as_deref_mut() {
            None => {
                let Ok(position) = self.few().binary_search(&slot) else { return false };
                if let Some(tail) = self.few.get_mut(position..self.len as usize) {
                    tail.rotate_left(1);
                }
            }
            Some(Many::List(list)) => {
                let Ok(position) = list.binary_search(&slot) else { return false };
                list.remove(position);
            }
            Some(Many::Bits(bits)) => {
                let Some(word) = bits.get_mut(word_of(slot)) else { return false };
                if *word & bit_of(slot) == 0 {
                    return false;
                }
                *word &= !bit_of(slot);
            }
        }
        self.len -= 1;
        self.shrink();
        true
    }

    /// Goes back to a smaller form well below its limit, so that a set at the limit does not go to and fro.
    fn shrink(&mut self) {
        match self.more.as_deref() {
            Some(Many::List(list)) if list.len() <= FEW / 2 => {
                for (place, slot) in self.few.iter_mut().zip(list) {
                    *place = *slot;
                }
                self.more = None;
            }
            Some(Many::Bits(_)) if self.len() <= LIST_MAX / 2 => {
                let list = self.iter().collect();
                self.more = Some(Box::new(Many::List(list)));
            }
            _ => {}
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let (list, bits): (&[u32], &[u64]) = match self.more.as_deref() {
            None => (self.few(), &[]),
            Some(Many::List(list)) => (list, &[]),
            Some(Many::Bits(bits)) => (&[], bits),
        };
        let from_bits = bits.iter().zip(0u32..).flat_map(|(word, index)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(index * 64 + bit)
            })
        });
        list.iter().copied().chain(from_bits)
    }
}

fn set_bit(bits: &mut Vec<u64>, slot: u32) -> bool {
    let index = word_of(slot);
    if index >= bits.len() {
        bits.resize(index + 1, 0);
    }
    let Some(word) = bits.get_mut(index) else { return false };
    let fresh = *word & bit_of(slot) == 0;
    *word |= bit_of(slot);
    fresh
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
                prop_assert!(set.len() > FEW / 2 || set.more.is_none(), "small sets need no memory of their own");
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }
}
