//! What the whole-system tests share: the built binaries, guests on their consoles, and whole clouds.
//!
//! These tests need root and a real KVM; `scripts/test` runs them inside the testbed where the machine has none. Every
//! failure is a panic with what the other side said last.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

pub mod choices;
pub mod cloud;
pub mod console;
pub mod disks;
pub mod fio;
pub mod machine;
pub mod objects;
pub mod report;
pub mod vmm;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A built program: from `HEARTH_BIN_DIR`, else beside the test's own binary. Inside the testbed it is copied to the scratch
/// disk first, without symbols: every start from the shared file system would take seconds.
pub fn program(name: &str) -> PathBuf {
    let folder = std::env::var_os("HEARTH_BIN_DIR").map_or_else(built, PathBuf::from);
    settled(folder.join(name), name, "cargo build --workspace")
}

/// A built example of hearth-snapshot, in the same way.
pub fn example(name: &str) -> PathBuf {
    settled(built().join("examples").join(name), name, "cargo build -p hearth-snapshot --examples")
}

/// Where cargo puts what it builds with the tests.
fn built() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_path_buf()
}

fn settled(path: PathBuf, name: &str, how: &str) -> PathBuf {
    let about = std::fs::metadata(&path)
        .unwrap_or_else(|_| panic!("{} is not built: run scripts/test, or {how}", path.display()));
    if !Path::new("/scratch").is_dir() {
        return path;
    }
    let copy = PathBuf::from(format!("/scratch/programs/{}.{}/{name}", about.mtime(), about.size()));
    if !copy.exists() {
        std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
        let draft = copy.with_extension(format!("{}", std::process::id()));
        let status = Command::new("strip").arg("-g").arg("-o").args([&draft, &path]).status().unwrap();
        assert!(status.success(), "strip {}", path.display());
        // Pages that are still to be written count as the process's own in its memory figures.
        std::fs::File::open(&draft).unwrap().sync_all().unwrap();
        std::fs::rename(&draft, &copy).unwrap();
    }
    copy
}

/// The disk image of the recipe `tiny`.
pub fn tiny_image() -> PathBuf {
    image("HEARTH_TEST_IMAGE", "tiny")
}

/// The disk image of the recipe `debian-12`.
pub fn debian_image() -> PathBuf {
    image("HEARTH_TEST_DEBIAN", "debian-12")
}

fn image(variable: &str, recipe: &str) -> PathBuf {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../images/out/{recipe}.raw"));
    let path = std::env::var_os(variable).map_or_else(built, PathBuf::from);
    assert!(path.exists(), "{} is not built: run scripts/test, or images/build {recipe}", path.display());
    path
}

/// A folder on a real file system, removed at the end of the test.
pub fn scratch() -> tempfile::TempDir {
    let base = ["/scratch", "/var/tmp"].into_iter().find(|path| std::path::Path::new(path).is_dir()).unwrap();
    tempfile::Builder::new().prefix("hearth-test-").tempdir_in(base).unwrap()
}
