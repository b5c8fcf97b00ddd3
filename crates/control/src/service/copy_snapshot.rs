//! Snapshots that no host makes: copies of others, and those of volumes that no host has seen.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CopySnapshot.html>

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;

use super::idempotency::ClientToken;
use super::snapshot::{NO_VOLUME, Order, find, find_completed, new_record, order, view};
use super::{Api, snapshot_set};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, encode};
use crate::keys;
use crate::quotas::{self, Wanted};
use crate::storage;
use crate::tables::SCHEMA_VERSION;

impl Api {
    /// Finishes what no host has to do with: at once if it shares everything with what it is made from, in the background if its
    /// content is to be stored anew. A crash in between is noticed at the next start.
    pub(crate) async fn finish(&self, spec: &rec::SnapshotSpec) -> ApiResult<()> {
        if !storage::changes_domain(spec) {
            return self.finish_or_fail(spec).await;
        }
        // The content is that of a manifest, which does not change any more.
        let status = rec::SnapshotStatus { schema_version: SCHEMA_VERSION, frozen: true, ..Default::default() };
        let key = keys::snapshot_status(&spec.account_id, &spec.snapshot_id);
        let txn = Txn::new()
            .compare_exists(keys::snapshot_spec(&spec.account_id, &spec.snapshot_id))
            .compare_absent(&key)
            .put(&key, encode(&status));
        self.core.commit(txn).await?;
        let (api, spec) = (self.clone(), spec.clone());
        tokio::spawn(async move {
            let stop = api.core.stop.clone();
            let finished = api.finish_or_fail(&spec);
            tokio::select! {
                finished = finished => {
                    if let Err(error) = finished {
                        tracing::warn!(snapshot = spec.snapshot_id, %error, "the copy of a snapshot failed");
                    }
                }
                // Done again after the next start.
                () = stop.cancelled() => {}
            }
        });
        Ok(())
    }

    /// [`Self::finish_untouched`]; what cannot be finished does not stay pending.
    pub(crate) async fn finish_or_fail(&self, spec: &rec::SnapshotSpec) -> ApiResult<()> {
        let done = self.finish_untouched(spec).await;
        if let Err(error) = &done {
            snapshot_set::fail(&self.core, &spec.snapshot_id, &error.to_string()).await?;
        }
        done
    }

    /// A volume that no host has seen yet is what it was made from.
    async fn finish_untouched(&self, spec: &rec::SnapshotSpec) -> ApiResult<()> {
        let (root, full_bytes) = storage::write_manifest(&self.core, spec).await?;
        let status = rec::SnapshotStatus {
            schema_version: SCHEMA_VERSION,
            state: v1::SnapshotState::Completed.into(),
            frozen: true,
            root,
            full_bytes,
            completed_ms: clock::now_ms(),
            ..Default::default()
        };
        let txn = Txn::new()
            .compare_exists(keys::snapshot_spec(&spec.account_id, &spec.snapshot_id))
            .put(keys::snapshot_status(&spec.account_id, &spec.snapshot_id), encode(&status));
        self.core.commit(txn).await.map(|_| ())
    }

    pub(crate) async fn do_copy_snapshot(
        &self,
        account: String,
        mut request: v1::CopySnapshotRequest,
    ) -> ApiResult<v1::Snapshot> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let token = ClientToken::new(&account, "CopySnapshot", &token_text, &request);
        let order = order(&account, request.description, request.tags, token_text)?;
        self.copy_snapshot(order, &request.source_snapshot_id, request.encrypted, token).await
    }

    /// A snapshot of its own with the content of another, once for each token; encrypted if that is wished or the other one is.
    pub(crate) async fn copy_snapshot(
        &self,
        order: Order,
        source_id: &str,
        encrypted: bool,
        token: Option<ClientToken>,
    ) -> ApiResult<v1::Snapshot> {
        let account = order.account.clone();
        for _ in 0..super::MAX_ATTEMPTS {
            let (spec, txn) = {
                let tables = self.core.tables();
                if let Some(ids) = token.as_ref().map(|token| token.replay(&tables)).transpose()?.flatten() {
                    let id = ids.first().map_or("", String::as_str);
                    let (spec, status) = find(&tables, &account, id)?;
                    return Ok(view(&self.core, spec, status.map(|status| &*status.value)));
                }
                let source = find_completed(&tables, &account, source_id)?;
                // A manifest of its own, over the same chunks unless they are to be encrypted.
                let volume = rec::VolumeSpec {
                    volume_id: NO_VOLUME.to_owned(),
                    account_id: account.clone(),
                    volume: Some(v1::HostVolume {
                        size_bytes: source.spec.volume_bytes,
                        base: Some(source.base()),
                        ..Default::default()
                    }),
                    encrypted: encrypted || source.spec.encrypted,
                    ..Default::default()
                };
                let spec = new_record(&tables, &order, &volume)?;
                let guard = quotas::check(&self.core.config, &tables, &account, &Wanted::snapshots(1))?;
                let txn = guard.apply(source.guard(storage::guard_epoch(Txn::new(), &tables)));
                let txn = txn.put(keys::snapshot_spec(&account, &spec.snapshot_id), encode(&spec));
                let ids = std::slice::from_ref(&spec.snapshot_id);
                let txn = token.as_ref().map_or(txn.clone(), |token| token.record(txn, ids));
                (spec, txn)
            };
            if self.core.commit(txn).await? == Commit::Done {
                self.finish(&spec).await?;
                let tables = self.core.tables();
                let (spec, status) = find(&tables, &account, &spec.snapshot_id)?;
                return Ok(view(&self.core, spec, status.map(|status| &*status.value)));
            }
        }
        Err(ApiError::unavailable("too many changes at the same time; try again"))
    }
}
