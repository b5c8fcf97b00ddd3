//! Work that takes long and is no resource of its own: its records and how it ends. What each kind does is in `bundle`,
//! `store_image` and `replace_root`.

use std::collections::HashMap;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use parking_lot::Mutex;
use rec::task::Kind;
use tokio_util::sync::CancellationToken;

use crate::api_error::{ApiError, ApiResult};
use crate::clock;
use crate::core::{Core, encode};
use crate::keys;
use crate::tables::{SCHEMA_VERSION, Tables, Versioned};

/// A task that its user has called off.
pub(crate) const CANCELLED: &str = "Client.UserInitiatedCancel";
const FAILED: &str = "Server.InternalError";

/// Tasks that this control plane works on now.
#[derive(Default)]
pub(crate) struct Jobs(Mutex<HashMap<String, CancellationToken>>);

impl Jobs {
    /// Takes a task; `None` when it has been taken. The token tells when it is called off.
    pub fn take(&self, task: &str) -> Option<CancellationToken> {
        let mut jobs = self.0.lock();
        if jobs.contains_key(task) {
            return None;
        }
        let token = CancellationToken::new();
        jobs.insert(task.to_owned(), token.clone());
        Some(token)
    }

    /// Whether it has been taken.
    pub fn has(&self, task: &str) -> bool {
        self.0.lock().contains_key(task)
    }

    pub fn done(&self, task: &str) {
        self.0.lock().remove(task);
    }

    pub fn cancel(&self, task: &str) {
        if let Some(token) = self.0.lock().get(task) {
            token.cancel();
        }
    }
}

/// A new task of this kind, not written yet.
pub(crate) fn new(account: &str, prefix: &str, client_token: &str, kind: Kind) -> ApiResult<rec::Task> {
    let mut bytes = [0u8; 9];
    getrandom::fill(&mut bytes)?;
    let mut digits = hex::encode(bytes);
    digits.truncate(hearth_types::id::ID_HEX_DIGITS);
    let now_ms = clock::now_ms();
    Ok(rec::Task {
        schema_version: SCHEMA_VERSION,
        task_id: format!("{prefix}-{digits}"),
        account_id: account.to_owned(),
        state: rec::TaskState::Pending.into(),
        created_ms: now_ms,
        updated_ms: now_ms,
        client_token: client_token.to_owned(),
        kind: Some(kind),
        ..Default::default()
    })
}

/// Whether an id is one of these tasks', as far as its form goes.
pub(crate) fn check_id(prefix: &str, id: &str) -> ApiResult<()> {
    let digits = id.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    match digits {
        Some(digits) if digits.len() == hearth_types::id::ID_HEX_DIGITS && digits.bytes().all(is_digit) => Ok(()),
        _ => Err(ApiError::invalid("task_id", format!("'{id:.40}' must be '{prefix}-' and 17 hex digits"))),
    }
}

pub(crate) fn is_open(task: &rec::Task) -> bool {
    !matches!(task.state(), rec::TaskState::Complete | rec::TaskState::Failed)
}

/// Tasks that have not ended.
pub(crate) fn open(tables: &Tables) -> impl Iterator<Item = &Versioned<rec::Task>> {
    tables.tasks.values().filter(|task| is_open(task))
}

/// Manifests that open tasks read.
pub(crate) fn sources(task: &rec::Task) -> Vec<v1::BaseSnapshot> {
    match &task.kind {
        Some(Kind::Bundle(job)) => job.source.iter().cloned().collect(),
        Some(Kind::StoreImage(job)) => job.disks.iter().filter_map(|disk| disk.source.clone()).collect(),
        Some(Kind::RestoreImage(_) | Kind::ReplaceRoot(_)) | None => Vec::new(),
    }
}

pub(crate) fn reason(code: &str, message: impl Into<String>) -> v1::StateReason {
    v1::StateReason { code: code.to_owned(), message: message.into() }
}

pub(crate) fn failure(message: impl Into<String>) -> v1::StateReason {
    reason(FAILED, message)
}

/// Changes a task that has not ended; `false` when it has.
pub(crate) async fn change(core: &Core, id: &str, change: impl Fn(&mut rec::Task)) -> ApiResult<bool> {
    core.update(|tables| {
        let Some(known) = tables.tasks.get(id).filter(|task| is_open(task)) else { return Ok((None, false)) };
        let mut new = (*known.value).clone();
        change(&mut new);
        if new == *known.value {
            return Ok((None, true));
        }
        new.updated_ms = clock::now_ms();
        let key = keys::task(&known.account_id, id);
        Ok((Some(Txn::new().compare_mod_revision(&key, known.revision).put(&key, encode(&new))), true))
    })
    .await
}

/// Notes that work has begun.
pub(crate) async fn begin(core: &Core, id: &str) -> ApiResult<bool> {
    change(core, id, |task| task.set_state(rec::TaskState::Running)).await
}

/// Ends a task that will not complete; `false` when it had ended.
pub(crate) async fn fail(core: &Core, id: &str, why: v1::StateReason) -> ApiResult<bool> {
    let first = change(core, id, |task| {
        task.set_state(rec::TaskState::Failed);
        task.reason = Some(why.clone());
    });
    let first = first.await?;
    core.jobs.cancel(id);
    core.live.set_percent(id, None);
    if first {
        tracing::warn!(task = id, why = why.message, "the task failed");
    }
    Ok(first)
}
