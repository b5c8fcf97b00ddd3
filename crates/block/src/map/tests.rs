use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::format::{
    BLOCKS_PER_CHUNK, CHUNKS_PER_PAGE, LOG_OFFSET, PAGE, PAGES_OFFSET, SECTOR, Sector, WORDS_PER_SECTOR, sector_tag,
    slot_offset,
};
use super::*;
use crate::layered::open_map;
use crate::layered::testing::{FileId, Rng, SimDisk};

pub(super) const PAGE_BYTES: u64 = CHUNKS_PER_PAGE as u64 * CHUNK_BYTES;

pub(super) fn spec(size_bytes: u64, base: &[u64]) -> MapSpec {
    MapSpec {
        filled: false,
        volume_id: "vol-0123456789abcdef0".into(),
        size_bytes,
        base: (!base.is_empty()).then(|| MapBase { root: [5; 32], extent: Extent::of(base.iter().copied()) }),
        generation: 1,
    }
}

pub(super) fn created(size_bytes: u64, base: &[u64]) -> Arc<SimDisk> {
    let disk = Arc::new(SimDisk::default());
    create(&disk.storage(FileId::Map), spec(size_bytes, base)).unwrap();
    disk
}

pub(super) fn opened(disk: &Arc<SimDisk>, base: &[u64]) -> Result<(Header, Bits), MapError> {
    let map = disk.storage(FileId::Map);
    let header = read_header(&map)?;
    let bits = load(&map, &header, Extent::of(base.iter().copied()))?;
    Ok((header, bits))
}

/// Writes the pages that changed, as a flush does.
pub(super) fn write_pages(disk: &Arc<SimDisk>, bits: &mut Bits) {
    let map = disk.storage(FileId::Map);
    let mut page = [0; PAGE];
    while let Some(write) = bits.take_changed(&mut page) {
        map.write_at(&page, slot_offset(write.page, write.slot)).unwrap();
        bits.written(write);
    }
    map.sync().unwrap();
}

#[test]
fn the_layout_is_the_documented_one() {
    assert_eq!(PAGE_BYTES, 124 << 20);
    let pages = [LOG_OFFSET, PAGES_OFFSET, slot_offset(0, 1), slot_offset(1, 0)];
    assert_eq!(pages, [8192, 1_056_768, 1_060_864, 1_064_960]);
    let disk = created(PAGE_BYTES + 4096, &[0, 248]);
    let map = disk.storage(FileId::Map);
    assert_eq!(map.length().unwrap(), 1_056_768 + 2 * 2 * 4096);
    assert!(map.next_data(8192).unwrap().is_none(), "more than the header is written");
    let mut head = [0u8; 116];
    map.read_at(&mut head, 4096).unwrap();
    let expected: Vec<u8> = [
        b"HRTHMAP1".as_slice(),
        &2u32.to_le_bytes(),
        &3u32.to_le_bytes(),
        &1u64.to_le_bytes(),
        b"vol-0123456789abcdef0\0\0\0\0\0\0\0\0\0\0\0",
        &(PAGE_BYTES + 4096).to_le_bytes(),
        &1u64.to_le_bytes(),
        &[5; 32],
        &249u64.to_le_bytes(),
        &crc32c::crc32c(&[1u64, 0, 0, 1 << 56].map(u64::to_le_bytes).concat()).to_le_bytes(),
    ]
    .concat();
    assert_eq!(head, *expected);
    let (_, mut bits) = opened(&disk, &[0, 248]).unwrap();
    bits.set_local(3..5);
    bits.set_dirty(1);
    write_pages(&disk, &mut bits);
    let mut sector = [0u8; 512];
    map.read_at(&mut sector, 1_056_768).unwrap();
    assert_eq!(sector[..4], crc32c::crc32c(&sector[4..]).to_le_bytes());
    assert_eq!(sector[4..8], 1u32.to_le_bytes());
    assert_eq!(sector[12..17], [2, 0, 0, 0, 0b1_1000]);
    assert_eq!(sector[17..32], [0; 15]);
    assert!(sector[32..].iter().all(|byte| *byte == 0xFF));
    assert!(map.next_data(1_060_864).unwrap().is_none(), "slot B is written first");
}

