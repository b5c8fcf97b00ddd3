//! Tasks: those of this control plane are worked on, those that nobody can finish fail, old ones are forgotten.

use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_store::Txn;
use hearth_types::InstanceState;
use rec::task::Kind;

use super::BATCH;
use crate::api_error::ApiResult;
use crate::clock;
use crate::core::Core;
use crate::keys;
use crate::life;
use crate::service::{bundle, replace_root, store_image, task};
use crate::tables::Tables;

/// Why a task of a host will never end by itself.
fn orphaned(tables: &Tables, task: &rec::Task) -> Option<String> {
    let Some(Kind::Bundle(job)) = &task.kind else { return None };
    if job.instance_id.is_empty() {
        return None;
    }
    let state = tables.instance(&job.instance_id).map(|(spec, status)| life::state_of(&spec, status.as_deref()));
    match state {
        Some(InstanceState::Running | InstanceState::Pending) => None,
        Some(state) => Some(format!("instance {} is {state}", job.instance_id)),
        None => Some(format!("instance {} is gone", job.instance_id)),
    }
}

pub(crate) async fn advance(core: &Arc<Core>) -> ApiResult<()> {
    let before = clock::now_ms().saturating_sub(clock::as_ms(core.config.tombstone_ttl));
    let (own, orphans, replacements, old) = {
        let tables = core.tables();
        let mut own = Vec::new();
        let mut orphans = Vec::new();
        let mut replacements = Vec::new();
        for task in task::open(&tables) {
            match orphaned(&tables, task) {
                _ if matches!(task.kind, Some(Kind::ReplaceRoot(_))) => replacements.push(task.clone()),
                Some(why) => orphans.push((task.task_id.clone(), why)),
                None if task.host_id.is_empty() => own.push((*task.value).clone()),
                None => {}
            }
        }
        let old = tables.tasks.values().filter(|task| !task::is_open(task) && task.updated_ms <= before);
        (own, orphans, replacements, old.take(BATCH).cloned().collect::<Vec<_>>())
    };
    for (id, why) in orphans {
        bundle::give_up(core, &id, task::failure(why)).await?;
    }
    for task in replacements {
        replace_root::advance(core, &task).await?;
    }
    for task in own {
        let Some(called_off) = core.jobs.take(&task.task_id) else { continue };
        let core = core.clone();
        let tasks = core.tasks.clone();
        tasks.spawn(async move {
            // As many at a time as imports, and none that has ended since it was looked at.
            let turn = tokio::select! {
                turn = core.imports.clone().acquire_owned() => turn.ok(),
                () = core.stop.cancelled() => None,
            };
            let is_open = core.tables().tasks.get(&task.task_id).is_some_and(|task| task::is_open(task));
            if turn.is_none() || !is_open {
                return core.jobs.done(&task.task_id);
            }
            match &task.kind {
                Some(Kind::Bundle(job)) => bundle::make(&core, &task.task_id, job, &called_off).await,
                Some(Kind::StoreImage(job)) => store_image::store(&core, &task.task_id, job, &called_off).await,
                Some(Kind::RestoreImage(job)) => store_image::restore(&core, &task, job).await,
                Some(Kind::ReplaceRoot(_)) | None => {}
            }
            core.jobs.done(&task.task_id);
        });
    }
    for task in old {
        if let (Some(Kind::Bundle(job)), rec::TaskState::Failed) = (&task.kind, task.state()) {
            bundle::remove_parts(core, job).await;
        }
        let key = keys::task(&task.account_id, &task.task_id);
        core.commit(Txn::new().compare_mod_revision(&key, task.revision).delete(&key)).await?;
    }
    Ok(())
}
