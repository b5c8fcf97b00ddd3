//! What tests of boot discovery need to know of a journal's inside.

use super::checksum::{crc32c, without_field};
use super::mapping::{JournalFile, journal_file};
use super::superblock::JournalSuperblock;
use super::volume::Volume;

/// The journal's file in an image that needs recovery.
pub fn journal_file_of(image: &[u8]) -> JournalFile {
    let image = image.to_vec();
    let volume = Volume::needing_recovery(&image).unwrap().expect("it needs recovery");
    journal_file(&image, &volume).unwrap()
}

pub fn parse_superblock(image: &[u8]) -> JournalSuperblock {
    let image = image.to_vec();
    let volume = Volume::needing_recovery(&image).unwrap().expect("it needs recovery");
    let file = journal_file(&image, &volume).unwrap();
    let at = (file.physical(0).unwrap() * volume.block_size) as usize;
    JournalSuperblock::parse(&image[at..at + 1024], volume.block_size, file.blocks).unwrap()
}

pub fn superblock_checksum(superblock: &[u8]) -> u32 {
    without_field(crc32c(), superblock, 0xfc)
}

/// Where in the image the journal's inode is.
pub fn inode_place(image: &[u8]) -> u64 {
    let image = image.to_vec();
    let volume = Volume::needing_recovery(&image).unwrap().expect("it needs recovery");
    super::mapping::inode_place(&image, &volume).unwrap()
}
