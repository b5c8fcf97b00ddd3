//! Journals of every form, against e2fsck's replay of the same ones.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;

use super::damage::Damaged;
use super::journal_support::*;
use super::support::*;
use crate::boot::read_at::{ReadAt, Window};
use crate::boot::{BootError, JournalError, Override, discover, journal};

const KINDS: &[Kind] = &[
    Kind { mke2fs: "-t ext4 -b 4096 -O 64bit,metadata_csum,extent", open: "-c -v 3" },
    Kind { mke2fs: "-t ext4 -b 4096 -O 64bit,metadata_csum,extent", open: "-c -v 2" },
    Kind { mke2fs: "-t ext4 -b 4096 -O 64bit,^metadata_csum,extent", open: CHECKSUM_PER_TRANSACTION },
    Kind { mke2fs: "-t ext4 -b 4096 -O 64bit,^metadata_csum,extent", open: "" },
    Kind { mke2fs: "-t ext4 -b 4096 -O 64bit,metadata_csum,extent", open: "" },
    Kind { mke2fs: "-t ext4 -b 1024 -O 64bit,metadata_csum,extent", open: "-c -v 3" },
    Kind { mke2fs: "-t ext4 -b 1024 -O 64bit,metadata_csum,extent", open: "-c -v 2" },
    Kind { mke2fs: "-t ext4 -b 1024 -O ^64bit,metadata_csum,extent", open: "-c -v 3" },
    Kind { mke2fs: "-t ext4 -b 1024 -O ^64bit,metadata_csum,extent", open: "-c -v 2" },
    Kind { mke2fs: "-t ext4 -b 1024 -O ^64bit,^metadata_csum,extent", open: CHECKSUM_PER_TRANSACTION },
    Kind { mke2fs: "-t ext4 -b 1024 -O ^64bit,^metadata_csum,extent", open: "" },
    Kind { mke2fs: "-t ext4 -b 2048 -O ^64bit,^extent,^metadata_csum", open: "" },
    Kind { mke2fs: "-t ext4 -b 1024 -O ^64bit,^extent,metadata_csum", open: "-c -v 3" },
    Kind { mke2fs: "-t ext4 -b 4096 -O 64bit,metadata_csum,extent,fast_commit", open: "-c -v 3" },
    Kind { mke2fs: "-t ext4 -b 4096 -J size=6 -O 64bit,metadata_csum_seed,metadata_csum,extent", open: "-c -v 3" },
    Kind { mke2fs: "-t ext3 -b 1024 -I 128", open: "" },
    Kind { mke2fs: "-t ext3 -b 4096 -I 128", open: "" },
    Kind { mke2fs: "-t ext3 -b 1024 -I 256", open: CHECKSUM_PER_TRANSACTION },
];

/// Checks what is seen of `image` against e2fsck.
fn check(dirty: &Dirty, image: &[u8], replayed: &[u8]) {
    assert!(le32(image, 1024 + 0x60) & 4 != 0, "needs recovery");
    let seen = seen(image);
    assert_eq!(differences(image, &seen, replayed), [0usize; 0], "{:?}", dirty.kind);
    assert_eq!(le32(&seen, 1024 + 0x60) & 4, 0);
    assert_eq!(find(image.to_vec()).unwrap().kernel, dirty.new_kernel, "{:?}", dirty.kind);
}

#[test]
fn what_is_seen_is_what_e2fsck_replays() {
    for kind in KINDS {
        let dirty = Dirty::make(*kind);
        let replayed = differences(&dirty.image, &dirty.image, &dirty.replayed).len();
        assert!(replayed > 300_000 / dirty.block_size, "{kind:?}: e2fsck has replayed {replayed} blocks");
        check(&dirty, &dirty.image, &dirty.replayed);
        let revoked = dirty.revoked as usize * dirty.block_size;
        let expected = if kind.revokes() { [0; 8] } else { [0xaa; 8] };
        assert_eq!(seen(&dirty.image)[revoked..][..8], expected, "revoked");
        assert_eq!(seen(&dirty.image)[revoked + dirty.block_size..][..8], [0xaa; 8], "not revoked");
        // The log goes on at the begin of the ring.
        let ring = journal_places(&dirty.image).len() - 1;
        for turn in [ring - 1, ring - 40] {
            let turned = dirty.turned(turn);
            check(&dirty, &turned, &replay(&turned));
        }
    }
}

