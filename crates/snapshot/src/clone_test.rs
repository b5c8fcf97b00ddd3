use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;

use tempfile::TempDir;

use super::*;

#[test]
fn a_copy_keeps_holes_and_grows() {
    let folder = TempDir::new().unwrap();
    let source = folder.path().join("source");
    let file = File::create(&source).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(&[1; 5000], 0).unwrap();
    file.write_all_at(&[2; 70_000], 500 << 20).unwrap();
    file.write_all_at(&[3; 1], (1 << 30) - 1).unwrap();
    let target = folder.path().join("target");
    let last = Cell::new((0, 0));
    let cloned = clone_file(&source, &target, Some(2 << 30), &|done, total| last.set((done, total))).unwrap();
    assert_eq!(cloned.bytes, 2 << 30);
    assert_eq!(last.get(), (1 << 30, 1 << 30));
    let copy = File::open(&target).unwrap();
    let metadata = copy.metadata().unwrap();
    assert_eq!(metadata.len(), 2 << 30);
    assert!(metadata.blocks() * 512 < 1 << 20, "the copy is not sparse");
    for (offset, length, value) in [(0, 5000, 1), (500 << 20, 70_000, 2), ((1 << 30) - 1, 1, 3), (1 << 30, 100, 0)] {
        let mut bytes = vec![9; length];
        copy.read_exact_at(&mut bytes, offset).unwrap();
        assert!(bytes.iter().all(|byte| *byte == value), "at {offset}");
    }
}

#[test]
fn an_existing_copy_is_replaced_whole_and_failures_leave_nothing() {
    let folder = TempDir::new().unwrap();
    let source = folder.path().join("source");
    let target = folder.path().join("target");
    fs::write(&source, [5; 4096]).unwrap();
    fs::write(&target, "an older and longer text").unwrap();
    clone_file(&source, &target, None, &|_, _| {}).unwrap();
    assert_eq!(fs::read(&target).unwrap(), [5; 4096]);
    let error = clone_file(&source, &folder.path().join("small"), Some(4095), &|_, _| {}).unwrap_err();
    assert!(matches!(error, ImageError::WouldShrink { source_bytes: 4096, wanted_bytes: 4095 }));
    let error = clone_file(&folder.path().join("missing"), &target, None, &|_, _| {}).unwrap_err();
    assert!(error.to_string().contains("missing") && !error.is_invalid_input(), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn an_empty_file_and_one_of_only_holes_can_be_copied() {
    let folder = TempDir::new().unwrap();
    for size in [0u64, 10 << 20] {
        let source = folder.path().join("source");
        File::create(&source).unwrap().set_len(size).unwrap();
        let cloned = clone_file(&source, &folder.path().join("target"), None, &|_, _| {}).unwrap();
        assert_eq!((cloned.bytes, cloned.copied_bytes), (size, 0));
    }
}
