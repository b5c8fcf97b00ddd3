//! Archives of which every checksum and the hash are right, and which lie.

use std::collections::BTreeMap;
use std::io::Read;

use super::*;
use crate::archive::record::RECORD_BYTES;
use crate::testing::chunk;

const MAX_BYTES: u64 = 64 << 40;

/// A record, with what its head says of its length if that is a lie.
#[derive(Clone, Debug)]
struct Entry {
    kind: u8,
    codec: u8,
    disk: u16,
    chunk: u64,
    payload: Vec<u8>,
    length: Option<u32>,
}

impl Entry {
    fn encode(&self) -> Vec<u8> {
        let mut record = vec![self.kind, self.codec];
        record.extend(self.disk.to_le_bytes());
        record.extend(self.chunk.to_le_bytes());
        record.extend(self.length.unwrap_or(self.payload.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record), &self.payload);
        record.extend(crc.to_le_bytes());
        record.extend(&self.payload);
        record
    }

    /// What it holds, by the documentation alone.
    fn content(&self) -> Option<Vec<u8>> {
        let mut content = Vec::new();
        match self.codec {
            0 => content.clone_from(&self.payload),
            1 => {
                let decoder = zstd::stream::read::Decoder::new(&self.payload[..]).ok()?;
                decoder.take(CHUNK_BYTES as u64 + 1).read_to_end(&mut content).ok()?;
            }
            _ => return None,
        }
        (content.len() == CHUNK_BYTES).then_some(content)
    }
}

#[derive(Clone, Debug)]
struct Forged {
    version: u32,
    /// Sizes and numbers of chunks.
    disks: Vec<(u64, u64)>,
    entries: Vec<Entry>,
    /// What the end says of the number of records.
    count: Option<u64>,
    right_hash: bool,
    behind: Vec<u8>,
    /// Bytes that are cut off.
    cut: usize,
}

fn packed(content: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(content, 1).unwrap()
}

/// The last chunk of a disk, with something behind the disk's end or nothing.
fn tail(inside: usize, beyond: bool) -> Vec<u8> {
    let mut content = chunk(77).to_vec();
    content[inside..].fill(u8::from(beyond));
    content
}

impl Forged {
    /// Two disks of which nothing is a lie.
    fn honest() -> Self {
        let entry = |disk, chunk, codec, content: &[u8]| Entry {
            kind: 1,
            codec,
            disk,
            chunk,
            payload: if codec == 1 { packed(content) } else { content.to_vec() },
            length: None,
        };
        let entries = vec![
            entry(0, 0, 1, &chunk(1)),
            entry(0, 2, 1, &chunk(2)),
            entry(0, 4, 1, &tail(4096, false)),
            entry(1, 1, 0, &chunk(3)),
            entry(1, 2, 1, &chunk(1)),
        ];
        let disks = vec![(4 * CHUNK_BYTES as u64 + 4096, 3), (3 * CHUNK_BYTES as u64, 2)];
        Self { version: 1, disks, entries, count: None, right_hash: true, behind: Vec::new(), cut: 0 }
    }

    fn encode(&self) -> Vec<u8> {
        let disks = self.disks.iter().enumerate().map(|(number, (size_bytes, present_chunks))| ArchivedDisk {
            name: format!("/dev/{number}"),
            size_bytes: *size_bytes,
            present_chunks: *present_chunks,
        });
        let header = ArchiveHeader { attributes: serde_json::Map::new(), disks: disks.collect() };
        let mut archive = head(self.version, &serde_json::to_vec(&header).unwrap());
        self.entries.iter().for_each(|entry| archive.extend(entry.encode()));
        let hash = if self.right_hash { *blake3::hash(&archive).as_bytes() } else { [7; 32] };
        let count = self.count.unwrap_or(self.entries.len() as u64);
        let end = Entry { kind: 2, codec: 0, disk: 0, chunk: count, payload: hash.to_vec(), length: None };
        archive.extend(end.encode());
        archive.extend(&self.behind);
        archive.truncate(archive.len() - self.cut.min(archive.len()));
        archive
    }

