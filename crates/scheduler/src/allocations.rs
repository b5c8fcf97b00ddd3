//! The table of allocations: a dense list, and a hash table of positions in it.
//!
//! A table of four-byte positions stays small with millions of allocations, so looking up a name that is not there (every
//! new placement does) touches little memory.

use std::hash::{BuildHasher, Hash};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::amounts::Amounts;
use crate::groups::Memberships;

/// What stands where.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) host: u32,
    /// Order of arrival.
    pub(crate) sequence: u64,
    pub(crate) amounts: Amounts,
    pub(crate) memberships: Memberships,
}

#[derive(Debug)]
struct Entry<A> {
    hash: u64,
    name: A,
    allocation: Allocation,
}

/// Allocations by name.
#[derive(Debug)]
pub(crate) struct Allocations<A> {
    entries: Vec<Option<Entry<A>>>,
    vacant: Vec<u32>,
    positions: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl<A> Default for Allocations<A> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            vacant: Vec::new(),
            positions: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }
}

impl<A: Hash + Eq> Allocations<A> {
    fn entry(&self, position: u32) -> Option<&Entry<A>> {
        self.entries.get(position as usize)?.as_ref()
    }

    pub(crate) fn get(&self, name: &A) -> Option<&Allocation> {
        let hash = self.hasher.hash_one(name);
        let is_it = |position: &u32| self.entry(*position).is_some_and(|entry| entry.name == *name);
        self.entry(*self.positions.find(hash, is_it)?).map(|entry| &entry.allocation)
    }

    /// Adds an allocation. Its name must be new.
    pub(crate) fn insert(&mut self, name: A, allocation: Allocation) {
        let hash = self.hasher.hash_one(&name);
        let position = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        if let Some(entry) = self.entries.get_mut(position as usize) {
            *entry = Some(Entry { hash, name, allocation });
        }
        let entries = &self.entries;
        self.positions.insert_unique(hash, position, |position| match entries.get(*position as usize) {
            Some(Some(entry)) => entry.hash,
            _ => 0,
        });
    }

    pub(crate) fn remove(&mut self, name: &A) -> Option<Allocation> {
        let hash = self.hasher.hash_one(name);
        let entries = &self.entries;
        let is_it = |position: &u32| match entries.get(*position as usize) {
            Some(Some(entry)) => entry.name == *name,
            _ => false,
        };
        let (position, _) = self.positions.find_entry(hash, is_it).ok()?.remove();
        self.vacant.push(position);
        Some(self.entries.get_mut(position as usize)?.take()?.allocation)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&A, &Allocation)> {
        self.entries.iter().flatten().map(|entry| (&entry.name, &entry.allocation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_host(host: u32) -> Allocation {
        Allocation { host, sequence: 0, amounts: Amounts::default(), memberships: Memberships::default() }
    }

    #[test]
    fn names_are_found_until_removed_and_places_are_used_again() {
        let mut table: Allocations<String> = Allocations::default();
        for round in 0..50u32 {
            for number in 0..20 {
                table.insert(format!("i-{round}-{number}"), on_host(number));
            }
            for number in 0..20 {
                let name = format!("i-{round}-{number}");
                assert_eq!(table.get(&name).unwrap().host, number);
                assert_eq!(table.remove(&name).unwrap().host, number);
                assert!(table.get(&name).is_none() && table.remove(&name).is_none());
            }
        }
        assert_eq!((table.iter().count(), table.entries.len()), (0, 20));
    }
}
