use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::format::{
    BLOCKS_PER_CHUNK, CHUNKS_PER_PAGE, PAGE, PAGES_OFFSET, SECTOR, Sector, WORDS_PER_SECTOR, sector_tag, slot_offset,
};
use super::*;
use crate::layered::testing::{FileId, Rng, SimDisk};

const PAGE_BYTES: u64 = CHUNKS_PER_PAGE as u64 * CHUNK_BYTES;

fn spec(size_bytes: u64, base: &[u64]) -> MapSpec<Vec<u64>> {
    MapSpec {
        filled: false,
        volume_id: "vol-0123456789abcdef0".into(),
        size_bytes,
        base_root: (!base.is_empty()).then_some([5; 32]),
        generation: 1,
        base_chunks: base.to_vec(),
    }
}

fn created(size_bytes: u64, base: &[u64]) -> Arc<SimDisk> {
    let disk = Arc::new(SimDisk::default());
    create(&disk.storage(FileId::Map), spec(size_bytes, base)).unwrap();
    disk
}

fn opened(disk: &Arc<SimDisk>) -> Result<(Header, Bits), MapError> {
    let map = disk.storage(FileId::Map);
    let header = read_header(&map)?;
    let bits = load(&map, &header)?;
    Ok((header, bits))
}

#[test]
fn the_layout_is_the_documented_one() {
    assert_eq!(PAGE_BYTES, 124 << 20);
    assert_eq!((PAGES_OFFSET, slot_offset(0, 1), slot_offset(1, 0)), (8192, 12288, 16384));
    let disk = created(PAGE_BYTES + 4096, &[0, 248]);
    let map = disk.storage(FileId::Map);
    assert_eq!(map.length().unwrap(), 8192 + 2 * 2 * 4096);
    let mut head = [0u8; 104];
    map.read_at(&mut head, 4096).unwrap();
    let expected: Vec<u8> = [
        b"HRTHMAP1".as_slice(),
        &1u32.to_le_bytes(),
        &3u32.to_le_bytes(),
        &1u64.to_le_bytes(),
        b"vol-0123456789abcdef0\0\0\0\0\0\0\0\0\0\0\0",
        &(PAGE_BYTES + 4096).to_le_bytes(),
        &1u64.to_le_bytes(),
        &[5; 32],
    ]
    .concat();
    assert_eq!(head, *expected);
    let mut sector = [0u8; 512];
    map.read_at(&mut sector, 8192).unwrap();
    assert_eq!(sector[..4], crc32c::crc32c(&sector[4..]).to_le_bytes());
    assert_eq!(sector[4..8], 1u32.to_le_bytes());
    assert_eq!(sector[12..32], [0; 20]);
    assert!(sector[32..].iter().all(|byte| *byte == 0xFF));
}

#[test]
fn what_cannot_be_is_refused() {
    let disk = Arc::new(SimDisk::default());
    let map = disk.storage(FileId::Map);
    assert!(matches!(create(&map, spec(0, &[])), Err(MapError::Size(0))));
    assert!(matches!(create(&map, spec(4097, &[])), Err(MapError::Size(4097))));
    assert!(matches!(create(&map, spec(1 << 57, &[])), Err(MapError::Size(_))));
    assert!(matches!(create(&map, spec(CHUNK_BYTES, &[1])), Err(MapError::BaseChunk(1))));
    assert!(matches!(create(&map, spec(4 * CHUNK_BYTES, &[2, 1])), Err(MapError::BaseChunk(1))));
    let baseless = MapSpec { base_root: None, ..spec(CHUNK_BYTES, &[0]) };
    assert!(matches!(create(&map, baseless), Err(MapError::BaseChunk(0))));
    let long = MapSpec { volume_id: "v".repeat(33), ..spec(4096, &[]) };
    assert!(matches!(create(&map, long), Err(MapError::VolumeId(_))));
    assert!(opened(&disk).is_err());
}

