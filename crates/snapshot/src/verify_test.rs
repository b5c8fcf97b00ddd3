use std::collections::BTreeMap;

use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};

use super::*;
use crate::chunk::CHUNK_BYTES;
use crate::epoch::Epoch;
use crate::manifest::ManifestSpec;
use crate::objects::{ObjectKind, classify};
use crate::testing::{chunk, domain, listing};
use crate::upload::{IndexedSource, SnapshotUpload};
use crate::usage::{UsageOf, usage};

async fn upload(objects: &Arc<dyn ObjectStore>, id: &str, parent: Option<&LiveRoot>, seeds: &[(u64, u64)]) -> LiveRoot {
    let id = SnapshotKey::new(id).unwrap();
    let store = ChunkStore::new(objects.clone(), domain("test"));
    let parent = match parent {
        Some(parent) => Some(Arc::new(Manifest::load(&**objects, &parent.id, None).await.unwrap())),
        None => None,
    };
    let seeds: BTreeMap<u64, u64> = seeds.iter().copied().collect();
    let indexes: Vec<u64> = seeds.keys().copied().collect();
    let read = IndexedSource::new(
        indexes,
        Box::new(move |index| {
            let content = chunk(seeds[&index]);
            Box::pin(async move { Ok(Some(content)) })
        }),
    );
    let spec = ManifestSpec { id: id.clone(), size_bytes: 2000 * CHUNK_BYTES as u64, epoch: Epoch(0) };
    let uploaded = SnapshotUpload::new(store, spec, parent).run(&read).await.unwrap();
    LiveRoot { id, root_hash: Some(uploaded.manifest.root_hash) }
}

async fn damage(objects: &Arc<dyn ObjectStore>, path: &str) {
    let path = Path::from(path);
    let mut content = objects.get(&path).await.unwrap().bytes().await.unwrap().to_vec();
    let middle = content.len() / 2;
    content[middle] ^= 4;
    objects.put(&path, PutPayload::from(content)).await.unwrap();
}

#[tokio::test]
async fn damage_and_loss_are_found_and_told_with_the_snapshots_they_hit() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let a = upload(&objects, "snap-a", None, &[(0, 1), (1, 2), (1500, 3)]).await;
    let b = upload(&objects, "snap-b", Some(&a), &[(1, 4)]).await;
    let roots = [a.clone(), b.clone()];
    let keys = domain("test");
    let last = parking_lot::Mutex::new(VerifyProgress::default());
    let fine = verify(&objects, &roots, &keys, &|progress| *last.lock() = progress).await;
    assert_eq!((fine.snapshots, fine.chunks, fine.findings.len()), (2, 4, 0));
    assert_eq!(*last.lock(), VerifyProgress { chunks_total: 4, chunks_done: 4, findings: 0 });

    let name_of = |seed| keys.name_of(&chunk(seed)).to_string();
    let all = listing(&*objects).await;
    let path_of = |seed| all.iter().find(|(path, _)| path.ends_with(&name_of(seed))).unwrap().0.clone();
    damage(&objects, &path_of(1)).await;
    objects.delete(&Path::from(path_of(4))).await.unwrap();
    let found = verify(&objects, &roots, &keys, &|_| ()).await;
    assert_eq!((found.chunks, found.findings.len()), (2, 2));
    for finding in &found.findings {
        let ids: Vec<&str> = finding.snapshots.iter().map(SnapshotKey::as_str).collect();
        match &finding.error {
            StorageError::Damaged { path, .. } => {
                assert_eq!((path, ids), (&path_of(1), vec!["snap-a", "snap-b"]));
            }
            StorageError::Missing { path } => assert_eq!((path, ids), (&path_of(4), vec!["snap-b"])),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn damaged_manifests_and_missing_keys_are_findings() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let a = upload(&objects, "snap-a", None, &[(0, 1)]).await;
    let b = upload(&objects, "snap-b", None, &[(0, 2)]).await;
    let roots = [a, b];
    let keyless = verify(&objects, &roots, &domain("other"), &|_| ()).await;
    assert_eq!((keyless.chunks, keyless.findings.len()), (0, 2));
    assert!(keyless.findings[0].error.to_string().contains("not at hand"));

    damage(&objects, "snap/snap-a/root").await;
    let found = verify(&objects, &roots, &domain("test"), &|_| ()).await;
    assert_eq!((found.chunks, found.findings.len()), (1, 1));
    assert_eq!(found.findings[0].path, "snap/snap-a/root");

    // A root that is whole, but not the one that the records name.
    upload(&objects, "snap-c", None, &[(0, 3)]).await;
    let other = objects.get(&Path::from("snap/snap-c/root")).await.unwrap().bytes().await.unwrap();
    objects.put(&Path::from("snap/snap-b/root"), other.into()).await.unwrap();
    let found = verify(&objects, &roots[1..], &domain("test"), &|_| ()).await;
    assert!(found.findings[0].error.to_string().contains("instead of"), "{}", found.findings[0].error);
}

#[tokio::test]
async fn usage_counts_everything_once() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let a = upload(&objects, "snap-a", None, &[(0, 1), (1500, 2)]).await;
    upload(&objects, "snap-b", Some(&a), &[(1, 3)]).await;
    crate::manifest::store_prefetch(&*objects, &a.id, &[1, 2, 3]).await.unwrap();
    objects.put(&Path::from("bundles/x.part.0000"), PutPayload::from_static(b"12345")).await.unwrap();
    let used = usage(&*objects).await.unwrap();
    let count = |kind: fn(&ObjectKind) -> bool, all: &[(String, u64)]| {
        let of = all.iter().filter(|(path, _)| kind(&classify(&Path::from(path.as_str()))));
        of.fold(UsageOf::default(), |sum, (_, size)| UsageOf { objects: sum.objects + 1, bytes: sum.bytes + size })
    };
    let all = listing(&*objects).await;
    assert_eq!(used.chunks, count(|kind| matches!(kind, ObjectKind::Chunk(..)), &all));
    assert_eq!((used.chunks.objects, used.pages.objects, used.roots.objects, used.prefetch.objects), (3, 3, 2, 1));
    assert_eq!(used.other, UsageOf { objects: 1, bytes: 5 });
    let hashed = UsageOf { objects: 6, bytes: used.chunks.bytes + used.pages.bytes };
    assert_eq!(used.by_domain, [("test".to_owned(), hashed)].into());
    assert_eq!(used.by_epoch, [(Epoch(0), hashed)].into());
    assert_eq!(
        all.iter().map(|(_, size)| size).sum::<u64>(),
        hashed.bytes + used.roots.bytes + used.prefetch.bytes + 5
    );
}
