//! The `staged` file of a snapshot: its bytes, and files that lie. A VMM writes it, which may have become somebody else's.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use crate::layered::freeze::{FrozenSet, encode_staged, staged_at};
use crate::{BlockError, CHUNK_BYTES, StagedView, staged_bytes};

fn file_of(bytes: &[u8], length: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.set_len(length).unwrap();
    file
}

/// docs/storage.md, "Stage of a snapshot".
#[test]
fn the_staged_file_is_the_documented_one() {
    let (size, chunks) = (65 * CHUNK_BYTES + 4096, 66);
    let bytes = encode_staged(size, &FrozenSet::of(chunks, &[0, 3, 65]));
    let mut expected = b"HRTHSTG1".to_vec();
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0, 0x10, 0x08, 2, 0, 0, 0, 0]);
    expected.extend([66, 0, 0, 0, 0, 0, 0, 0]);
    expected.resize(4096, 0);
    expected.extend([0b1001, 0, 0, 0, 0, 0, 0, 0, 0b10, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0; 66]);
    assert!(bytes == expected);
    assert_eq!((staged_bytes(size), staged_at(chunks, 3)), (4096 + 16 + 66, 4096 + 16 + 3));
    let file = file_of(&bytes, bytes.len() as u64);
    file.write_all_at(&[1], 4096 + 16 + 3).unwrap();
    let view = StagedView::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(view.frozen().iter().collect::<Vec<_>>(), [0, 3, 65]);
    let staged = [0, 3, 65].map(|chunk| view.is_staged(chunk).unwrap());
    assert!(staged == [false, true, false] && !view.is_broken().unwrap());
    file.write_all_at(&[1], 12).unwrap();
    assert!(view.is_broken().unwrap());
    // Cut off while it is looked at.
    file.set_len(4096).unwrap();
    assert!(matches!(view.is_staged(65), Err(BlockError::Stage(_))));
}

proptest! {
    #[test]
    fn a_staged_file_that_lies_is_refused(
        magic in prop::bool::weighted(0.95), version in prop_oneof![9 => Just(1u32), 1 => any::<u32>()],
        size in prop::sample::select(vec![
            0, 4096, 64 * CHUNK_BYTES, 65 * CHUNK_BYTES - 4096, 64 << 40, (64 << 40) + 1, 1 << 56, 1 << 63, u64::MAX,
        ]),
        lie in prop_oneof![4 => Just(0i64), 1 => -2i64..3, 1 => any::<i64>()],
        missing in prop_oneof![4 => Just(0u64), 1 => 1u64..200],
        words in prop::collection::vec(prop_oneof![0u64..2, any::<u64>()], 2), noise in prop::collection::vec(any::<u8>(), 16),
    ) {
        let right = size.div_ceil(CHUNK_BYTES);
        let chunks = right.wrapping_add_signed(lie);
        let mut bytes = if magic { b"HRTHSTG1".to_vec() } else { b"HRTHSTG2".to_vec() };
        bytes.extend(version.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(chunks.to_le_bytes());
        bytes.resize(4096, 0);
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(noise);
        let whole = 4096 + right.div_ceil(64) * 8 + right;
        // No file system has longer files, and what claims to need one is refused before.
        let length = whole.min(1 << 40).saturating_sub(missing);
        let opened = StagedView::open(file_of(&bytes, length));
        let spare = |word: u64, before: u64| match right.saturating_sub(before) {
            left @ 0..64 => word >> left == 0,
            _ => true,
        };
        // The file's words beyond those two are zeros, or marks.
        let set_ends = right >= 128 || match right.div_ceil(64) { 0 => true, 1 => spare(words[0], 0), _ => spare(words[1], 64) };
        let sound = magic && version == 1 && lie == 0 && missing == 0 && size <= 64 << 40 && set_ends;
        prop_assert_eq!(opened.is_ok(), sound, "{:?}", opened.err());
        if let Ok(view) = opened {
            prop_assert_eq!(view.frozen().chunks, right);
            prop_assert!(right > 1000 || view.frozen().len() == view.frozen().iter().count() as u64);
        }
    }
}
