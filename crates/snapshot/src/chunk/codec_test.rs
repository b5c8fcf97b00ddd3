use proptest::prelude::*;

use super::*;
use crate::testing::{domain, noise};

fn encoded(content: &[u8]) -> (KeyDomain, ChunkHash, Vec<u8>) {
    let domain = domain("codec");
    let name = domain.name_of(content);
    let object = encode(&domain, &name, content).unwrap();
    (domain, name, object)
}

/// Makes the header's checksum right again, as somebody would who changes an object on purpose.
fn with_crc(mut object: Vec<u8>) -> Vec<u8> {
    let crc = crc(&object);
    object[COVERED..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    object
}

#[test]
fn content_comes_back_whatever_it_is() {
    let mut half = noise(1, CHUNK_BYTES);
    half[..CHUNK_BYTES / 2].fill(7);
    let text: Vec<u8> = b"hearth ".iter().copied().cycle().take(CHUNK_BYTES).collect();
    for content in [text, noise(2, CHUNK_BYTES), half, vec![1], noise(3, 5000)] {
        let (domain, name, object) = encoded(&content);
        assert!(object.len() <= HEADER_BYTES + content.len() + TAG_BYTES);
        assert_eq!(decode(&domain, &name, object).unwrap(), content);
    }
}

#[test]
fn what_does_not_compress_is_stored_as_it_is_and_text_is_not() {
    let (_, _, object) = encoded(&noise(4, CHUNK_BYTES));
    assert_eq!(object.len(), MAX_OBJECT_BYTES);
    let text: Vec<u8> = b"hearth ".iter().copied().cycle().take(CHUNK_BYTES).collect();
    let (_, _, object) = encoded(&text);
    assert!(object.len() < CHUNK_BYTES / 100, "{}", object.len());
}

/// What is written today must be read by every later version. Only content that is stored as it is can be pinned byte by byte:
/// later versions of zstd may pack better.
#[test]
fn the_format_does_not_change() {
    let (_, name, object) = encoded(&noise(5, 100));
    assert_eq!(name.to_string(), "d81550486fc206cbd780ba8056f12c6678a558d7a8238a28e3f4c998a44d2a1d");
    assert_eq!(
        blake3::hash(&object).to_hex().as_str(),
        "611d3f75fc38316233de0c477f43c3ce0988a2140713151d483aed5d305a123a"
    );
    assert_eq!(&object[..16], b"HCNK\x01\0\0\0\x64\0\0\0\x74\0\0\0");
}

#[test]
fn equal_content_is_an_equal_object_in_one_domain_only() {
    let content = noise(6, 3000);
    let (domain_a, name_a, object_a) = encoded(&content);
    assert_eq!(encode(&domain_a, &name_a, &content).unwrap(), object_a);
    let other = domain("other");
    assert_ne!(other.name_of(&content), name_a);
    assert_eq!(decode(&other, &name_a, object_a), Err(Damage::Decryption));
}

#[test]
fn invariant_6_every_flipped_bit_of_a_chunk_is_noticed() {
    for content in [noise(7, 200), vec![3; 4096]] {
        let (domain, name, object) = encoded(&content);
        for bit in 0..object.len() * 8 {
            let mut changed = object.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            decode(&domain, &name, changed.clone()).expect_err(&format!("bit {bit}"));
            // Also with a right checksum, where the bit is not one of the checksum's own.
            if !(COVERED..HEADER_BYTES).contains(&(bit / 8)) {
                decode(&domain, &name, with_crc(changed)).expect_err(&format!("bit {bit} with a right checksum"));
            }
        }
    }
}

#[test]
fn every_cut_and_every_addition_is_noticed() {
    let (domain, name, object) = encoded(&noise(8, 300));
    for length in 0..object.len() {
        let error = decode(&domain, &name, object[..length].to_vec()).unwrap_err();
        assert!(matches!(error, Damage::Size { .. }), "{length}: {error}");
    }
    let mut longer = object;
    longer.push(0);
    assert!(matches!(decode(&domain, &name, longer), Err(Damage::Size { .. })));
}

#[test]
fn another_chunk_under_the_name_is_noticed() {
    let (domain, name, _) = encoded(&noise(9, 300));
    let (_, _, other) = encoded(&noise(10, 300));
    assert_eq!(decode(&domain, &name, other), Err(Damage::Decryption));
    // Sealed with the right key, and still not the content of that name.
    let forged = encode(&domain, &name, &noise(11, 300)).unwrap();
    assert!(matches!(decode(&domain, &name, forged), Err(Damage::Content(_))));
}

#[test]
fn damage_says_what_it_is() {
    let (domain, name, object) = encoded(&noise(12, 300));
    let changed = |at: usize, value: u8| {
        let mut object = object.clone();
        object[at] = value;
        decode(&domain, &name, with_crc(object)).unwrap_err()
    };
    assert_eq!(changed(0, b'X'), Damage::Signature("a chunk"));
    assert_eq!(changed(4, 2), Damage::Version(2));
    assert_eq!(changed(5, 9), Damage::Codec(9));
    assert_eq!(changed(6, 1), Damage::Flags(1));
    assert!(matches!(changed(8, 0), Damage::Field(_)));
    assert!(matches!(changed(11, 1), Damage::Field(_)));
    assert_eq!(changed(16, object[16] ^ 1), Damage::Decryption);
    let mut object = object;
    object[40] ^= 1;
    assert!(matches!(decode(&domain, &name, object), Err(Damage::Checksum { .. })));
}

#[test]
fn only_one_chunk_at_most_is_taken() {
    let domain = domain("codec");
    let name = domain.name_of(b"");
    assert_eq!(encode(&domain, &name, b""), None);
    assert_eq!(encode(&domain, &name, &vec![1; CHUNK_BYTES + 1]), None);
}

proptest! {
    #[test]
    fn nonsense_is_refused(object in proptest::collection::vec(any::<u8>(), 0..400)) {
        let domain = domain("codec");
        let name = domain.name_of(b"x");
        prop_assert!(decode(&domain, &name, object).is_err());
    }

    #[test]
    fn a_well_formed_header_over_nonsense_is_refused(
        codec in 0u8..3, content in any::<u32>(), payload in proptest::collection::vec(any::<u8>(), 0..200)
    ) {
        let mut object = Vec::from(*MAGIC);
        object.extend([VERSION, codec, 0, 0]);
        object.extend(content.to_le_bytes());
        object.extend((payload.len() as u32).to_le_bytes());
        object.extend([0; 16]);
        object.extend(payload);
        let domain = domain("codec");
        prop_assert!(decode(&domain, &domain.name_of(b"x"), with_crc(object)).is_err());
    }
}
