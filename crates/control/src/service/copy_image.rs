//! Copies of images: each has snapshots of its own, so that it lives on when the source goes. The image is pending until they are
//! complete; each step is found from the records, by the call or later by the reconciler.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CopyImage.html>

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::SnapshotState;

use super::idempotency::ClientToken;
use super::register::{available, new_image};
use super::{Api, image, snapshot};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::core::encode;
use crate::keys;
use crate::tables::SCHEMA_VERSION;

/// Under tokens of this call the snapshots of copies are made.
const CALL: &str = "SnapshotOfCopy";

fn no_request(spec: &rec::ImageSpec) -> v1::GetImageRequest {
    v1::GetImageRequest { image_id: spec.image_id.clone() }
}

fn token_of(spec: &rec::ImageSpec, index: usize) -> Option<ClientToken> {
    ClientToken::new(&spec.account_id, CALL, &format!("{}-{index}", spec.image_id), &no_request(spec))
}

impl Api {
    pub(crate) async fn do_copy_image(
        &self,
        account: String,
        mut request: v1::CopyImageRequest,
    ) -> ApiResult<v1::Image> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let account = account.as_str();
        let token = ClientToken::new(account, "CopyImage", &token_text, &request);
        check::tags_of("snapshot_tags", &request.snapshot_tags)?;
        let mut spec = new_image(account, &request.name, &request.description, &request.tags, &token_text)?;
        spec.snapshot_tags.clone_from(&request.snapshot_tags);
        let made = self
            .register(account, token.as_ref(), |tables| {
                let (source, status) = image::find(tables, account, &request.source_image_id)?;
                let status = status.cloned().unwrap_or_default();
                if status.state() != v1::ImageState::Available {
                    let message = format!("image {} is not available", source.image_id);
                    return Err(ApiError::wrong_state("InvalidAMIID.Unavailable", message));
                }
                let mut txn = Txn::new()
                    .compare_mod_revision(keys::image_spec(&source.account_id, &source.image_id), source.revision);
                for ebs in source.block_device_mappings.iter().filter_map(|mapping| mapping.ebs.as_ref()) {
                    if !ebs.snapshot_id.is_empty() {
                        txn = snapshot::find_completed(tables, account, &ebs.snapshot_id)?.pin(txn);
                    }
                }
                let description = match spec.description.as_str() {
                    "" => source.description.clone(),
                    own => own.to_owned(),
                };
                let spec = rec::ImageSpec {
                    description,
                    root_device_name: source.root_device_name.clone(),
                    boot: source.boot.clone(),
                    block_device_mappings: source.block_device_mappings.clone(),
                    source_image: source.image_id.clone(),
                    encrypt_copy: request.encrypted,
                    image_location: source.image_location.clone(),
                    bundle_sha256: source.bundle_sha256.clone(),
                    ..spec.clone()
                };
                let status = rec::ImageStatus {
                    schema_version: SCHEMA_VERSION,
                    state: v1::ImageState::Pending.into(),
                    size_bytes: status.size_bytes,
                    ..Default::default()
                };
                Ok((spec, status, txn))
            })
            .await?;
        if let Err(error) = self.advance_image(&made.image_id).await {
            tracing::warn!(image = made.image_id, %error, "the copy of an image will be tried again");
        }
        let tables = self.core.tables();
        let (spec, status) = image::find(&tables, account, &made.image_id)?;
        Ok(image::view(spec, status))
    }

    /// Makes the snapshots of a copy that are missing, then makes it available.
    pub(crate) async fn advance_copy(&self, found: &rec::ImageSpec) -> ApiResult<()> {
        // Call and reconciler may look at the same copy: one after the other, the second at what the first has made of it.
        let turn = ClientToken::new(&found.account_id, CALL, &found.image_id, &no_request(found));
        let _turn = match &turn {
            Some(turn) => Some(self.core.token_locks.lock(turn).await),
            None => None,
        };
        let Some((spec, true)) = self.pending_image(&found.image_id) else { return Ok(()) };
        let spec = &*spec;
        let mut mappings = spec.block_device_mappings.clone();
        let mut made = Vec::new();
        let mut pending = false;
        for (index, ebs) in mappings.iter_mut().filter_map(|mapping| mapping.ebs.as_mut()).enumerate() {
            if ebs.snapshot_id.is_empty() {
                continue;
            }
            let description = format!("Copied for {} from {}", spec.image_id, spec.source_image);
            let order = snapshot::order(&spec.account_id, description, spec.snapshot_tags.clone(), String::new())?;
            let copied = self.copy_snapshot(order, &ebs.snapshot_id, spec.encrypt_copy, token_of(spec, index)).await;
            match copied {
                Ok(copied) if copied.state() == v1::SnapshotState::Completed => {
                    ebs.encrypted = Some(copied.encrypted);
                    ebs.snapshot_id.clone_from(&copied.snapshot_id);
                    made.push(copied.snapshot_id);
                }
                // Its content is being stored anew; looked at again when it has come further.
                Ok(copied) if copied.state() == v1::SnapshotState::Pending => pending = true,
                Ok(copied) => {
                    let why = copied.state_reason.map(|reason| reason.message).unwrap_or_default();
                    return self.give_up_copy(spec, &format!("a snapshot could not be copied: {why}")).await;
                }
                Err(error) => {
                    return self.give_up_copy(spec, &format!("a snapshot could not be copied: {error}")).await;
                }
            }
        }
        if pending {
            return Ok(());
        }
        let (account, id) = (&spec.account_id, &spec.image_id);
        let (key, status_key) = (keys::image_spec(account, id), keys::image_status(account, id));
        let whole = self
            .core
            .update(|tables| {
                let Some(entry) = tables.images.get(id) else { return Ok((None, true)) };
                let (Some(known), Some(status)) = (&entry.spec, &entry.status) else { return Ok((None, true)) };
                if status.state() != v1::ImageState::Pending {
                    return Ok((None, true));
                }
                let new = rec::ImageSpec { block_device_mappings: mappings.clone(), ..(*known.value).clone() };
                let mut txn = Txn::new()
                    .compare_mod_revision(&key, known.revision)
                    .compare_mod_revision(&status_key, status.revision)
                    .put(&key, encode(&new))
                    .put(&status_key, encode(&available(status.size_bytes)));
                for id in &made {
                    match snapshot::find_completed(tables, account, id) {
                        Ok(source) => txn = source.pin(txn),
                        Err(_) => return Ok((None, false)),
                    }
                }
                Ok((Some(txn), true))
            })
            .await?;
        match whole {
            true => Ok(()),
            false => self.give_up_copy(spec, "a snapshot of it was deleted").await,
        }
    }

    /// Ends a copy that will never be available, and deletes what was made for it.
    async fn give_up_copy(&self, spec: &rec::ImageSpec, why: &str) -> ApiResult<()> {
        let (account, id) = (&spec.account_id, &spec.image_id);
        let (key, status_key) = (keys::image_spec(account, id), keys::image_status(account, id));
        let failed = rec::ImageStatus {
            schema_version: SCHEMA_VERSION,
            state: v1::ImageState::Failed.into(),
            reason: Some(v1::StateReason { code: "Server.InternalError".to_owned(), message: why.to_owned() }),
            ..Default::default()
        };
        self.core
            .update(|tables| {
                let Some(known) = tables.images.get(id).and_then(|entry| entry.spec.as_ref()) else {
                    return Ok((None, ()));
                };
                // The source's snapshots are nobody's concern here any more.
                let new = rec::ImageSpec { block_device_mappings: Vec::new(), ..(*known.value).clone() };
                let txn = Txn::new()
                    .compare_mod_revision(&key, known.revision)
                    .put(&key, encode(&new))
                    .put(&status_key, encode(&failed))
                    .delete(keys::image_name(account, &spec.name));
                Ok((Some(txn), ()))
            })
            .await?;
        tracing::warn!(image = id, name = spec.name, why, "the copy of an image failed");
        let made: Vec<String> = {
            let tables = self.core.tables();
            let tokens = (0..spec.block_device_mappings.len()).filter_map(|index| token_of(spec, index));
            let ids = tokens.filter_map(|token| token.replay(&tables).ok().flatten()).flatten();
            ids.filter(|id| {
                tables
                    .snapshot(id)
                    .is_some_and(|(_, status)| snapshot::state_of(status.as_deref()) != SnapshotState::Pending)
            })
            .collect()
        };
        for id in made {
            if let Err(error) = self.do_delete_snapshot(&spec.account_id, &id).await {
                tracing::debug!(snapshot = id, %error, "the snapshot of an image that was not copied stays");
            }
        }
        Ok(())
    }
}
