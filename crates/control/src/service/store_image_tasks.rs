//! Tasks that store images or make them of stored ones, as the API shows and lists them. What they do is in `store_image`.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeStoreImageTasks.html>

use std::borrow::Cow;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use rec::TaskState;

use super::store_image::{job, restore_job};
use super::{Api, image};
use crate::api_error::ApiResult;
use crate::clock;
use crate::core::Core;
use crate::listing::Listing;

const FILTERS: [&str; 5] = ["task-id", "image-id", "object-key", "task-state", "start-time"];

fn state_of(task: &rec::Task) -> v1::StoreImageTaskState {
    match task.state() {
        TaskState::Complete => v1::StoreImageTaskState::Completed,
        TaskState::Failed => v1::StoreImageTaskState::Failed,
        TaskState::Pending | TaskState::Running | TaskState::Unspecified => v1::StoreImageTaskState::InProgress,
    }
}

fn progress_of(core: &Core, task: &rec::Task) -> u32 {
    if task.state() == TaskState::Complete { 100 } else { core.live.percent(&task.task_id) }
}

fn restore_view(core: &Core, task: &rec::Task, job: &rec::RestoreImageJob) -> v1::RestoreImageTask {
    v1::RestoreImageTask {
        task_id: task.task_id.clone(),
        image_id: job.image_id.clone(),
        object_key: job.object_key.clone(),
        snapshot_ids: job.snapshot_ids.clone(),
        state: state_of(task).into(),
        state_reason: task.reason.clone(),
        progress: progress_of(core, task),
        start_time: clock::rfc3339(task.created_ms),
    }
}

pub(crate) fn view(core: &Core, task: &rec::Task, job: &rec::StoreImageJob) -> v1::StoreImageTask {
    v1::StoreImageTask {
        task_id: task.task_id.clone(),
        image_id: job.image_id.clone(),
        object_key: job.object_key.clone(),
        state: state_of(task).into(),
        state_reason: task.reason.clone(),
        progress: progress_of(core, task),
        start_time: clock::rfc3339(task.created_ms),
    }
}

/// What a filter looks at in a task of both kinds.
fn filter_values<'a>(
    [id, image, key, start]: [&'a str; 4],
    state: v1::StoreImageTaskState,
    name: &str,
) -> Vec<Cow<'a, str>> {
    vec![match name {
        "task-id" => id.into(),
        "image-id" => image.into(),
        "object-key" => key.into(),
        "start-time" => start.into(),
        _ => match state {
            v1::StoreImageTaskState::Completed => "completed",
            v1::StoreImageTaskState::Failed => "failed",
            v1::StoreImageTaskState::InProgress | v1::StoreImageTaskState::Unspecified => "in-progress",
        }
        .into(),
    }]
}

impl Api {
    pub(crate) fn do_list_store_tasks(
        &self,
        account: &str,
        mut request: v1::ListStoreImageTasksRequest,
    ) -> ApiResult<v1::ListStoreImageTasksResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListStoreImageTasks", account, &request, page.as_ref())?
            .ids("image_ids", &request.image_ids, image::check_id)?
            .filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        let found: Vec<v1::StoreImageTask> = tables
            .tasks
            .iter()
            .filter(|(id, task)| task.account_id == account && listing.is_ahead(id))
            .filter_map(|(_, task)| Some(view(&self.core, task, job(task)?)))
            .filter(|task| listing.names(&task.image_id))
            .filter(|task| {
                let (id, image, key) = (&task.task_id, &task.image_id, &task.object_key);
                listing.matches(|name| filter_values([id, image, key, &task.start_time], task.state(), name))
            })
            .collect();
        let (tasks, page) = listing.page(&found, |found| &found.task_id);
        Ok(v1::ListStoreImageTasksResponse { tasks, page })
    }

    pub(crate) fn do_list_restore_tasks(
        &self,
        account: &str,
        mut request: v1::ListRestoreImageTasksRequest,
    ) -> ApiResult<v1::ListRestoreImageTasksResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListRestoreImageTasks", account, &request, page.as_ref())?
            .ids("image_ids", &request.image_ids, image::check_id)?
            .filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        let found: Vec<v1::RestoreImageTask> = tables
            .tasks
            .iter()
            .filter(|(id, task)| task.account_id == account && listing.is_ahead(id))
            .filter_map(|(_, task)| Some(restore_view(&self.core, task, restore_job(task)?)))
            .filter(|task| listing.names(&task.image_id))
            .filter(|task| {
                let (id, image, key) = (&task.task_id, &task.image_id, &task.object_key);
                listing.matches(|name| filter_values([id, image, key, &task.start_time], task.state(), name))
            })
            .collect();
        let (tasks, page) = listing.page(&found, |found| &found.task_id);
        Ok(v1::ListRestoreImageTasksResponse { tasks, page })
    }
}
