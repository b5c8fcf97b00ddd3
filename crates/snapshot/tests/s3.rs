//! The chunk store on a real S3 server, healthy and not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hearth_snapshot::*;
use object_store::ObjectStoreExt;
use support::{ACCESS_KEY, BUCKET, Fault, Line, SECRET_KEY, Server, random_faults, serve};

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn options(server: &Server) -> StoreOptions {
    StoreOptions {
        s3: S3Options {
            endpoint: Some(format!("http://{}", server.address)),
            access_key_id: Some(ACCESS_KEY.into()),
            secret_access_key: Some(SECRET_KEY.into()),
            allow_http: true,
            ..S3Options::default()
        },
        retry_timeout: Some(Duration::from_secs(60)),
    }
}

fn open(server: &Server) -> Arc<dyn ObjectStore> {
    open_store(&format!("s3://{BUCKET}/hearth/one"), &options(server)).unwrap()
}

fn domain() -> KeyDomain {
    KeyDomain::new(KeyDomainId::new("test").unwrap(), &[7; 32])
}

/// Half noise, half text, unlike that of any other seed.
fn chunk(seed: u64) -> Bytes {
    let mut content: Vec<u8> = b"hearth ".iter().copied().cycle().take(CHUNK_BYTES).collect();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in content[..CHUNK_BYTES / 2].chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    content.into()
}

fn source(chunks: &[(u64, u64)]) -> IndexedSource {
    let chunks: BTreeMap<u64, u64> = chunks.iter().copied().collect();
    let indexes: Vec<u64> = chunks.keys().copied().collect();
    IndexedSource::new(
        indexes,
        Box::new(move |index| {
            let content = chunk(chunks[&index]);
            Box::pin(async move { Ok(Some(content)) })
        }),
    )
}

fn key(id: &str) -> SnapshotKey {
    SnapshotKey::new(id).unwrap()
}

async fn snapshot(
    store: &ChunkStore,
    ledger: &MemoryLedger,
    id: &str,
    parent: Option<&str>,
    chunks: &[(u64, u64)],
) -> Uploaded {
    let epoch = ledger.open(&key(id), parent.map(key).as_ref()).unwrap();
    let parent = match parent {
        Some(parent) => Some(Arc::new(Manifest::load(&**store.objects(), &key(parent), None).await.unwrap())),
        None => None,
    };
    let spec = ManifestSpec { id: key(id), size_bytes: 3000 * CHUNK_BYTES as u64, epoch };
    let uploaded = SnapshotUpload::new(store.clone(), spec, parent).run(&source(chunks)).await.unwrap();
    ledger.close(&key(id), Some(uploaded.manifest.root_hash));
    uploaded
}

async fn assert_reads(store: &ChunkStore, id: &str, chunks: &[(u64, u64)]) {
    let manifest = Manifest::load(&**store.objects(), &key(id), None).await.unwrap();
    assert_eq!(manifest.present_chunks() as usize, chunks.len());
    for (index, seed) in chunks {
        assert_eq!(manifest.read_chunk(store, *index).await.unwrap(), Some(chunk(*seed)), "chunk {index} of {id}");
    }
}

/// Everything this crate does with a store, once.
async fn a_whole_life(objects: Arc<dyn ObjectStore>) {
    let store = ChunkStore::new(objects.clone(), domain());
    let ledger = Arc::new(MemoryLedger::default());
    let first: Vec<(u64, u64)> = (0..24).map(|number| (number * 100, number + 1)).collect();
    let uploaded = snapshot(&store, &ledger, "snap-1", None, &first).await;
    assert_eq!(uploaded.chunks.chunks_done, 24);
    let second = snapshot(&store, &ledger, "snap-2", Some("snap-1"), &[(0, 50), (100, 2)]).await;
    assert_eq!((second.chunks.chunks_unchanged, second.manifest.pages_written), (1, 1));
    let mut expected = first.clone();
    expected[0].1 = 50;
    assert_reads(&store, "snap-1", &first).await;
    assert_reads(&store, "snap-2", &expected).await;
    store_prefetch(&*objects, &key("snap-2"), &[3, 1, 2]).await.unwrap();
    assert_eq!(load_prefetch(&*objects, &key("snap-2")).await.unwrap(), Some(vec![3, 1, 2]));
    assert_eq!(load_prefetch(&*objects, &key("snap-1")).await.unwrap(), None);

    // The id of a snapshot is taken once, whatever is lost on the way.
    let spec = ManifestSpec { id: key("snap-1"), size_bytes: 3000 * CHUNK_BYTES as u64, epoch: Epoch(0) };
    let other = SnapshotUpload::new(store.clone(), spec, None).run(&source(&[(1, 1)])).await;
    assert!(matches!(other, Err(StorageError::RootExists { .. })), "{other:?}");

    let roots = ledger.roots().await.unwrap().live;
    let verified = verify(&objects, &roots, &domain(), &|_| ()).await;
    assert!(verified.findings.is_empty(), "{:?}", verified.findings);
    assert_eq!((verified.snapshots, verified.chunks), (2, 25));
    let used = usage(&*objects).await.unwrap();
    assert_eq!((used.chunks.objects, used.roots.objects, used.prefetch.objects), (25, 2, 1));

    bundles(&objects, &store).await;
    archives(&objects, &store).await;

    ledger.delete(&key("snap-1"));
    let gc = Gc::new(objects.clone(), ledger.clone());
    let now = CollectOptions { now: true, ..CollectOptions::default() };
    let collected = gc.run(&now).await.unwrap();
    assert_eq!((collected.epoch, collected.roots), (Epoch(3), 1), "{collected:?}");
    assert!(collected.chunks >= 1 && collected.pages >= 1, "{collected:?}");
    assert_reads(&store, "snap-2", &expected).await;
    ledger.delete(&key("snap-2"));
    gc.run(&now).await.unwrap();
    let used = usage(&*objects).await.unwrap();
    assert_eq!((used.chunks.objects, used.pages.objects, used.roots.objects, used.prefetch.objects), (0, 0, 0, 0));
    assert!(used.other.objects > 0, "bundle and archive stay");
}

