//! Epochs: the rule that lets garbage be collected without counting references.
//!
//! The control plane keeps one number, the current epoch. An upload (a snapshot, an import, a copy) is opened in the epoch of
//! that moment and writes its objects into it.
//!
//! 1. An upload of epoch `e` may refer to an object that it finds by looking only if that lies in `e` or `e - 1`
//!    ([`Epoch::may_reuse`]). It may refer to any object that its *parent* manifest refers to; the parent is pinned, that is,
//!    counts as live, from the opening to the end of the upload.
//! 2. The current epoch advances from `c` to `c + 1` only while no upload of an epoch before `c` is open.
//! 3. The collector reads the current epoch `c`, then the live roots, and deletes objects of epochs up to `c - 3`
//!    ([`Epoch::may_sweep`]) that none of these roots refers to.
//!
//! So every open upload has `e >= c - 1` and may find by looking nothing older than `c - 2`. What the collector may delete can
//! become referenced again only through a parent, whose objects it has marked. One epoch less would be wrong; the model in
//! `gc/model_test.rs` walks all interleavings and shows both.

use std::fmt;
use std::str::FromStr;

/// A generation of objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u32);

/// How many epochs back an upload may look for objects.
pub const LOOKBACK: u32 = 1;
/// How many epochs back the youngest object lies that may be deleted.
pub const GRACE: u32 = 3;

impl Epoch {
    /// Whether an upload of this epoch may refer to an object of epoch `object` that it found by looking.
    pub fn may_reuse(self, object: Self) -> bool {
        object <= self && self.0 - object.0 <= LOOKBACK
    }

    /// Whether the collector may delete an unreferenced object of epoch `object` while this is the current one.
    pub fn may_sweep(self, object: Self) -> bool {
        object.0.checked_add(GRACE).is_some_and(|earliest| earliest <= self.0)
    }

    /// The epochs in which an upload of this one may look, its own first.
    pub fn reusable(self) -> impl Iterator<Item = Self> {
        (0..=LOOKBACK).filter_map(move |back| self.0.checked_sub(back)).map(Self)
    }

    /// The one after this; `None` at the end of all epochs.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

/// Eight hex digits, so that names sort as numbers do.
impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// A text that is not an epoch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an epoch: it must be 8 hex digits")]
pub struct NotAnEpoch(String);

impl FromStr for Epoch {
    type Err = NotAnEpoch;
    fn from_str(text: &str) -> Result<Self, NotAnEpoch> {
        let error = || NotAnEpoch(text.to_owned());
        if text.len() != 8 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(error());
        }
        u32::from_str_radix(text, 16).map(Self).map_err(|_| error())
    }
}
