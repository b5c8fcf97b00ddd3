//! Files and records of images that nobody needs any more.

use std::collections::HashSet;
use std::path::Path;

use hearth_proto::v1;
use hearth_store::Txn;

use crate::api_error::ApiResult;
use crate::core::{Commit, Core};
use crate::error::ControlError;
use crate::files;
use crate::keys;
use crate::life;
use crate::service::import;
use crate::tables::Tables;

/// Takes back imports that a crash has interrupted and removes files without a record.
pub(crate) async fn clean_up_after_crash(core: &Core) -> Result<(), ControlError> {
    let interrupted: Vec<_> = {
        let tables = core.tables();
        let pending = tables.images.values().filter(|entry| {
            !matches!(
                entry.status.as_ref().map(|status| status.state()),
                Some(v1::ImageState::Available | v1::ImageState::Failed)
            )
        });
        pending.filter_map(|entry| entry.spec.clone()).collect()
    };
    for spec in interrupted {
        tracing::warn!(image = spec.image_id, name = spec.name, "an import was interrupted; it is taken back");
        let taken = import::take_back(core, &spec).await;
        taken.map_err(|error| {
            tracing::error!(image = spec.image_id, %error, "an interrupted import could not be taken back");
            ControlError::Stopped("the clean-up of images")
        })?;
    }
    remove_others(&core.config.spool_dir(), &HashSet::new())?;
    let known: HashSet<String> = core.tables().images.keys().map(|id| format!("{id}.raw")).collect();
    remove_others(&core.config.image_dir(), &known)
}

/// Removes all files in a folder but these.
fn remove_others(folder: &Path, keep: &HashSet<String>) -> Result<(), ControlError> {
    let entries = std::fs::read_dir(folder).map_err(ControlError::io("list", folder))?;
    let mut removed = false;
    for entry in entries {
        let entry = entry.map_err(ControlError::io("list", folder))?;
        if entry.file_name().to_str().is_some_and(|name| keep.contains(name)) {
            continue;
        }
        let path = entry.path();
        tracing::info!(path = %path.display(), "removing what an interrupted import left");
        let is_dir = entry.file_type().map_err(ControlError::io("look at", &path))?.is_dir();
        let result = if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        result.map_err(ControlError::io("remove", &path))?;
        removed = true;
    }
    if removed { files::sync_dir(folder) } else { Ok(()) }
}

/// Images that nobody can launch from and no instance may still have to fetch.
fn unused(tables: &Tables) -> Vec<(String, String, Txn)> {
    if !tables.images.values().any(|entry| entry.spec.as_ref().is_some_and(|spec| spec.deregistered)) {
        return Vec::new();
    }
    let needed: HashSet<&str> = tables
        .instances
        .values()
        .filter_map(|entry| {
            let spec = entry.spec.as_deref()?;
            let live = !life::state_of(spec, entry.status.as_deref()).is_final();
            live.then(|| spec.spec.as_ref().map(|spec| spec.image_id.as_str())).flatten()
        })
        .collect();
    let entries = tables.images.iter().filter_map(|(id, entry)| Some((id, entry.spec.as_ref()?)));
    entries
        .filter(|(id, spec)| spec.deregistered && !needed.contains(id.as_str()))
        .map(|(id, spec)| {
            let key = keys::image_spec(&spec.account_id, id);
            // A launch compares the same record, so either it sees the end or is seen here.
            let txn = Txn::new()
                .compare_mod_revision(&key, spec.revision)
                .delete(&key)
                .delete(keys::image_status(&spec.account_id, id));
            (id.clone(), spec.name.clone(), txn)
        })
        .collect()
}

/// Deletes the bytes of deregistered images when their last instance is gone.
pub(crate) async fn reclaim(core: &Core) -> ApiResult<()> {
    let unused = unused(&core.tables());
    for (id, name, txn) in unused {
        // The record goes first: a file without a record is removed at the next start, the opposite would be a lie.
        if core.commit(txn).await? != Commit::Done {
            continue;
        }
        let path = import::image_path(core, &id);
        match tokio::fs::remove_file(&path).await {
            Ok(()) => tracing::info!(image = id, name, "image deleted"),
            // A failed import has left none.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(image = id, path = %path.display(), %error, "the image's file could not be removed")
            }
        }
    }
    Ok(())
}
