//! The gRPC services. Each file answers one service's calls, or a part of a large one.

use std::sync::Arc;

use crate::api_error::{ApiError, ApiResult};
use crate::core::Core;

pub(crate) mod account;
pub(crate) mod agent;
pub(crate) mod attach;
pub(crate) mod attribute;
pub(crate) mod bundle;
pub(crate) mod console;
pub(crate) mod copy_image;
pub(crate) mod copy_snapshot;
pub(crate) mod create_image;
pub(crate) mod enroll;
pub(crate) mod export;
pub(crate) mod fast_restore;
pub(crate) mod host;
pub(crate) mod idempotency;
pub(crate) mod image;
pub(crate) mod import;
pub(crate) mod instance;
pub(crate) mod instance_type;
pub(crate) mod key_pair;
pub(crate) mod lifecycle;
pub(crate) mod objects;
pub(crate) mod register;
pub(crate) mod replace_root;
pub(crate) mod reports;
pub(crate) mod run;
pub(crate) mod session;
pub(crate) mod snapshot;
pub(crate) mod snapshot_set;
pub(crate) mod storage;
pub(crate) mod store_image;
pub(crate) mod store_image_tasks;
pub(crate) mod tag;
pub(crate) mod task;
pub(crate) mod token;
pub(crate) mod volume;
pub(crate) mod volume_reports;
pub(crate) mod watch;

/// Attempts of a call when records change under it.
pub(crate) const MAX_ATTEMPTS: u32 = 20;

/// Implements every service.
#[derive(Clone)]
pub(crate) struct Api {
    pub core: Arc<Core>,
}

/// Runs work that must not stop halfway when its caller hangs up.
pub(crate) async fn detached<T: Send + 'static>(
    core: &Core,
    work: impl Future<Output = ApiResult<T>> + Send + 'static,
) -> ApiResult<T> {
    match core.tasks.spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("the call ended unexpectedly: {error}"))),
    }
}