/// Invariant 6: a flipped bit is found, or (in one copy of the header) does not matter.
#[test]
fn any_single_flipped_bit_is_detected() {
    let disk = created(PAGE_BYTES + CHUNK_BYTES, &[0, 1, 77, 248]);
    let (header, _) = opened(&disk).unwrap();
    let length = disk.storage(FileId::Map).length().unwrap();
    let mut rng = Rng::new(1);
    for bit in (0..length * 8).filter(|bit| *bit < 1024 || rng.chance(4) || bit / 8 >= 8192 && bit % 4096 < 256) {
        disk.flip_bit(FileId::Map, bit);
        match opened(&disk) {
            Ok((found, _)) => assert!(bit / 8 < PAGES_OFFSET && found == header, "bit {bit} flipped unnoticed"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        disk.flip_bit(FileId::Map, bit);
    }
    opened(&disk).unwrap();
}

#[test]
fn pages_of_another_place_or_volume_are_refused() {
    let disk = created(2 * PAGE_BYTES, &[0]);
    let map = disk.storage(FileId::Map);
    let mut page = [0u8; PAGE];
    map.read_at(&mut page, slot_offset(1, 0)).unwrap();
    map.write_at(&page, slot_offset(0, 0)).unwrap();
    assert!(matches!(opened(&disk), Err(MapError::Page { page: 0, slot: 0, sector: 0, .. })));
}

#[test]
fn a_creation_that_was_cut_off_is_refused() {
    for fuse in 0.. {
        let disk = Arc::new(SimDisk::default());
        disk.set_fuse(Some(fuse));
        let result = create(&disk.storage(FileId::Map), spec(3 * PAGE_BYTES, &[0, 300]));
        disk.power_cut(&mut Rng::new(fuse));
        match (result, opened(&disk)) {
            (Ok(()), Ok(_)) if fuse > 4 => return,
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
        let (mut header, _) = opened(&disk).unwrap();
        disk.set_fuse(Some(fuse));
        let grown = grow(&disk.storage(FileId::Map), &data, &mut header, new);
        disk.power_cut(&mut Rng::new(seed));
        let (header, bits) = opened(&disk).unwrap();
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
            let (mut header, _) = opened(&disk).unwrap();
            header.generation = 9;
            disk.set_fuse(Some(fuse));
            let written = write_header(&map, &mut header);
            disk.power_cut(&mut Rng::new(seed));
            let (found, _) = opened(&disk).unwrap();
            assert!(found.generation == 1 || found == header);
            assert!(written.is_err() || found == header);
        }
    }
}

proptest! {
    #[test]
    fn sectors_decode_to_what_was_encoded(
        seq: u32,
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
        let whole = keep_header && bytes.is_empty() || bytes.is_empty();
        prop_assert_eq!(opened(&disk).is_ok(), whole || (!keep_header && bytes.len() <= PAGE));
    }

    #[test]
    fn bits_agree_with_a_set(
        base in prop::collection::btree_set(0u64..500, 0..40),
        ranges in prop::collection::vec((0u64..500 * 128, 1u64..3000), 0..60),
        probes in prop::collection::vec((0u64..500 * 128, 1u64..9000), 20),
    ) {
        let disk = created(500 * CHUNK_BYTES, &base.iter().copied().collect::<Vec<_>>());
        let (_, mut bits) = opened(&disk).unwrap();
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
        let map = disk.storage(FileId::Map);
        let mut page = [0; PAGE];
        while let Some(write) = bits.take_changed(&mut page) {
            map.write_at(&page, slot_offset(write.page, write.slot)).unwrap();
            bits.written(write);
        }
        let (_, again) = opened(&disk).unwrap();
        prop_assert_eq!(again.dirty_chunks(), dirty);
        for (block, local) in model.iter().enumerate() {
            prop_assert_eq!(again.is_local(block as u64), *local);
        }
    }
}
