//! Reconcilers: each looks at the tables alone and does what is missing, kicked by changes and repeated by a timer. What they do
//! may be done twice or be interrupted anywhere without harm.

use std::sync::Arc;
use std::time::Duration;

use hearth_proto::record::v1 as rec;
use hearth_store::Txn;
use tokio::task::JoinSet;

use crate::api_error::ApiResult;
use crate::clock;
use crate::core::Core;
use crate::keys;
use crate::life;
use crate::service::import;
use crate::tables::{Tables, account_of};

pub(crate) mod images;
pub(crate) mod tasks;
pub(crate) mod volumes;

/// Pause after a run, so that a storm of changes is one run.
const SETTLE: Duration = Duration::from_millis(200);
/// Most objects dealt with in one transaction.
const BATCH: usize = 20;

/// Starts all of them.
pub(crate) fn spawn(core: &Arc<Core>, tasks: &mut JoinSet<()>) {
    let reconciler = core.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = run(&reconciler) => {}
            () = reconciler.stop.cancelled() => {}
        }
    });
    let collector = core.clone();
    tasks.spawn(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(jittered(collector.config.collect_interval)) => {}
                () = collector.stop.cancelled() => return,
            }
            match crate::service::storage::collect(&collector, false).await {
                Ok(done) => tracing::debug!(?done, "garbage collected"),
                Err(error) => tracing::warn!(%error, "garbage could not be collected; it is tried again"),
            }
        }
    });
    // Hosts that do not come back after a start of the control plane.
    let watcher = core.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = tokio::time::sleep(watcher.config.host_timeout + Duration::from_millis(10)) => {}
            () = watcher.stop.cancelled() => return,
        }
        let hosts: Vec<String> = watcher.tables().hosts.keys().cloned().collect();
        for host in hosts.iter().filter(|host| !watcher.live.is_up(host)) {
            tracing::warn!(host, "the host has not come back since the control plane started");
            watcher.host_changed(host);
        }
    });
}

async fn run(core: &Arc<Core>) {
    loop {
        for (what, result) in [
            ("tombstones", tombstones(core).await),
            ("tokens", tokens(core).await),
            ("volumes", volumes::advance(core).await),
            ("snapshots", volumes::snapshots(core).await),
            ("images", images::advance(core).await),
            ("tasks", tasks::advance(core).await),
        ] {
            if let Err(error) = result {
                tracing::warn!(what, %error, "a reconciler could not finish; it is run again");
            }
        }
        tokio::time::sleep(SETTLE).await;
        tokio::select! {
            () = core.reconcile.notified() => {}
            () = tokio::time::sleep(jittered(core.config.resync_interval)) => {}
        }
    }
}

/// Between 0.75 and 1.25 of `interval`, so that several control planes and kinds of work do not fall into step.
fn jittered(interval: Duration) -> Duration {
    let mut byte = [0u8; 1];
    // Without randomness there is no jitter, and no harm.
    let _ = getrandom::fill(&mut byte);
    let [byte] = byte;
    interval.mul_f64(0.75 + f64::from(byte) / 510.0)
}

/// Forgets instances that have been terminated for a while.
async fn tombstones(core: &Core) -> ApiResult<()> {
    let before = clock::now_ms().saturating_sub(clock::as_ms(core.config.tombstone_ttl));
    let expired = |tables: &Tables| -> Vec<(String, Txn)> {
        let old = tables.instances.keys().filter_map(|id| tables.instance(id)).filter(|(spec, status)| {
            life::state_of(spec, status.as_deref()).is_final()
                && status.as_ref().is_some_and(|status| status.terminated_ms <= before)
        });
        old.take(BATCH)
            .map(|(spec, status)| {
                let account = account_of(&spec);
                let (spec_key, status_key) = (
                    keys::instance_spec(account, &spec.instance_id),
                    keys::instance_status(account, &spec.instance_id),
                );
                let txn = Txn::new()
                    .compare_mod_revision(&spec_key, spec.revision)
                    .compare_mod_revision(&status_key, status.as_ref().map_or(0, |status| status.revision))
                    .delete(&spec_key)
                    .delete(&status_key);
                (spec.instance_id.clone(), txn)
            })
            .collect()
    };
    loop {
        let batch = expired(&core.tables());
        if batch.is_empty() {
            return Ok(());
        }
        for (id, txn) in batch {
            core.commit(txn).await?;
            tracing::debug!(instance = id, "forgotten");
        }
    }
}

/// Forgets join tokens that have expired and answers for client tokens that are older than promised.
async fn tokens(core: &Core) -> ApiResult<()> {
    let now = clock::now_ms();
    let old = now.saturating_sub(clock::as_ms(core.config.client_token_ttl));
    loop {
        let expired: Vec<String> = {
            let tables = core.tables();
            let join = tables.join_tokens.iter().filter(|(_, token)| token.expires_ms <= now);
            // An upload that is still awaited is found by its token.
            let is_awaited =
                |token: &rec::ClientToken| token.resource_ids.iter().any(|id| import::pending(&tables, id).is_some());
            let client = tables.client_tokens.iter().filter(|(_, token)| token.created_ms <= old && !is_awaited(token));
            join.map(|(hash, _)| keys::join_token(hash)).chain(client.map(|(key, _)| key.clone())).take(BATCH).collect()
        };
        if expired.is_empty() {
            return Ok(());
        }
        core.commit(expired.into_iter().fold(Txn::new(), |txn, key| txn.delete(key))).await?;
    }
}
