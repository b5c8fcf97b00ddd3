//! Disks of instances. A seam: today raw files; a volume engine will take the place of [`RawVolumes`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::state::sync_dir;

/// Why a disk cannot be made or opened.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// A file.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The copy of the image.
    #[error("copying the image to the root volume: {0}")]
    Copy(String),
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { action, path, source }
}

/// Told (done, total) bytes.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Makes and opens disks. All calls block; all may be repeated after a crash.
pub trait Volumes: Send + Sync {
    /// Makes the root volume of `bytes` bytes at `path` from the raw image, unless it is there already. It appears complete
    /// or not at all.
    fn create_root(&self, image: &Path, path: &Path, bytes: u64, progress: Progress<'_>) -> Result<(), VolumeError>;
    /// Makes an empty disk of `bytes` bytes at `path`, unless it is there already.
    fn create_empty(&self, path: &Path, bytes: u64) -> Result<(), VolumeError>;
    /// Opens a disk for a VMM.
    fn open(&self, path: &Path) -> Result<File, VolumeError>;
    /// Deletes a disk, if it is there.
    fn delete(&self, path: &Path) -> Result<(), VolumeError>;
}

/// Raw files: a reflink or sparse copy of the image; instance-store disks are sparse.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawVolumes;

impl Volumes for RawVolumes {
    fn create_root(&self, image: &Path, path: &Path, bytes: u64, progress: Progress<'_>) -> Result<(), VolumeError> {
        if path.exists() {
            return Ok(());
        }
        remove_partial_copies(path)?;
        hearth_snapshot::clone_file(image, path, Some(bytes), &|done, total| progress(done, total))
            .map_err(|error| VolumeError::Copy(error.to_string()))?;
        private(path)
    }

    fn create_empty(&self, path: &Path, bytes: u64) -> Result<(), VolumeError> {
        let failed = |action| io_error(action, path);
        if path.metadata().is_ok_and(|metadata| metadata.len() == bytes) {
            return Ok(());
        }
        let mut options = OpenOptions::new();
        let file =
            options.write(true).create(true).truncate(true).mode(0o600).open(path).map_err(failed("creating"))?;
        file.set_len(bytes).map_err(failed("setting the size of"))?;
        file.sync_all().map_err(failed("syncing"))?;
        sync_dir(path.parent().unwrap_or(Path::new("/"))).map_err(failed("syncing the folder of"))
    }

    fn open(&self, path: &Path) -> Result<File, VolumeError> {
        OpenOptions::new().read(true).write(true).open(path).map_err(io_error("opening", path))
    }

    fn delete(&self, path: &Path) -> Result<(), VolumeError> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("deleting", path)(error)),
            _ => Ok(()),
        }
    }
}

/// Deletes what copies left behind that were cut off by the end of an agent: hidden files beside the volume.
fn remove_partial_copies(path: &Path) -> Result<(), VolumeError> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let entries = std::fs::read_dir(folder).map_err(io_error("reading", folder))?;
    for entry in entries.flatten() {
        let found = entry.file_name();
        let found = found.to_str().unwrap_or_default();
        if found.starts_with(&format!(".{name}.")) && found.ends_with(".partial") {
            std::fs::remove_file(entry.path()).map_err(io_error("deleting", &entry.path()))?;
        }
    }
    Ok(())
}

/// Only root may read a guest's disk.
fn private(path: &Path) -> Result<(), VolumeError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io_error("protecting", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_made_once_and_deleted_any_number_of_times() {
        let folder = tempfile::tempdir().unwrap();
        let (image, root) = (folder.path().join("image"), folder.path().join("root.raw"));
        std::fs::write(&image, vec![7u8; 8192]).unwrap();
        let cut_off = folder.path().join(".root.raw.123.0.partial");
        std::fs::write(&cut_off, b"half").unwrap();
        RawVolumes.create_root(&image, &root, 1 << 20, &|_, _| ()).unwrap();
        assert!(!cut_off.exists());
        std::fs::write(&image, vec![8u8; 8192]).unwrap();
        RawVolumes.create_root(&image, &root, 1 << 20, &|_, _| ()).unwrap();
        let content = std::fs::read(&root).unwrap();
        assert_eq!((content.len(), content[0], content[8192]), (1 << 20, 7, 0));

        let disk = folder.path().join("ephemeral0.raw");
        RawVolumes.create_empty(&disk, 1 << 30).unwrap();
        use std::os::unix::fs::{FileExt, MetadataExt};
        RawVolumes.open(&disk).unwrap().write_all_at(b"x", 0).unwrap();
        RawVolumes.create_empty(&disk, 1 << 30).unwrap();
        let metadata = disk.metadata().unwrap();
        assert!(metadata.len() == 1 << 30 && metadata.blocks() > 0 && metadata.blocks() < 1024, "sparse, kept");
        for _ in 0..2 {
            RawVolumes.delete(&disk).unwrap();
        }
        assert!(matches!(RawVolumes.open(&disk), Err(VolumeError::Io { .. })));
    }

    #[test]
    fn an_image_larger_than_the_volume_is_refused_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (image, root) = (folder.path().join("image"), folder.path().join("root.raw"));
        std::fs::write(&image, vec![7u8; 8192]).unwrap();
        assert!(matches!(RawVolumes.create_root(&image, &root, 4096, &|_, _| ()), Err(VolumeError::Copy(_))));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
