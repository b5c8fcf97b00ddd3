//! The checksums of ext4 and JBD2.

use crc::{Algorithm, CRC_32_ISCSI, CRC_32_MPEG_2, Crc, Digest, Table};

/// CRC32C as the kernel's `crc32c()` computes it: started with all ones, its result not inverted.
const KERNEL_CRC32C: Algorithm<u32> = Algorithm { xorout: 0, ..CRC_32_ISCSI };

static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&KERNEL_CRC32C);
/// The kernel's `crc32_be()`, started with all ones.
static CRC32_BE: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_MPEG_2);

/// A checksum that is being computed.
pub type Sum = Digest<'static, u32, Table<16>>;

/// A new CRC32C over nothing yet.
pub fn crc32c() -> Sum {
    CRC32C.digest()
}

/// A new big-endian CRC32 over nothing yet.
pub fn crc32_be() -> Sum {
    CRC32_BE.digest()
}

/// `sum` over `block` with the four bytes at `field` taken as zero.
pub fn without_field(mut sum: Sum, block: &[u8], field: usize) -> u32 {
    let (before, rest) = block.split_at(field.min(block.len()));
    sum.update(before);
    sum.update(&[0; 4]);
    sum.update(rest.get(4..).unwrap_or_default());
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let mut sum = crc32c();
        sum.update(b"123456789");
        assert_eq!(sum.finalize(), !0xe306_9283);
        let mut sum = crc32_be();
        sum.update(b"123456789");
        assert_eq!(sum.finalize(), 0x0376_e6e7);
        let mut sum = crc32c();
        sum.update(b"ab\0\0\0\0g");
        assert_eq!(without_field(crc32c(), b"abcdefg", 2), sum.finalize());
    }
}
