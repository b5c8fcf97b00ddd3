//! Images from snapshots. Those of instances are in `create_image`, those of other images in `copy_image`.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_RegisterImage.html>

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::volume::{GIB, ROOT_DEVICE_NAME};
use hearth_types::{ImageId, VolumeType, check_device_name};

use super::idempotency::ClientToken;
use super::{Api, bundle, image, import};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, encode, id_value};
use crate::keys;
use crate::mappings::{self, Root};
use crate::quotas::{self, Wanted};
use crate::tables::{SCHEMA_VERSION, Tables};

const MAX_DESCRIPTION_CHARS: usize = 1000;

/// Records of a new image, with its name and token taken.
fn register_txn(
    tables: &Tables,
    txn: Txn,
    spec: &rec::ImageSpec,
    status: &rec::ImageStatus,
    token: Option<&ClientToken>,
) -> ApiResult<Txn> {
    let (account, id) = (&spec.account_id, &spec.image_id);
    import::check_name_is_free(tables, account, &spec.name)?;
    let name_key = keys::image_name(account, &spec.name);
    let txn = txn
        .compare_absent(&name_key)
        .put(&name_key, id_value(id))
        .put(keys::image_spec(account, id), encode(spec))
        .put(keys::image_status(account, id), encode(status));
    Ok(match token {
        Some(token) => token.record(txn, std::slice::from_ref(id)),
        None => txn,
    })
}

pub(crate) fn available(size_bytes: u64) -> rec::ImageStatus {
    rec::ImageStatus {
        schema_version: SCHEMA_VERSION,
        state: v1::ImageState::Available.into(),
        size_bytes,
        ..Default::default()
    }
}

pub(crate) fn new_image(
    account: &str,
    name: &str,
    description: &str,
    tags: &[v1::Tag],
    token: &str,
) -> ApiResult<rec::ImageSpec> {
    check::name("name", name)?;
    check::text("description", description, MAX_DESCRIPTION_CHARS)?;
    check::tags(tags)?;
    Ok(rec::ImageSpec {
        schema_version: SCHEMA_VERSION,
        image_id: ImageId::generate()?.to_string(),
        account_id: account.to_owned(),
        name: name.to_owned(),
        description: description.to_owned(),
        tags: tags.to_vec(),
        created_ms: clock::now_ms(),
        client_token: token.to_owned(),
        ..Default::default()
    })
}

/// Whether the IOPS of a type are chosen.
pub(crate) fn is_provisioned(kind: &str) -> bool {
    matches!(kind, "gp3" | "io1" | "io2")
}

/// Mappings with everything that a launch needs filled in.
fn complete(planned: &mappings::PlannedDevices) -> Vec<v1::BlockDeviceMapping> {
    let volumes = planned.volumes.iter().map(|volume| v1::BlockDeviceMapping {
        device_name: volume.device_name.clone(),
        ebs: Some(v1::EbsBlockDevice {
            snapshot_id: volume.source.as_ref().map(|source| source.base().snapshot_id).unwrap_or_default(),
            volume_size_bytes: volume.shape.size_bytes.next_multiple_of(GIB),
            volume_type: volume.shape.kind.name().to_owned(),
            iops: is_provisioned(volume.shape.kind.name()).then_some(volume.shape.iops),
            throughput_mibps: (volume.shape.kind == VolumeType::Gp3).then_some(volume.shape.throughput_mibps),
            delete_on_termination: Some(volume.delete_on_termination),
            encrypted: Some(volume.encrypted),
        }),
        ..Default::default()
    });
    let store = planned.ephemeral.iter().map(|(device_name, number)| v1::BlockDeviceMapping {
        device_name: device_name.clone(),
        virtual_name: format!("ephemeral{number}"),
        ..Default::default()
    });
    volumes.chain(store).collect()
}

impl Api {
    /// The image that an earlier call with this token made.
    fn replay_image(
        &self,
        tables: &Tables,
        account: &str,
        token: Option<&ClientToken>,
    ) -> ApiResult<Option<v1::Image>> {
        let Some(ids) = token.map(|token| token.replay(tables)).transpose()?.flatten() else { return Ok(None) };
        let (spec, status) = image::find(tables, account, ids.first().map_or("", String::as_str))?;
        Ok(Some(image::view(spec, status)))
    }