async fn bundles(objects: &Arc<dyn ObjectStore>, store: &ChunkStore) {
    let manifest = Arc::new(Manifest::load(&**objects, &key("snap-2"), None).await.unwrap());
    let from = ManifestSource::new(store.clone(), manifest.clone()).unwrap();
    let spec = BundleSpec {
        prefix: "images".into(),
        name: "web".into(),
        disk_bytes: manifest.size_bytes(),
        attributes: serde_json::Map::new(),
    };
    let bundled = write_bundle(&**objects, spec, &from, Arc::new(|_, _| ())).await.unwrap();
    let (read, _) = load_bundle(&**objects, &bundled.location, Some(&bundled.manifest_sha256)).await.unwrap();
    let file = tempfile::tempfile().unwrap();
    let file = Arc::new(file);
    restore_bundle(&**objects, &bundled.location, &read, file.clone(), Arc::new(|_, _| ())).await.unwrap();
    let mut content = vec![0; CHUNK_BYTES];
    file.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content, chunk(50));
    file.read_exact_at(&mut content, 2300 * CHUNK_BYTES as u64).unwrap();
    assert_eq!(content, chunk(24));
}

async fn archives(objects: &Arc<dyn ObjectStore>, store: &ChunkStore) {
    let manifest = Arc::new(Manifest::load(&**objects, &key("snap-2"), None).await.unwrap());
    let disk = ArchiveDisk { name: "/dev/sda1".into(), store: store.clone(), manifest: manifest.clone() };
    write_archive(&**objects, "ami-1.bin", serde_json::Map::new(), &[disk], Arc::new(|_, _| ())).await.unwrap();
    let opened = open_archive(objects.clone(), "ami-1.bin").await.unwrap();
    let spec = ManifestSpec { id: key("restored"), size_bytes: manifest.size_bytes(), epoch: Epoch(0) };
    // Into another place: the epochs of this one are the ledger's.
    let elsewhere = open_store("memory:", &StoreOptions::default()).unwrap();
    let target = RestoreDisk { store: ChunkStore::new(elsewhere.clone(), domain()), spec };
    let restored = opened.restore(&[target], Arc::new(|_, _| ())).await.unwrap();
    assert_eq!(restored[0].present_chunks, manifest.present_chunks());
    let restored = Manifest::load(&*elsewhere, &key("restored"), None).await.unwrap();
    assert_eq!(changed(&manifest, &restored), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_on_s3() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), LOCAL, Line::default(), None).await;
    a_whole_life(open(&server)).await;
    assert!(std::fs::read_dir(folder.path().join(BUCKET).join("hearth/one")).unwrap().count() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_on_s3_that_fails_at_every_fifth_request() {
    for seed in [1, 2, 3] {
        let folder = tempfile::tempdir().unwrap();
        let line = Line { plan: random_faults(seed, 20), ..Line::default() };
        let server = serve(folder.path(), LOCAL, line, None).await;
        a_whole_life(open(&server)).await;
        let (requests, faults) = (server.requests.load(Ordering::SeqCst), server.faults.load(Ordering::SeqCst));
        eprintln!("seed {seed}: {faults} faults in {requests} requests");
        assert!(faults > 30, "{faults} faults in {requests} requests");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_a_transient_error_and_the_upload_goes_on_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let down = Arc::new(AtomicBool::new(false));
    let plan = {
        let down = down.clone();
        Arc::new(
            move |_: u64, _: &http::Method, _: &str| {
                if down.load(Ordering::SeqCst) { Fault::Dropped } else { Fault::None }
            },
        )
    };
    let server = serve(folder.path(), LOCAL, Line { plan, ..Line::default() }, None).await;
    let mut impatient = options(&server);
    impatient.retry_timeout = Some(Duration::from_millis(300));
    let objects = open_store(&format!("s3://{BUCKET}/p"), &impatient).unwrap();
    let store = ChunkStore::new(objects, domain());
    let chunks: Vec<(u64, u64)> = (0..20).map(|number| (number, number + 1)).collect();
    let spec = ManifestSpec { id: key("snap-1"), size_bytes: 20 * CHUNK_BYTES as u64, epoch: Epoch(0) };
    // The store goes away after ten chunks.
    let upload = SnapshotUpload::new(store.clone(), spec, None).with_parallel(2);
    let failing = upload.clone().with_progress({
        let down = down.clone();
        Arc::new(move |progress: UploadProgress| down.store(progress.chunks_done >= 10, Ordering::SeqCst))
    });
    let error = failing.run(&source(&chunks)).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    let error = Manifest::load(&**store.objects(), &key("snap-1"), None).await.unwrap_err();
    assert!(error.is_transient(), "it is not said to be missing: {error}");
    down.store(false, Ordering::SeqCst);
    let uploaded = upload.run(&source(&chunks)).await.unwrap();
    assert!(uploaded.chunks.chunks_found >= 10, "{uploaded:?}");
    assert_reads(&store, "snap-1", &chunks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_waited_out_however_often_it_is_asked_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let begun = std::time::Instant::now();
    let plan = Arc::new(
        move |_: u64, _: &http::Method, _: &str| {
            if begun.elapsed() < Duration::from_secs(8) { Fault::Dropped } else { Fault::None }
        },
    );
    let server = serve(folder.path(), LOCAL, Line { plan, ..Line::default() }, None).await;
    let objects = open_store(&format!("s3://{BUCKET}/p"), &options(&server)).unwrap();
    objects.put(&"object".into(), "content".into()).await.unwrap();
    assert!(server.faults.load(Ordering::SeqCst) > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_is_published_once_whatever_happens_to_the_acknowledgement() {
    for fault in [Fault::LostAck, Fault::LostConnection, Fault::Torn, Fault::Broken, Fault::Throttled] {
        let folder = tempfile::tempdir().unwrap();
        let hit = Arc::new(AtomicBool::new(false));
        let plan = {
            let hit = hit.clone();
            Arc::new(move |_: u64, method: &http::Method, path: &str| {
                let first =
                    *method == http::Method::PUT && path.ends_with("/root") && !hit.swap(true, Ordering::SeqCst);
                if first { fault } else { Fault::None }
            })
        };
        let server = serve(folder.path(), LOCAL, Line { plan, ..Line::default() }, None).await;
        let store = ChunkStore::new(open(&server), domain());
        let ledger = MemoryLedger::default();
        snapshot(&store, &ledger, "snap-1", None, &[(1, 1)]).await;
        assert!(hit.load(Ordering::SeqCst));
        assert_reads(&store, "snap-1", &[(1, 1)]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_and_addresses_are_not_transient() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), LOCAL, Line::default(), None).await;
    let mut wrong = options(&server);
    wrong.s3.secret_access_key = Some("wrong".into());
    let objects = open_store(&format!("s3://{BUCKET}"), &wrong).unwrap();
    let error = Manifest::load(&*objects, &key("snap-1"), None).await.unwrap_err();
    assert!(!error.is_transient() && !matches!(error, StorageError::Missing { .. }), "{error}");
    let mut plain = options(&server);
    plain.s3.allow_http = false;
    let mut half = options(&server);
    half.s3.secret_access_key = None;
    for (url, options, sign) in [
        (format!("s3://{BUCKET}"), plain, "not encrypted"),
        (format!("s3://{BUCKET}"), half, "secret access key"),
        ("s3:///x".into(), options(&server), "s3://bucket/prefix"),
        ("ftp://x/y".into(), StoreOptions::default(), "not known"),
        ("/var/lib/x".into(), StoreOptions::default(), "URL"),
        ("file://host/x".into(), StoreOptions::default(), "file:///folder"),
    ] {
        let error = open_store(&url, &options).unwrap_err();
        assert!(matches!(error, StorageError::Address { .. }), "{error}");
        assert!(error.to_string().contains(sign), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn https_needs_a_trusted_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], made.signing_key.serialize_der().try_into().unwrap())
        .unwrap();
    let tls = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let server = serve(folder.path(), LOCAL, Line::default(), Some(tls)).await;
    let mut trusting = options(&server);
    trusting.s3.endpoint = Some(format!("https://localhost:{}", server.address.port()));
    trusting.s3.allow_http = false;
    trusting.retry_timeout = Some(Duration::from_millis(100));
    let suspicious = open_store(&format!("s3://{BUCKET}"), &trusting).unwrap();
    let error = usage(&*suspicious).await.unwrap_err();
    assert!(format!("{error:?}").contains("ertificate"), "{error:?}");
    trusting.s3.ca_pem = Some(made.cert.pem().into_bytes());
    let store = ChunkStore::new(open_store(&format!("s3://{BUCKET}"), &trusting).unwrap(), domain());
    let stored = store.put_chunk(Epoch(0), chunk(1)).await.unwrap().unwrap();
    assert_eq!(store.get_chunk(&stored).await.unwrap(), chunk(1));
}
