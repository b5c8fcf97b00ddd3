//! What launches from a snapshot read: noted by the first, fetched ahead by later ones, which add what was missing.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

/// The reads of a base belong to the launch until nobody has waited for another chunk for this long,
pub const QUIET: Duration = Duration::from_secs(15);
/// and at most this long after the first of them.
pub const NOTED_FOR: Duration = Duration::from_secs(120);

/// Chunks in the order in which launches touched them.
pub struct WorkingSet {
    /// `None` once the launch is over.
    touched: Option<Vec<u32>>,
    once: HashSet<u32>,
    began: Option<Instant>,
    last: Option<Instant>,
}

impl Default for WorkingSet {
    fn default() -> Self {
        Self { touched: Some(Vec::new()), once: HashSet::new(), began: None, last: None }
    }
}

impl WorkingSet {
    /// A launch reads a chunk. `true` for the first.
    pub fn note(&mut self, chunk: u64) -> bool {
        let Some(touched) = &mut self.touched else { return false };
        let now = Instant::now();
        self.last = Some(now);
        if let Ok(chunk) = u32::try_from(chunk)
            && self.once.insert(chunk)
        {
            touched.push(chunk);
        }
        self.began.replace(self.began.unwrap_or(now)).is_none()
    }

    /// Whether the launch is over, if nothing is under way to it.
    pub fn is_over(&self, idle: bool) -> bool {
        self.began.is_some_and(|began| began.elapsed() >= NOTED_FOR)
            || idle && self.last.is_some_and(|last| last.elapsed() >= QUIET)
    }

    /// All of it; later reads are no part of it.
    pub fn take(&mut self) -> Vec<u32> {
        self.once = HashSet::new();
        self.touched.take().unwrap_or_default()
    }
}

/// The list that replaces `known` after a launch that read `touched`, of a snapshot with `chunks` chunks; `None` when nothing is new.
/// Launches differ: what they add is no more than what makes half of the snapshot.
pub fn unite(known: Option<&[u32]>, touched: &[u32], chunks: u64) -> Option<Vec<u32>> {
    let Some(known) = known else { return (!touched.is_empty()).then(|| touched.to_vec()) };
    let there: HashSet<u32> = known.iter().copied().collect();
    let room = usize::try_from(chunks / 2).unwrap_or(usize::MAX).saturating_sub(known.len());
    let new: Vec<u32> = touched.iter().copied().filter(|chunk| !there.contains(chunk)).take(room).collect();
    (!new.is_empty()).then(|| [known, &new].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_add_what_was_missing_up_to_half_of_the_snapshot() {
        assert_eq!(unite(None, &[], 100), None);
        assert_eq!(unite(None, &[9, 2], 2), Some(vec![9, 2]));
        assert_eq!(unite(Some(&[9, 2]), &[2, 9], 100), None);
        assert_eq!(unite(Some(&[9, 2]), &[2, 7, 9, 8], 100), Some(vec![9, 2, 7, 8]));
        assert_eq!(unite(Some(&[9, 2]), &[5, 7, 8], 8), Some(vec![9, 2, 5, 7]));
        assert_eq!(unite(Some(&[9, 2]), &[5], 4), None);
        assert_eq!(unite(Some(&[9, 2, 3]), &[5], 2), None);
    }
}
