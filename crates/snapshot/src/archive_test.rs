use std::sync::Arc;

use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use proptest::prelude::*;

use super::read::parse_head;
use super::*;
use crate::chunk::{CHUNK_BYTES, ChunkStore};
use crate::convert::Limits;
use crate::epoch::Epoch;
use crate::import::{ImportRequest, import};
use crate::manifest::{Committed, Manifest, ManifestSpec};
use crate::objects::{Damage, SnapshotKey, StorageError};
use crate::testing::{domain, listing, memory_store, noise, sample_disk};

#[path = "archive_hostile_test.rs"]
mod hostile;

fn silent() -> OnArchiveProgress {
    Arc::new(|_, _| ())
}

async fn disk(store: &ChunkStore, id: &str, path: &std::path::Path) -> ArchiveDisk {
    let id = SnapshotKey::new(id).unwrap();
    let request = ImportRequest {
        path: path.to_owned(),
        format: None,
        limits: Limits::default(),
        id: id.clone(),
        epoch: Epoch(0),
    };
    import(store, request, Arc::new(|_| ())).await.unwrap();
    let manifest = Arc::new(Manifest::load(&**store.objects(), &id, None).await.unwrap());
    ArchiveDisk { name: format!("/dev/{id}"), store: store.clone(), manifest }
}

fn targets(store: &ChunkStore, header: &ArchiveHeader) -> Vec<RestoreDisk> {
    let disks = header.disks.iter().enumerate();
    let spec = |(number, disk): (usize, &ArchivedDisk)| ManifestSpec {
        id: SnapshotKey::new(format!("snap-restored-{number}")).unwrap(),
        size_bytes: disk.size_bytes,
        epoch: Epoch(9),
    };
    disks.map(|disk| RestoreDisk { store: store.clone(), spec: spec(disk) }).collect()
}

