use super::support::*;
use crate::boot::partition::TYPE_XBOOTLDR;
use crate::boot::{BootError, Override, discover};
use std::sync::Arc;

#[test]
fn without_configuration_the_newest_kernel_boots_with_its_initrd() {
    let (old, new) = (fake_kernel("old"), fake_kernel("new"));
    let files = with(
        root_files(),
        &[
            ("/boot/vmlinuz-6.1.0-9-cloud-amd64", &old),
            ("/boot/vmlinuz-6.1.0-56-cloud-amd64", &new),
            ("/boot/initrd.img-6.1.0-9-cloud-amd64", b"old initrd"),
            ("/boot/initrd.img-6.1.0-56-cloud-amd64", b"new initrd"),
        ],
    );
    let set = find(gpt(&[(TYPE_ROOT, &ext4(&files, 8, FS_UUID))])).unwrap();
    assert_eq!(set.kernel, new);
    assert_eq!(set.initrd.as_deref(), Some(b"new initrd".as_slice()));
    assert_eq!(set.cmdline, format!("root=PARTUUID={} ro console=ttyS0", part_uuid(1)));
    assert_eq!(set.kernel_place, "/boot/vmlinuz-6.1.0-56-cloud-amd64 of partition 1");
}

#[test]
fn a_file_system_without_partitions_boots_by_uuid_or_as_vda() {
    let kernel = fake_kernel("k");
    let files = with(root_files(), &[("/boot/vmlinuz", &kernel)]);
    assert_eq!(find(ext4(&files, 8, FS_UUID)).unwrap().cmdline, "root=/dev/vda ro console=ttyS0");
    let files = with(files, &[("/boot/initrd.img", b"i")]);
    assert_eq!(find(ext4(&files, 8, FS_UUID)).unwrap().cmdline, format!("root=UUID={FS_UUID} ro console=ttyS0"));
}

#[test]
fn symbolic_links_are_followed_and_kernel_cmdline_is_used() {
    let kernel = fake_kernel("k");
    let files = with(
        root_files(),
        &[
            ("/boot/vmlinuz", b"-> vmlinuz-6.1"),
            ("/boot/vmlinuz-6.1", &kernel),
            ("/etc/kernel/cmdline", b"quiet console=hvc0\n"),
        ],
    );
    let set = find(gpt(&[(TYPE_LINUX, &ext4(&files, 8, FS_UUID))])).unwrap();
    assert_eq!(set.kernel, kernel);
    assert_eq!(set.cmdline, format!("root=PARTUUID={} ro quiet console=hvc0", part_uuid(1)));
}

#[test]
fn kernels_on_a_boot_partition_boot_the_root_partition() {
    let kernel = fake_kernel("k");
    let boot = Files::from([("/vmlinuz-6.1", kernel.clone()), ("/initramfs-6.1.img", b"i".to_vec())]);
    let boot = ext4(&boot, 8, "11111111-1111-4111-8111-111111111111");
    let root = ext4(&root_files(), 8, FS_UUID);
    for kind in [TYPE_XBOOTLDR, TYPE_LINUX] {
        let set = find(gpt(&[(kind, &boot), (TYPE_LINUX, &root)])).unwrap();
        assert_eq!(set.kernel, kernel);
        assert_eq!(set.initrd.as_deref(), Some(b"i".as_slice()));
        assert_eq!(set.cmdline, format!("root=PARTUUID={} ro console=ttyS0", part_uuid(2)));
    }
}

#[test]
fn boot_loader_specification_entries_win_and_join_their_initrds() {
    let (kernel, rescue) = (fake_kernel("k"), fake_kernel("rescue"));
    let entry = b"title Linux\nversion 6.9\nlinux /boot/vmlinuz-6.9\ninitrd /boot/ucode.img\ninitrd /boot/i.img\n\
        options root=UUID=x $kernelopts\n";
    let files = with(
        root_files(),
        &[
            ("/boot/vmlinuz-6.9", &kernel),
            ("/boot/vmlinuz-0-rescue", &rescue),
            ("/boot/ucode.img", b"micro"),
            ("/boot/i.img", b"code"),
            ("/boot/loader/entries/a-6.9.conf", entry),
            ("/boot/loader/entries/a-7.0.conf", b"version 7.0\nlinux /boot/missing\n"),
            ("/boot/loader/entries/a-0-rescue.conf", b"version 9-rescue\nlinux /boot/vmlinuz-0-rescue\n"),
            ("/boot/grub2/grub.cfg", b"load_env\nset default=saved\nblscfg\n"),
            (
                "/boot/grub2/grubenv",
                b"# GRUB Environment Block\nkernelopts=quiet net.ifnames=0\nsaved_entry=none\n####",
            ),
        ],
    );
    let set = find(gpt(&[(TYPE_LINUX, &ext4(&files, 8, FS_UUID))])).unwrap();
    assert_eq!(set.kernel, kernel);
    assert_eq!(set.initrd.as_deref(), Some(b"micro\0\0\0code".as_slice()));
    assert_eq!(set.cmdline, "root=UUID=x quiet net.ifnames=0 console=ttyS0");
}

