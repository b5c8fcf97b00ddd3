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

#[test]
fn flipped_bits_and_cuts_are_noticed() {
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
    fn lists_come_back_and_nonsense_does_not(chunks in proptest::collection::vec(any::<u32>(), 0..100), nonsense in any::<Vec<u8>>()) {
        prop_assert_eq!(decode(&encode(&chunks)).unwrap(), chunks);
        prop_assert!(decode(&nonsense).is_err());
    }
}
