//! Images: finding, listing and deregistering them. Importing is in `import`.

use std::borrow::Cow;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::ImageId;
use hearth_types::volume::{GIB, ROOT_DEVICE_NAME};
use tonic::{Request, Response, Status, Streaming};

use super::{Api, import};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::check;
use crate::clock;
use crate::core::{Core, encode};
use crate::keys;
use crate::listing::Listing;
use crate::tables::{ImageEntry, Tables, Versioned};

const FILTERS: [&str; 18] = [
    "image-id",
    "name",
    "description",
    "state",
    "architecture",
    "owner-id",
    "image-type",
    "creation-date",
    "root-device-type",
    "block-device-mapping.device-name",
    "block-device-mapping.snapshot-id",
    "block-device-mapping.volume-size",
    "block-device-mapping.volume-type",
    "block-device-mapping.delete-on-termination",
    "block-device-mapping.encrypted",
    "tag-key",
    "tag-value",
    "tag:",
];

/// The device that instances of an image boot from.
pub(crate) fn root_device_name(spec: &rec::ImageSpec) -> String {
    match spec.root_device_name.as_str() {
        "" => ROOT_DEVICE_NAME.to_owned(),
        name => name.to_owned(),
    }
}

/// The snapshot of its root disk.
pub(crate) fn root_snapshot(spec: &rec::ImageSpec) -> Option<&str> {
    let root = root_device_name(spec);
    let mapping = spec.block_device_mappings.iter().find(|mapping| mapping.device_name == root)?;
    mapping.ebs.as_ref().map(|ebs| ebs.snapshot_id.as_str()).filter(|id| !id.is_empty())
}

pub(crate) fn view(spec: &rec::ImageSpec, status: Option<&rec::ImageStatus>) -> v1::Image {
    let status = status.cloned().unwrap_or_default();
    let state = match (spec.deregistered, status.state()) {
        (true, _) => v1::ImageState::Deregistered,
        (_, v1::ImageState::Unspecified) => v1::ImageState::Pending,
        (_, state) => state,
    };
    v1::Image {
        image_id: spec.image_id.clone(),
        account_id: spec.account_id.clone(),
        name: spec.name.clone(),
        description: spec.description.clone(),
        state: state.into(),
        state_reason: status.reason,
        architecture: "x86_64".to_owned(),
        size_bytes: status.size_bytes,
        boot: spec.boot.clone(),
        tags: spec.tags.clone(),
        creation_date: clock::rfc3339(spec.created_ms),
        root_device_name: root_device_name(spec),
        root_device_type: if spec.image_location.is_empty() { "ebs" } else { "instance-store" }.to_owned(),
        block_device_mappings: spec.block_device_mappings.clone(),
        image_location: spec.image_location.clone(),
        progress: None,
        upload_expires: String::new(),
    }
}

/// [`view`] with what is to be told of an import that has not ended.
fn current_view(core: &Core, tables: &Tables, spec: &rec::ImageSpec, status: Option<&rec::ImageStatus>) -> v1::Image {
    let mut image = view(spec, status);
    if let Some(found) = import::pending(tables, &spec.image_id) {
        let (progress, upload_expires) = import::seen(core, &found);
        image.progress = Some(progress);
        image.upload_expires = upload_expires;
    }
    image
}

fn state_name(state: v1::ImageState) -> &'static str {
    match state {
        v1::ImageState::Available => "available",
        v1::ImageState::Failed => "failed",
        v1::ImageState::Deregistered => "deregistered",
        v1::ImageState::Pending | v1::ImageState::Unspecified => "pending",
    }
}

pub(crate) fn check_id(id: &str) -> ApiResult<()> {
    match id.parse::<ImageId>() {
        Ok(_) => Ok(()),
        Err(error) => Err(ApiError::malformed_id("InvalidAMIID.Malformed", "image_id", &error)),
    }
}

fn not_found(ids: &[&str]) -> ApiError {
    ApiError::not_found("InvalidAMIID.NotFound", "image", ids)
}

/// Accounts use their own images and those of operators.
fn may_use(tables: &Tables, account: &str, spec: &rec::ImageSpec) -> bool {
    spec.account_id == account || tables.accounts.get(&spec.account_id).is_some_and(|owner| owner.is_operator)
}

fn visible<'a>(tables: &Tables, account: &str, entry: &'a ImageEntry) -> Option<&'a Versioned<rec::ImageSpec>> {
    entry.spec.as_ref().filter(|spec| !spec.deregistered && may_use(tables, account, spec))
}

/// An image that the account may use.
pub(crate) fn find<'a>(
    tables: &'a Tables,
    account: &str,
    id: &str,
) -> ApiResult<(&'a Versioned<rec::ImageSpec>, Option<&'a rec::ImageStatus>)> {
    check_id(id)?;
    let entry = tables.images.get(id).ok_or_else(|| not_found(&[id]))?;
    let spec = visible(tables, account, entry).ok_or_else(|| not_found(&[id]))?;
    Ok((spec, entry.status.as_deref()))
}

