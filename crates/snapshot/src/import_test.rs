use std::fs;

use parking_lot::Mutex as SyncMutex;
use proptest::prelude::*;

use super::*;
use crate::manifest::Manifest;
use crate::testing::{listing, memory_store, noise, qemu, sample_disk};

fn request(path: &std::path::Path, id: &str) -> ImportRequest {
    let id = SnapshotKey::new(id).unwrap();
    ImportRequest { path: path.to_owned(), format: None, limits: Limits::default(), id, epoch: Epoch(0) }
}

fn silent() -> OnImportProgress {
    Arc::new(|_| ())
}

async fn content(store: &ChunkStore, id: &str) -> Vec<u8> {
    let manifest = Manifest::load(&**store.objects(), &SnapshotKey::new(id).unwrap(), None).await.unwrap();
    let mut disk = Vec::new();
    for index in 0..manifest.chunk_count() {
        match manifest.read_chunk(store, index).await.unwrap() {
            Some(chunk) => disk.extend_from_slice(&chunk),
            None => disk.resize(disk.len() + CHUNK_BYTES, 0),
        }
    }
    assert!(disk[manifest.size_bytes() as usize..].iter().all(|byte| *byte == 0));
    disk.truncate(manifest.size_bytes() as usize);
    disk
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_becomes_the_same_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let raw = sample_disk(folder.path(), (21 << 20) + 1536);
    let expected = fs::read(&raw).unwrap();
    let mut images = vec![raw.clone()];
    for (name, options) in [
        ("plain.qcow2", &["-O", "qcow2"][..]),
        ("compressed.qcow2", &["-O", "qcow2", "-c"]),
        ("sparse.vmdk", &["-O", "vmdk"]),
        ("stream.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
    ] {
        let path = folder.path().join(name);
        let ends = [raw.to_str().unwrap(), path.to_str().unwrap()];
        qemu("qemu-img", &[&["convert", "-f", "raw"], options, &ends].concat());
        images.push(path);
    }
    let store = memory_store();
    let mut first = None;
    for (number, image) in images.iter().enumerate() {
        let seen = Arc::new(SyncMutex::new(ImportProgress::default()));
        let tell = seen.clone();
        let id = format!("snap-{number}");
        let imported =
            import(&store, request(image, &id), Arc::new(move |progress| *tell.lock() = progress)).await.unwrap();
        assert_eq!(imported.virtual_bytes, expected.len() as u64);
        assert_eq!(content(&store, &id).await, expected, "{}", image.display());
        let progress = *seen.lock();
        assert_eq!((progress.bytes_done, progress.bytes_total), (expected.len() as u64, expected.len() as u64));
        assert_eq!(progress.chunks, imported.chunks);
        // Holes are not looked at, and nothing is stored a second time.
        let present = imported.manifest.present_chunks;
        assert!(present < 15, "{present} chunks of {}", expected.len() / CHUNK_BYTES);
        if number > 0 {
            assert_eq!((imported.chunks.chunks_written, imported.manifest.pages_written), (0, 0));
            assert_eq!(Some(present), first);
        }
        first = Some(present);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_broke_off_writes_only_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("disk.raw");
    fs::write(&raw, noise(5, 40 * CHUNK_BYTES)).unwrap();
    let store = memory_store();
    // Given up after ten chunks, as a killed process does.
    let (tell, done) = tokio::sync::oneshot::channel();
    let tell = SyncMutex::new(Some(tell));
    let progress: OnImportProgress = Arc::new(move |progress: ImportProgress| {
        if progress.chunks.chunks_done >= 10
            && let Some(tell) = tell.lock().take()
        {
            tell.send(()).unwrap();
        }
    });
    tokio::select! {
        biased;
        _ = done => {}
        imported = import(&store, request(&raw, "snap-1"), progress) => { imported.unwrap(); panic!("it was not given up") }
    }
    let before = listing(&**store.objects()).await;
    assert!(before.len() >= 10 && before.iter().all(|(path, _)| path.starts_with("chunk/")), "{before:?}");
    let imported = import(&store, request(&raw, "snap-1"), silent()).await.unwrap();
    assert!(imported.chunks.chunks_found >= 10, "{imported:?}");
    assert_eq!(imported.chunks.chunks_written + imported.chunks.chunks_found, 40);
    assert_eq!(content(&store, "snap-1").await, fs::read(&raw).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_is_the_images_fault_and_leaves_no_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let raw = sample_disk(folder.path(), 21 << 20);
    let good = folder.path().join("good.vmdk");
    let ends = [raw.to_str().unwrap(), good.to_str().unwrap()];
    qemu("qemu-img", &[&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"][..], &ends].concat());
    // A grain in the middle does not unpack: found only after many chunks were handed on.
    let mut bad = fs::read(&good).unwrap();
    let middle = bad.len() / 2;
    bad[middle..middle + 2000].fill(0x55);
    let damaged = folder.path().join("damaged.vmdk");
    fs::write(&damaged, bad).unwrap();
    let gzip = folder.path().join("x.gz");
    fs::write(&gzip, b"\x1f\x8b\x08").unwrap();
    let empty = folder.path().join("empty");
    fs::write(&empty, b"").unwrap();
    let store = memory_store();
    for path in [damaged, gzip, empty] {
        let error = import(&store, request(&path, "snap-1"), silent()).await.unwrap_err();
        assert!(matches!(&error, StorageError::Image(error) if error.is_invalid_input()), "{error}");
    }
    let mut large = request(&raw, "snap-1");
    large.limits.max_virtual_bytes = 1 << 20;
    let error = import(&store, large, silent()).await.unwrap_err();
    assert!(matches!(&error, StorageError::Image(ImageError::TooLarge { .. })), "{error}");
    assert!(listing(&**store.objects()).await.iter().all(|(path, _)| !path.starts_with("snap/")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_ends_the_import() {
    use crate::testing::{Fault, FaultStore, domain};
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("disk.raw");
    fs::write(&raw, noise(5, 80 * CHUNK_BYTES)).unwrap();
    let memory = Arc::new(object_store::memory::InMemory::new());
    let faulty = FaultStore::new(memory, |call, _| if call > 30 { Fault::Refused } else { Fault::None });
    let store = ChunkStore::new(faulty, domain("test"));
    let error = import(&store, request(&raw, "snap-1"), silent()).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}

#[derive(Clone, Debug)]
enum Piece {
    Data(usize),
    Zeros(usize),
}

proptest! {
    #![proptest_config(crate::testing::cases(64))]

    /// Data and holes of any length are cut into the right chunks.
    #[test]
    fn pieces_of_any_length_make_the_disk(
        pieces in proptest::collection::vec(
            prop_oneof![(1usize..1_200_000).prop_map(Piece::Data), (1usize..1_500_000).prop_map(Piece::Zeros)], 1..8)
    ) {
        let (sender, mut receiver) = mpsc::channel(1000);
        let mut sink = ChunkSink {
            sender, handed: Arc::default(), position: 0, chunk: BytesMut::new(), path: PathBuf::new(),
        };
        let mut disk = Vec::new();
        for (number, piece) in pieces.into_iter().enumerate() {
            match piece {
                Piece::Data(length) => {
                    let data = noise(number as u64 + 1, length);
                    sink.data(&data).unwrap();
                    disk.extend(data);
                }
                Piece::Zeros(length) => {
                    sink.zeros(length as u64, &mut |_| {}).unwrap();
                    disk.resize(disk.len() + length, 0);
                }
            }
            prop_assert_eq!(sink.position(), disk.len() as u64);
        }
        sink.flush().unwrap();
        let mut read = vec![0; disk.len().next_multiple_of(CHUNK_BYTES)];
        let mut last = None;
        while let Ok(Item::Chunk(SourceChunk { index, content })) = receiver.try_recv() {
            prop_assert!(last < Some(index), "each chunk once, ascending");
            last = Some(index);
            read[index as usize * CHUNK_BYTES..][..CHUNK_BYTES].copy_from_slice(&content.unwrap());
        }
        read.truncate(disk.len());
        prop_assert!(read == disk);
    }
}