    /// Writes what `make` makes, again when records have changed meanwhile.
    pub(crate) async fn register(
        &self,
        account: &str,
        token: Option<&ClientToken>,
        mut make: impl FnMut(&Tables) -> ApiResult<(rec::ImageSpec, rec::ImageStatus, Txn)>,
    ) -> ApiResult<v1::Image> {
        for _ in 0..super::MAX_ATTEMPTS {
            let (spec, status, txn) = {
                let tables = self.core.tables();
                if let Some(known) = self.replay_image(&tables, account, token)? {
                    return Ok(known);
                }
                let (spec, status, txn) = make(&tables)?;
                let wanted = Wanted { images: 1, ..Wanted::default() };
                let txn = quotas::check(&self.core.config, &tables, account, &wanted)?.apply(txn);
                let txn = register_txn(&tables, txn, &spec, &status, token)?;
                (spec, status, txn)
            };
            if self.core.commit(txn).await? == Commit::Done {
                tracing::info!(image = spec.image_id, name = spec.name, "image registered");
                return Ok(image::view(&spec, Some(&status)));
            }
        }
        Err(ApiError::unavailable("too many changes at the same time; try again"))
    }

    pub(crate) async fn do_register_image(
        &self,
        account: String,
        mut request: v1::RegisterImageRequest,
    ) -> ApiResult<v1::Image> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let account = account.as_str();
        let token = ClientToken::new(account, "RegisterImage", &token_text, &request);
        mappings::check(&request.block_device_mappings)?;
        import::check_boot(request.boot.as_ref())?;
        let _turn;
        // What a bundle says of itself holds where the request says nothing.
        let bundle = match request.image_location.as_str() {
            "" => None,
            location => {
                _turn = bundle::turn(&self.core, account, location).await?;
                Some(bundle::open(&self.core, account, location).await?)
            }
        };
        let told = bundle.as_ref().map_or("", |bundle| bundle.attribute("root_device_name"));
        let root = match (request.root_device_name.as_str(), told) {
            ("", "") => ROOT_DEVICE_NAME,
            ("", name) | (name, _) => name,
        };
        let root = root.to_owned();
        let root = root.as_str();
        check_device_name(root).map_err(|message| ApiError::invalid("root_device_name", message))?;
        let spec = new_image(account, &request.name, &request.description, &request.tags, &token_text)?;
        if let Some(bundle) = bundle {
            return self.register_bundle(account, token.as_ref(), (spec, root, &request), &bundle).await;
        }
        self.register(account, token.as_ref(), |tables| {
            let planned = mappings::plan(tables, account, Root::Ebs(root), &request.block_device_mappings, usize::MAX)?;
            let first = planned.volumes.first();
            let Some(source) = first.and_then(|volume| volume.source.as_ref()) else {
                let message = format!("the root device {root} needs a snapshot_id");
                return Err(mappings::refused(message));
            };
            let size = source.base().size_bytes;
            let mut txn = Txn::new();
            for source in planned.volumes.iter().filter_map(|volume| volume.source.as_ref()) {
                txn = source.pin(txn);
            }
            let spec = rec::ImageSpec {
                root_device_name: root.to_owned(),
                boot: request.boot.clone(),
                block_device_mappings: complete(&planned),
                ..spec.clone()
            };
            Ok((spec, available(size), txn))
        })
        .await
    }

    /// An image whose instances get their root disk from a bundle.
    async fn register_bundle(
        &self,
        account: &str,
        token: Option<&ClientToken>,
        (spec, root, request): (rec::ImageSpec, &str, &v1::RegisterImageRequest),
        bundle: &bundle::Found,
    ) -> ApiResult<v1::Image> {
        let told = v1::BootOverride {
            extra_cmdline: bundle.attribute("extra_cmdline").to_owned(),
            cmdline: bundle.attribute("cmdline").to_owned(),
        };
        import::check_boot(Some(&told))?;
        let told = Some(told).filter(|boot| *boot != v1::BootOverride::default());
        self.register(account, token, |tables| {
            let mapped = &request.block_device_mappings;
            let planned = mappings::plan(tables, account, Root::Bundle(root), mapped, usize::MAX)?;
            let sources = planned.volumes.iter().filter_map(|volume| volume.source.as_ref());
            let txn = sources.fold(Txn::new(), |txn, source| source.pin(txn));
            // Where nothing is wanted, launches put no instance store.
            let without = mapped.iter().filter(|mapping| mapping.no_device).cloned();
            let spec = rec::ImageSpec {
                root_device_name: root.to_owned(),
                boot: request.boot.clone().or_else(|| told.clone()),
                block_device_mappings: complete(&planned).into_iter().chain(without).collect(),
                image_location: bundle.location.clone(),
                bundle_sha256: bundle.sha256.clone(),
                ..spec.clone()
            };
            Ok((spec, available(bundle.manifest.disk_bytes), txn))
        })
        .await
    }
}
