//! Uploads to a local folder, killed with SIGKILL at any moment.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hearth_snapshot::*;

const FOLDER: &str = "HEARTH_TEST_KILL_FOLDER";
const CHUNKS: u64 = 48;

fn domain() -> KeyDomain {
    KeyDomain::new(KeyDomainId::new("test").unwrap(), &[7; 32])
}

fn key() -> SnapshotKey {
    SnapshotKey::new("snap-1").unwrap()
}

fn chunk(seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(CHUNK_BYTES).collect::<Vec<u8>>().into()
}

fn open(folder: &Path) -> Arc<dyn ObjectStore> {
    open_store(&format!("file://{}", folder.display()), &StoreOptions::default()).unwrap()
}

/// The part of the test that is killed; does nothing when the test below did not start it.
#[tokio::test(flavor = "multi_thread")]
async fn uploading_child() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let store = ChunkStore::new(open(Path::new(&folder)), domain());
    let read: ReadChunk = Box::new(|index| Box::pin(async move { Ok(Some(chunk(index + 1))) }));
    println!("\nuploading");
    let spec = ManifestSpec { id: key(), size_bytes: CHUNKS * CHUNK_BYTES as u64, epoch: Epoch(0) };
    SnapshotUpload::new(store, spec, None).with_parallel(4).run(&IndexedSource::new(0..CHUNKS, read)).await.unwrap();
    println!("\nuploaded");
}

/// Runs the child and kills it `after` it has started; whether it was done before.
fn run(folder: &Path, after: Option<Duration>) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "uploading_child", "--nocapture"])
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.find(|line| line.as_ref().unwrap() == "uploading").expect("the child did not start").unwrap();
    if let Some(after) = after {
        std::thread::sleep(after);
        child.kill().unwrap();
    }
    let done = lines.any(|line| line.is_ok_and(|line| line == "uploaded"));
    child.wait().unwrap();
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_upload_is_invisible_and_can_be_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let objects = open(folder.path());
    let mut killed = 0;
    for round in 0..12u64 {
        // Often early, sometimes late: later rounds find more of the work done.
        if run(folder.path(), Some(Duration::from_millis(round * round * 2))) {
            break;
        }
        killed += 1;
        match Manifest::load(&*objects, &key(), None).await {
            Err(StorageError::Missing { .. }) => {}
            Ok(manifest) => assert_eq!(manifest.present_chunks(), CHUNKS),
            Err(error) => panic!("round {round}: {error}"),
        }
    }
    assert!(killed > 0, "it was never killed before it was done");
    assert!(run(folder.path(), None));
    let ledger = Arc::new(MemoryLedger::default());
    assert_eq!(ledger.open(&key(), None).unwrap(), Epoch(0));
    let manifest = Manifest::load(&*objects, &key(), None).await.unwrap();
    ledger.close(&key(), Some(manifest.root_hash()));
    let verified = verify(&objects, &ledger.roots().await.unwrap().live, &domain(), &|_| ()).await;
    assert_eq!((verified.chunks, verified.findings.len()), (CHUNKS, 0), "{:?}", verified.findings);
    let used = usage(&*objects).await.unwrap();
    assert_eq!((used.chunks.objects, used.pages.objects, used.roots.objects), (CHUNKS, 1, 1));

    ledger.delete(&key());
    let now = CollectOptions { now: true, local_root: Some(folder.path().to_owned()), ..CollectOptions::default() };
    let collected = Gc::new(objects, ledger).run(&now).await.unwrap();
    eprintln!("killed {killed} times, {} files of interrupted writes", collected.leftovers);
    let mut folders = vec![folder.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            assert!(path.is_dir(), "{} was left behind", path.display());
            folders.push(path);
        }
    }
}