#[test]
fn what_cannot_be_is_refused() {
    let disk = Arc::new(SimDisk::default());
    let map = disk.storage(FileId::Map);
    assert!(matches!(create(&map, spec(0, &[])), Err(MapError::Size(0))));
    assert!(matches!(create(&map, spec(4097, &[])), Err(MapError::Size(4097))));
    assert!(matches!(create(&map, spec((64 << 40) + 4096, &[])), Err(MapError::Size(_))));
    let long = MapSpec { volume_id: "v".repeat(33), ..spec(4096, &[]) };
    assert!(matches!(create(&map, long), Err(MapError::VolumeId(_))));
    assert!(opened(&disk, &[]).is_err());
    // Another version, another base.
    let disk = created(CHUNK_BYTES, &[0]);
    assert!(matches!(opened(&disk, &[]), Err(MapError::Extent)));
    assert!(opened(&disk, &[0, 1, 77]).is_ok(), "what is behind the volume's end is nothing to it");
    let map = disk.storage(FileId::Map);
    let mut page = [0u8; PAGE];
    map.read_at(&mut page, 0).unwrap();
    page[8] = 1;
    let crc = crc32c::crc32c(&page[..PAGE - 4]);
    page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
    map.write_at(&page, 0).unwrap();
    assert!(matches!(opened(&disk, &[0]), Err(MapError::Version(1))));
}

/// A base's chunks that lie behind the end when a volume is made never show, however it grows.
#[test]
fn what_a_volume_grows_by_is_blank() {
    let disk = created(2 * CHUNK_BYTES, &[0, 1, 2, 300]);
    let (mut header, mut bits) = opened(&disk, &[0, 1, 2, 300]).unwrap();
    let (map, data) = (disk.storage(FileId::Map), disk.storage(FileId::Data));
    grow(&map, &data, &mut header, 400 * CHUNK_BYTES).unwrap();
    bits.grow(400 * CHUNK_BYTES);
    for bits in [bits, opened(&disk, &[0, 1, 2, 300]).unwrap().1] {
        let end = 400 * BLOCKS_PER_CHUNK;
        assert_eq!(bits.run(0, end), Run { local: false, end: 2 * BLOCKS_PER_CHUNK });
        assert_eq!(bits.run(2 * BLOCKS_PER_CHUNK, end), Run { local: true, end });
    }
}

/// The first write of a page, cut off anywhere, leaves each bit as it was or as it was to be; and so does the next one.
#[test]
fn a_torn_first_write_of_a_page_changes_no_other_bit() {
    let base = [0, 1, 40, 247];
    let blank = |block: u64| !base.contains(&(block / BLOCKS_PER_CHUNK));
    let mut torn = 0;
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let disk = created(PAGE_BYTES, &base);
        let map = disk.storage(FileId::Map);
        let mut header = read_header(&map).unwrap();
        header.clean = false;
        write_header(&map, &mut header).unwrap();
        let mut wanted = BTreeSet::new();
        for _ in 0..3 {
            let (_, mut bits) = opened(&disk, &base).unwrap();
            let blocks: Vec<u64> = (0..PAGE_BYTES / BLOCK_BYTES).filter(|block| bits.is_local(*block)).collect();
            assert!(blocks.iter().all(|block| blank(*block) || wanted.contains(block)));
            assert!((0..PAGE_BYTES / BLOCK_BYTES).filter(|block| blank(*block)).all(|block| bits.is_local(block)));
            let here = wanted.iter().filter(|block| bits.is_local(**block)).count();
            torn += u64::from(here > 0 && here < wanted.len());
            for chunk in base {
                let block = chunk * BLOCKS_PER_CHUNK + rng.below(BLOCKS_PER_CHUNK);
                bits.set_local(block..block + 1);
                wanted.insert(block);
            }
            let mut page = [0; PAGE];
            let write = bits.take_changed(&mut page).unwrap();
            map.write_at(&page, slot_offset(write.page, write.slot)).unwrap();
            disk.power_cut(&mut rng);
        }
    }
    assert!(torn > 50, "{torn}");
}

