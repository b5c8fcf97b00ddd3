use super::*;

const BLOCK: usize = 1024;
/// Of the inode table, and of blocks for maps.
const TABLE: usize = 5;
const MAP: usize = 20;

fn volume(disk: &[u8]) -> Volume {
    let blocks = (disk.len() / BLOCK) as u64;
    let block_size = BLOCK as u64;
    Volume { block_size, blocks, inodes_per_group: 16, inode_size: 128, descriptor_size: 32, journal_inode: 8 }
}

/// A disk whose inode 8 has this map.
fn disk(extents: bool, map: &[u8]) -> Vec<u8> {
    let mut disk = vec![0u8; 4096 * BLOCK];
    disk[2 * BLOCK + 8] = TABLE as u8;
    let inode = &mut disk[TABLE * BLOCK + 7 * 128..][..128];
    inode[..2].copy_from_slice(&MODE_REGULAR.to_le_bytes());
    inode[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    inode[0x1a] = 1;
    inode[0x20..0x24].copy_from_slice(&(if extents { FLAG_EXTENTS } else { 0 }).to_le_bytes());
    inode[0x28..0x28 + map.len()].copy_from_slice(map);
    disk
}

fn node(depth: u16, entries: &[[u8; 12]]) -> Vec<u8> {
    let header = [EXTENT_MAGIC, entries.len() as u16, 340, depth, 0, 0];
    let header = header.iter().flat_map(|half| half.to_le_bytes());
    header.chain(entries.iter().flatten().copied()).collect()
}

fn extent(logical: u32, length: u16, physical: u32) -> [u8; 12] {
    let mut entry = [0; 12];
    entry[..4].copy_from_slice(&logical.to_le_bytes());
    entry[4..6].copy_from_slice(&length.to_le_bytes());
    entry[8..].copy_from_slice(&physical.to_le_bytes());
    entry
}

fn index(logical: u32, child: usize) -> [u8; 12] {
    let mut entry = [0; 12];
    entry[..4].copy_from_slice(&logical.to_le_bytes());
    entry[4..8].copy_from_slice(&(child as u32).to_le_bytes());
    entry
}

fn put(disk: &mut [u8], block: usize, content: &[u8]) {
    disk[block * BLOCK..][..content.len()].copy_from_slice(content);
}

fn file(disk: &[u8]) -> Result<JournalFile, JournalError> {
    journal_file(&disk.to_vec(), &volume(disk))
}

#[test]
fn extents_are_followed_and_holes_are_told() {
    let mut disk = disk(true, &node(1, &[index(0, MAP), index(50, MAP + 1)]));
    let unwritten = extent(40, 5 | 0x8000, 900);
    put(&mut disk, MAP, &node(0, &[extent(0, 10, 100), extent(10, 5, 110), extent(20, 1, 300), unwritten]));
    put(&mut disk, MAP + 1, &node(0, &[extent(50, 32768 - 31000, 400)]));
    let file = file(&disk).unwrap();
    let places = [0, 14, 15, 19, 20, 21, 40, 50, 1817, 1818].map(|block| file.physical(block));
    let expected = [Some(100), Some(114), None, None, Some(300), None, None, Some(400), Some(2167), None];
    assert_eq!(places, expected);
    assert_eq!(file.runs.len(), 3);
}

#[test]
fn block_maps_are_followed() {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let mut map: Vec<u32> = (100..112).collect();
    map.extend([MAP as u32, MAP as u32 + 1, 0]);
    let mut disk = disk(false, &words(&map));
    put(&mut disk, MAP, &words(&(112..112 + 256).collect::<Vec<_>>()));
    put(&mut disk, MAP + 1, &words(&[0, MAP as u32 + 2]));
    put(&mut disk, MAP + 2, &words(&[0, 0, 777]));
    let file = file(&disk).unwrap();
    assert_eq!(file.physical(0), Some(100));
    assert_eq!(file.physical(267), Some(367));
    assert_eq!(file.physical(268), None);
    assert_eq!(file.physical(268 + 256 + 2), Some(777));
    assert_eq!(file.runs.len(), 2);
}

#[test]
fn maps_without_end_are_refused() {
    // A node that is its own child.
    let mut looped = disk(true, &node(5, &[index(0, MAP)]));
    put(&mut looped, MAP, &node(4, &[index(0, MAP)]));
    assert!(matches!(file(&looped), Err(JournalError::Damaged(_))));
    // Five levels of the same 84 children, who are empty in the end: 84^5 of them.
    let mut wide = disk(true, &node(5, &[index(0, MAP + 4)]));
    for depth in 1..5 {
        put(&mut wide, MAP + depth, &node(depth as u16, &[index(0, MAP + depth - 1); 84]));
    }
    put(&mut wide, MAP, &node(0, &[]));
    assert!(matches!(file(&wide), Err(JournalError::TooLarge { .. })));
    // With something in them they overlap.
    put(&mut wide, MAP, &node(0, &[extent(0, 1, 100)]));
    assert!(matches!(file(&wide), Err(JournalError::Damaged(_))));
    // A block map of its own pointers.
    let mut looped = disk(false, &[[0u8; 56].as_slice(), &(MAP as u32).to_le_bytes()].concat());
    put(&mut looped, MAP, &(MAP as u32).to_le_bytes().repeat(256));
    assert!(matches!(file(&looped), Err(JournalError::TooLarge { .. })));
}

#[test]
fn what_lies_outside_is_refused() {
    for map in [
        node(0, &[extent(0, 10, 4090)]),
        node(0, &[extent(0, 10, 0)]),
        node(0, &[extent(0, 10, u32::MAX)]),
        node(1, &[index(0, 1 << 30)]),
        node(6, &[]),
        node(0, &[extent(5, 10, 100), extent(0, 5, 200)]),
    ] {
        assert!(matches!(file(&disk(true, &map)), Err(JournalError::Damaged(_))), "{map:?}");
    }
    let mut many = node(0, &[]);
    many[2] = 200;
    assert!(matches!(file(&disk(true, &many)), Err(JournalError::Damaged(_))));
    assert!(matches!(file(&disk(false, &[0xff; 60])), Err(JournalError::Damaged(_))));
    assert!(matches!(file(&[0; 4096]), Err(JournalError::Filesystem(_))));
}
