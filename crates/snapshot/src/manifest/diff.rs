//! What changed between two manifests.

use super::load::Manifest;
use super::page::PAGE_ENTRIES;
use crate::chunk::ChunkRef;

/// One difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedChunk {
    /// Which chunk.
    pub index: u64,
    /// In the first manifest; `None` = zeros or behind its end.
    pub before: Option<ChunkRef>,
    /// In the second manifest; `None` = zeros or behind its end.
    pub after: Option<ChunkRef>,
}

/// Chunks whose content differs, ascending. Pages that both share are not looked into. Both manifests must be of the same key
/// domain; content of different domains is different by definition.
pub fn changed(before: &Manifest, after: &Manifest) -> Vec<ChangedChunk> {
    let same_domain = before.domain() == after.domain();
    let pages = before.pages.len().max(after.pages.len());
    let mut found = Vec::new();
    for number in 0..pages {
        let name = |manifest: &Manifest| manifest.root.pages.get(number).copied().flatten().map(|(page, _)| page.hash);
        if same_domain && name(before) == name(after) {
            continue;
        }
        for slot in 0..PAGE_ENTRIES {
            let index = (number * PAGE_ENTRIES + slot) as u64;
            let (before, after) = (before.entry(index), after.entry(index));
            let same = match (before, after) {
                (Some(before), Some(after)) => same_domain && before.hash == after.hash,
                (None, None) => true,
                _ => false,
            };
            if !same {
                found.push(ChangedChunk { index, before, after });
            }
        }
    }
    found
}
