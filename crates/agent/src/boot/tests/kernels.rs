use std::io::Write;

use super::support::fake_kernel;
use crate::boot::bls::compare_versions;
use crate::boot::kernel::{KernelKind, extract_vmlinux, kind};
use proptest::prelude::*;

/// A small ELF64 with (or without) the PVH note.
pub fn vmlinux(pvh: bool) -> Vec<u8> {
    let mut elf = vec![0u8; 64 + 56];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18..20].copy_from_slice(&62u16.to_le_bytes());
    elf[32..40].copy_from_slice(&64u64.to_le_bytes());
    elf[54..56].copy_from_slice(&56u16.to_le_bytes());
    elf[56..58].copy_from_slice(&1u16.to_le_bytes());
    elf[64..68].copy_from_slice(&4u32.to_le_bytes());
    elf[72..80].copy_from_slice(&120u64.to_le_bytes());
    elf[96..104].copy_from_slice(&40u64.to_le_bytes());
    for (size, content_size, kind, name) in [(4u32, 4u32, 6u32, b"Xen\0"), (4, 4, if pvh { 18 } else { 5 }, b"Xen\0")] {
        for value in [size, content_size, kind] {
            elf.extend_from_slice(&value.to_le_bytes());
        }
        elf.extend_from_slice(name);
        elf.extend_from_slice(&[0; 4]);
    }
    elf.extend((0..300_000u32).map(|i| (i % 251) as u8));
    elf
}

pub fn bz_image(payload: &[u8]) -> Vec<u8> {
    let mut file = fake_kernel("");
    file[0x1f1] = 2;
    file.truncate(3 * 512);
    file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend_from_slice(&[0; 16]);
    file.extend_from_slice(payload);
    file.extend_from_slice(&[0; 64]);
    file
}

pub fn packed(content: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let sized = |mut packed: Vec<u8>| {
        packed.extend_from_slice(&(content.len() as u32).to_le_bytes());
        packed
    };
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(content).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
    xz.write_all(content).unwrap();
    let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
    for block in content.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        lz4.extend_from_slice(&(block.len() as u32).to_le_bytes());
        lz4.extend_from_slice(&block);
    }
    vec![
        ("gzip", gzip.finish().unwrap()),
        ("xz", sized(xz.finish().unwrap())),
        ("lz4", sized(lz4)),
        ("zstd", sized(zstd::encode_all(content, 3).unwrap())),
    ]
}

#[test]
fn every_compression_is_unpacked() {
    let elf = vmlinux(true);
    for (name, payload) in packed(&elf) {
        assert_eq!(extract_vmlinux(&bz_image(&payload)).unwrap(), elf, "{name}");
    }
}

#[test]
fn what_cannot_be_unpacked_says_why() {
    let no_pvh = &packed(&vmlinux(false))[0].1;
    for (file, wanted) in [
        (bz_image(no_pvh), "no PVH entry"),
        (bz_image(&packed(b"not an ELF file")[0].1), "not an ELF file"),
        (bz_image(b"LZO!"), "unknown compression"),
        (bz_image(b""), "empty payload"),
        (bz_image(&packed(&vmlinux(true))[2].1[..500]), "lz4"),
        (fake_kernel("")[..0x210].to_vec(), "payload"),
        (vmlinux(true), "boot protocol"),
    ] {
        let error = extract_vmlinux(&file).unwrap_err();
        assert!(error.contains(wanted), "{error} / {wanted}");
    }
    assert_eq!(kind(&vmlinux(true)), KernelKind::Vmlinux);
    assert_eq!(kind(b"#!/bin/sh"), KernelKind::Other);
}

#[test]
fn a_bomb_is_stopped() {
    use std::io::Read;
    let bomb = zstd::encode_all(std::io::repeat(0).take((256 << 20) + 1), 1).unwrap();
    assert!(extract_vmlinux(&bz_image(&bomb)).unwrap_err().contains("unpacks to more than"));
}

#[test]
fn versions_sort_as_people_read_them() {
    for (low, high) in [
        ("6.1.0-9", "6.1.0-10"),
        ("5.19", "6.1"),
        ("6.1", "6.1.0"),
        ("6.1~rc1", "6.1"),
        ("6.1.0-56-cloud-amd64", "6.1.0-57-cloud-amd64"),
        ("", "1"),
        ("6.01", "6.2"),
    ] {
        assert!(compare_versions(low, high).is_lt() && compare_versions(high, low).is_gt(), "{low} {high}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_unpacking_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000), magic in 0usize..5) {
        let start: &[u8] = [&[0x1f, 0x8b, 8][..], &[0xfd, b'7', b'z', b'X', b'Z', 0], &[0x28, 0xb5, 0x2f, 0xfd], &[2, 0x21, 0x4c, 0x18], &[]][magic];
        let _ = extract_vmlinux(&bz_image(&[start, &bytes].concat()));
        let _ = extract_vmlinux(&bytes);
    }

    #[test]
    fn no_damage_of_a_kernel_makes_unpacking_panic(form in 0usize..4, at in 0usize..4000, value: u8) {
        static PACKED: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
        let forms = PACKED.get_or_init(|| packed(&vmlinux(true)).iter().map(|(_, payload)| bz_image(payload)).collect());
        let mut file = forms[form].clone();
        let at = at % file.len();
        file[at] = value;
        let _ = extract_vmlinux(&file);
    }

    #[test]
    fn version_order_is_total(a in "[0-9.a~-]{0,6}", b in "[0-9.a~-]{0,6}", c in "[0-9.a~-]{0,6}") {
        prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
        if compare_versions(&a, &b).is_le() && compare_versions(&b, &c).is_le() {
            prop_assert!(compare_versions(&a, &c).is_le());
        }
    }
}