#[test]
fn a_page_that_is_partly_gone_is_damage() {
    for (slot, sector) in [(1, 0), (1, 3), (1, 7)] {
        let disk = created(PAGE_BYTES, &[0, 1]);
        let (_, mut bits) = opened(&disk, &[0, 1]).unwrap();
        for block in 0..2 {
            bits.set_local(block..block + 1);
            write_pages(&disk, &mut bits);
        }
        opened(&disk, &[0, 1]).unwrap();
        let map = disk.storage(FileId::Map);
        map.write_at(&[0; SECTOR], slot_offset(0, slot) + sector * SECTOR as u64).unwrap();
        assert!(matches!(opened(&disk, &[0, 1]), Err(MapError::Page { page: 0, .. })));
        map.write_at(&[0; PAGE], slot_offset(0, 0)).unwrap();
        assert!(matches!(opened(&disk, &[0, 1]), Err(MapError::Page { page: 0, .. })));
    }
}

/// Records of four flushes in an unclean map.
fn logged() -> Arc<SimDisk> {
    let disk = created(PAGE_BYTES, &[0]);
    let map = disk.storage(FileId::Map);
    let (mut header, _) = opened(&disk, &[0]).unwrap();
    header.clean = false;
    write_header(&map, &mut header).unwrap();
    let mut at = 0;
    for (seq, blocks) in [vec![3], vec![9, 10], vec![3], vec![5]].into_iter().enumerate() {
        let entries: Vec<_> = blocks.iter().map(|block| log::Entry { block: *block, page_seq: 0 }).collect();
        let mut record = vec![seq as u8 + 1; PAGE * (1 + blocks.len())];
        log::encode(&header.volume_id, at, seq as u64 + 7, &entries, &mut record);
        map.write_at(&record, LOG_OFFSET + at * BLOCK_BYTES).unwrap();
        at += 1 + blocks.len() as u64;
    }
    map.sync().unwrap();
    disk
}

fn replayed(disk: &Arc<SimDisk>) -> Result<Vec<(u64, u8)>, MapError> {
    let (header, bits) = opened(disk, &[0])?;
    let found = log::read(&disk.storage(FileId::Map), &header, &bits)?;
    Ok(found.iter().map(|(block, content)| (*block, content[0])).collect())
}

