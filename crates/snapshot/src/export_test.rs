use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::convert::Limits;
use crate::epoch::Epoch;
use crate::import::{ImportRequest, import};
use crate::objects::SnapshotKey;
use crate::testing::{domain, memory_store, qemu, sample_disk};

async fn imported(store: &ChunkStore, path: &Path) -> Manifest {
    let id = SnapshotKey::new("snap-1").unwrap();
    let request = ImportRequest {
        path: path.to_owned(),
        format: None,
        limits: Limits::default(),
        id: id.clone(),
        epoch: Epoch(0),
    };
    import(store, request, Arc::new(|_| ())).await.unwrap();
    Manifest::load(&**store.objects(), &id, None).await.unwrap()
}

fn silent() -> OnExportProgress {
    Arc::new(|_, _| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_comes_out_as_it_went_in() {
    let folder = tempfile::tempdir().unwrap();
    // An odd size; and one that needs three L2 tables, of which one is empty.
    for bytes in [(9 << 20) + 512, (1 << 30) + (300 << 20)] {
        let raw = sample_disk(folder.path(), bytes);
        let store = memory_store();
        let manifest = imported(&store, &raw).await;
        let out = folder.path().join("out.raw");
        let exported = export(&store, &manifest, &out, ExportFormat::Raw, silent()).await.unwrap();
        assert_eq!(exported.virtual_bytes, bytes);
        qemu("cmp", &[raw.to_str().unwrap(), out.to_str().unwrap()]);
        assert!(fs::metadata(&out).unwrap().blocks() * 512 < 6 << 20, "holes stay holes");

        let out = folder.path().join("out.qcow2");
        export(&store, &manifest, &out, ExportFormat::Qcow2, silent()).await.unwrap();
        let out = out.to_str().unwrap();
        qemu("qemu-img", &["check", out]);
        qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), out]);
        assert!(fs::metadata(out).unwrap().len() < 7 << 20);
        // It can be written to.
        qemu("qemu-io", &["-c", "write -P 7 1M 64k", "-c", "write -P 8 700k 9k", out]);
        qemu("qemu-img", &["check", out]);
        let again = crate::testing::memory_store();
        assert_eq!(imported(&again, Path::new(out)).await.size_bytes(), bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_disk_is_exported_too() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("empty.raw");
    fs::File::create(&raw).unwrap().set_len(3 << 30).unwrap();
    let store = memory_store();
    let manifest = imported(&store, &raw).await;
    assert_eq!(manifest.present_chunks(), 0);
    let out = folder.path().join("out.qcow2");
    export(&store, &manifest, &out, ExportFormat::Qcow2, silent()).await.unwrap();
    qemu("qemu-img", &["check", out.to_str().unwrap()]);
    assert!(qemu("qemu-img", &["info", out.to_str().unwrap()]).contains("virtual size: 3 GiB"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_leaves_no_file() {
    use object_store::ObjectStoreExt;
    let folder = tempfile::tempdir().unwrap();
    let store = memory_store();
    let manifest = imported(&store, &sample_disk(folder.path(), 9 << 20)).await;
    let (_, chunk) = manifest.entries().last().unwrap();
    store.objects().delete(&crate::objects::chunk_path(store.domain().id(), &chunk)).await.unwrap();
    let out = folder.path().join("out.raw");
    for format in [ExportFormat::Raw, ExportFormat::Qcow2] {
        let error = export(&store, &manifest, &out, format, silent()).await.unwrap_err();
        assert!(matches!(error, StorageError::Missing { .. }), "{error}");
    }
    let other = ChunkStore::new(store.objects().clone(), domain("other"));
    assert!(matches!(
        export(&other, &manifest, &out, ExportFormat::Raw, silent()).await,
        Err(StorageError::KeyDomain { .. })
    ));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the sample");
}
