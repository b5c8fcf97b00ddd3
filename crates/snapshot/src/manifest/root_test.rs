use proptest::prelude::*;

use super::*;

const PAGE_SPAN: u64 = (CHUNK_BYTES * PAGE_ENTRIES) as u64;

fn sample() -> Root {
    Root {
        id: SnapshotKey::new("snap-0123456789abcdef0").unwrap(),
        size_bytes: 2 * PAGE_SPAN + 5 * CHUNK_BYTES as u64,
        domain: KeyDomainId::new("default").unwrap(),
        epoch: Epoch(7),
        parent: Some(SnapshotKey::new("snap-fedcba98765432100").unwrap()),
        present_chunks: 1029,
        pages: vec![
            Some((PageRef { hash: ChunkHash([1; 32]), epoch: Epoch(3) }, 1024)),
            None,
            Some((PageRef { hash: ChunkHash([2; 32]), epoch: Epoch(7) }, 5)),
        ],
    }
}

fn with_crc(mut object: Vec<u8>) -> Vec<u8> {
    let covered = object.len() - CRC_BYTES;
    let crc = crc32c::crc32c(&object[..covered]);
    object[covered..].copy_from_slice(&crc.to_le_bytes());
    object
}

#[test]
fn the_format_does_not_change() {
    let object = sample().encode();
    assert_eq!(Root::decode(&object).unwrap(), sample());
    assert_eq!(RootHash::of(&object).to_string(), "bb38621c2cf10d420387353e7b077a9d7fb2de155cb627e43089f8ffd4609f14");
    assert_eq!(&object[..16], b"HEARTHMF\x01\0\0\0\0\0\x08\0");
    assert_eq!(object.len(), 40 + 9 + 24 + 24 + 3 * 40 + 4);
}

#[test]
fn invariant_6_every_flipped_bit_and_cut_of_a_root_is_noticed() {
    let object = sample().encode();
    for bit in 0..object.len() * 8 {
        let mut changed = object.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        Root::decode(&changed).expect_err(&format!("bit {bit}"));
    }
    for length in 0..object.len() {
        Root::decode(&object[..length]).expect_err(&format!("{length} bytes"));
    }
}

#[test]
fn damage_says_what_it_is() {
    let object = sample().encode();
    let changed = |at: usize, value: u8| {
        let mut object = object.clone();
        object[at] = value;
        Root::decode(&with_crc(object)).unwrap_err()
    };
    assert_eq!(changed(0, 0), Damage::Signature("a snapshot's root"));
    assert_eq!(changed(8, 2), Damage::Version(2));
    assert!(changed(12, 1).to_string().contains("chunks of"));
    assert!(changed(23, 1).to_string().contains("a volume of"));
    assert!(changed(24, 1).to_string().contains("it says"));
    assert!(changed(36, 2).to_string().contains("pages"));
    assert!(changed(40, 200).to_string().contains("name"));
    assert!(changed(42, b'/').to_string().contains("key domain"));
    let last = object.len();
    assert!(changed(last - 8, 6).to_string().contains("page 2"), "more chunks than the volume has");
    assert!(changed(last - 4 - 80, 6).to_string().contains("page 1"), "an empty page with a name");
}

proptest! {
    #[test]
    fn whatever_is_taken_makes_sense(changes in proptest::collection::vec((0usize..221, any::<u8>()), 1..6)) {
        let mut object = sample().encode();
        for (at, value) in changes {
            object[at] = value;
        }
        if let Ok(root) = Root::decode(&with_crc(object.clone())) {
            prop_assert_eq!(root.pages.len(), page_count(root.size_bytes));
            prop_assert!(root.size_bytes <= MAX_VOLUME_BYTES);
            prop_assert_eq!(root.encode(), with_crc(object));
        }
    }

    #[test]
    fn nonsense_is_refused(object in proptest::collection::vec(any::<u8>(), 0..300), signed in any::<bool>()) {
        let mut object = object;
        if signed && object.len() > 16 {
            object[..8].copy_from_slice(MAGIC);
            object[8..12].copy_from_slice(&VERSION.to_le_bytes());
            object = with_crc(object);
        }
        prop_assert!(Root::decode(&object).is_err());
    }
}
