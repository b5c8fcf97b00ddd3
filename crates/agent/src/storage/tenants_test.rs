//! What one account leaves on a host's disk, and what the next one sees there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use hearth_block::{
    CHUNK_BYTES, Cause, ChunkFetcher, Engine, LayeredVolume, OpenOptions, Operation, Request, Volume, VolumeEvents,
    VolumeQueue,
};
use hearth_proto::v1::{BaseSnapshot, HostVolume, KeyDomain};
use hearth_snapshot::{Epoch, IndexedSource, ManifestSpec, SnapshotKey, SnapshotUpload, StoreOptions, open_store};
use object_store::ObjectStore;

use super::{Bases, HostVolumes, Keyring, Placed, Reader};
use crate::state::Layout;

const CHUNKS: u64 = 24;
/// What the first account writes.
const SECRET: u8 = 0xA5;
const SNAPSHOT: &str = "snap-0123456789abcdef0";

struct Agent(Placed);

impl ChunkFetcher for Agent {
    fn fetch(&self, chunk: u64) {
        if let Some(base) = &self.0.base {
            base.want(chunk, Reader::Waiting);
        }
    }
}

impl VolumeEvents for Agent {
    fn impaired(&self, cause: Cause) {
        panic!("{cause:?}");
    }
    fn recovered(&self) {}
}

fn open(placed: &Placed) -> LayeredVolume {
    let agent = Arc::new(Agent(placed.clone()));
    let options = OpenOptions {
        generation: placed.wanted.attach_generation,
        fetcher: agent.clone(),
        events: agent,
        engine: Engine::Auto,
        direct: true,
    };
    LayeredVolume::open(placed.files().unwrap(), options).unwrap()
}

/// One request of a guest.
fn run(
    volume: &LayeredVolume,
    queue: &mut dyn VolumeQueue,
    operation: Operation,
    offset: u64,
    bytes: &mut [u8],
    length: u64,
) {
    let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    let buffers = if bytes.is_empty() { &[] } else { &buffers[..] };
    // SAFETY: the buffer outlives the request, which is waited for.
    unsafe { queue.submit(Request { operation, offset, length, buffers, token: 0 }).unwrap() };
    queue.kick().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let mut done = false;
    while !done {
        volume.presence_changed();
        queue
            .drain(&mut |completion| {
                completion.result.unwrap();
                done = true;
            })
            .unwrap();
        assert!(Instant::now() < end, "{operation} does not end");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// All that a guest reads, chunk by chunk.
fn content(volume: &LayeredVolume) -> Vec<u8> {
    let mut queue = volume.open_queue(4).unwrap();
    let mut all = vec![SECRET; volume.size_bytes() as usize];
    for (chunk, bytes) in (0u64..).zip(all.chunks_mut(CHUNK_BYTES as usize)) {
        run(volume, queue.as_mut(), Operation::Read, chunk * CHUNK_BYTES, bytes, 0);
    }
    all
}

fn wanted(number: u64, base: Option<&BaseSnapshot>) -> HostVolume {
    HostVolume {
        volume_id: format!("vol-{number:017x}"),
        attach_generation: 1,
        size_bytes: CHUNKS * CHUNK_BYTES,
        base: base.cloned(),
        ..HostVolume::default()
    }
}

/// A host, and a snapshot of four chunks that everybody may use.
async fn host(folder: &std::path::Path) -> (HostVolumes, BaseSnapshot) {
    let objects: Arc<dyn ObjectStore> = open_store("memory:", &StoreOptions::default()).unwrap();
    let domain = KeyDomain { name: "plain".into(), secret: vec![7; 32].into(), encrypt_on_hosts: false };
    let layout = Layout::new(&folder.join("state"), &folder.join("run"));
    let keyring = Keyring::of_domains(&layout, std::slice::from_ref(&domain));
    let size_bytes = 4 * CHUNK_BYTES;
    let spec = ManifestSpec { id: SnapshotKey::new(SNAPSHOT).unwrap(), size_bytes, epoch: Epoch(0) };
    let read =
        |chunk: u64| async move { Ok((chunk != 2).then(|| Bytes::from(vec![0xB0; CHUNK_BYTES as usize]))) }.boxed();
    let source = IndexedSource::new(0..4, Box::new(read));
    let chunks = keyring.chunk_store(&objects, Some(&domain)).unwrap();
    let made = SnapshotUpload::new(chunks, spec, None).run(&source).await.unwrap();
    let root = made.manifest.root_hash.to_string();
    let bases = Arc::new(Bases::new(layout.clone(), objects, keyring, "boot".into(), 0));
    let base = BaseSnapshot { snapshot_id: SNAPSHOT.into(), root, size_bytes, key_domain: Some(domain) };
    (HostVolumes::new(layout, bases).unwrap(), base)
}

/// Invariant 7 across accounts: whatever a volume held that was written, flushed, discarded and deleted, another one that is made on
/// the same disk reads as zeros everywhere but in its snapshot's chunks, and grows by zeros.
#[tokio::test(flavor = "multi_thread")]
async fn invariant_7_a_new_volume_shows_nothing_of_a_deleted_one() {
    let folder = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target")).unwrap();
    let (volumes, base) = host(folder.path()).await;
    for (round, base) in [None, Some(&base)].into_iter().enumerate() {
        let number = 2 * round as u64;
        let theirs = volumes.place(&wanted(number, base)).await.unwrap();
        let id = theirs.id.clone();
        tokio::task::spawn_blocking(move || {
            let volume = open(&theirs);
            let mut queue = volume.open_queue(4).unwrap();
            for chunk in 0..CHUNKS {
                let mut secret = vec![SECRET; CHUNK_BYTES as usize];
                run(&volume, queue.as_mut(), Operation::Write, chunk * CHUNK_BYTES, &mut secret, 0);
            }
            run(&volume, queue.as_mut(), Operation::Flush, 0, &mut [], 0);
            // What they discard themselves they do not see again either.
            run(&volume, queue.as_mut(), Operation::Discard, CHUNK_BYTES, &mut [], 3 * CHUNK_BYTES + 4096);
            drop(queue);
            volume.close_clean().unwrap();
            drop(volume);
            let again = content(&open(&theirs));
            let discarded = CHUNK_BYTES as usize..4 * CHUNK_BYTES as usize + 4096;
            let right = |(at, byte): (usize, &u8)| *byte == if discarded.contains(&at) { 0 } else { SECRET };
            assert!(again.iter().enumerate().all(right));
        })
        .await
        .unwrap();
        volumes.delete(&id).unwrap();
        assert!(!volumes.is_here(&id));

        let mut ours = volumes.place(&wanted(number + 1, base)).await.unwrap();
        let from_base = if base.is_some() { [0, 1, 3].as_slice() } else { &[] };
        tokio::task::spawn_blocking(move || {
            for size in [CHUNKS, CHUNKS + 3] {
                ours.wanted.size_bytes = size * CHUNK_BYTES;
                drop(ours.open_offline().unwrap());
                let seen = content(&open(&ours));
                assert_eq!(seen.len() as u64, size * CHUNK_BYTES);
                for (chunk, bytes) in (0u64..).zip(seen.chunks(CHUNK_BYTES as usize)) {
                    let expected = if from_base.contains(&chunk) { 0xB0 } else { 0 };
                    assert!(bytes.iter().all(|byte| *byte == expected), "chunk {chunk} in round {round}");
                }
            }
        })
        .await
        .unwrap();
    }
}
