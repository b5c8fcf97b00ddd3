use std::fs;

use object_store::memory::InMemory;
use object_store::{ObjectStoreExt, PutPayload};

use super::*;
use crate::bundle::{BundleSpec, Bundled, PART_BYTES, write_bundle};
use crate::chunk::CHUNK_BYTES;
use crate::sources::FileSource;
use crate::testing::{listing, noise, sample_disk};

#[path = "bundle_hostile_test.rs"]
mod hostile;

fn silent() -> OnBundleProgress {
    Arc::new(|_, _| ())
}

async fn bundled(objects: &dyn ObjectStore, disk: &std::path::Path) -> Bundled {
    let source = FileSource::open(disk).unwrap();
    let attributes = serde_json::from_str(r#"{"architecture":"x86_64","root":"/dev/sda1"}"#).unwrap();
    let spec =
        BundleSpec { prefix: "images/web".into(), name: "web-1".into(), disk_bytes: source.size_bytes(), attributes };
    write_bundle(objects, spec, &source, silent()).await.unwrap()
}

fn target(folder: &std::path::Path) -> (std::path::PathBuf, Arc<File>) {
    // One of its own each time: writes of a restoration that was given up may still be on their way.
    let (file, path) = tempfile::NamedTempFile::new_in(folder).unwrap().keep().unwrap();
    (path, Arc::new(file))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_comes_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let objects = InMemory::new();
    let disk = sample_disk(folder.path(), (70 << 20) + 512);
    // Enough that does not compress for several parts.
    let file = File::options().write(true).open(&disk).unwrap();
    file.write_all_at(&noise(3, 35 << 20), 20 << 20).unwrap();
    let made = bundled(&objects, &disk).await;
    assert_eq!(made.location, "images/web/web-1.manifest.json");
    assert!(made.manifest.parts.len() >= 4);
    assert!(made.manifest.parts.iter().all(|part| part.bytes <= PART_BYTES));
    assert!(made.manifest.data_bytes < 40 << 20, "holes are left out");
    let (manifest, sha256) = load_bundle(&objects, &made.location, Some(&made.manifest_sha256)).await.unwrap();
    assert_eq!((&manifest, sha256), (&made.manifest, made.manifest_sha256));
    assert_eq!(manifest.attributes["root"], "/dev/sda1");
    let (path, file) = target(folder.path());
    restore_bundle(&objects, &made.location, &manifest, file, silent()).await.unwrap();
    assert!(fs::read(path).unwrap() == fs::read(disk).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_damage_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let objects = InMemory::new();
    let made = bundled(&objects, &sample_disk(folder.path(), 20 << 20)).await;
    let part = Path::from(format!("images/web/{}", made.manifest.parts[0].object));
    let whole = objects.get(&part).await.unwrap().bytes().await.unwrap();
    let mut flipped = whole.to_vec();
    flipped[whole.len() / 2] ^= 1;
    let mut longer = whole.to_vec();
    longer.push(0);
    for content in [flipped, longer, whole[..whole.len() - 1].to_vec(), Vec::new()] {
        objects.put(&part, PutPayload::from(content)).await.unwrap();
        let (_, file) = target(folder.path());
        let error = restore_bundle(&objects, &made.location, &made.manifest, file, silent()).await.unwrap_err();
        assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
    }
    objects.delete(&part).await.unwrap();
    let (_, file) = target(folder.path());
    let error = restore_bundle(&objects, &made.location, &made.manifest, file, silent()).await.unwrap_err();
    assert!(matches!(error, StorageError::Missing { .. }), "{error}");

    // Digests that fit a part which is not what the extents say.
    let mut forged = made.manifest.clone();
    let content = zstd::encode_all(&b"too short"[..], 1).unwrap();
    forged.parts[0].bytes = content.len() as u64;
    forged.parts[0].sha256 = hex::encode(Sha256::digest(&content));
    forged.parts[0].blake3 = blake3::hash(&content).to_hex().to_string();
    objects.put(&part, PutPayload::from(content)).await.unwrap();
    let (_, file) = target(folder.path());
    let error = restore_bundle(&objects, &made.location, &forged, file, silent()).await.unwrap_err();
    assert!(matches!(error, StorageError::Damaged { damage: Damage::Decompression(_), .. }), "{error}");

    let error = load_bundle(&objects, &made.location, Some(&"00".repeat(32))).await.unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
    let error = load_bundle(&objects, "images/web/nothing.json", None).await.unwrap_err();
    assert!(matches!(error, StorageError::Missing { .. }), "{error}");
    objects.put(&Path::from("other.json"), PutPayload::from_static(b"{}")).await.unwrap();
    assert!(matches!(load_bundle(&objects, "other.json", None).await, Err(StorageError::Damaged { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_device_of_another_size_or_a_bad_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let objects = InMemory::new();
    let disk = sample_disk(folder.path(), 12 << 20);
    let made = bundled(&objects, &disk).await;
    let (_, file) = target(folder.path());
    file.set_len(CHUNK_BYTES as u64).unwrap();
    let error = restore_bundle(&objects, &made.location, &made.manifest, file, silent()).await.unwrap_err();
    assert!(matches!(error, StorageError::Usage(_)), "{error}");
    let before = listing(&objects).await;
    for (prefix, name) in [("a", ""), ("a", "x/y"), ("a", ".."), ("a/../b", "x")] {
        let source = FileSource::open(&disk).unwrap();
        let spec = BundleSpec {
            prefix: prefix.into(),
            name: name.into(),
            disk_bytes: 12 << 20,
            attributes: Default::default(),
        };
        let error = write_bundle(&objects, spec, &source, silent()).await.unwrap_err();
        assert!(matches!(error, StorageError::Usage(_)), "{error}");
    }
    assert_eq!(listing(&objects).await, before);
}
