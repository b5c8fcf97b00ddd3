//! Numbers that only grow, whatever happens to the agent.

use std::io;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::state::{Layout, read_if_exists, write_atomically};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Numbers {
    agent_epoch: u64,
    highest_term: u64,
}

/// The agent's epoch and the highest leader term it has obeyed.
pub struct Epoch {
    layout: Layout,
    numbers: Mutex<Numbers>,
}

impl Epoch {
    /// Begins a new epoch; it is on disk when this returns.
    pub fn begin(layout: &Layout) -> io::Result<Self> {
        let old = match read_if_exists(&layout.epoch())? {
            Some(text) => serde_json::from_slice(&text)?,
            None => Numbers::default(),
        };
        let epoch = Self { layout: layout.clone(), numbers: Mutex::new(old) };
        epoch.store(Numbers { agent_epoch: old.agent_epoch.saturating_add(1), ..old })?;
        Ok(epoch)
    }

    fn store(&self, numbers: Numbers) -> io::Result<()> {
        let mut kept = self.numbers.lock();
        write_atomically(&self.layout.epoch(), &serde_json::to_vec(&numbers)?, 0o600)?;
        *kept = numbers;
        Ok(())
    }

    /// This start of the agent.
    pub fn agent_epoch(&self) -> u64 {
        self.numbers.lock().agent_epoch
    }

    /// Highest term obeyed.
    pub fn highest_term(&self) -> u64 {
        self.numbers.lock().highest_term
    }

    /// Notes a term before it is obeyed.
    pub fn obey(&self, term: u64) -> io::Result<()> {
        let known = *self.numbers.lock();
        if term > known.highest_term { self.store(Numbers { highest_term: term, ..known }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_and_terms_grow_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path(), folder.path());
        let first = Epoch::begin(&layout).unwrap();
        assert_eq!((first.agent_epoch(), first.highest_term()), (1, 0));
        first.obey(7).unwrap();
        first.obey(3).unwrap();
        let second = Epoch::begin(&layout).unwrap();
        assert_eq!((second.agent_epoch(), second.highest_term()), (2, 7));
        std::fs::write(layout.epoch(), b"nonsense").unwrap();
        assert!(Epoch::begin(&layout).is_err(), "a lost epoch must not start again from 1");
    }
}