/// An image that the account may change.
pub(crate) fn find_own<'a>(tables: &'a Tables, account: &str, id: &str) -> ApiResult<&'a Versioned<rec::ImageSpec>> {
    let (spec, _) = find(tables, account, id)?;
    match spec.account_id == account {
        true => Ok(spec),
        false => Err(ApiError::unauthorized(format!("image {id} is another account's")).with("image_id", id)),
    }
}

fn filter_values<'a>(image: &'a v1::Image, name: &str) -> Vec<Cow<'a, str>> {
    if let Some(field) = name.strip_prefix("block-device-mapping.") {
        return image.block_device_mappings.iter().filter_map(|mapping| mapping_value(mapping, field)).collect();
    }
    let text = match name {
        "image-id" => &image.image_id,
        "name" => &image.name,
        "description" => &image.description,
        "state" => return vec![state_name(image.state()).into()],
        "architecture" => &image.architecture,
        "owner-id" => &image.account_id,
        // There are no kernel and ramdisk images.
        "image-type" => return vec!["machine".into()],
        "creation-date" => &image.creation_date,
        "root-device-type" => &image.root_device_type,
        other => return check::tag_values(&image.tags, other).unwrap_or_default(),
    };
    vec![text.as_str().into()]
}

/// What a filter looks at in one mapping.
fn mapping_value<'a>(mapping: &'a v1::BlockDeviceMapping, field: &str) -> Option<Cow<'a, str>> {
    if field == "device-name" {
        return Some(mapping.device_name.as_str().into());
    }
    let ebs = mapping.ebs.as_ref()?;
    Some(match field {
        "snapshot-id" => ebs.snapshot_id.as_str().into(),
        "volume-size" => ebs.volume_size_bytes.div_ceil(GIB).to_string().into(),
        "volume-type" => ebs.volume_type.as_str().into(),
        "delete-on-termination" => ebs.delete_on_termination?.to_string().into(),
        _ => ebs.encrypted?.to_string().into(),
    })
}

