//! Logs written by hand: what e2fsprogs does not write, and what nobody would.

use super::*;

const BLOCK: usize = 1024;
/// Where the journal's file begins on the disk.
const AT: u64 = 3;

fn superblock(blocks: u32, wide: bool, checksums: Checksums) -> JournalSuperblock {
    JournalSuperblock { first: 1, last: blocks, start: 1, sequence: 7, wide, checksums, uuid: [9; 16] }
}

fn block(kind: u32, sequence: u32, rest: &[u8]) -> Vec<u8> {
    let mut block: Vec<u8> = [MAGIC, kind, sequence].iter().flat_map(|word| word.to_be_bytes()).collect();
    block.extend_from_slice(rest);
    block.resize(BLOCK, 0);
    block
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn scan(superblock: &JournalSuperblock, log: &[Vec<u8>]) -> Result<Found, JournalError> {
    let mut disk = vec![0u8; BLOCK * (AT as usize + 1)];
    disk.extend(log.iter().flatten());
    disk.resize(BLOCK * (AT as usize + superblock.last as usize), 0);
    let volume = Volume {
        block_size: BLOCK as u64,
        blocks: 1 << 40,
        inodes_per_group: 1,
        inode_size: 128,
        descriptor_size: 32,
        journal_inode: 8,
    };
    let file = JournalFile::contiguous(AT, superblock.last.into());
    Log::new(&disk, &volume, &file).scan(superblock)
}

fn targets(found: &Found) -> Vec<(u64, u64, bool)> {
    found.copies.iter().map(|(block, copy)| (*block, copy.place - AT, copy.escaped)).collect()
}

#[test]
fn tags_of_64_bits_with_uuids_and_without() {
    let uuid = [0x5555_5555; 4];
    let tags = [
        words(&[5, 0, 1]),
        words(&uuid),
        // Escaped, same UUID; then "deleted", which means nothing; then the last one.
        words(&[6, TAG_ESCAPED | TAG_SAME_UUID, 0]),
        words(&[7, 4, 2]),
        words(&uuid),
        words(&[8, TAG_SAME_UUID | TAG_LAST, 0]),
        words(&[9, TAG_SAME_UUID, 0]),
    ]
    .concat();
    let data = vec![1u8; BLOCK];
    let mut log = vec![block(DESCRIPTOR, 7, &tags)];
    log.extend(std::iter::repeat_n(data, 4));
    log.push(block(COMMIT, 7, &[]));
    let found = scan(&superblock(100, true, Checksums::None), &log).unwrap();
    assert_eq!(found.transactions, 1);
    assert_eq!(targets(&found), [(6, 3, true), (8, 5, false), (1 << 32 | 5, 2, false), (2 << 32 | 7, 4, false)]);

    // A later transaction revokes one by its number of 64 bits, and one by its lower half, which is another block.
    log.push(block(REVOKE, 8, &words(&[16 + 16, 1, 5, 0, 7])));
    log.push(block(COMMIT, 8, &[]));
    let found = scan(&superblock(100, true, Checksums::None), &log).unwrap();
    assert_eq!(targets(&found), [(6, 3, true), (8, 5, false), (2 << 32 | 7, 4, false)]);
}

#[test]
fn a_descriptor_without_a_last_tag_ends_with_its_block() {
    let tags: Vec<u8> = (0..200).flat_map(|target| words(&[1000 + target, TAG_SAME_UUID])).collect();
    let fit = (BLOCK - HEADER_BYTES) / 8;
    let mut log = vec![block(DESCRIPTOR, 7, tags.get(..fit * 8).unwrap())];
    log.extend(std::iter::repeat_n(vec![1u8; BLOCK], fit));
    log.push(block(COMMIT, 7, &[]));
    let found = scan(&superblock(400, false, Checksums::None), &log).unwrap();
    assert_eq!((found.copies.len(), found.transactions, found.end), (fit, 1, "no block of the log"));
}

#[test]
fn a_revocation_ends_with_its_transaction() {
    let write = |sequence| {
        let tag = words(&[50, TAG_SAME_UUID | TAG_LAST]);
        [block(DESCRIPTOR, sequence, &tag), vec![1u8; BLOCK], block(COMMIT, sequence, &[])]
    };
    let revoke = |sequence| [block(REVOKE, sequence, &words(&[20, 50])), block(COMMIT, sequence, &[])];
    let log = |parts: &[&[Vec<u8>]]| parts.concat();
    let plain = superblock(100, false, Checksums::None);
    assert_eq!(targets(&scan(&plain, &log(&[&write(7), &revoke(8)])).unwrap()), []);
    assert_eq!(targets(&scan(&plain, &log(&[&revoke(7), &write(8)])).unwrap()), [(50, 4, false)]);
    assert_eq!(targets(&scan(&plain, &log(&[&write(7), &revoke(8), &write(9)])).unwrap()), [(50, 7, false)]);
    // In one transaction it holds whichever comes first.
    let both = [block(REVOKE, 7, &words(&[20, 50])), write(7).concat()].concat();
    let both: Vec<Vec<u8>> = both.chunks(BLOCK).map(<[u8]>::to_vec).collect();
    assert_eq!(targets(&scan(&plain, &both).unwrap()), []);
    // Without its commit block it does not hold.
    let cut = log(&[&write(7), &revoke(8)[..1]]);
    assert_eq!(targets(&scan(&plain, &cut).unwrap()), [(50, 2, false)]);
    // More than fits ends the log.
    let long = log(&[&write(7), &[block(REVOKE, 8, &words(&[1025, 50])), block(COMMIT, 8, &[])]]);
    assert_eq!(scan(&plain, &long).unwrap().end, "a revocation block that is too long");
}

#[test]
fn the_number_of_a_transaction_wraps() {
    let mut start = superblock(100, false, Checksums::None);
    start.sequence = u32::MAX;
    let log: Vec<Vec<u8>> = [u32::MAX, 0, 1].map(|sequence| block(COMMIT, sequence, &[])).into();
    assert_eq!(scan(&start, &log).unwrap().transactions, 3);
}

#[test]
fn a_log_without_end_and_one_of_too_many_revocations() {
    let tag = words(&[50, TAG_SAME_UUID | TAG_LAST]);
    let ring: Vec<Vec<u8>> = std::iter::repeat_n(block(DESCRIPTOR, 7, &tag), 99).collect();
    let found = scan(&superblock(100, false, Checksums::None), &ring).unwrap();
    assert_eq!((found.end, found.transactions, found.copies.len()), ("the ring is full", 0, 0));

    let revokes = block(REVOKE, 7, &words(&[&[1024u32][..], &[50; 252]].concat()));
    let ring: Vec<Vec<u8>> = std::iter::repeat_n(revokes, MAX_REVOKED / 252 + 2).collect();
    let error = scan(&superblock(ring.len() as u32 + 1, false, Checksums::None), &ring).unwrap_err();
    assert!(matches!(error, JournalError::TooLarge { what: "revocations", .. }), "{error}");
}

#[test]
fn a_part_of_the_journal_that_is_nowhere_is_an_error() {
    let mut short = superblock(100, false, Checksums::None);
    short.start = 99;
    let disk = vec![0u8; BLOCK * 200];
    let volume = Volume {
        block_size: BLOCK as u64,
        blocks: 200,
        inodes_per_group: 1,
        inode_size: 128,
        descriptor_size: 32,
        journal_inode: 8,
    };
    let file = JournalFile::contiguous(AT, 99);
    let error = Log::new(&disk, &volume, &file).scan(&short).unwrap_err();
    assert!(matches!(error, JournalError::Damaged(_)), "{error}");
}
