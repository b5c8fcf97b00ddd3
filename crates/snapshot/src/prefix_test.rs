use std::io::Write;

use proptest::prelude::*;

use super::*;

/// The digest as its description says.
fn plain(content: &[u8]) -> PrefixDigest {
    let mut digest = [0u8; 32];
    for (number, piece) in content.chunks(PIECE_BYTES as usize).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            let offset = number as u64 * PIECE_BYTES;
            let text = [&digest[..], &offset.to_le_bytes(), piece].concat();
            digest = *blake3::hash(&text).as_bytes();
        }
    }
    PrefixDigest(digest)
}

#[derive(Clone, Debug)]
enum Part {
    Data(u8, usize),
    Zeros(u64),
}

fn parts() -> impl Strategy<Value = Vec<Part>> {
    let length =
        prop_oneof![1usize..2000, Just(PIECE_BYTES as usize), (PIECE_BYTES as usize - 3)..(PIECE_BYTES as usize + 3)];
    let zeros = prop_oneof![1u64..2000, Just(PIECE_BYTES), (PIECE_BYTES - 3)..(3 * PIECE_BYTES + 3)];
    let part =
        prop_oneof![(0u8..3, length).prop_map(|(byte, length)| Part::Data(byte, length)), zeros.prop_map(Part::Zeros)];
    proptest::collection::vec(part, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn however_a_file_comes_its_digest_is_the_same(parts in parts(), stop in 0usize..12) {
        let mut content = Vec::new();
        for part in &parts {
            match part {
                Part::Data(byte, length) => content.resize(content.len() + length, *byte),
                Part::Zeros(count) => content.resize(content.len() + *count as usize, 0),
            }
        }
        let size = content.len() as u64;
        let mut hasher = PrefixHasher::new(size, 0, PrefixDigest::default());
        for (number, part) in parts.iter().enumerate() {
            if number == stop {
                // Continued elsewhere, at the last place where that can be.
                let (offset, digest) = hasher.whole();
                let again = hasher.position();
                prop_assert!(offset.is_multiple_of(PIECE_BYTES) && again - offset < PIECE_BYTES);
                prop_assert_eq!(digest, plain(&content[..offset as usize]));
                hasher = PrefixHasher::new(size, offset, digest);
                hasher.data(&content[offset as usize..again as usize]);
            }
            match part {
                Part::Data(byte, length) => hasher.data(&vec![*byte; *length]),
                Part::Zeros(count) => hasher.zeros(*count),
            }
        }
        prop_assert_eq!(hasher.position(), size);
        prop_assert_eq!(hasher.whole(), (size, plain(&content)));
    }

    #[test]
    fn a_file_is_read_without_its_zeros(parts in parts()) {
        let mut file = tempfile::tempfile().unwrap();
        let mut content = Vec::new();
        for part in &parts {
            match part {
                Part::Data(byte, length) => {
                    file.write_all(&vec![*byte; *length]).unwrap();
                    content.resize(content.len() + length, *byte);
                }
                Part::Zeros(count) => {
                    content.resize(content.len() + *count as usize, 0);
                    file.set_len(content.len() as u64).unwrap();
                    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap();
                }
            }
        }
        let size = content.len() as u64;
        let (mut offset, mut digest, mut piece) = (0, PrefixDigest::default(), Vec::new());
        let mut read = vec![0; content.len()];
        while let Some(begin) = next_piece(&file, offset, size, &mut piece, |_| {}).unwrap() {
            prop_assert!(begin.is_multiple_of(PIECE_BYTES) && begin >= offset && piece.iter().any(|byte| *byte != 0));
            read[begin as usize..begin as usize + piece.len()].copy_from_slice(&piece);
            digest = digest.with(begin, &piece);
            offset = begin + piece.len() as u64;
        }
        prop_assert!(read == content);
        prop_assert_eq!(digest, plain(&content));
    }
}

#[test]
fn what_differs_is_seen() {
    let mut content = vec![1u8; 3 * PIECE_BYTES as usize];
    let before = plain(&content);
    content[PIECE_BYTES as usize] = 2;
    assert_ne!(plain(&content), before);
    // The same bytes elsewhere.
    let (mut one, mut other) = (vec![0u8; 2 * PIECE_BYTES as usize], vec![0u8; 2 * PIECE_BYTES as usize]);
    one[0] = 1;
    other[PIECE_BYTES as usize] = 1;
    assert_ne!(plain(&one), plain(&other));
    assert_eq!(PrefixDigest::from_bytes(&[]), Some(PrefixDigest::default()));
    assert_eq!(PrefixDigest::from_bytes(before.as_bytes()), Some(before));
    assert_eq!(PrefixDigest::from_bytes(&[1; 31]), None);
}