impl Api {
    fn do_list_images(&self, account: &str, mut request: v1::ListImagesRequest) -> ApiResult<v1::ListImagesResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListImages", account, &request, page.as_ref())?
            .ids("image_ids", &request.image_ids, check_id)?
            .filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        listing.all_known(|id| find(&tables, account, id).is_ok(), not_found)?;
        let found: Vec<v1::Image> = tables
            .images
            .iter()
            .filter(|(id, _)| listing.wants(id))
            .filter_map(|(_, entry)| {
                let spec = visible(&tables, account, entry)?;
                Some(current_view(&self.core, &tables, spec, entry.status.as_deref()))
            })
            .filter(|image| listing.matches(|name| filter_values(image, name)))
            .collect();
        let (images, page) = listing.page(&found, |image| &image.image_id);
        Ok(v1::ListImagesResponse { images, page })
    }

    async fn do_deregister_image(&self, account: &str, id: &str, with_snapshots: bool) -> ApiResult<()> {
        find_own(&self.core.tables(), account, id)?;
        if import::give_up(&self.core, id).await? {
            tracing::info!(image = id, "an import was given up as asked");
            return Ok(());
        }
        let mut snapshots = Vec::new();
        self.core
            .update(|tables| {
                let spec = find_own(tables, account, id)?;
                let of_mappings = spec.block_device_mappings.iter().filter_map(|mapping| mapping.ebs.as_ref());
                snapshots = of_mappings.map(|ebs| ebs.snapshot_id.clone()).filter(|id| !id.is_empty()).collect();
                let entry = tables.images.get(id);
                let state = entry.and_then(|entry| entry.status.as_ref()).map(|status| status.state());
                if matches!(state, None | Some(v1::ImageState::Pending)) {
                    let message = format!("image {id} is still being made");
                    return Err(ApiError::wrong_state("IncorrectImageState", message).with("image_id", id));
                }
                let new = rec::ImageSpec { deregistered: true, ..(*spec.value).clone() };
                let key = keys::image_spec(account, id);
                let mut txn = Txn::new().compare_mod_revision(&key, spec.revision).put(&key, encode(&new));
                if spec.import.is_some() {
                    txn = import::forget_token(txn, spec);
                }
                // A failed import has given its name back already.
                if state == Some(v1::ImageState::Available) {
                    txn = txn.delete(keys::image_name(account, &spec.name));
                }
                Ok((Some(txn), ()))
            })
            .await?;
        for snapshot in snapshots.iter().filter(|_| with_snapshots) {
            // One that another image stands on, or that is gone, stays as it is.
            if let Err(error) = self.do_delete_snapshot(account, snapshot).await {
                tracing::info!(image = id, snapshot, %error, "a snapshot of the deregistered image stays");
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl v1::image_service_server::ImageService for Api {
    type ImportImageStream = import::ImportStream;

    async fn import_image(
        &self,
        request: Request<Streaming<v1::ImportImageRequest>>,
    ) -> Result<Response<Self::ImportImageStream>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(import::start(self.core.clone(), account, request.into_inner()).await?))
    }

    async fn register_image(&self, request: Request<v1::RegisterImageRequest>) -> Result<Response<v1::Image>, Status> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        let made = super::detached(&self.core, async move { api.do_register_image(account, request).await });
        Ok(Response::new(made.await?))
    }

    async fn create_image(&self, request: Request<v1::CreateImageRequest>) -> Result<Response<v1::Image>, Status> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        let made = super::detached(&self.core, async move { api.do_create_image(account, request).await });
        Ok(Response::new(made.await?))
    }

    async fn copy_image(&self, request: Request<v1::CopyImageRequest>) -> Result<Response<v1::Image>, Status> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        let made = super::detached(&self.core, async move { api.do_copy_image(account, request).await });
        Ok(Response::new(made.await?))
    }

    async fn create_bundle(
        &self,
        request: Request<v1::CreateBundleRequest>,
    ) -> Result<Response<v1::BundleTask>, Status> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        let made = super::detached(&self.core, async move { api.do_create_bundle(account, request).await });
        Ok(Response::new(made.await?))
    }

    async fn list_bundle_tasks(
        &self,
        request: Request<v1::ListBundleTasksRequest>,
    ) -> Result<Response<v1::ListBundleTasksResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_bundle_tasks(&account, request.into_inner())?))
    }

    async fn cancel_bundle_task(
        &self,
        request: Request<v1::CancelBundleTaskRequest>,
    ) -> Result<Response<v1::BundleTask>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_cancel_bundle(&account, &request.into_inner().bundle_id).await?))
    }

    async fn delete_bundle(
        &self,
        request: Request<v1::DeleteBundleRequest>,
    ) -> Result<Response<v1::DeleteBundleResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        let (api, location) = (self.clone(), request.into_inner().image_location);
        super::detached(&self.core, async move { api.do_delete_bundle(account, location).await }).await?;
        Ok(Response::new(v1::DeleteBundleResponse {}))
    }

    async fn delete_stored_image(
        &self,
        request: Request<v1::DeleteStoredImageRequest>,
    ) -> Result<Response<v1::DeleteStoredImageResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        self.do_delete_stored(&account, &request.into_inner().object_key).await?;
        Ok(Response::new(v1::DeleteStoredImageResponse {}))
    }

    async fn create_store_image_task(
        &self,
        request: Request<v1::CreateStoreImageTaskRequest>,
    ) -> Result<Response<v1::StoreImageTask>, Status> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        let made = super::detached(&self.core, async move { api.do_store_image(account, request).await });
        Ok(Response::new(made.await?))
    }

    async fn list_store_image_tasks(
        &self,
        request: Request<v1::ListStoreImageTasksRequest>,
    ) -> Result<Response<v1::ListStoreImageTasksResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_store_tasks(&account, request.into_inner())?))
    }

    async fn list_restore_image_tasks(
        &self,
        request: Request<v1::ListRestoreImageTasksRequest>,
    ) -> Result<Response<v1::ListRestoreImageTasksResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_restore_tasks(&account, request.into_inner())?))
    }

    async fn create_restore_image_task(
        &self,
        request: Request<v1::CreateRestoreImageTaskRequest>,
    ) -> Result<Response<v1::Image>, Status> {
        let account = auth::caller(&request)?.account_id;
        let (api, request) = (self.clone(), request.into_inner());
        let made = super::detached(&self.core, async move { api.do_restore_image(account, request).await });
        Ok(Response::new(made.await?))
    }

    type ExportImageStream = super::export::ExportStream;

    async fn export_image(
        &self,
        request: Request<v1::ExportImageRequest>,
    ) -> Result<Response<Self::ExportImageStream>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_export_image(&account, request.into_inner()).await?))
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        Ok(Response::new(self.do_list_images(&account, request.into_inner())?))
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<v1::Image>, Status> {
        let account = auth::caller(&request)?.account_id;
        let tables = self.core.tables();
        let (spec, status) = find(&tables, &account, &request.get_ref().image_id)?;
        Ok(Response::new(current_view(&self.core, &tables, spec, status)))
    }

    async fn deregister_image(
        &self,
        request: Request<v1::DeregisterImageRequest>,
    ) -> Result<Response<v1::DeregisterImageResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        let request = request.into_inner();
        self.do_deregister_image(&account, &request.image_id, request.delete_associated_snapshots).await?;
        Ok(Response::new(v1::DeregisterImageResponse {}))
    }
}
