//! Maps of which every checksum is right, and which lie: typed errors, or what the format says and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::format::{
    BLOCKS_PER_CHUNK, CHUNKS_PER_SECTOR, LOG_BYTES, LOG_OFFSET, PAGE, SECTOR, SECTORS_PER_PAGE, SEQ_MAX,
    WORDS_PER_SECTOR, pages_for, sector_tag, slot_offset,
};
use super::tests::{PAGE_BYTES, created, opened, write_pages};
use super::*;
use crate::layered::open_map;
use crate::layered::testing::{FileId, SimDisk};

const ID: &[u8; 32] = b"vol-0123456789abcdef0\0\0\0\0\0\0\0\0\0\0\0";
const BASE: [u64; 4] = [0, 1, 40, 247];

fn signed(mut page: Vec<u8>) -> Vec<u8> {
    page.resize(PAGE - 4, 0);
    let crc = crc32c::crc32c(&page);
    page.extend(crc.to_le_bytes());
    page
}

#[derive(Clone, Debug)]
struct Fields {
    version: u32,
    flags: u32,
    sequence: u64,
    size: u64,
    generation: u64,
    extent_chunks: u64,
    extent_checksum: Option<u32>,
}

impl Fields {
    fn encode(&self) -> Vec<u8> {
        let words = [1u64 << 40 | 3, 0, 0, 1 << 55];
        let cut = words.iter().enumerate().map(|(at, word)| {
            let left = self.extent_chunks.saturating_sub(at as u64 * 64).min(64) as u32;
            word & u64::MAX.checked_shr(64 - left).unwrap_or(0)
        });
        let mut cut: Vec<u64> = cut.collect();
        while cut.last() == Some(&0) {
            cut.pop();
        }
        let right = crc32c::crc32c(&cut.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
        let mut page = Vec::from(*b"HRTHMAP1");
        page.extend(self.version.to_le_bytes());
        page.extend(self.flags.to_le_bytes());
        page.extend(self.sequence.to_le_bytes());
        page.extend(ID);
        page.extend(self.size.to_le_bytes());
        page.extend(self.generation.to_le_bytes());
        page.extend([5; 32]);
        page.extend(self.extent_chunks.to_le_bytes());
        page.extend(self.extent_checksum.unwrap_or(right).to_le_bytes());
        signed(page)
    }

    fn makes_sense(&self) -> bool {
        self.version == 2
            && self.flags < 4
            && (4096..=64 << 40).contains(&self.size)
            && self.size.is_multiple_of(4096)
            && self.extent_chunks <= self.size.div_ceil(CHUNK_BYTES)
    }
}

fn fields() -> impl Strategy<Value = Fields> {
    let sizes =
        vec![0, 4095, 4096, PAGE_BYTES, PAGE_BYTES + 4096, 64 << 40, (64 << 40) + 4096, 1 << 63, u64::MAX - 4095];
    let chunks = vec![0, 1, 41, 248, 249, 1 << 27, (1 << 27) + 1, u64::MAX];
    (
        prop_oneof![9 => Just(2u32), 1 => any::<u32>()],
        prop_oneof![9 => 0u32..4, 1 => any::<u32>()],
        prop_oneof![0u64..3, Just(u64::MAX), any::<u64>()],
        prop::sample::select(sizes),
        any::<u64>(),
        prop::sample::select(chunks),
        prop::option::weighted(0.1, any::<u32>()),
    )
        .prop_map(|(version, flags, sequence, size, generation, extent_chunks, extent_checksum)| Fields {
            version,
            flags,
            sequence,
            size,
            generation,
            extent_chunks,
            extent_checksum,
        })
}

/// A sector with a right checksum.
#[derive(Clone, Debug)]
struct Forged {
    slot: u8,
    sector: usize,
    seq: u32,
    dirty: u32,
    local: [u64; WORDS_PER_SECTOR],
    own_tag: bool,
}

impl Forged {
    fn encode(&self) -> Vec<u8> {
        let tag = sector_tag(ID, 0, self.sector) ^ u32::from(!self.own_tag);
        let mut rest: Vec<u8> = [self.seq, tag, self.dirty].iter().flat_map(|field| field.to_le_bytes()).collect();
        rest.extend(self.local.iter().flat_map(|word| word.to_le_bytes()));
        [&crc32c::crc32c(&rest).to_le_bytes()[..], &rest].concat()
    }