#[test]
fn the_log_is_read_in_order_until_a_page_supersedes_it() {
    let disk = logged();
    assert_eq!(replayed(&disk).unwrap(), [(3, 1), (9, 2), (10, 2), (3, 3), (5, 4)]);
    let mut head = [0; 64];
    disk.storage(FileId::Map).read_at(&mut head, 8192 + 2 * 4096).unwrap();
    assert_eq!(head[..8], *b"HRTHLOG1");
    assert_eq!(head[12..24], [2, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(head[32..44], [9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(head[44..48], crc32c::crc32c(&[2; PAGE]).to_le_bytes());
    let (_, mut bits) = opened(&disk, &[0]).unwrap();
    bits.set_local(3..4);
    write_pages(&disk, &mut bits);
    assert_eq!(replayed(&disk).unwrap(), []);
}

/// Invariant 6: every flipped bit of a record is found, unless it is in the last one: that one might as well have been cut off by a
/// crash.
#[test]
fn invariant_6_a_flipped_bit_of_the_log_is_no_cut_off_record() {
    let disk = logged();
    let (header, bits) = opened(&disk, &[0]).unwrap();
    let mut log = log::contents(&disk.storage(FileId::Map)).unwrap();
    for bit in 0..9 * PAGE * 8 {
        log[bit / 8] ^= 1 << (bit % 8);
        match log::decode(&log, &header, &bits) {
            Err(MapError::Log(_)) if bit < 7 * PAGE * 8 => {}
            Ok(found) if bit >= 7 * PAGE * 8 => assert_eq!(found.len(), 4),
            other => panic!("{other:?} with bit {bit} flipped"),
        }
        log[bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(log::decode(&log, &header, &bits).unwrap().len(), 5);
}

/// Invariant 6: every flipped bit of a page is found, and every one in a copy of the header is found or does not matter. (The log of a
/// map that was closed clean is not looked at.)
#[test]
fn invariant_6_a_flipped_bit_of_the_map_is_found() {
    let base = [0, 1, 77, 248];
    let disk = created(PAGE_BYTES + CHUNK_BYTES, &base);
    let (header, mut bits) = opened(&disk, &base).unwrap();
    // Both slots of the first page, one of the second.
    for block in [0, 248 * BLOCKS_PER_CHUNK, 1] {
        bits.set_local(block..block + 1);
        write_pages(&disk, &mut bits);
    }
    let map = disk.storage(FileId::Map);
    for bit in 0..LOG_OFFSET * 8 {
        disk.flip_bit(FileId::Map, bit);
        assert_eq!(read_header(&map).unwrap(), header, "bit {bit} of the header flipped");
        disk.flip_bit(FileId::Map, bit);
    }
    let length = map.length().unwrap();
    assert_eq!(length, slot_offset(2, 0));
    for bit in PAGES_OFFSET * 8..length * 8 {
        disk.flip_bit(FileId::Map, bit);
        let error = load(&map, &header, Extent::of(base)).unwrap_err();
        assert!(matches!(error, MapError::Page { .. }), "{error} with bit {bit} flipped");
        disk.flip_bit(FileId::Map, bit);
    }
    opened(&disk, &base).unwrap();
}

#[test]
fn pages_of_another_place_or_volume_are_refused() {
    let base = [0, 300];
    let disk = created(2 * PAGE_BYTES, &base);
    let (_, mut bits) = opened(&disk, &base).unwrap();
    bits.set_local(0..1);
    bits.set_local(300 * BLOCKS_PER_CHUNK..301 * BLOCKS_PER_CHUNK);
    write_pages(&disk, &mut bits);
    let map = disk.storage(FileId::Map);
    let mut page = [0u8; PAGE];
    map.read_at(&mut page, slot_offset(1, 0)).unwrap();
    map.write_at(&page, slot_offset(0, 0)).unwrap();
    assert!(matches!(opened(&disk, &base), Err(MapError::Page { page: 0, slot: 0, sector: 0, .. })));
}

#[test]
fn a_creation_that_was_cut_off_is_refused() {
    for fuse in 0.. {
        let disk = Arc::new(SimDisk::default());
        disk.set_fuse(Some(fuse));
        let result = create(&disk.storage(FileId::Map), spec(3 * PAGE_BYTES, &[0, 300]));
        disk.power_cut(&mut Rng::new(fuse));
        match (result, opened(&disk, &[0, 300])) {
            (Ok(()), Ok(_)) if fuse > 2 => return,
            (Err(_), Err(_)) => {}
            // The last sync only was not told of.
            (Err(_), Ok((header, bits))) => {
                assert_eq!((header.sequence, header.size_bytes), (1, 3 * PAGE_BYTES));
                assert!(!bits.is_local(0) && bits.is_local(128));
            }
            (result, opened) => panic!("{result:?} {opened:?} at call {fuse}"),
        }
    }
}

#[test]
fn a_growth_that_was_cut_off_leaves_the_old_size_or_the_new_one() {
    let (old, new) = (PAGE_BYTES - 4096, 3 * PAGE_BYTES + CHUNK_BYTES);
    let mut ends = BTreeSet::new();
    for seed in 0..600 {
        let fuse = seed % 15;
        let disk = created(old, &[0]);
        let data = disk.storage(FileId::Data);
        data.set_length(old).unwrap();
        data.sync().unwrap();
        let (mut header, _) = opened(&disk, &[0]).unwrap();
        disk.set_fuse(Some(fuse));
        let grown = grow(&disk.storage(FileId::Map), &data, &mut header, new);
        disk.power_cut(&mut Rng::new(seed));
        let (header, bits) = opened(&disk, &[0]).unwrap();
        assert!(header.size_bytes == old || header.size_bytes == new);
        assert!(grown.is_err() || header.size_bytes == new);
        assert!(data.length().unwrap() >= header.size_bytes);
        assert!(!bits.is_local(0));
        let blocks = header.size_bytes / BLOCK_BYTES;
        assert_eq!(bits.run(BLOCKS_PER_CHUNK, blocks), Run { local: true, end: blocks });
        ends.insert((grown.is_ok(), header.size_bytes == new));
    }
    assert_eq!(ends.len(), 3, "{ends:?}");
}

#[test]
fn a_header_survives_the_loss_of_either_copy() {
    for fuse in 0..4 {
        for seed in 0..50 {
            let disk = created(CHUNK_BYTES, &[]);
            let map = disk.storage(FileId::Map);
            let (mut header, _) = opened(&disk, &[]).unwrap();
            header.generation = 9;
            disk.set_fuse(Some(fuse));
            let written = write_header(&map, &mut header);
            disk.power_cut(&mut Rng::new(seed));
            let (found, _) = opened(&disk, &[]).unwrap();
            assert!(found.generation == 1 || found == header);
            assert!(written.is_err() || found == header);
        }
    }
}

/// A change that was cut off between the two copies and then acted upon: the next change, cut off too, does not bring back what was
/// before the first.
#[test]
fn a_header_that_was_half_written_is_evened_out() {
    let mut changed = 0;
    for seed in 0..400 {
        let disk = created(CHUNK_BYTES, &[]);
        let (map, data) = (disk.storage(FileId::Map), disk.storage(FileId::Data));
        data.set_length(CHUNK_BYTES).unwrap();
        data.sync().unwrap();
        let mut header = read_header(&map).unwrap();
        header.clean = false;
        // The process is killed, the host goes on.
        disk.set_fuse(Some(seed % 4));
        write_header(&map, &mut header).unwrap_err();
        disk.revive();
        let (mut header, _) = open_map(&map, &data, 1, None).unwrap();
        if header.clean {
            continue;
        }
        // In use; and now the power fails during another change.
        changed += 1;
        header.generation = 2;
        disk.set_fuse(Some(seed / 4 % 4));
        write_header(&map, &mut header).unwrap_err();
        disk.power_cut(&mut Rng::new(seed));
        assert!(!read_header(&map).unwrap().clean, "seed {seed}: what was in use counts as clean");
    }
    assert!(changed > 300);
}

proptest! {
    #[test]
    fn sectors_decode_to_what_was_encoded(
        seq in 1u32..=1 << 31,
        dirty in 0u32..1 << 31,
        words in prop::collection::vec(any::<u64>(), WORDS_PER_SECTOR),
        page: u64,
        sector in 0usize..8,
    ) {
        let local = words.try_into().unwrap();
        let (tag, written) = (sector_tag(&[3; 32], page, sector), Sector { seq, dirty, local });
        let mut bytes = [0; SECTOR];
        written.encode(tag, &mut bytes);
        prop_assert_eq!(Sector::decode(tag, &bytes), Ok(written));
        prop_assert!(Sector::decode(tag ^ 1, &bytes).is_err());
    }

    #[test]
    fn garbage_never_opens(bytes in prop::collection::vec(any::<u8>(), 0..20_000), keep_header: bool) {
        let disk = created(CHUNK_BYTES, &[0]);
        let map = disk.storage(FileId::Map);
        map.write_at(&bytes, if keep_header { PAGES_OFFSET } else { 0 }).unwrap();
        let whole = bytes.iter().all(|byte| *byte == 0) && keep_header || bytes.is_empty();
        prop_assert_eq!(opened(&disk, &[0]).is_ok(), whole || (!keep_header && bytes.len() <= PAGE));
    }

    #[test]
    fn bits_agree_with_a_set(
        base in prop::collection::btree_set(0u64..500, 0..40),
        ranges in prop::collection::vec((0u64..500 * 128, 1u64..3000), 0..60),
        probes in prop::collection::vec((0u64..500 * 128, 1u64..9000), 20),
    ) {
        let base: Vec<u64> = base.into_iter().collect();
        let disk = created(500 * CHUNK_BYTES, &base);
        let (_, mut bits) = opened(&disk, &base).unwrap();
        let mut model: Vec<bool> = (0..500 * BLOCKS_PER_CHUNK).map(|b| !base.contains(&(b / BLOCKS_PER_CHUNK))).collect();
        for (first, count) in ranges {
            let end = (first + count).min(500 * BLOCKS_PER_CHUNK);
            bits.set_local(first..end);
            model[first as usize..end as usize].fill(true);
            bits.set_dirty(first / BLOCKS_PER_CHUNK);
        }
        for (first, count) in probes {
            let limit = (first + count).min(500 * BLOCKS_PER_CHUNK);
            let alike = model[first as usize..limit as usize].iter().take_while(|b| **b == model[first as usize]).count();
            prop_assert_eq!(bits.run(first, limit), Run { local: model[first as usize], end: first + alike as u64 });
        }
        // Through the file and back.
        bits.include_dirty();
        let dirty = bits.dirty_chunks();
        write_pages(&disk, &mut bits);
        let (_, again) = opened(&disk, &base).unwrap();
        prop_assert_eq!(again.dirty_chunks(), dirty);
        for (block, local) in model.iter().enumerate() {
            prop_assert_eq!(again.is_local(block as u64), *local);
        }
    }
}