const PLAIN: Kind = Kind { mke2fs: "-t ext4 -b 1024 -O ^64bit,^metadata_csum,extent", open: "" };
const GUARDED: Kind = Kind { mke2fs: "-t ext4 -b 4096 -O 64bit,metadata_csum,extent", open: "-c -v 3" };
const OLD: Kind = Kind { mke2fs: "-t ext3 -b 1024 -I 128", open: "" };

/// Where in the image the blocks of the log are that end a transaction.
fn commits(image: &[u8]) -> Vec<usize> {
    let size = block_size(image);
    let is_commit = |at: &usize| image[*at..at + 8] == [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 2];
    journal_places(image).iter().map(|place| place * size).filter(is_commit).collect()
}

#[test]
fn a_transaction_without_its_end_is_left_out_with_all_behind_it() {
    for kind in [PLAIN, GUARDED, OLD] {
        let dirty = Dirty::make(kind);
        let commits = commits(&dirty.image);
        assert_eq!(commits.len(), 5);
        for (count, commit) in commits.iter().enumerate() {
            let mut image = dirty.image.clone();
            image[*commit..commit + dirty.block_size].fill(0);
            let replayed = replay(&image);
            assert_eq!(differences(&image, &seen(&image), &replayed), [0usize; 0], "{kind:?} {count}");
            let kernel = if count < 4 { &dirty.old_kernel } else { &dirty.new_kernel };
            // Half of the new file system is neither the old one nor the new one.
            if count != 0 && count != 3 {
                assert_eq!(&find(image).unwrap().kernel, kernel, "{kind:?} {count}");
            }
        }
    }
}

#[test]
fn transactions_are_numbered_on_from_zero() {
    let dirty = Dirty::make(PLAIN);
    let mut image = dirty.image.clone();
    let from = u32::MAX - 1;
    for place in journal_places(&dirty.image).into_iter().skip(1) {
        let header = &mut image[place * dirty.block_size..][..12];
        if header[..4] == MAGIC {
            let sequence = u32::from_be_bytes(header[8..].try_into().unwrap());
            header[8..].copy_from_slice(&(sequence - 1).wrapping_add(from).to_be_bytes());
        }
    }
    patch_journal(&mut image, &[(0x18, from)]);
    check(&dirty, &image, &replay(&image));
}

#[test]
fn damage_ends_a_guarded_log_where_it_is() {
    let dirty = Dirty::make(GUARDED);
    let commits = commits(&dirty.image);
    let size = dirty.block_size;
    let places = journal_places(&dirty.image);
    let second = places.iter().position(|place| place * size == commits[1]).unwrap();
    let mut expected = dirty.image.clone();
    expected[commits[2]..commits[2] + size].fill(0);
    let expected = replay(&expected);
    // Its descriptor block, data blocks, commit block.
    for (block, byte) in [(second + 1, 700), (second + 2, 0), (second + 9, size - 1)] {
        let mut image = dirty.image.clone();
        image[places[block] * size + byte] ^= 0x10;
        assert_eq!(differences(&image, &seen(&image), &expected), [0usize; 0], "block {block}");
        assert_eq!(find(image).unwrap().kernel, dirty.old_kernel);
    }
    let mut image = dirty.image.clone();
    image[commits[2] + 20] ^= 0x10;
    assert_eq!(differences(&image, &seen(&image), &expected), [0usize; 0]);
    // A commit block of which only the first sector was written counts.
    let mut image = dirty.image.clone();
    image[commits[2] + 512..commits[2] + size].fill(0x77);
    assert_eq!(differences(&image, &seen(&image), &dirty.replayed), [0usize; 0]);
}

