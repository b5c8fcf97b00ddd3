//! Garbage collection by epochs; the rules and why they are enough: [`crate::epoch`](crate::Epoch).

mod collect;
mod ledger;
mod mark;
mod sweep;

pub use collect::{CollectOptions, Collected, Gc};
pub use ledger::{Ledger, LedgerError, LiveRoot, MemoryLedger, Roots};

#[cfg(test)]
mod model_test;
