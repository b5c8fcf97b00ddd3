//! What the tests of this crate share: content, and an object store that misbehaves on demand.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::chunk::{CHUNK_BYTES, ChunkStore, KeyDomain, KeyDomainId};

/// `usual` cases of a slow property, or as many as PROPTEST_CASES says.
pub fn cases(usual: u32) -> proptest::test_runner::Config {
    let config = proptest::test_runner::Config::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => proptest::test_runner::Config { cases: usual, ..config },
    }
}

/// The same noise for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// A chunk that compresses well and is unlike any of another seed; 0 = zeros.
pub fn chunk(seed: u64) -> Bytes {
    let mut content = vec![0; CHUNK_BYTES];
    if seed > 0 {
        for block in content.chunks_mut(64 << 10) {
            block[..8].copy_from_slice(&seed.to_le_bytes());
        }
    }
    content.into()
}

pub fn domain(name: &str) -> KeyDomain {
    KeyDomain::new(KeyDomainId::new(name).unwrap(), blake3::hash(name.as_bytes()).as_bytes())
}

pub fn memory_store() -> ChunkStore {
    ChunkStore::new(Arc::new(InMemory::new()), domain("test"))
}

/// What happens to one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// It fails and was not done: throttled, 500, connection refused.
    Refused,
    /// It was done, and fails: the acknowledgement is lost.
    LostAck,
    /// A read ends early, a write stores only its first half and fails (a store that is not atomic).
    Torn,
    /// It and all later calls fail, the process is dead; this one was not done.
    DeathBefore,
    /// It was done; all later calls fail.
    DeathAfter,
}

type Plan = Box<dyn Fn(u64, &Path) -> Fault + Send + Sync>;

/// Counts the calls and asks a plan what is to happen to each. The path of a listing is its prefix.
pub struct FaultStore {
    inner: Arc<dyn ObjectStore>,
    plan: Plan,
    calls: Arc<AtomicU64>,
    dead: AtomicU64,
}

impl FaultStore {
    pub fn new(inner: Arc<dyn ObjectStore>, plan: impl Fn(u64, &Path) -> Fault + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { inner, plan: Box::new(plan), calls: Arc::default(), dead: AtomicU64::new(0) })
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    fn fault(&self, path: &Path) -> Fault {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        if self.dead.load(Ordering::SeqCst) == 1 {
            return Fault::Refused;
        }
        let fault = (self.plan)(number, path);
        if matches!(fault, Fault::DeathBefore | Fault::DeathAfter) {
            self.dead.store(1, Ordering::SeqCst);
        }
        fault
    }
}

fn injected() -> Error {
    Error::Generic { store: "faults", source: "injected".into() }
}

impl fmt::Debug for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultStore").finish_non_exhaustive()
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultStore")
    }
}

#[async_trait]
impl ObjectStore for FaultStore {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match self.fault(path) {
            Fault::None => self.inner.put_opts(path, payload, options).await,
            Fault::LostAck | Fault::DeathAfter => {
                self.inner.put_opts(path, payload, options).await?;
                Err(injected())
            }
            Fault::Torn => {
                let whole: Bytes = payload.into();
                let half = PutPayload::from_bytes(whole.slice(..whole.len() / 2));
                self.inner.put_opts(path, half, options).await?;
                Err(injected())
            }
            Fault::Refused | Fault::DeathBefore => Err(injected()),
        }
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        match self.fault(path) {
            Fault::None => self.inner.put_multipart_opts(path, options).await,
            _ => Err(injected()),
        }
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        match self.fault(path) {
            Fault::None => self.inner.get_opts(path, options).await,
            Fault::Torn => {
                let found = self.inner.get_opts(path, options).await?;
                let (meta, range, attributes) = (found.meta.clone(), found.range.clone(), found.attributes.clone());
                let extensions = found.extensions.clone();
                let whole = found.bytes().await?;
                let half = Ok(whole.slice(..whole.len() / 2));
                let payload = GetResultPayload::Stream(futures::stream::iter([half]).boxed());
                Ok(GetResult { payload, meta, range, attributes, extensions })
            }
            _ => Err(injected()),
        }
    }

    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        match self.fault(path) {
            Fault::None => self.inner.get_ranges(path, ranges).await,
            _ => Err(injected()),
        }
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.fault(&Path::default()) {
            Fault::None => self.inner.delete_stream(paths),
            Fault::LostAck | Fault::Torn | Fault::DeathAfter => {
                // The first one is deleted.
                let some = self.inner.delete_stream(paths.take(1).boxed());
                some.chain(futures::stream::once(async { Err(injected()) })).boxed()
            }
            Fault::Refused | Fault::DeathBefore => futures::stream::once(async { Err(injected()) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.fault(prefix.unwrap_or(&Path::default())) {
            Fault::None => self.inner.list(prefix),
            _ => futures::stream::once(async { Err(injected()) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        match self.fault(prefix.unwrap_or(&Path::default())) {
            Fault::None => self.inner.list_with_delimiter(prefix).await,
            _ => Err(injected()),
        }
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        match self.fault(to) {
            Fault::None => self.inner.copy_opts(from, to, options).await,
            _ => Err(injected()),
        }
    }
}

/// All objects with their sizes, sorted.
pub async fn listing(objects: &dyn ObjectStore) -> Vec<(String, u64)> {
    use futures::TryStreamExt;
    let mut all: Vec<_> =
        objects.list(None).map_ok(|meta| (meta.location.to_string(), meta.size)).try_collect().await.unwrap();
    all.sort();
    all
}

/// Runs a tool of the Debian package qemu-utils, the reference of the image formats.
pub fn qemu(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program).args(args).output();
    let output =
        output.unwrap_or_else(|error| panic!("these tests need {program} (Debian package qemu-utils): {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {out}{err}");
    out.into_owned()
}

/// A sparse disk of `bytes` in `folder`: text and noise at places that cross blocks, clusters and chunks.
pub fn sample_disk(folder: &std::path::Path, bytes: u64) -> std::path::PathBuf {
    use std::os::unix::fs::FileExt;
    let path = folder.join("sample.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(bytes).unwrap();
    file.write_all_at(&noise(77, 1_300_000), 100_000).unwrap();
    let text: Vec<u8> = b"hearth ".iter().copied().cycle().take(3 << 20).collect();
    file.write_all_at(&text, 5_000_001).unwrap();
    file.write_all_at(&[0xa5; 700], bytes - 700).unwrap();
    path
}