#[test]
fn fast_commits_are_no_part_of_the_ring() {
    let dirty = Dirty::make(Kind { mke2fs: "-t ext4 -b 1024 -J size=4 -O ^64bit,^metadata_csum,extent", open: "" });
    let length = journal_places(&dirty.image).len();
    let superblock = parse_superblock(&dirty.image);
    assert_eq!(superblock.last as usize, length);
    // FAST_COMMIT beside REVOKE, with so many blocks, or the default.
    for (fast, blocks) in [(600, 600), (0, 256), (length as u32 - 1000, 0)] {
        let mut image = dirty.image.clone();
        patch_journal(&mut image, &[(0x28, 0x21), (0x54, fast)]);
        assert_eq!(parse_superblock(&image).last as usize, length - blocks, "{fast}");
        let turned = Dirty { image, ..Dirty::clone(&dirty) }.turned(length - blocks - 5);
        // e2fsck would replay the fast commits too; there are none, so that the same must come out as without them.
        assert_eq!(differences(&turned, &seen(&turned), &dirty.replayed), [0usize; 0]);
        assert_eq!(find(turned).unwrap().kernel, dirty.new_kernel);
    }
}

#[test]
fn what_cannot_be_replayed_says_why_and_what_to_do() {
    let plain = Dirty::make(PLAIN);
    let message = |image: &[u8]| match find(image.to_vec()).unwrap_err() {
        BootError::Journal { place, source } => (place, source),
        error => panic!("{error}"),
    };
    let with_journal = |words: &[(usize, u32)]| {
        let mut image = plain.image.clone();
        patch_journal(&mut image, words);
        message(&image).1
    };
    let with_superblock = |words: &[(usize, u32)]| {
        let mut image = plain.image.clone();
        for (at, word) in words {
            image[1024 + at..1024 + at + 4].copy_from_slice(&word.to_le_bytes());
        }
        message(&image).1
    };
    assert!(matches!(with_superblock(&[(0xe0, 0), (0xe4, 0x801)]), JournalError::External));
    assert!(matches!(with_superblock(&[(0xe0, 0)]), JournalError::Filesystem(_)));
    assert!(matches!(with_superblock(&[(0xe0, 1 << 30)]), JournalError::Filesystem(_) | JournalError::Read { .. }));
    assert!(matches!(with_superblock(&[(0x28, 0)]), JournalError::Filesystem(_)));
    assert!(matches!(with_superblock(&[(0x18, 7)]), JournalError::Filesystem(_)));
    // The root directory, and an inode that is free.
    assert!(matches!(with_superblock(&[(0xe0, 2)]), JournalError::Damaged(_)));
    assert!(matches!(with_superblock(&[(0xe0, 9)]), JournalError::Damaged(_)));
    assert!(matches!(with_journal(&[(0x28, 0x41)]), JournalError::Features { incompat: 0x40, ro_compat: 0 }));
    assert!(matches!(with_journal(&[(0x2c, 1)]), JournalError::Features { incompat: 0, ro_compat: 1 }));
    assert!(matches!(with_journal(&[(0x28, 5)]), JournalError::AsyncWithoutChecksums));
    for words in [(0, 1), (4, 5), (0xc, 4096), (0x10, 1 << 30), (0x10, 0), (0x14, 0), (0x1c, 1 << 30), (0x28, 0x19)] {
        assert!(matches!(with_journal(&[words]), JournalError::Damaged(_)), "{words:x?}");
    }
    let said = find({
        let mut image = plain.image.clone();
        patch_journal(&mut image, &[(0x28, 5)]);
        image
    });
    assert_eq!(
        said.unwrap_err().to_string(),
        "the ext4 file system of the whole disk was not unmounted, and its journal cannot be replayed: the journal commits \
         asynchronously without checksums, so that torn transactions cannot be told; replay it with `e2fsck`, and mount \
         without `journal_async_commit`"
    );
    // An emptied log: nothing is left to be done.
    let mut image = plain.image.clone();
    patch_journal(&mut image, &[(0x1c, 0)]);
    assert_eq!(find(image).unwrap().kernel, plain.old_kernel);
    // A disk that ends inside the journal.
    let middle = journal_places(&plain.image)[20] * plain.block_size;
    assert!(find(plain.image[..middle].to_vec()).is_err());
}

