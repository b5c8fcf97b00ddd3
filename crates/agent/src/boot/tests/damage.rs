//! Random bytes and random damage to good disks: an answer or an error, never a panic, a hang or a heap of memory.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::support::*;
use crate::boot::{Override, ReadAt, discover};
use proptest::prelude::*;

/// A good disk with some bytes replaced, counting what is read.
pub struct Damaged {
    base: &'static [u8],
    patches: Vec<(u64, Vec<u8>)>,
    pub read: AtomicU64,
}

impl Damaged {
    pub fn new(base: &'static [u8], patches: Vec<(u64, Vec<u8>)>) -> Self {
        Self { base, patches, read: AtomicU64::new(0) }
    }
}

impl ReadAt for Damaged {
    fn size(&self) -> u64 {
        self.base.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = self.base.get(start..start + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        for (at, patch) in &self.patches {
            for (index, value) in patch.iter().enumerate() {
                if let Some(slot) = (at + index as u64).checked_sub(offset).and_then(|i| buffer.get_mut(i as usize)) {
                    *slot = *value;
                }
            }
        }
        Ok(())
    }
}

fn good() -> &'static [u8] {
    static DISK: OnceLock<Vec<u8>> = OnceLock::new();
    DISK.get_or_init(|| {
        let kernel = fake_kernel("k");
        let files = with(
            root_files(),
            &[
                ("/boot/vmlinuz-6.1", &kernel),
                ("/boot/initrd.img-6.1", b"initrd"),
                ("/boot/vmlinuz", b"-> vmlinuz-6.1"),
                ("/boot/loader/entries/a.conf", b"linux /boot/nothing\n"),
                (
                    "/boot/grub/grub.cfg",
                    b"menuentry a {\nlinux /boot/vmlinuz-6.1 root=/dev/vda1\ninitrd /boot/initrd.img-6.1\n}\n",
                ),
            ],
        );
        gpt(&[(TYPE_LINUX, &ext4(&files, 8, FS_UUID))])
    })
}

/// Where it hurts: the tables, the superblock and group descriptors, inode tables and directories, now and then anywhere.
fn patches() -> impl Strategy<Value = Vec<(u64, Vec<u8>)>> {
    let filesystem = 1u64 << 20;
    let place = prop_oneof![
        0u64..20_000,
        filesystem + 1024..filesystem + 2048,
        filesystem + 4096..filesystem + 8192,
        filesystem..filesystem + 400_000,
        0..good().len() as u64,
    ];
    prop::collection::vec((place, prop::collection::vec(any::<u8>(), 1..16)), 1..12)
}

proptest! {
    #![proptest_config(cases(1500))]
    #[test]
    fn damaged_disks_harm_nobody(patches in patches()) {
        let disk = Arc::new(Damaged::new(good(), patches));
        let _ = discover(&(disk.clone() as Arc<dyn ReadAt>), &Override::default());
        // 10 MiB of disk: whatever it claims about itself must not make us read it hundreds of times.
        prop_assert!(disk.read.load(Ordering::Relaxed) < 3 << 30);
    }
}

proptest! {
    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..8192)) {
        let mut disk = bytes;
        prop_assert!(find(disk.clone()).is_err());
        if disk.len() > 1100 {
            // Noise behind every signature that is looked for.
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
            disk[512..520].copy_from_slice(b"EFI PART");
            prop_assert!(find(disk.clone()).is_err());
            disk[512] = 0;
            disk[1080..1082].copy_from_slice(&[0x53, 0xef]);
            prop_assert!(find(disk).is_err());
        }
    }
}
