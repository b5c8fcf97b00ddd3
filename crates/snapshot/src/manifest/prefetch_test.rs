use proptest::prelude::*;

use super::*;
use crate::testing::memory_store;

#[tokio::test]
async fn a_list_is_stored_replaced_and_missing_without_error() {
    let store = memory_store();
    let id = SnapshotKey::new("snap-1").unwrap();
    let objects = &**store.objects();
    assert_eq!(load_prefetch(objects, &id).await.unwrap(), None);
    store_prefetch(objects, &id, &[5, 1, 9]).await.unwrap();
    store_prefetch(objects, &id, &[5, 1, 7]).await.unwrap();
    assert_eq!(load_prefetch(objects, &id).await.unwrap(), Some(vec![5, 1, 7]));
    let long: Vec<u32> = (0..100_000).collect();
    store_prefetch(objects, &id, &long).await.unwrap();
    assert_eq!(load_prefetch(objects, &id).await.unwrap().unwrap(), long[..MAX_ENTRIES]);
}

/// docs/storage-objects.md.
#[test]
fn a_list_is_the_documented_one() {
    let before = b"HPRE\x01\0\0\0\x03\0\0\0";
    let after = [5, 0, 0, 0, 1, 0, 0, 0, 0x70, 0x11, 1, 0];
    let crc = crc32c::crc32c(&[&before[..], &after].concat()).to_le_bytes();
    assert_eq!(encode(&[5, 1, 70_000]), [&before[..], &crc, &after].concat());
}

#[test]
fn invariant_6_every_flipped_bit_and_cut_of_a_prefetch_list_is_noticed() {
    let object = encode(&[3, 4, 70_000]);
    for bit in 0..object.len() * 8 {
        let mut changed = object.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        decode(&changed).expect_err(&format!("bit {bit}"));
    }
    for length in 0..object.len() {
        decode(&object[..length]).expect_err(&format!("{length} bytes"));
    }
}

proptest! {
    #[test]
    fn signed_lists_that_lie_are_refused(
        version in 0u32..3, count in prop_oneof![0u32..12, Just(u32::MAX), Just(1 << 30)],
        body in proptest::collection::vec(any::<u8>(), 0..48),
    ) {
        let mut object = Vec::from(*MAGIC);
        object.extend(version.to_le_bytes());
        object.extend(count.to_le_bytes());
        object.extend([0; 4]);
        object.extend(&body);
        let crc = crc(&object).to_le_bytes();
        object[12..16].copy_from_slice(&crc);
        let decoded = decode(&object);
        prop_assert_eq!(decoded.is_ok(), version == 1 && body.len() as u64 == u64::from(count) * 4, "{:?}", decoded);
    }

    #[test]
    fn lists_come_back_and_nonsense_does_not(chunks in proptest::collection::vec(any::<u32>(), 0..100), nonsense in any::<Vec<u8>>()) {
        prop_assert_eq!(decode(&encode(&chunks)).unwrap(), chunks);
        prop_assert!(decode(&nonsense).is_err());
    }
}