    /// What its disks hold, by the documentation alone; `None` = it contradicts itself.
    fn expected(&self) -> Option<Vec<BTreeMap<u64, Vec<u8>>>> {
        let whole = self.behind.len() == self.cut && self.right_hash && self.version == 1;
        let counted = self.count.is_none_or(|count| count == self.entries.len() as u64);
        if !whole || !counted || !(1..=256).contains(&self.disks.len()) {
            return None;
        }
        let mut disks = vec![BTreeMap::new(); self.disks.len()];
        for entry in &self.entries {
            let disk = usize::from(entry.disk);
            let (size, _) = *self.disks.get(disk)?;
            let start = entry.chunk.checked_mul(CHUNK_BYTES as u64)?;
            let told = entry.length.is_none_or(|length| length as usize == entry.payload.len());
            let content = entry.content().filter(|_| entry.kind == 1 && told && start < size)?;
            let inside = (size - start).min(CHUNK_BYTES as u64) as usize;
            if content[inside..].iter().any(|byte| *byte != 0) || disks[disk].insert(entry.chunk, content).is_some() {
                return None;
            }
        }
        for ((size, present), chunks) in self.disks.iter().zip(&disks) {
            if !(1..=MAX_BYTES).contains(size) || *present != chunks.len() as u64 {
                return None;
            }
        }
        disks.iter_mut().for_each(|chunks| chunks.retain(|_, content| content.iter().any(|byte| *byte != 0)));
        Some(disks)
    }

    fn entry(&mut self, at: usize) -> Option<&mut Entry> {
        let count = self.entries.len();
        self.entries.get_mut(at % count.max(1))
    }

    fn change(&mut self, change: &Change) {
        let count = self.entries.len();
        match *change {
            Change::Repeat(from, to) if count > 0 => {
                let again = self.entries[from % count].clone();
                self.entries.insert(to % (count + 1), again);
            }
            Change::Drop(at) if count > 0 => drop(self.entries.remove(at % count)),
            Change::Swap(a, b) if count > 0 => self.entries.swap(a % count, b % count),
            Change::Disk(at, disk) => self.entry(at).into_iter().for_each(|entry| entry.disk = disk),
            Change::Chunk(at, chunk) => self.entry(at).into_iter().for_each(|entry| entry.chunk = chunk),
            Change::Codec(at, codec) => self.entry(at).into_iter().for_each(|entry| entry.codec = codec),
            Change::Kind(at, kind) => self.entry(at).into_iter().for_each(|entry| entry.kind = kind),
            Change::Length(at, length) => self.entry(at).into_iter().for_each(|entry| entry.length = Some(length)),
            Change::Payload(at, ref payload) => {
                if let Some(entry) = self.entry(at) {
                    (entry.codec, entry.payload) = payload.bytes(std::mem::take(&mut entry.payload));
                }
            }
            Change::Disks(count) => self.disks.resize(count, (CHUNK_BYTES as u64, 0)),
            Change::Size(disk, size) => self.disks.get_mut(disk).into_iter().for_each(|disk| disk.0 = size),
            Change::Present(disk, chunks) => self.disks.get_mut(disk).into_iter().for_each(|disk| disk.1 = chunks),
            Change::Count(count) => self.count = Some(count),
            Change::Hash => self.right_hash = false,
            Change::Version(version) => self.version = version,
            Change::Behind(ref bytes) => self.behind.clone_from(bytes),
            Change::Cut(bytes) => self.cut = bytes,
            Change::Repeat(..) | Change::Drop(_) | Change::Swap(..) => {}
        }
    }
}

fn head(version: u32, json: &[u8]) -> Vec<u8> {
    let mut head = Vec::from(*b"HEARTHAR");
    head.extend(version.to_le_bytes());
    head.extend((json.len() as u32).to_le_bytes());
    head.extend(json);
    let crc = crc32c::crc32c(&head);
    head.extend(crc.to_le_bytes());
    head
}

#[derive(Clone, Debug)]
enum Payload {
    /// Unpacks to this many chunks' worth of zeros, which the frame tells or not.
    Bomb(usize, bool),
    Short(usize),
    Longer(Vec<u8>),
    Cut(usize),
    Zeros,
    Tail(bool),
    TwoFrames,
}

