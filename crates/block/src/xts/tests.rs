use super::*;

/// IEEE Std 1619-2018, annex B, vectors 10 to 14: AES-256, 512-byte data units, with the first and last block of each
/// ciphertext.
const VECTORS: [(u64, u128, u128); 5] = [
    (0xff, 0x1c3b3a102f770386e4836c99e370cf9b, 0xc4f36ffda9fcea70b9c6e693e148c151),
    (0xffff, 0x77a31251618a15e6b92d1d66dffe7b50, 0xa4f9e27b42af8100cb9d59cef9645803),
    (0xff_ffff, 0xe387aaa58ba483afa7e8eb469778317e, 0x2263a1eef52dd6888c309f5a7d712826),
    (0xffff_ffff, 0xbf53d2dade78e822a4d949a9bc6766b0, 0x4c82f335abb152c4a93411373aaa8220),
    (0xff_ffff_ffff, 0x64497e5a831e4a932c09be3e5393376d, 0xd609d273ad5b0d59631c531f6a0a57b9),
];

fn standard_key() -> Xts {
    let digits = "2718281828459045235360287471352662497757247093699959574966967627\
                  3141592653589793238462643383279502884197169399375105820974944592";
    let byte = |at: usize| u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).unwrap();
    Xts::new(&XtsKey::new(std::array::from_fn(byte)).unwrap())
}

fn counting() -> Vec<u8> {
    (0..512u32).map(|at| at as u8).collect()
}

#[test]
fn the_vectors_of_the_standard() {
    let xts = standard_key();
    for (unit, first, last) in VECTORS {
        let mut bytes = counting();
        xts.encrypt(&mut bytes, unit * 512);
        assert_eq!(bytes[..16], first.to_be_bytes(), "unit {unit:#x}");
        assert_eq!(bytes[496..], last.to_be_bytes(), "unit {unit:#x}");
        xts.decrypt(&mut bytes, unit * 512);
        assert_eq!(bytes, counting());
    }
}

#[test]
fn units_are_numbered_by_offset_and_zeros_are_holes() {
    let xts = standard_key();
    let mut together = [counting(), counting(), vec![0; 512]].concat();
    xts.encrypt(&mut together, 7 * 512);
    let mut second = counting();
    xts.encrypt(&mut second, 8 * 512);
    assert_eq!(together[512..1024], second);
    assert!(together[..512] != together[512..1024] && together[1024..].iter().any(|byte| *byte != 0));
    xts.decrypt(&mut together, 7 * 512);
    assert_eq!(together[512..1024], counting());
    assert!(together[1024..].iter().all(|byte| *byte == 0));
    let mut hole = vec![0; 1024];
    xts.decrypt(&mut hole, 0);
    assert!(hole.iter().all(|byte| *byte == 0));
}

#[test]
fn keys_with_equal_halves_are_refused_and_none_is_printed() {
    assert!(XtsKey::new([3; 64]).is_none());
    let mut bytes = [3; 64];
    bytes[0] = 4;
    assert_eq!(format!("{:?}", XtsKey::new(bytes).unwrap()), "XtsKey(..)");
}