    fn makes_sense(&self) -> bool {
        self.own_tag && (1..=1 << 31).contains(&self.seq) && self.dirty >> 31 == 0
    }
}

fn sectors() -> impl Strategy<Value = Vec<Forged>> {
    let seq = prop_oneof![
        9 => 1u32..4,
        1 => prop::sample::select(vec![0, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, u32::MAX - 1, u32::MAX]),
    ];
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    let dirty = prop_oneof![9 => 0u32..1 << 31, 1 => any::<u32>()];
    let sector = (0u8..2, 0..SECTORS_PER_PAGE, seq, dirty, prop::array::uniform32(word), prop::bool::weighted(0.97));
    let forged = sector.prop_map(|(slot, sector, seq, dirty, words, own_tag)| Forged {
        slot,
        sector,
        seq,
        dirty,
        local: std::array::from_fn(|at| words[at % 32]),
        own_tag,
    });
    prop::collection::vec(forged, 1..10)
}

fn in_use(disk: &Arc<SimDisk>) {
    let map = disk.storage(FileId::Map);
    let mut header = read_header(&map).unwrap();
    header.clean = false;
    write_header(&map, &mut header).unwrap();
}

/// A record of the log at a place, with what it says of itself.
#[derive(Clone, Debug)]
struct Record {
    /// Blocks left free before it.
    gap: u64,
    /// Added to the sequence of the one before, plus one.
    skip: u64,
    count: Option<u32>,
    own_tag: bool,
    /// Block, sequence of the page, what fills the content, and whether its checksum is right.
    entries: Vec<(u64, u32, u8, bool)>,
}

const LOG_BLOCKS: u64 = LOG_BYTES / BLOCK_BYTES;

fn log_of(first: u64, seq: u64, records: &[Record]) -> Vec<u8> {
    let mut log = vec![0u8; LOG_BYTES as usize];
    let (mut at, mut seq) = (first, seq);
    for record in records {
        at += record.gap;
        seq = seq.wrapping_add(1).wrapping_add(record.skip);
        let tag = crc32c::crc32c_append(crc32c::crc32c(ID), &at.to_le_bytes()) ^ u32::from(!record.own_tag);
        let count = record.count.unwrap_or(record.entries.len() as u32);
        let mut rest = count.to_le_bytes().to_vec();
        rest.extend(seq.to_le_bytes());
        rest.extend(tag.to_le_bytes());
        rest.extend([0; 4]);
        let mut blocks = Vec::new();
        for (block, page_seq, filler, whole) in &record.entries {
            let content = [*filler; PAGE];
            rest.extend(block.to_le_bytes());
            rest.extend(page_seq.to_le_bytes());
            rest.extend((crc32c::crc32c(&content) ^ u32::from(!whole)).to_le_bytes());
            blocks.extend(content);
        }
        rest.resize(PAGE - 12, 0);
        let head = [&b"HRTHLOG1"[..], &crc32c::crc32c(&rest).to_le_bytes(), &rest].concat();
        for (to, from) in log.iter_mut().skip(at as usize * PAGE).zip(head.into_iter().chain(blocks)) {
            *to = from;
        }
        at += 1 + record.entries.len() as u64;
    }
    log
}

/// What a log says, by the documentation alone: contents in order, or that it is damaged.
fn meaning(log: &[u8], blocks: u64, page_seq: impl Fn(u64) -> u32) -> Option<Vec<(u64, u8)>> {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    let head = |at: u64| {
        let block = log.get(at as usize * PAGE..)?.get(..PAGE)?;
        let count = number(&block[12..16]);
        let tag = crc32c::crc32c_append(crc32c::crc32c(ID), &at.to_le_bytes());
        let right = block[..8] == *b"HRTHLOG1"
            && number(&block[8..12]) == u64::from(crc32c::crc32c(&block[12..]))
            && number(&block[24..28]) == u64::from(tag)
            && (1..=16).contains(&count);
        let entry =
            |at: usize| (number(&block[at..at + 8]), number(&block[at + 8..at + 12]), number(&block[at + 12..at + 16]));
        let entries: Vec<_> = (0..count.min(16) as usize).map(|number| entry(32 + 16 * number)).collect();
        right.then(|| (number(&block[16..24]), entries))
    };
    let counts = |(block, seq, _): &(u64, u64, u64)| *block < blocks && u64::from(page_seq(*block)) <= *seq;
    let (mut found, mut at, mut expected) = (Vec::new(), 0, None);
    while let Some((seq, entries)) = head(at).filter(|(seq, _)| expected.is_none_or(|expected| expected == *seq)) {
        let contents = entries.iter().zip(at + 1..).map(|(entry, place)| {
            let content = log.get(place as usize * PAGE..)?.get(..PAGE)?;
            (u64::from(crc32c::crc32c(content)) == entry.2).then_some((entry, content[0]))
        });
        let Some(contents) = contents.collect::<Option<Vec<_>>>() else { break };
        found
            .extend(contents.into_iter().filter(|(entry, _)| counts(entry)).map(|(entry, content)| (entry.0, content)));
        (at, expected) = (at + 1 + entries.len() as u64, Some(seq.wrapping_add(1)));
    }
    let later = (at + 1..LOG_BLOCKS).filter_map(head).any(|(_, entries)| entries.iter().any(counts));
    (!later).then_some(found)
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let blocks = PAGE_BYTES / BLOCK_BYTES;
    let block = prop_oneof![
        6 => 0u64..6,
        1 => prop::sample::select(vec![blocks - 1, blocks, blocks + 5, 1 << 44, 1 << 52, u64::MAX]),
    ];
    let entry = (block, 0u32..4, 1u8..200, prop::bool::weighted(0.97));
    let record = (
        prop_oneof![12 => Just(0u64), 1 => 1u64..40, 1 => 200u64..LOG_BLOCKS],
        prop_oneof![12 => Just(0u64), 1 => any::<u64>()],
        prop::option::weighted(0.05, prop::sample::select(vec![0u32, 1, 16, 17, u32::MAX])),
        prop::bool::weighted(0.97),
        prop::collection::vec(entry, 1..17),
    );
    let record = record.prop_map(|(gap, skip, count, own_tag, entries)| Record { gap, skip, count, own_tag, entries });
    prop::collection::vec(record, 1..24)
}

proptest! {
    #[test]
    fn signed_headers_make_sense_or_are_refused(copies in [prop::option::of(fields()), prop::option::of(fields())], short in 0u64..2) {
        let disk = Arc::new(SimDisk::default());
        let map = disk.storage(FileId::Map);
        for (copy, at) in copies.iter().zip([0, PAGE as u64]) {
            if let Some(copy) = copy {
                map.write_at(&copy.encode(), at).unwrap();
            }
        }
        let newest = copies.iter().flatten().filter(|copy| copy.makes_sense()).max_by_key(|copy| copy.sequence);
        let size = newest.map_or(PAGE_BYTES, |fields| fields.size);
        map.set_length(slot_offset(pages_for(size), 0) - short).unwrap();
        let newer_version = copies.iter().flatten().any(|copy| copy.version != 2);
        match (newest, read_header(&map)) {
            (_, Err(MapError::Version(version))) => prop_assert!(newer_version && version != 2),
            (Some(newest), Ok(header)) => {
                prop_assert_eq!(header.sequence, newest.sequence);
                prop_assert!(copies.iter().flatten().any(|copy| copy.makes_sense() && copy.size == header.size_bytes));
                // Nobody has a map of many TiB here: what is read of it is bounded all the same.
                let loaded = load(&map, &header, Extent::of(BASE));
                if short > 0 && header.size_bytes == size {
                    prop_assert!(matches!(loaded, Err(MapError::Header(_))), "{:?}", loaded);
                } else if let Ok(bits) = loaded {
                    prop_assert_eq!(bits.size_bytes(), header.size_bytes);
                }
            }
            (newest, result) => {
                let refused = matches!(result, Err(MapError::Header(_) | MapError::Size(_)));
                prop_assert!(refused && newest.is_none(), "{:?}", result);
            }
        }
    }

    #[test]
    fn signed_pages_say_what_they_say_or_are_refused(forged in sectors(), clean: bool) {
        let disk = created(PAGE_BYTES, &BASE);
        if !clean {
            in_use(&disk);
        }
        let map = disk.storage(FileId::Map);
        let mut newest: BTreeMap<(u8, usize), &Forged> = BTreeMap::new();
        for sector in &forged {
            map.write_at(&sector.encode(), slot_offset(0, sector.slot) + (sector.sector * SECTOR) as u64).unwrap();
            newest.insert((sector.slot, sector.sector), sector);
        }
        let sound = newest.values().all(|sector| sector.makes_sense());
        let slot_a = newest.keys().any(|(slot, _)| *slot == 0);
        let current: Vec<Option<&Forged>> = (0..SECTORS_PER_PAGE)
            .map(|at| {
                let [a, b] = [0, 1].map(|slot| newest.get(&(slot, at)).copied());
                if b.map(|b| b.seq) > a.map(|a| a.seq) { b } else { a }
            })
            .collect();
        let seqs: Vec<u32> = current.iter().map(|sector| sector.map_or(0, |sector| sector.seq)).collect();
        let even = seqs.iter().all(|seq| *seq == seqs[0]);
        let loaded = opened(&disk, &BASE);
        prop_assert_eq!(loaded.is_ok(), sound && slot_a && (even || !clean), "{:?}", loaded);
        let Ok((_, mut bits)) = loaded else { return Ok(()) };
        let local = |block: u64| {
            let (chunk, inside) = (block / BLOCKS_PER_CHUNK, block % (CHUNKS_PER_SECTOR as u64 * BLOCKS_PER_CHUNK));
            match current[chunk as usize / CHUNKS_PER_SECTOR] {
                Some(sector) => sector.local[inside as usize / 64] >> (inside % 64) & 1 == 1,
                None => !BASE.contains(&chunk),
            }
        };
        let blocks = PAGE_BYTES / BLOCK_BYTES;
        let before: Vec<bool> = (0..blocks).map(local).collect();
        prop_assert!((0..blocks).all(|block| bits.is_local(block) == before[block as usize]));
        // And what is written next counts.
        let block = before.iter().position(|local| !local);
        let Some(block) = block.filter(|_| !seqs.contains(&SEQ_MAX)) else { return Ok(()) };
        bits.set_local(block as u64..block as u64 + 1);
        write_pages(&disk, &mut bits);
        let (_, again) = opened(&disk, &BASE).unwrap();
        prop_assert!((0..blocks).all(|at| again.is_local(at) == (before[at as usize] || at == block as u64)));
    }

    #[test]
    fn a_signed_log_means_what_is_documented(first in prop_oneof![9 => Just(0u64), 1 => 0u64..300],
        seq in prop_oneof![any::<u64>(), Just(u64::MAX), Just(u64::MAX - 3)], records in records(), written in 0u32..3) {
        let disk = created(PAGE_BYTES, &[0]);
        let data = disk.storage(FileId::Data);
        data.set_length(PAGE_BYTES).unwrap();
        // The page's sequence, so that some entries do not count any more.
        let (_, mut bits) = opened(&disk, &[0]).unwrap();
        for block in 100..100 + u64::from(written) {
            bits.set_local(block..block + 1);
            write_pages(&disk, &mut bits);
        }
        in_use(&disk);
        let log = log_of(first, seq, &records);
        disk.storage(FileId::Map).write_at(&log, LOG_OFFSET).unwrap();
        let expected = meaning(&log, PAGE_BYTES / BLOCK_BYTES, |_| written);
        let opened = open_map(&disk.storage(FileId::Map), &data, 1, Some(Extent::of([0])));
        let Some(expected) = expected else {
            let damaged = matches!(opened, Err(crate::BlockError::Map(MapError::Log(_))));
            prop_assert!(damaged, "{:?}", opened);
            return Ok(());
        };
        let (_, bits) = opened.unwrap();
        prop_assert_eq!(data.length().unwrap(), PAGE_BYTES, "written behind the volume's end");
        let last: BTreeMap<u64, u8> = expected.into_iter().collect();
        for block in (0..6).chain([PAGE_BYTES / BLOCK_BYTES - 1]) {
            let mut content = [0; PAGE];
            data.read_at(&mut content, block * BLOCK_BYTES).unwrap();
            prop_assert_eq!(content, [last.get(&block).copied().unwrap_or(0); PAGE], "block {}", block);
            prop_assert!(!last.contains_key(&block) || bits.is_local(block));
        }
    }
}
