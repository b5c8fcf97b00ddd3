use proptest::prelude::*;

use super::*;

pub(crate) fn chunk_ref() -> impl Strategy<Value = ChunkRef> {
    (any::<[u8; 32]>(), any::<u32>()).prop_map(|(hash, epoch)| ChunkRef { hash: ChunkHash(hash), epoch: Epoch(epoch) })
}

fn sample() -> Page {
    let mut page = Page::default();
    for slot in [0, 1, 500, 1023] {
        page.set(slot, Some(ChunkRef { hash: ChunkHash([slot as u8; 32]), epoch: Epoch(slot as u32) }));
    }
    page
}

fn with_crc(mut object: Vec<u8>) -> Vec<u8> {
    let crc = crc(&object);
    object[12..16].copy_from_slice(&crc.to_le_bytes());
    object
}

#[test]
fn the_format_does_not_change() {
    let (name, object) = sample().encode();
    assert_eq!(name.to_string(), "1518e625404c667f8848f053ea285c427de1699f7b67b515e636e69666b402d1");
    assert_eq!(object.len(), 40_976);
    assert_eq!(&object[..12], b"HPAG\x01\0\0\0\x04\0\0\0");
}

#[test]
fn invariant_6_every_flipped_bit_and_cut_of_a_page_is_noticed() {
    let (hash, object) = sample().encode();
    let name = PageRef { hash, epoch: Epoch(0) };
    let mut changed = object.clone();
    for bit in 0..object.len() * 8 {
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(Page::decode(&name, &changed).is_err(), "bit {bit}");
        changed[bit / 8] ^= 1 << (bit % 8);
    }
    // Also with a right checksum, where the bit is not one of the checksum's own: every bit of the header and some entries, one bit of
    // every other byte.
    for bit in (0..4000).chain((4000..object.len() * 8).step_by(9)).filter(|bit| !(96..128).contains(bit)) {
        let mut changed = object.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(Page::decode(&name, &with_crc(changed)).is_err(), "bit {bit} with a right checksum");
    }
    for length in 0..object.len() {
        assert!(matches!(Page::decode(&name, &object[..length]), Err(Damage::Size { .. })));
    }
}

#[test]
fn damage_says_what_it_is() {
    let (_, object) = sample().encode();
    let changed = |at: usize, value: u8| {
        let mut object = object.clone();
        object[at] = value;
        Page::decode_unnamed(&with_crc(object)).unwrap_err()
    };
    assert_eq!(changed(0, 0), Damage::Signature("a manifest page"));
    assert_eq!(changed(4, 2), Damage::Version(2));
    assert!(matches!(changed(8, 5), Damage::Field(_)), "a wrong count");
    assert_eq!(changed(16 + 36, 3), Damage::Flags(3));
    assert!(matches!(changed(16 + 2 * 40, 1), Damage::Field(_)), "an absent entry with a hash");
}

proptest! {
    #![proptest_config(crate::testing::cases(64))]

    #[test]
    fn entries_come_back(entries in proptest::collection::btree_map(0usize..PAGE_ENTRIES, chunk_ref(), 0..60)) {
        let mut page = Page::default();
        for (slot, chunk) in &entries {
            page.set(*slot, Some(*chunk));
        }
        let (hash, object) = page.encode();
        let read = Page::decode(&PageRef { hash, epoch: Epoch(1) }, &object).unwrap();
        prop_assert_eq!(read.present(), entries.len());
        prop_assert!(read.iter().eq(entries.iter().map(|(slot, chunk)| (*slot, *chunk))));
    }

    #[test]
    fn nonsense_is_refused(changes in proptest::collection::vec((0usize..MAX_PAGE_BYTES, any::<u8>()), 1..50)) {
        let (_, mut object) = sample().encode();
        let before = object.clone();
        for (at, value) in changes {
            object[at] = value;
        }
        let object = with_crc(object);
        // Whatever is taken is what would be written.
        if let Ok(page) = Page::decode_unnamed(&object) {
            prop_assert_eq!(page.encode().1, object);
        } else {
            prop_assert_ne!(object, before);
        }
    }
}
