//! Verification: everything that snapshots refer to is read and checked again.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use futures::StreamExt;
use object_store::ObjectStore;

use crate::chunk::{ChunkRef, ChunkStore, KeyDomain, KeyDomainId};
use crate::gc::LiveRoot;
use crate::manifest::Manifest;
use crate::objects::{SnapshotKey, StorageError, chunk_path};
use crate::upload::DEFAULT_PARALLEL;

/// Gives the keys of a key domain.
pub trait KeySource: Send + Sync {
    /// `None` when they are not at hand: the domain's chunks can then not be checked.
    fn key_domain(&self, id: &KeyDomainId) -> Option<KeyDomain>;
}

impl KeySource for KeyDomain {
    fn key_domain(&self, id: &KeyDomainId) -> Option<KeyDomain> {
        (self.id() == id).then(|| self.clone())
    }
}

/// Something that is wrong.
#[derive(Debug)]
pub struct Finding {
    /// The object, as the store names it.
    pub path: String,
    /// What is wrong: missing, damaged, not readable, or no key.
    pub error: StorageError,
    /// The snapshots that need it.
    pub snapshots: Vec<SnapshotKey>,
}

/// How far a verification is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Chunks to read.
    pub chunks_total: u64,
    /// Chunks read.
    pub chunks_done: u64,
    /// Findings so far.
    pub findings: u64,
}

/// What a verification found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Distinct chunks that were read and are right.
    pub chunks: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Reads every root, page and chunk that `roots` need, each object once, and checks it against its name. Errors of the store end
/// up in the findings like damage does; the run goes on.
pub async fn verify(
    objects: &Arc<dyn ObjectStore>,
    roots: &[LiveRoot],
    keys: &dyn KeySource,
    progress: &(dyn Fn(VerifyProgress) + Send + Sync),
) -> Verified {
    let mut verified = Verified::default();
    // Which snapshots (by number) need a chunk.
    let mut needed: HashMap<(KeyDomainId, ChunkRef), Vec<u32>> = HashMap::new();
    let mut domains: BTreeSet<KeyDomainId> = BTreeSet::new();
    for (number, root) in roots.iter().enumerate() {
        verified.snapshots += 1;
        match Manifest::load(&**objects, &root.id, root.root_hash.as_ref()).await {
            Ok(manifest) => {
                domains.insert(manifest.domain().clone());
                for (_, chunk) in manifest.entries() {
                    let users = needed.entry((manifest.domain().clone(), chunk)).or_default();
                    if users.last() != Some(&(number as u32)) {
                        users.push(number as u32);
                    }
                }
            }
            Err(error) => {
                let path = path_of(&error).unwrap_or_else(|| crate::objects::root_path(&root.id).to_string());
                verified.findings.push(Finding { path, error, snapshots: vec![root.id.clone()] });
            }
        }
    }
    let stores: HashMap<KeyDomainId, ChunkStore> = domains
        .into_iter()
        .filter_map(|id| keys.key_domain(&id).map(|domain| (id, ChunkStore::new(objects.clone(), domain))))
        .collect();
    let total = needed.len() as u64;
    let checks = needed.into_iter().map(|((domain, chunk), users)| {
        let store = stores.get(&domain);
        async move {
            let result = match store {
                Some(store) => store.get_chunk(&chunk).await.map(drop),
                None => Err(StorageError::Usage(format!("the key of key domain {domain} is not at hand"))),
            };
            (chunk_path(&domain, &chunk), result, users)
        }
    });
    let mut checks = futures::stream::iter(checks).buffer_unordered(DEFAULT_PARALLEL);
    let mut done = 0;
    while let Some((path, result, users)) = checks.next().await {
        done += 1;
        match result {
            Ok(()) => verified.chunks += 1,
            Err(error) => {
                let ids = users.iter().filter_map(|number| roots.get(*number as usize));
                let snapshots = ids.map(|root| root.id.clone()).collect();
                verified.findings.push(Finding { path: path.to_string(), error, snapshots });
            }
        }
        progress(VerifyProgress { chunks_total: total, chunks_done: done, findings: verified.findings.len() as u64 });
    }
    verified
}

fn path_of(error: &StorageError) -> Option<String> {
    match error {
        StorageError::Missing { path } | StorageError::Damaged { path, .. } | StorageError::Objects { path, .. } => {
            Some(path.clone())
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "verify_test.rs"]
mod tests;