impl Payload {
    fn bytes(&self, before: Vec<u8>) -> (u8, Vec<u8>) {
        let mut before = before;
        match self {
            Self::Bomb(chunks, told) => {
                let content = vec![0; chunks * CHUNK_BYTES];
                (1, if *told { packed(&content) } else { zstd::stream::encode_all(&content[..], 1).unwrap() })
            }
            Self::Short(bytes) => (1, packed(&vec![5; *bytes])),
            Self::Longer(bytes) => {
                before.extend(bytes);
                (1, before)
            }
            Self::Cut(bytes) => {
                before.truncate(*bytes);
                (1, before)
            }
            Self::Zeros => (1, packed(&[0; CHUNK_BYTES])),
            Self::Tail(beyond) => (1, packed(&tail(4096, *beyond))),
            Self::TwoFrames => (1, [packed(&chunk(5)[..1000]), packed(&chunk(5)[1000..])].concat()),
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Repeat(usize, usize),
    Drop(usize),
    Swap(usize, usize),
    Disk(usize, u16),
    Chunk(usize, u64),
    Codec(usize, u8),
    Kind(usize, u8),
    Length(usize, u32),
    Payload(usize, Payload),
    Disks(usize),
    Size(usize, u64),
    Present(usize, u64),
    Count(u64),
    Hash,
    Version(u32),
    Behind(Vec<u8>),
    Cut(usize),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let at = || 0usize..8;
    let number = || prop_oneof![0u64..8, Just(u64::MAX), Just(1 << 63), Just((1 << 45) + 1), any::<u64>()];
    let chunk = CHUNK_BYTES as u64;
    let size = prop_oneof![
        prop::sample::select(vec![0, 1, 511, chunk, 3 * chunk, 4 * chunk + 4095, MAX_BYTES, MAX_BYTES + 1, u64::MAX]),
        any::<u64>(),
    ];
    let payload = prop_oneof![
        (2usize..40, any::<bool>()).prop_map(|(chunks, told)| Payload::Bomb(chunks, told)),
        (0..CHUNK_BYTES).prop_map(Payload::Short),
        proptest::collection::vec(any::<u8>(), 1..40).prop_map(Payload::Longer),
        (0usize..CHUNK_BYTES).prop_map(Payload::Cut),
        Just(Payload::Zeros),
        any::<bool>().prop_map(Payload::Tail),
        Just(Payload::TwoFrames),
    ];
    let change = prop_oneof![
        1 => (at(), at()).prop_map(|(from, to)| Change::Repeat(from, to)),
        1 => at().prop_map(Change::Drop),
        3 => (at(), at()).prop_map(|(a, b)| Change::Swap(a, b)),
        1 => (at(), prop_oneof![0u16..4, any::<u16>()]).prop_map(|(at, disk)| Change::Disk(at, disk)),
        1 => (at(), number()).prop_map(|(at, chunk)| Change::Chunk(at, chunk)),
        1 => (at(), prop_oneof![0u8..3, any::<u8>()]).prop_map(|(at, codec)| Change::Codec(at, codec)),
        1 => (at(), prop_oneof![0u8..4, any::<u8>()]).prop_map(|(at, kind)| Change::Kind(at, kind)),
        1 => (at(), prop_oneof![0u32..40, Just(u32::MAX), Just(CHUNK_BYTES as u32 + 1), any::<u32>()])
            .prop_map(|(at, length)| Change::Length(at, length)),
        3 => (at(), payload).prop_map(|(at, payload)| Change::Payload(at, payload)),
        1 => prop_oneof![0usize..4, Just(256), Just(257)].prop_map(Change::Disks),
        1 => (0usize..2, size).prop_map(|(disk, size)| Change::Size(disk, size)),
        1 => (0usize..2, number()).prop_map(|(disk, chunks)| Change::Present(disk, chunks)),
        1 => number().prop_map(Change::Count),
        1 => Just(Change::Hash),
        1 => (0u32..3).prop_map(Change::Version),
        1 => proptest::collection::vec(any::<u8>(), 1..60).prop_map(Change::Behind),
        1 => (0usize..5000).prop_map(Change::Cut),
    ];
    proptest::collection::vec(change, 1..4)
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap().block_on(work)
}

/// Restores an archive into a store of its own.
async fn restored(archive: Vec<u8>) -> (ChunkStore, Result<Vec<(SnapshotKey, Committed)>, StorageError>) {
    let cloud = ChunkStore::new(Arc::new(InMemory::new()), domain("elsewhere"));
    let bucket: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    bucket.put(&Path::from("ami.bin"), PutPayload::from(archive)).await.unwrap();
    let work = async {
        let opened = open_archive(bucket, "ami.bin").await?;
        let targets = targets(&cloud, opened.header());
        let committed = opened.restore(&targets, silent()).await?;
        Ok(targets.into_iter().map(|target| target.spec.id).zip(committed).collect())
    };
    let result = work.await;
    (cloud, result)
}

async fn check(forged: &Forged) {
    let (cloud, result) = restored(forged.encode()).await;
    match (forged.expected(), result) {
        (None, Err(error)) => {
            assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
            let published = listing(&**cloud.objects()).await;
            assert!(published.iter().all(|(path, _)| path.starts_with("chunk/")), "{published:?}");
        }
        (Some(disks), Ok(committed)) => {
            assert_eq!(disks.len(), committed.len());
            for (chunks, (id, committed)) in disks.iter().zip(committed) {
                let manifest = Manifest::load(&**cloud.objects(), &id, Some(&committed.root_hash)).await.unwrap();
                assert!(manifest.chunks().eq(chunks.keys().copied()));
                for (index, content) in chunks {
                    let read = manifest.read_chunk(&cloud, *index).await.unwrap();
                    assert!(read.as_deref() == Some(&content[..]), "chunk {index} of {id}");
                }
            }
        }
        (expected, result) => panic!("{result:?} where it makes sense: {}", expected.is_some()),
    }
}

#[test]
fn an_honest_archive_is_taken_and_each_lie_is_refused() {
    run(async {
        check(&Forged::honest()).await;
        assert!(Forged::honest().expected().is_some());
        let lies = [
            Change::Repeat(0, 5),
            Change::Disk(0, 2),
            Change::Disk(0, u16::MAX),
            Change::Chunk(1, 5),
            Change::Chunk(1, u64::MAX),
            Change::Chunk(1, 0),
            Change::Drop(3),
            Change::Size(0, u64::MAX),
            Change::Size(0, MAX_BYTES + 1),
            Change::Size(0, CHUNK_BYTES as u64),
            Change::Size(0, 0),
            Change::Present(0, 4),
            Change::Present(0, u64::MAX),
            Change::Disks(1),
            Change::Disks(257),
            Change::Count(4),
            Change::Count(u64::MAX),
            Change::Length(1, u32::MAX),
            Change::Length(4, 0),
            Change::Payload(0, Payload::Bomb(2, true)),
            Change::Payload(0, Payload::Bomb(900, false)),
            Change::Payload(0, Payload::Short(CHUNK_BYTES - 1)),
            Change::Payload(2, Payload::Tail(true)),
            Change::Payload(0, Payload::Cut(9)),
            Change::Codec(0, 0),
            Change::Codec(3, 1),
            Change::Kind(4, 2),
            Change::Hash,
            Change::Behind(vec![0]),
            Change::Cut(1),
            Change::Cut(52),
        ];
        for lie in lies {
            let mut forged = Forged::honest();
            forged.change(&lie);
            assert!(forged.expected().is_none(), "{lie:?}");
            check(&forged).await;
        }
    });
}

/// docs/storage-objects.md, byte by byte. Only content that does not compress can be pinned: later versions of zstd may pack better.
#[test]
fn an_archive_is_the_documented_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let content = noise(9, CHUNK_BYTES);
    std::fs::write(&path, [vec![0; CHUNK_BYTES], content.clone(), vec![0; 512]].concat()).unwrap();
    let mut expected = Vec::from(*b"HEARTHAR\x01\0\0\0\x61\0\0\0");
    let json = br#"{"attributes":{"name":"web"},"disks":[{"name":"/dev/a","size_bytes":1049088,"present_chunks":1}]}"#;
    assert_eq!(json.len(), 0x61);
    expected.extend(json);
    expected.extend(crc32c::crc32c(&expected).to_le_bytes());
    let record = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    expected.extend(record);
    expected.extend(crc32c::crc32c(&[&record[..], &content].concat()).to_le_bytes());
    expected.extend(&content);
    let hash = blake3::hash(&expected);
    let end = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0];
    expected.extend(end);
    expected.extend(crc32c::crc32c(&[&end[..], hash.as_bytes()].concat()).to_le_bytes());
    expected.extend(hash.as_bytes());
    run(async {
        let store = memory_store();
        let disks = [disk(&store, "a", &path).await];
        let bucket = InMemory::new();
        let attributes = serde_json::from_str(r#"{"name":"web"}"#).unwrap();
        write_archive(&bucket, "a.bin", attributes, &disks, silent()).await.unwrap();
        let written = bucket.get(&Path::from("a.bin")).await.unwrap().bytes().await.unwrap();
        assert!(written == expected);
    });
}

/// Every bit and every length of a small archive.
#[test]
fn invariant_6_every_flipped_bit_and_cut_of_an_archive_is_noticed() {
    let mut forged = Forged::honest();
    forged.entries.retain(|entry| entry.disk == 0);
    forged.disks.truncate(1);
    let whole = forged.encode();
    assert!(whole.len() < 600, "{} bytes", whole.len());
    let flipped = (0..whole.len() * 8).map(|bit| {
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        changed
    });
    let cut = (0..whole.len()).map(|length| whole[..length].to_vec());
    run(async {
        for (number, archive) in flipped.chain(cut).enumerate() {
            let (cloud, result) = restored(archive).await;
            assert!(matches!(result, Err(StorageError::Damaged { .. })), "change {number}: {result:?}");
            assert!(listing(&**cloud.objects()).await.iter().all(|(path, _)| path.starts_with("chunk/")));
        }
        restored(whole.clone()).await.1.unwrap();
    });
}

/// Many records that unpack to far more than a chunk, and a header that promises millions of chunks, need no more memory than
/// honest ones.
#[test]
fn bombs_and_huge_counts_take_little_memory() {
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    let bomb = zstd::stream::encode_all(std::io::repeat(0).take(2 << 30), 1).unwrap();
    assert!(bomb.len() < CHUNK_BYTES);
    let mut forged = Forged::honest();
    forged.disks = vec![(MAX_BYTES, MAX_BYTES / CHUNK_BYTES as u64); 256];
    for (number, entry) in forged.entries.iter_mut().enumerate() {
        (entry.disk, entry.chunk) = (number as u16, (u64::MAX / CHUNK_BYTES as u64 - number as u64) & 0x7ff_ffff);
    }
    let before = peak();
    run(check(&forged));
    forged.entries.iter_mut().for_each(|entry| (entry.codec, entry.payload) = (1, bomb.clone()));
    run(check(&forged));
    let more = peak() - before;
    assert!(more < 256 << 20, "{more} bytes");
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::{Value, json};
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[ -~]{0,12}".prop_map(Value::from),
        Just(json!({})),
        Just(json!([])),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| proptest::collection::vec(inner, 0..3).prop_map(Value::from))
}

