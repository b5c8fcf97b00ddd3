//! Disk images for tests: file systems by mke2fs, partition tables by hand.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;

use crate::boot::partition::TYPE_ROOT_X86_64;
use crate::boot::read_at::ReadAt;
use crate::boot::{BootError, BootSet, Override, discover};

pub const TYPE_LINUX: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";
pub const TYPE_ROOT: &str = TYPE_ROOT_X86_64;
pub const FS_UUID: &str = "6e2a4b1c-9f3d-4a57-8c21-0d5b7e9f1a23";

/// `usual` cases, or as many as PROPTEST_CASES says: for long runs.
pub fn cases(usual: u32) -> proptest::test_runner::Config {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    proptest::test_runner::Config::with_cases(cases)
}

pub type Files<'a> = BTreeMap<&'a str, Vec<u8>>;

/// A file the size of nothing that passes for a bzImage.
pub fn fake_kernel(mark: &str) -> Vec<u8> {
    let mut file = vec![0u8; 4096];
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file.extend_from_slice(mark.as_bytes());
    file
}

/// An ext4 image of `mib` MiB with these files.
pub fn ext4(files: &Files<'_>, mib: u64, uuid: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    std::fs::create_dir_all(&tree).unwrap();
    for (path, content) in files {
        let target = tree.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        match content.strip_prefix(b"-> ") {
            Some(link) => std::os::unix::fs::symlink(std::str::from_utf8(link).unwrap(), target).unwrap(),
            None => std::fs::write(target, content).unwrap(),
        }
    }
    let image = folder.path().join("image");
    let output = Command::new("mke2fs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-t", "ext4", "-U", uuid, "-d"])
        .arg(&tree)
        .arg(&image)
        .arg(format!("{mib}M"))
        .output()
        .expect("mke2fs (package e2fsprogs) is needed to make test images");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(image).unwrap()
}

pub fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

pub fn guid_bytes(text: &str) -> [u8; 16] {
    let raw = hex::decode(text.replace('-', "")).unwrap();
    let mut bytes: [u8; 16] = raw.try_into().unwrap();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

pub fn part_uuid(number: u8) -> String {
    format!("00000000-0000-4000-8000-0000000000{number:02x}")
}

/// A disk with these partitions one behind the other: type GUID and content.
pub fn gpt(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut entries = vec![0u8; 128 * 128];
    let mut disk = vec![0u8; 1 << 20];
    for (index, (kind, content)) in parts.iter().enumerate() {
        let first = disk.len() as u64 / 512;
        disk.extend_from_slice(content);
        disk.resize(disk.len().next_multiple_of(1 << 20), 0);
        let entry = &mut entries[128 * index..][..128];
        entry[..16].copy_from_slice(&guid_bytes(kind));
        entry[16..32].copy_from_slice(&guid_bytes(&part_uuid(index as u8 + 1)));
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&(disk.len() as u64 / 512 - 1).to_le_bytes());
    }
    disk.resize(disk.len() + (1 << 20), 0);
    let last = disk.len() as u64 / 512 - 1;
    let header = |own: u64, other: u64, table: u64| {
        let mut header = [0u8; 512];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x10000u32.to_le_bytes());
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        for (at, value) in [(24, own), (32, other), (40, 34), (48, last - 33), (72, table)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let crc = crc32(&header[..92]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        header
    };
    disk[446 + 4] = 0xee;
    disk[446 + 8] = 1;
    disk[446 + 12..446 + 16].copy_from_slice(&(last as u32).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..1024].copy_from_slice(&header(1, last, 2));
    disk[1024..1024 + entries.len()].copy_from_slice(&entries);
    let backup = last as usize * 512;
    disk[backup - entries.len()..backup].copy_from_slice(&entries);
    disk[backup..].copy_from_slice(&header(last, 1, last - 32));
    disk
}

pub fn find(disk: Vec<u8>) -> Result<BootSet, BootError> {
    let disk: Arc<dyn ReadAt> = Arc::new(disk);
    discover(&disk, &Override::default())
}

/// Files of a root file system without kernel.
pub fn root_files<'a>() -> Files<'a> {
    Files::from([("/sbin/init", b"init".to_vec()), ("/etc/os-release", b"ID=test\n".to_vec())])
}

pub fn with<'a>(mut files: Files<'a>, more: &[(&'a str, &[u8])]) -> Files<'a> {
    files.extend(more.iter().map(|(path, content)| (*path, content.to_vec())));
    files
}
