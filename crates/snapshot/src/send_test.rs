//! Everything that does I/O can be spawned on a runtime with several threads. Compiling is the test.

use std::path::Path;
use std::sync::Arc;

use crate::*;

fn spawnable<F: Future + Send>(_: F) {}

#[expect(dead_code, clippy::too_many_arguments)]
fn all_of_these_are(
    objects: Arc<dyn ObjectStore>,
    store: ChunkStore,
    manifest: Arc<Manifest>,
    id: SnapshotKey,
    spec: ManifestSpec,
    source: Arc<dyn ChunkSource>,
    gc: Gc,
    roots: Vec<LiveRoot>,
    file: Arc<std::fs::File>,
    request: ImportRequest,
    disks: Vec<ArchiveDisk>,
    opened: OpenedArchive,
    targets: Vec<RestoreDisk>,
    bundle: BundleManifest,
) {
    spawnable(store.put_chunk(Epoch(0), bytes::Bytes::new()));
    spawnable(async { Manifest::load(&*objects, &id, None).await });
    spawnable(async { manifest.read_chunk(&store, 0).await });
    spawnable(async { ManifestWriter::new(spec.clone(), Some(&manifest)).unwrap().commit(&store).await });
    spawnable(async { SnapshotUpload::new(store.clone(), spec.clone(), None).run(&*source).await });
    spawnable(async { store_prefetch(&*objects, &id, &[]).await });
    spawnable(async { load_prefetch(&*objects, &id).await });
    spawnable(async { gc.run(&CollectOptions::default()).await });
    spawnable(async { verify(&objects, &roots, store.domain(), &|_| ()).await });
    spawnable(async { usage(&*objects).await });
    spawnable(async { import(&store, request, Arc::new(|_| ())).await });
    spawnable(async { export(&store, &manifest, Path::new("x"), ExportFormat::Raw, Arc::new(|_, _| ())).await });
    let spec =
        BundleSpec { prefix: String::new(), name: String::new(), disk_bytes: 0, attributes: serde_json::Map::new() };
    spawnable(async { write_bundle(&*objects, spec, &*source, Arc::new(|_, _| ())).await });
    spawnable(async { load_bundle(&*objects, "x", None).await });
    spawnable(async { restore_bundle(&*objects, "x", &bundle, file, Arc::new(|_, _| ())).await });
    spawnable(async { write_archive(&*objects, "x", serde_json::Map::new(), &disks, Arc::new(|_, _| ())).await });
    spawnable(open_archive(objects.clone(), "x"));
    spawnable(async { opened.restore(&targets, Arc::new(|_, _| ())).await });
}