proptest! {
    #![proptest_config(crate::testing::cases(600))]

    #[test]
    fn whoever_lies_publishes_nothing(changes in changes()) {
        let mut forged = Forged::honest();
        changes.iter().for_each(|change| forged.change(change));
        run(check(&forged));
    }

    #[test]
    fn a_signed_record_is_a_chunk_an_end_or_damage(
        kind in prop_oneof![0u8..4, any::<u8>()], codec in prop_oneof![0u8..3, any::<u8>()], disk: u16, number: u64,
        payload in prop_oneof![proptest::collection::vec(any::<u8>(), 0..80), Just(vec![1; 32])],
    ) {
        let entry = Entry { kind, codec, disk, chunk: number, payload: payload.clone(), length: None };
        let head: [u8; RECORD_BYTES] = std::array::from_fn(|at| entry.encode()[at]);
        prop_assert_eq!(record::payload_bytes(&head), Ok(payload.len()));
        let expected = match (kind, codec) {
            (1, 0 | 1) => Some(record::Record::Chunk { disk, chunk: number, codec }),
            (2, 0) if payload.len() == 32 => Some(record::Record::End { records: number }),
            _ => None,
        };
        prop_assert_eq!(record::decode(&head, &payload).ok(), expected);
    }

    #[test]
    fn a_signed_head_makes_sense_or_is_damage(
        attributes in json(), name in json(), size in prop_oneof![json(), (1u64..1 << 47).prop_map(Into::into)],
        chunks in prop_oneof![json(), (0u64..200).prop_map(Into::into)], disks in 0usize..3, extra in json(),
    ) {
        let disk = serde_json::json!({"name": name, "size_bytes": size, "present_chunks": chunks});
        let value = serde_json::json!({"attributes": attributes, "disks": vec![disk; disks], "extra": extra});
        let sound = attributes.is_object() && name.is_string() && disks > 0
            && size.as_u64().is_some_and(|size| (1..=MAX_BYTES).contains(&size)
                && chunks.as_u64().is_some_and(|chunks| chunks <= size.div_ceil(CHUNK_BYTES as u64)));
        let parsed = parse_head(&head(1, &serde_json::to_vec(&value).unwrap()));
        prop_assert_eq!(parsed.is_ok(), sound, "{:?}", parsed);
    }
}