#[test]
fn mbr_partitions_primary_and_logical() {
    let kernel = fake_kernel("k");
    let files = with(root_files(), &[("/boot/vmlinuz-1", &kernel)]);
    let image = ext4(&files, 8, FS_UUID);
    let table = |sector: &mut [u8], slot: usize, kind: u8, first: u32, sectors: u32| {
        let entry = &mut sector[446 + 16 * slot..][..16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
        sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    };
    let sectors = (image.len() / 512) as u32;
    let mut primary = vec![0u8; 1 << 20];
    primary[440..444].copy_from_slice(&0xdead_beefu32.to_le_bytes());
    let mut logical = primary.clone();
    table(&mut primary, 0, 0x83, 2048, sectors);
    primary.extend_from_slice(&image);
    assert_eq!(find(primary).unwrap().cmdline, "root=PARTUUID=deadbeef-01 ro console=ttyS0");
    table(&mut logical, 1, 0x05, 1024, sectors + 2048);
    table(&mut logical[1024 * 512..], 0, 0x83, 1024, sectors);
    // The chain points back at itself.
    table(&mut logical[1024 * 512..], 1, 0x05, 0, 1);
    logical.extend_from_slice(&image);
    assert_eq!(find(logical).unwrap().cmdline, "root=PARTUUID=deadbeef-05 ro console=ttyS0");
}

#[test]
fn overrides_replace_and_extend_the_command_line() {
    let kernel = fake_kernel("k");
    let files = with(root_files(), &[("/boot/vmlinuz-1", &kernel)]);
    let disk = Arc::new(gpt(&[(TYPE_LINUX, &ext4(&files, 8, FS_UUID))])) as Arc<dyn crate::boot::ReadAt>;
    let overrides = |cmdline: &str, extra: &str| Override { cmdline: cmdline.into(), extra_cmdline: extra.into() };
    let line = |o: &Override| discover(&disk, o).map(|set| set.cmdline);
    assert_eq!(line(&overrides("root=/dev/vda1", "single")).unwrap(), "root=/dev/vda1 single console=ttyS0");
    assert!(line(&overrides("", "quiet")).unwrap().contains(" ro quiet console=ttyS0"));
    let error = line(&overrides(&"x".repeat(3000), "")).unwrap_err();
    assert!(matches!(error, BootError::CommandLine(3014)), "{error}");
}

#[test]
fn errors_say_where_was_looked() {
    let message = |disk: Vec<u8>| find(disk).unwrap_err().to_string();
    assert_eq!(message(Vec::new()), "the root disk has neither a GPT or MBR partition table nor an ext4 file system");
    assert_eq!(message(vec![0; 1 << 20]), message(Vec::new()));
    let mut xfs = vec![0u8; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    assert_eq!(
        message(gpt(&[(TYPE_LINUX, &xfs), (TYPE_LINUX, &[0; 4096])])),
        "no readable ext4 file system on the root disk: partition 1: xfs, partition 2: no known file system"
    );
    let none = ext4(&root_files(), 8, FS_UUID);
    assert_eq!(message(gpt(&[(TYPE_LINUX, &none)])), "no kernel in /boot of partition 1");
    let cfg = "menuentry 'a' {\n linux /boot/gone\n}\n";
    let files = with(root_files(), &[("/boot/grub/grub.cfg", cfg.as_bytes())]);
    assert_eq!(
        message(gpt(&[(TYPE_LINUX, &ext4(&files, 8, FS_UUID))])),
        "no kernel in /boot of partition 1 (grub.cfg names /boot/gone on hd0,gpt1, which is missing)"
    );
    let files = with(root_files(), &[("/boot/vmlinuz-1", b"text")]);
    assert!(matches!(find(ext4(&files, 8, FS_UUID)), Err(BootError::NotAKernel { .. })));
}

#[test]
fn the_backup_table_serves_when_the_primary_is_damaged() {
    let kernel = fake_kernel("k");
    let files = with(root_files(), &[("/boot/vmlinuz-1", &kernel)]);
    let good = gpt(&[(TYPE_LINUX, &ext4(&files, 8, FS_UUID))]);
    for (at, length) in [(512, 8), (512 + 56, 4), (1024, 16)] {
        let mut disk = good.clone();
        disk[at..at + length].fill(0x5a);
        assert_eq!(find(disk).unwrap().kernel, kernel, "damaged at {at}");
    }
    let mut disk = good.clone();
    disk[512 + 56] ^= 1;
    let end = disk.len() - 512;
    disk[end..].fill(0);
    let error = find(disk).unwrap_err().to_string();
    assert!(error.contains("primary GPT: wrong header checksum; backup GPT: no signature"), "{error}");
}

#[test]
fn a_truncated_image_is_refused_or_still_whole_enough() {
    let kernel = fake_kernel("k");
    let files = with(root_files(), &[("/boot/vmlinuz-1", &kernel)]);
    let good = gpt(&[(TYPE_LINUX, &ext4(&files, 8, FS_UUID))]);
    for length in [513, 1024, 20_000, 1 << 20, (1 << 20) + 2000, (1 << 20) + 50_000] {
        let error = find(good[..length].to_vec()).unwrap_err();
        assert!(!error.to_string().is_empty());
    }
}
