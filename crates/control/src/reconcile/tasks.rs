//! Tasks: those of this control plane are worked on, those that nobody can finish fail, old ones are forgotten.

use std::collections::HashMap;
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

/// Those of the waiting tasks whose turn it is: accounts with the fewest running first, of each the oldest.
fn turns(running: &[rec::Task], waiting: Vec<rec::Task>, most: usize, most_of_account: usize) -> Vec<rec::Task> {
    let mut of_accounts: HashMap<String, usize> = HashMap::new();
    for task in running {
        *of_accounts.entry(task.account_id.clone()).or_default() += 1;
    }
    let mut left = waiting;
    let mut chosen = Vec::new();
    while running.len() + chosen.len() < most {
        let count = |task: &rec::Task| of_accounts.get(&task.account_id).copied().unwrap_or(0);
        let candidates = left.iter().enumerate().filter(|(_, task)| count(task) < most_of_account);
        let next = candidates.min_by_key(|(_, task)| (count(task), task.created_ms, task.task_id.clone()));
        let Some(index) = next.map(|(index, _)| index) else { break };
        let task = left.swap_remove(index);
        *of_accounts.entry(task.account_id.clone()).or_default() += 1;
        chosen.push(task);
    }
    chosen
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
    let (running, waiting): (Vec<_>, Vec<_>) = own.into_iter().partition(|task| core.jobs.has(&task.task_id));
    for task in turns(&running, waiting, core.config.max_concurrent_tasks, core.config.max_tasks_per_account) {
        let Some(called_off) = core.jobs.take(&task.task_id) else { continue };
        // It may have been called off before it was taken.
        if !core.tables().tasks.get(&task.task_id).is_some_and(|task| task::is_open(task)) {
            core.jobs.done(&task.task_id);
            continue;
        }
        let core = core.clone();
        let tasks = core.tasks.clone();
        tasks.spawn(async move {
            match &task.kind {
                Some(Kind::Bundle(job)) => bundle::make(&core, &task.task_id, job, &called_off).await,
                Some(Kind::StoreImage(job)) => store_image::store(&core, &task.task_id, job, &called_off).await,
                Some(Kind::RestoreImage(job)) => store_image::restore(&core, &task, job).await,
                Some(Kind::ReplaceRoot(_)) | None => {}
            }
            core.jobs.done(&task.task_id);
            // For the next one.
            core.reconcile.notify_one();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn task(account: &str, number: u64) -> rec::Task {
        let task_id = format!("{account}{number}");
        rec::Task { task_id, account_id: account.to_owned(), created_ms: number, ..Default::default() }
    }

    fn ids(tasks: &[rec::Task]) -> Vec<&str> {
        tasks.iter().map(|task| task.task_id.as_str()).collect()
    }

    #[test]
    fn no_account_keeps_the_others_waiting() {
        let many: Vec<_> = (0..50).map(|number| task("a", number)).collect();
        let few = [task("b", 60), task("b", 61), task("c", 70)];
        let waiting = || many.iter().chain(&few).cloned().collect::<Vec<_>>();
        assert_eq!(ids(&turns(&[], waiting(), 4, 3)), ["a0", "b60", "c70", "a1"]);
        assert_eq!(ids(&turns(&[], many.clone(), 4, 3)), ["a0", "a1", "a2"], "one place is left for others");
        let running = [task("a", 100), task("a", 101), task("a", 102)];
        assert_eq!(ids(&turns(&running, waiting(), 4, 3)), ["b60"]);
        assert_eq!(ids(&turns(&running, many, 4, 3)), Vec::<&str>::new());
    }
}
