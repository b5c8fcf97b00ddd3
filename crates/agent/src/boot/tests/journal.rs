//! Journals of every form, against e2fsck's replay of the same ones.

use std::sync::Arc;

use super::journal_support::*;
use super::support::*;
use crate::boot::read_at::{ReadAt, Window};
use crate::boot::{BootError, JournalError};

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
    Kind { mke2fs: "-t ext4 -b 4096 -J size=8 -O 64bit,metadata_csum_seed,metadata_csum,extent", open: "-c -v 3" },
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
        for turn in [ring - 1, ring - 40, ring - 200] {
            let turned = dirty.turned(turn);
            check(&dirty, &turned, &replay(&turned));
        }
    }
}
