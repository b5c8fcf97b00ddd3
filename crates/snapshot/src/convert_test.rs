//! Images are made by qemu-img and qemu-io (Debian: qemu-utils), the formats' reference implementation.

use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::format::detect;

const MIB: u64 = 1 << 20;

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| {
        panic!("these tests need {program} (Debian package qemu-utils): {error}");
    });
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A 9 MiB disk (with an odd size of `extra`) with text, noise and zeros at places that cross clusters and tables.
fn sample(folder: &Path, extra: u64) -> (PathBuf, Vec<u8>) {
    let path = folder.join("sample.raw");
    let mut content = vec![0u8; (9 * MIB + extra) as usize];
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for byte in &mut content[100_000..900_000] {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    for (index, byte) in content[4 * MIB as usize + 77..5 * MIB as usize].iter_mut().enumerate() {
        *byte = b"hearth "[index % 7];
    }
    let end = content.len();
    content[end - 700..].fill(0xa5);
    fs::write(&path, &content).unwrap();
    (path, content)
}

fn made(folder: &Path, raw: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = folder.join(name);
    let mut args = vec!["convert", "-f", "raw"];
    args.extend_from_slice(options);
    args.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
    run("qemu-img", &args);
    path
}

fn padded(mut content: Vec<u8>) -> Vec<u8> {
    content.resize(content.len().next_multiple_of(512), 0);
    content
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn assert_converts(input: &Path, format: Format, content: &[u8]) {
    let output = input.with_extension("converted");
    let last = Cell::new(0);
    let progress = |done: u64, total: u64| {
        assert!(done >= last.get() && done <= total, "{done} of {total} after {}", last.get());
        last.set(done);
    };
    assert_eq!(detect(input).unwrap(), format);
    let converted = convert(input, None, &output, &progress).unwrap();
    let content = padded(content.to_vec());
    assert_eq!(converted.format, format);
    assert_eq!(converted.virtual_bytes, content.len() as u64);
    assert_eq!(converted.sha256, hex(&content));
    assert!(fs::read(&output).unwrap() == content, "content differs");
    assert!(converted.data_bytes < content.len() as u64 / 2);
    assert!(fs::metadata(&output).unwrap().blocks() * 512 <= converted.data_bytes + 64 * 1024, "output is not sparse");
}

fn files_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_kind_of_qcow2_gives_the_disk_inside() {
    let folder = TempDir::new().unwrap();
    let (raw, content) = sample(folder.path(), 1024);
    let kinds: [&[&str]; 7] = [
        &["-O", "qcow2"],
        &["-O", "qcow2", "-c"],
        &["-O", "qcow2", "-o", "compat=0.10"],
        &["-O", "qcow2", "-c", "-o", "compat=0.10,cluster_size=4096"],
        &["-O", "qcow2", "-o", "cluster_size=512"],
        &["-O", "qcow2", "-o", "cluster_size=2M"],
        &["-O", "qcow2", "-o", "preallocation=metadata,lazy_refcounts=on"],
    ];
    for (index, options) in kinds.into_iter().enumerate() {
        let image = made(folder.path(), &raw, &format!("{index}.qcow2"), options);
        assert_converts(&image, Format::Qcow2, &content);
    }
}

#[test]
fn zero_clusters_and_discarded_ones_read_as_zeros() {
    let folder = TempDir::new().unwrap();
    let (raw, mut content) = sample(folder.path(), 0);
    let image = made(folder.path(), &raw, "zero.qcow2", &["-O", "qcow2"]);
    run(
        "qemu-io",
        &["-c", "write -z 128k 256k", "-c", "discard 512k 128k", "-c", "write -z -u 4M 64k", image.to_str().unwrap()],
    );
    content[128 * 1024..384 * 1024].fill(0);
    content[512 * 1024..640 * 1024].fill(0);
    content[4 * MIB as usize..4 * MIB as usize + 64 * 1024].fill(0);
    assert_converts(&image, Format::Qcow2, &content);
}

#[test]
fn internal_snapshots_do_not_disturb() {
    let folder = TempDir::new().unwrap();
    let (raw, mut content) = sample(folder.path(), 0);
    let image = made(folder.path(), &raw, "snap.qcow2", &["-O", "qcow2"]);
    run("qemu-img", &["snapshot", "-c", "before", image.to_str().unwrap()]);
    run("qemu-io", &["-c", "write -P 0x5a 200k 300k", image.to_str().unwrap()]);
    content[200 * 1024..500 * 1024].fill(0x5a);
    assert_converts(&image, Format::Qcow2, &content);
}

#[test]
fn both_single_file_kinds_of_vmdk_give_the_disk_inside() {
    let folder = TempDir::new().unwrap();
    let (raw, content) = sample(folder.path(), 1024);
    for kind in ["monolithicSparse", "streamOptimized"] {
        let image = made(folder.path(), &raw, kind, &["-O", "vmdk", "-o", &format!("subformat={kind}")]);
        assert_converts(&image, Format::Vmdk, &content);
    }
}

#[test]
fn raw_is_padded_to_sectors_and_keeps_its_holes() {
    let folder = TempDir::new().unwrap();
    let (raw, content) = sample(folder.path(), 300);
    assert_converts(&raw, Format::Raw, &content);

    let sparse = folder.path().join("holes.raw");
    let file = fs::File::create(&sparse).unwrap();
    file.set_len(3 << 30).unwrap();
    file.write_all_at(b"end", (3 << 30) - 3).unwrap();
    let converted = convert(&sparse, None, &folder.path().join("holes.out"), &|_, _| {}).unwrap();
    assert_eq!((converted.virtual_bytes, converted.data_bytes), (3 << 30, 4096));
}

#[test]
fn images_that_need_other_files_are_refused() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (raw, _) = sample(folder.path(), 0);
    let raw = raw.to_str().unwrap();
    run("qemu-img", &["create", "-f", "qcow2", "-b", raw, "-F", "raw", &at("backed")]);
    run(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", &format!("data_file={},data_file_raw=on", at("data")), &at("split"), "1M"],
    );
    run("qemu-img", &["convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, &at("flat")]);
    run("qemu-img", &["convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", raw, &at("two.vmdk")]);
    let parent = at("parent");
    run("qemu-img", &["convert", "-O", "vmdk", raw, &parent]);
    run("qemu-img", &["create", "-f", "vmdk", "-b", &parent, "-F", "vmdk", &at("child")]);
    let extent = folder.path().join("two-s001.vmdk").to_str().unwrap().to_owned();
    for image in [at("backed"), at("split"), at("flat"), at("two.vmdk"), extent, at("child")] {
        let error = convert(Path::new(&image), None, &folder.path().join("out"), &|_, _| {}).unwrap_err();
        assert!(matches!(error, ImageError::ExternalFile { .. }), "{image}: {error}");
    }
}

#[test]
fn what_is_not_supported_says_how_to_go_on() {
    let folder = TempDir::new().unwrap();
    let (raw, _) = sample(folder.path(), 0);
    let cases: [(&[&str], &str); 3] = [
        (&["-O", "qcow2", "-c", "-o", "compression_type=zstd"], "compression_type=zlib"),
        (&["-O", "qcow2", "-o", "extended_l2=on"], "extended L2"),
        (&["-O", "vdi"], "a VDI image"),
    ];
    for (index, (options, text)) in cases.into_iter().enumerate() {
        let image = made(folder.path(), &raw, &index.to_string(), options);
        let error = convert(&image, None, &folder.path().join("out"), &|_, _| {}).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.is_invalid_input());
    }
    for (content, text) in [(&b"\x1f\x8b\x08\0stuff"[..], "gzip"), (b"\xfd7zXZ\0..", "xz"), (b"", "empty")] {
        let file = folder.path().join("foreign");
        fs::write(&file, content).unwrap();
        let error = convert(&file, None, &folder.path().join("out"), &|_, _| {}).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
    let error = convert(&raw, Some(Format::Qcow2), &folder.path().join("out"), &|_, _| {}).unwrap_err();
    assert!(matches!(error, ImageError::WrongFormat(Format::Qcow2)), "{error}");
}

#[test]
fn truncated_images_are_refused_at_every_length_and_leave_nothing() {
    let folder = TempDir::new().unwrap();
    let (raw, content) = sample(folder.path(), 0);
    let kinds: [&[&str]; 4] = [
        &["-O", "qcow2"],
        &["-O", "qcow2", "-c"],
        &["-O", "vmdk", "-o", "subformat=monolithicSparse"],
        &["-O", "vmdk", "-o", "subformat=streamOptimized"],
    ];
    for options in kinds {
        let image = made(folder.path(), &raw, "image", options);
        let whole = fs::read(&image).unwrap();
        let steps = (1..40).map(|step| whole.len() * step / 40);
        for length in steps.chain([5, 70, 100, 511, 600, 66_000, whole.len() - 2048]) {
            let cut = folder.path().join("cut");
            fs::write(&cut, &whole[..length]).unwrap();
            let out = folder.path().join("out");
            match convert(&cut, None, &out, &|_, _| {}) {
                // Only what says that the stream has ended is missing.
                Ok(converted) => {
                    assert!(length > whole.len() - 65_536, "{options:?} at {length} of {}", whole.len());
                    assert_eq!(converted.sha256, hex(&content));
                    fs::remove_file(&out).unwrap();
                }
                Err(error) => assert!(error.is_invalid_input(), "{error}"),
            }
            assert!(!out.exists());
        }
        fs::remove_file(folder.path().join("cut")).unwrap();
        assert_eq!(files_in(folder.path()), ["image", "sample.raw"]);
    }
}

fn put(image: &mut [u8], offset: usize, value: &[u8]) {
    image[offset..offset + value.len()].copy_from_slice(value);
}

fn be(image: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(image[offset..offset + 8].try_into().unwrap())
}

fn refused(content: &[u8]) -> ImageError {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("in");
    fs::write(&file, content).unwrap();
    let error = convert(&file, None, &folder.path().join("out"), &|_, _| {}).unwrap_err();
    assert_eq!(files_in(folder.path()), ["in"]);
    error
}

#[test]
fn hostile_qcow2_tables_are_refused() {
    let folder = TempDir::new().unwrap();
    let (raw, _) = sample(folder.path(), 0);
    let good = fs::read(made(folder.path(), &raw, "good", &["-O", "qcow2"])).unwrap();
    let l1 = be(&good, 40) as usize;
    let l2 = (be(&good, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let data = be(&good, l2 + 8);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = good.clone();
        change(&mut image);
        refused(&image)
    };
    // A first-level table that would take 32 GiB of memory.
    let error = changed(&|image| put(image, 36, &u32::MAX.to_be_bytes()));
    assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
    // One that does not cover the disk.
    let error = changed(&|image| put(image, 24, &(1u64 << 40).to_be_bytes()));
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    // The largest disk there is.
    let error = changed(&|image| put(image, 24, &u64::MAX.to_be_bytes()));
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    // Every guest cluster is the same host cluster: the disk would be larger than the file by any factor.
    let error = changed(&|image| {
        for slot in 0..144 {
            put(image, l2 + slot * 8, &data.to_be_bytes());
        }
        image.truncate((data & !(1 << 63)) as usize + 65536);
    });
    assert!(matches!(error, ImageError::Corrupt { .. } | ImageError::Truncated { .. }), "{error}");
    // An L2 table far outside.
    let error = changed(&|image| put(image, l1, &0x0000_7fff_ffff_0000u64.to_be_bytes()));
    assert!(matches!(error, ImageError::Truncated { .. }), "{error}");
    // A cluster that is not aligned.
    let error = changed(&|image| put(image, l2, &0x0000_0000_0001_0200u64.to_be_bytes()));
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    // Encryption: the clusters would be taken as they are.
    let error = changed(&|image| put(image, 32, &2u32.to_be_bytes()));
    assert!(error.to_string().contains("encrypted"), "{error}");
    // Feature name table of one byte.
    let error = changed(&|image| put(image, 112 + 4, &1u32.to_be_bytes()));
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
}

#[test]
fn an_l2_table_that_maps_itself_is_just_odd_data() {
    let folder = TempDir::new().unwrap();
    let (raw, mut content) = sample(folder.path(), 0);
    let mut image = fs::read(made(folder.path(), &raw, "self", &["-O", "qcow2"])).unwrap();
    let l1 = be(&image, 40) as usize;
    let l2 = (be(&image, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    put(&mut image, l2, &(l2 as u64).to_be_bytes());
    content[..65536].copy_from_slice(&image[l2..l2 + 65536]);
    let file = folder.path().join("self.qcow2");
    fs::write(&file, &image).unwrap();
    assert_converts(&file, Format::Qcow2, &content);
}

#[test]
fn larger_than_allowed_is_refused_before_anything_is_written() {
    let folder = TempDir::new().unwrap();
    let huge = folder.path().join("huge");
    run("qemu-img", &["create", "-f", "qcow2", huge.to_str().unwrap(), "3T"]);
    let out = folder.path().join("out");
    let error = convert(&huge, None, &out, &|_, _| {}).unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { virtual_bytes, .. } if virtual_bytes == 3 << 40), "{error}");
    let limits = Limits { max_virtual_bytes: 1024 };
    let mut small = fs::File::create(folder.path().join("small")).unwrap();
    small.write_all(&[1; 1025]).unwrap();
    let error = convert_with_limits(&folder.path().join("small"), None, &out, limits, &|_, _| {}).unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { virtual_bytes: 1025, limit: 1024 }), "{error}");
    assert_eq!(files_in(folder.path()), ["huge", "small"]);
}

/// Small images in memory for mutation: qcow2 plain, compressed, version 2; vmdk sparse, stream-optimized.
fn seeds() -> &'static Vec<Vec<u8>> {
    static SEEDS: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    SEEDS.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        let raw = folder.path().join("raw");
        let mut content = vec![0; 300_032];
        content[5000..90_000].fill(7);
        fs::write(&raw, content).unwrap();
        let kinds: [&[&str]; 5] = [
            &["-O", "qcow2", "-o", "cluster_size=4096"],
            &["-O", "qcow2", "-c", "-o", "cluster_size=4096"],
            &["-O", "qcow2", "-o", "compat=0.10,cluster_size=4096"],
            &["-O", "vmdk", "-o", "subformat=monolithicSparse"],
            &["-O", "vmdk", "-o", "subformat=streamOptimized"],
        ];
        kinds.iter().map(|options| fs::read(made(folder.path(), &raw, "seed", options)).unwrap()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// Whatever stands in the file, the answer is a disk or a typed error that blames the file.
    #[test]
    fn mutated_images_never_panic(
        seed in 0usize..5,
        changes in prop::collection::vec((0usize..1 << 20, any::<bool>(), prop::collection::vec(any::<u8>(), 1..9)), 1..6),
        length in 1usize..1 << 21,
    ) {
        let mut image = seeds()[seed].clone();
        image.truncate(length);
        let size = image.len();
        for (offset, in_header, bytes) in &changes {
            // Half of the changes hit the header and the tables behind it.
            let offset = if *in_header { offset % size.min(600) } else { offset % size };
            let end = (offset + bytes.len()).min(size);
            image[offset..end].copy_from_slice(&bytes[..end - offset]);
        }
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("in");
        fs::write(&file, &image).unwrap();
        let limits = Limits { max_virtual_bytes: 64 << 20 };
        match convert_with_limits(&file, None, &folder.path().join("out"), limits, &|_, _| {}) {
            Ok(converted) => prop_assert!(converted.virtual_bytes <= 64 << 20),
            Err(error) => prop_assert!(error.is_invalid_input(), "{error}"),
        }
    }

    /// The same for files that are nothing but a signature and noise.
    #[test]
    fn noise_behind_a_signature_never_panics(vmdk in any::<bool>(), noise in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut image = if vmdk { b"KDMV\x01\0\0\0".to_vec() } else { b"QFI\xfb\0\0\0\x03".to_vec() };
        image.extend(noise);
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("in");
        fs::write(&file, &image).unwrap();
        let limits = Limits { max_virtual_bytes: 64 << 20 };
        if let Err(error) = convert_with_limits(&file, None, &folder.path().join("out"), limits, &|_, _| {}) {
            prop_assert!(error.is_invalid_input(), "{error}");
        }
    }
}
