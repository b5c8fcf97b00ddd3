//! Instance-store disks: sparse raw files that live as long as the instance runs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::state::sync_dir;

/// Why a disk cannot be made, opened or deleted.
#[derive(Debug, Error)]
#[error("{action} {}: {source}", path.display())]
pub struct InstanceStoreError {
    /// What was tried.
    pub action: &'static str,
    /// Which file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstanceStoreError {
    let path = path.to_owned();
    move |source| InstanceStoreError { action, path, source }
}

/// Makes an empty disk of `bytes` bytes at `path`, unless it is there already. Blocks.
pub fn create(path: &Path, bytes: u64) -> Result<(), InstanceStoreError> {
    if path.metadata().is_ok_and(|metadata| metadata.len() == bytes) {
        return Ok(());
    }
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    let file = file.map_err(failed("creating", path))?;
    file.set_len(bytes).map_err(failed("setting the size of", path))?;
    file.sync_all().map_err(failed("syncing", path))?;
    sync_dir(path.parent().unwrap_or(Path::new("/"))).map_err(failed("syncing the folder of", path))
}

/// Opens a disk for a VMM.
pub fn open(path: &Path) -> Result<File, InstanceStoreError> {
    OpenOptions::new().read(true).write(true).open(path).map_err(failed("opening", path))
}

/// Deletes a disk, if it is there.
pub fn delete(path: &Path) -> Result<(), InstanceStoreError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("deleting", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_made_once_and_deleted_any_number_of_times() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("ephemeral0.raw");
        create(&disk, 1 << 30).unwrap();
        open(&disk).unwrap().write_all_at(b"x", 0).unwrap();
        create(&disk, 1 << 30).unwrap();
        let metadata = disk.metadata().unwrap();
        assert!(metadata.len() == 1 << 30 && metadata.blocks() > 0 && metadata.blocks() < 1024, "sparse, kept");
        for _ in 0..2 {
            delete(&disk).unwrap();
        }
        assert!(open(&disk).is_err());
    }

    /// Whoever has the host's disk next sees nothing of it.
    #[test]
    fn a_new_disk_shows_nothing_of_the_one_before() {
        use std::os::unix::fs::FileExt;
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("ephemeral0.raw");
        for bytes in [1 << 20, 1 << 20, 2 << 20] {
            create(&disk, bytes).unwrap();
            let file = open(&disk).unwrap();
            let mut content = vec![1; bytes as usize];
            file.read_exact_at(&mut content, 0).unwrap();
            assert!(content.iter().all(|byte| *byte == 0));
            file.write_all_at(&vec![0xAA; bytes as usize], 0).unwrap();
            // The last one is only made anew with another size, as after a change of the instance's type.
            if bytes == 1 << 20 {
                delete(&disk).unwrap();
            }
        }
        create(&disk, 1 << 20).unwrap();
        let mut content = vec![1; 1 << 20];
        open(&disk).unwrap().read_exact_at(&mut content, 0).unwrap();
        assert!(content.iter().all(|byte| *byte == 0));
    }
}