#[test]
fn a_file_system_that_cannot_be_replayed_is_named_beside_those_that_can() {
    let mut broken = Dirty::make(PLAIN).image;
    patch_journal(&mut broken, &[(0x28, 5)]);
    let data = ext4(&Files::from([("/data", b"d".to_vec())]), 8, FS_UUID);
    let error = find(gpt(&[(TYPE_LINUX, &broken), (TYPE_LINUX, &data)])).unwrap_err().to_string();
    let start = "no kernel in /boot of partition 2 (the ext4 file system of partition 1 was not unmounted";
    assert!(error.starts_with(start) || error.starts_with(&start.replace("/boot", "/")), "{error}");
    // And one that can is found, wherever it begins.
    let dirty = Dirty::make(OLD);
    let set = find(gpt(&[(TYPE_LINUX, &data), (TYPE_LINUX, &dirty.image)])).unwrap();
    assert_eq!(set.kernel, dirty.new_kernel);
}

#[test]
fn a_wrong_checksum_of_the_super_block_is_not_mended() {
    let dirty = Dirty::make(GUARDED);
    let mut image = dirty.image.clone();
    image[1024 + 0x78] ^= 1;
    let error = find(image).unwrap_err().to_string();
    assert!(error.contains("superblock checksum"), "{error}");
}

fn bases() -> &'static [Dirty] {
    static BASES: OnceLock<Vec<Dirty>> = OnceLock::new();
    BASES.get_or_init(|| [PLAIN, GUARDED, OLD].map(Dirty::make).into())
}

/// Which file system, and what is damaged in it: super block, group descriptors, the inodes before the eleventh, the journal's
/// superblock, map and log, now and then anything.
fn damage() -> impl Strategy<Value = (usize, Vec<(u64, Vec<u8>)>)> {
    (0..3usize).prop_flat_map(|index| {
        let dirty = &bases()[index];
        let size = dirty.block_size as u64;
        let journal = journal::tests::journal_file_of(&dirty.image);
        let log = journal.physical(0).unwrap() * size;
        let inode = journal::tests::inode_place(&dirty.image);
        let place = prop_oneof![
            1024u64..2048,
            1024u64..1280,
            4096u64..4096 + 64,
            inode..inode + 128,
            inode + 0x28..inode + 0x28 + 60,
            log..log + 0x60,
            log + size..log + 4 * size,
            log..log + 100 * size,
            0..dirty.image.len() as u64,
        ];
        let word = prop_oneof![
            prop::collection::vec(any::<u8>(), 1..16),
            prop::sample::select(vec![0u32, 1, 2, 5, 8, 16, 1 << 15, u32::MAX]).prop_map(|n| n.to_be_bytes().to_vec()),
            prop::sample::select(vec![0u32, 1, 2, 5, 8, 16, 1 << 15, u32::MAX]).prop_map(|n| n.to_le_bytes().to_vec()),
        ];
        (Just(index), prop::collection::vec((place, word), 1..8))
    })
}

proptest! {
    #![proptest_config(cases(300))]
    #[test]
    fn damaged_journals_harm_nobody((index, patches) in damage()) {
        let disk = Arc::new(Damaged::new(&bases()[index].image, patches));
        let shared: Arc<dyn ReadAt> = disk.clone();
        let _ = discover(&shared, &Override::default());
        // 16 MiB of disk with a journal of at most 4 MiB: what it says of itself must not make us read it hundreds of times.
        prop_assert!(disk.read.load(Ordering::Relaxed) < 3 << 30);
        let before = disk.read.load(Ordering::Relaxed);
        let size = shared.size();
        if let Ok(view) = journal::replayed(Window::new(shared, 0, size)) {
            let mut whole = vec![0; size as usize];
            view.read_exact_at(&mut whole, 0).unwrap();
        }
        prop_assert!(disk.read.load(Ordering::Relaxed) - before < 200 << 20);
    }
}
