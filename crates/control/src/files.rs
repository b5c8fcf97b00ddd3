//! Files that must be whole or absent, whenever the power fails.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::error::ControlError;

/// Makes a folder and its parents, for this user alone: there are secrets and other people's disks in it.
pub(crate) fn make_dir(path: &Path) -> Result<(), ControlError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(ControlError::io("make folder", path))
}

/// Makes renames and deletions in a folder durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), ControlError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(ControlError::io("sync folder", path))
}

/// Writes a file through a temporary name; it appears whole, with permission bits `mode`, and durable.
pub(crate) fn write_atomically(path: &Path, content: &[u8], mode: u32) -> Result<(), ControlError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    make_dir(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = folder.join(name);
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(ControlError::io("remove", &temporary)(error));
        }
        _ => {}
    }
    let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(ControlError::io("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(ControlError::io("rename to", path))?;
    sync_dir(folder)
}

/// Reads a text file; `None` when it does not exist.
pub(crate) fn read_if_exists(path: &Path) -> Result<Option<String>, ControlError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ControlError::io("read", path)(error)),
    }
}
