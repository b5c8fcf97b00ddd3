//! Copies of the control plane's store, for operators.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use hearth_store::sqlite;

use crate::error::DaemonError;
use crate::layout;
use crate::settings::{RestoreArgs, Settings};

fn store_path(settings: &Settings) -> Result<PathBuf, DaemonError> {
    Ok(layout::control(settings, IpAddr::V4(Ipv4Addr::LOCALHOST))?.store_path())
}

/// Writes a consistent copy of the store to `file`; the control plane may run meanwhile.
pub fn backup(settings: &Settings, file: &Path) -> Result<(), DaemonError> {
    let store = store_path(settings)?;
    let revision = sqlite::backup(&store, file)?;
    println!("{} holds {} as of revision {revision}", file.display(), store.display());
    Ok(())
}

/// Puts a copy in the place of the store. The control plane must not run.
pub fn restore(settings: &Settings, args: &RestoreArgs) -> Result<(), DaemonError> {
    let store = store_path(settings)?;
    if let Some(folder) = store.parent() {
        use std::os::unix::fs::DirBuilderExt;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| DaemonError::Folder { path: folder.to_owned(), source })?;
    }
    let revision = if args.force {
        let (revision, kept) = sqlite::restore_over(&args.file, &store)?;
        if kept.exists() {
            println!("the store that was there is kept as {}", kept.display());
        }
        revision
    } else {
        if store.exists() {
            return Err(DaemonError::StoreExists(store));
        }
        sqlite::restore(&args.file, &store)?
    };
    println!("{} is restored from {}; it goes on at revision {revision}", store.display(), args.file.display());
    Ok(())
}
