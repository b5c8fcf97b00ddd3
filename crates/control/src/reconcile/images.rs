//! Files and records of images that nobody needs any more.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;

use crate::api_error::ApiResult;
use crate::core::Core;
use crate::error::ControlError;
use crate::files;
use crate::keys;
use crate::service::Api;
use crate::service::create_image::is_made_of_others;
use crate::service::import::{self, spool};
use crate::service::store_image::is_being_restored;
use crate::tables::Tables;

/// Takes back interrupted uploads that nobody can go on with, finishes other snapshots that this control plane was making, and
/// removes files without a record.
pub(crate) async fn clean_up_after_crash(core: &Arc<Core>) -> Result<(), ControlError> {
    let (lost, kept) = interrupted_imports(&core.tables());
    for spec in lost {
        tracing::warn!(image = spec.image_id, name = spec.name, "an upload was interrupted; the import is taken back");
        let taken = core.commit(import::take_back_txn(&spec)).await;
        taken.map_err(|error| {
            tracing::error!(image = spec.image_id, %error, "an interrupted import could not be taken back");
            ControlError::Stopped("the clean-up of images")
        })?;
    }
    let interrupted = super::volumes::interrupted(&core.tables());
    let api = Api { core: core.clone() };
    for spec in interrupted {
        // What cannot be finished is in error then.
        if let Err(error) = api.finish(&spec).await {
            tracing::warn!(snapshot = spec.snapshot_id, %error, "an interrupted snapshot could not be finished");
        }
    }
    remove_others(&core.config.spool_dir(), &kept)
}

/// Imports that a crash has cut off for good, and the spool files of the others.
fn interrupted_imports(tables: &Tables) -> (Vec<rec::ImageSpec>, HashSet<String>) {
    let (mut lost, mut kept) = (Vec::new(), HashSet::new());
    for (id, entry) in &tables.images {
        let ended = matches!(
            entry.status.as_ref().map(|status| status.state()),
            Some(v1::ImageState::Available | v1::ImageState::Failed)
        );
        let open = entry.spec.as_deref().filter(|spec| !ended && !is_made_of_others(spec));
        let Some(spec) = open.filter(|_| !is_being_restored(tables, id)) else { continue };
        match import::pending(tables, id) {
            Some(found) if found.is_whole() || found.job.resumable => _ = kept.insert(spool::name(id)),
            // Also those of releases that kept no uploads.
            _ => lost.push(spec.clone()),
        }
    }
    (lost, kept)
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

/// Lets images go on that are imported, or made of instances and other images, and forgets deregistered ones and uploads that
/// nobody goes on with.
pub(crate) async fn advance(core: &Arc<Core>) -> ApiResult<()> {
    let (pending, deregistered) = {
        let tables = core.tables();
        let pending: Vec<String> = tables
            .images
            .iter()
            .filter(|(_, entry)| entry.spec.as_ref().is_some_and(|spec| is_made_of_others(spec) && !spec.deregistered))
            .filter(|(_, entry)| {
                let waits = entry.status.as_ref().is_none_or(|status| status.state() == v1::ImageState::Pending);
                waits || entry.spec.as_ref().is_some_and(|spec| spec.restart_source)
            })
            .map(|(id, _)| id.clone())
            .collect();
        let deregistered: Vec<Txn> = tables
            .images
            .iter()
            .filter_map(|(id, entry)| Some((id, entry.spec.as_ref().filter(|spec| spec.deregistered)?)))
            .map(|(id, spec)| {
                // A launch compares the same record, so either it sees the end or is seen here.
                let key = keys::image_spec(&spec.account_id, id);
                let txn = Txn::new().compare_mod_revision(&key, spec.revision).delete(&key);
                txn.delete(keys::image_status(&spec.account_id, id))
            })
            .collect();
        (pending, deregistered)
    };
    let api = Api { core: core.clone() };
    for id in pending {
        if let Err(error) = api.advance_image(&id).await {
            tracing::warn!(image = id, %error, "the image cannot go on; it is tried again");
        }
    }
    for txn in deregistered {
        core.commit(txn).await?;
    }
    import::convert::advance(core);
    for id in abandoned(core) {
        tracing::warn!(image = id, "nobody has gone on with an upload for too long; the import is taken back");
        import::give_up(core, &id).await?;
    }
    Ok(())
}

fn abandoned(core: &Core) -> Vec<String> {
    let tables = core.tables();
    let is_abandoned =
        |id: &&String| import::pending(&tables, id).is_some_and(|found| import::is_abandoned(core, &found));
    tables.images.keys().filter(is_abandoned).cloned().collect()
}