async fn stored(folder: &std::path::Path) -> (Arc<dyn ObjectStore>, Vec<ArchiveDisk>, Archived) {
    let store = memory_store();
    let first = disk(&store, "a", &sample_disk(folder, (12 << 20) + 512)).await;
    let path = folder.join("noise.raw");
    std::fs::write(&path, noise(4, 5 * CHUNK_BYTES)).unwrap();
    let second = disk(&store, "b", &path).await;
    let bucket: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let disks = vec![first, second];
    let attributes = serde_json::from_str(r#"{"name":"web","architecture":"x86_64"}"#).unwrap();
    let archived = write_archive(&*bucket, "ami-1.bin", attributes, &disks, silent()).await.unwrap();
    (bucket, disks, archived)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ami_comes_back_in_another_cloud() {
    let folder = tempfile::tempdir().unwrap();
    let (bucket, disks, archived) = stored(folder.path()).await;
    assert_eq!(listing(&*bucket).await, [("ami-1.bin".to_owned(), archived.bytes)]);
    let opened = open_archive(bucket, "ami-1.bin").await.unwrap();
    assert_eq!(opened.header().attributes["name"], "web");
    let cloud = ChunkStore::new(Arc::new(InMemory::new()), domain("elsewhere"));
    let targets = targets(&cloud, opened.header());
    let committed = opened.restore(&targets, silent()).await.unwrap();
    assert_eq!(
        committed,
        opened
            .restore(&targets, silent())
            .await
            .unwrap()
            .iter()
            .map(|again| { Committed { pages_written: 1, ..*again } })
            .collect::<Vec<_>>()
    );
    for ((disk, target), committed) in disks.iter().zip(&targets).zip(committed) {
        let restored = Manifest::load(&**cloud.objects(), &target.spec.id, Some(&committed.root_hash)).await.unwrap();
        assert_eq!(restored.size_bytes(), disk.manifest.size_bytes());
        assert!(restored.chunks().eq(disk.manifest.chunks()));
        for index in disk.manifest.chunks() {
            let expected = disk.manifest.read_chunk(&disk.store, index).await.unwrap();
            assert_eq!(restored.read_chunk(&cloud, index).await.unwrap(), expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_anywhere_publishes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (bucket, _, archived) = stored(folder.path()).await;
    let path = Path::from("ami-1.bin");
    let whole = bucket.get(&path).await.unwrap().bytes().await.unwrap();
    let header = open_archive(bucket.clone(), "ami-1.bin").await.unwrap().header().clone();
    let cloud = ChunkStore::new(Arc::new(InMemory::new()), domain("elsewhere"));
    let attempt = async |content: Vec<u8>| {
        bucket.put(&path, PutPayload::from(content)).await.unwrap();
        let opened = open_archive(bucket.clone(), "ami-1.bin").await?;
        opened.restore(&targets(&cloud, &header), silent()).await
    };
    let length = archived.bytes as usize;
    let places = (0..300).step_by(7).chain((300..length).step_by(length / 40)).chain(length - 60..length);
    for at in places {
        let mut changed = whole.to_vec();
        changed[at] ^= 0x10;
        let error = attempt(changed).await.unwrap_err();
        assert!(matches!(error, StorageError::Damaged { .. } | StorageError::Usage(_)), "byte {at}: {error}");
    }
    for cut in [0, 10, 200, length / 3, length - 1, length - 52] {
        let error = attempt(whole[..cut].to_vec()).await.unwrap_err();
        assert!(matches!(error, StorageError::Damaged { .. }), "cut at {cut}: {error}");
    }
    let mut longer = whole.to_vec();
    longer.push(1);
    assert!(matches!(attempt(longer).await, Err(StorageError::Damaged { .. })));
    assert!(listing(&**cloud.objects()).await.iter().all(|(path, _)| path.starts_with("chunk/")));
    attempt(whole.to_vec()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_must_fit() {
    let folder = tempfile::tempdir().unwrap();
    let (bucket, disks, _) = stored(folder.path()).await;
    let opened = open_archive(bucket.clone(), "ami-1.bin").await.unwrap();
    let cloud = memory_store();
    let mut wrong = targets(&cloud, opened.header());
    wrong[0].spec.size_bytes += 512;
    assert!(matches!(opened.restore(&wrong, silent()).await, Err(StorageError::Usage(_))));
    assert!(matches!(opened.restore(&wrong[..1], silent()).await, Err(StorageError::Usage(_))));
    assert!(matches!(open_archive(bucket.clone(), "nothing").await, Err(StorageError::Missing { .. })));
    let none = write_archive(&*bucket, "x", Default::default(), &[], silent()).await;
    assert!(matches!(none, Err(StorageError::Usage(_))));
    // A source that cannot be read leaves no object.
    let (_, chunk) = disks[0].manifest.entries().next().unwrap();
    let path = crate::objects::chunk_path(disks[0].store.domain().id(), &chunk);
    disks[0].store.objects().delete(&path).await.unwrap();
    let failed = write_archive(&*bucket, "x", Default::default(), &disks, silent()).await;
    assert!(matches!(failed, Err(StorageError::Missing { .. })));
    assert_eq!(listing(&*bucket).await.len(), 1);
}

proptest! {
    #[test]
    fn nonsense_is_refused(head in proptest::collection::vec(any::<u8>(), 0..200), json in "[ -~]{0,80}", payload in any::<Vec<u8>>()) {
        prop_assert!(parse_head(&head).is_err());
        let mut signed = Vec::from(*MAGIC);
        signed.extend([0; 8]);
        signed.extend(json.as_bytes());
        let crc = crc32c::crc32c(&signed);
        signed.extend(crc.to_le_bytes());
        prop_assert!(parse_head(&signed).is_err());
        let record: [u8; record::RECORD_BYTES] = std::array::from_fn(|at| head.get(at).copied().unwrap_or(0));
        let refused = matches!(record::decode(&record, &payload), Err(Damage::Checksum { .. }));
        prop_assert!(refused);
        prop_assert!(record::unpack(1, &payload).is_err());
    }
}
