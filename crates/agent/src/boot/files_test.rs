use std::io::Read;

use super::*;
use crate::boot::tests::kernels::{bz_image, packed, vmlinux};
use crate::boot::tests::support::{FS_UUID, Files, ext4, fake_kernel};

fn disk(folder: &Path, kernel: Vec<u8>) -> PathBuf {
    let files =
        Files::from([("/sbin/init", b"i".to_vec()), ("/boot/vmlinuz-1", kernel), ("/boot/initrd-1", b"rd".to_vec())]);
    let path = folder.join("disk");
    std::fs::write(&path, ext4(&files, 8, FS_UUID)).unwrap();
    path
}

fn content(mut file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_kernel_is_unpacked_once_and_served_from_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let elf = vmlinux(true);
    let disk = disk(folder.path(), bz_image(&packed(&elf)[2].1));
    let loader = BootLoader::new(&folder.path().join("kernels")).unwrap();
    let boot = loader.load(&disk, &Override::default()).unwrap();
    assert_eq!(content(boot.kernel), elf);
    assert_eq!(content(boot.initrd.unwrap()), b"rd");
    let cached: Vec<_> = std::fs::read_dir(folder.path().join("kernels")).unwrap().flatten().collect();
    assert_eq!(cached.len(), 1);
    // What stands in the cache is what is served.
    let file = cached[0].path().join("vmlinux");
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, b"marked").unwrap();
    assert_eq!(content(loader.load(&disk, &Override::default()).unwrap().kernel), b"marked");
}

#[test]
fn a_kernel_that_cannot_be_unpacked_is_booted_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = fake_kernel("odd");
    let disk = disk(folder.path(), kernel.clone());
    let loader = BootLoader::new(&folder.path().join("kernels")).unwrap();
    let mut boot = loader.load(&disk, &Override::default()).unwrap();
    assert!(boot.kernel.write_all(b"x").is_err(), "sealed");
    assert_eq!(content(boot.kernel), kernel);
    assert_eq!(std::fs::read_dir(folder.path().join("kernels")).unwrap().count(), 0);
}

#[test]
fn the_cache_keeps_the_kernels_used_last() {
    let folder = tempfile::tempdir().unwrap();
    let loader = BootLoader::new(&folder.path().join("kernels")).unwrap();
    for number in 0..KEPT_KERNELS as u32 + 4 {
        let mut elf = vmlinux(true);
        elf.extend_from_slice(&number.to_le_bytes());
        loader.kernel(&bz_image(&packed(&elf)[2].1)).unwrap();
    }
    assert_eq!(std::fs::read_dir(folder.path().join("kernels")).unwrap().count(), KEPT_KERNELS);
}

#[test]
fn a_disk_that_cannot_be_read_is_the_hosts_fault() {
    let folder = tempfile::tempdir().unwrap();
    let loader = BootLoader::new(&folder.path().join("kernels")).unwrap();
    // Opens, has a size, and every read of it fails.
    let unreadable = folder.path().join("folder");
    std::fs::create_dir(&unreadable).unwrap();
    let error = loader.load(&unreadable, &Override::default()).unwrap_err();
    assert!(
        matches!(&error, BootFilesError::Host { source, .. } if source.raw_os_error() == Some(libc::EISDIR)),
        "{error}"
    );
    // One that ends too early is not.
    let disk = disk(folder.path(), fake_kernel("k"));
    File::options().write(true).open(&disk).unwrap().set_len(100_000).unwrap();
    assert!(matches!(loader.load(&disk, &Override::default()), Err(BootFilesError::Image(_))));
}
