//! Tags of instances, images, volumes, snapshots and key pairs.

use hearth_proto::v1;
use hearth_store::Txn;
use tonic::{Request, Response, Status};

use super::{Api, instance, key_pair, snapshot, volume};
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::check;
use crate::core::encode;
use crate::keys;
use crate::life;
use crate::paging::Pager;
use crate::tables::{Tables, account_of};

const FILTERS: [&str; 4] = ["key", "value", "resource-id", "resource-type"];
/// Most resources in one call.
const MAX_RESOURCES: usize = 50;

/// Applies `change` to the tags of one resource and adds what must be written to the transaction.
fn change_tags(
    tables: &Tables,
    account: &str,
    id: &str,
    txn: Txn,
    change: &impl Fn(&[v1::Tag]) -> Vec<v1::Tag>,
) -> ApiResult<Txn> {
    let apply = |tags: &[v1::Tag]| -> ApiResult<Vec<v1::Tag>> {
        let changed = change(tags);
        check::tags(&changed).map_err(|error| error.with("resource_id", id))?;
        Ok(changed)
    };
    match id.split('-').next() {
        Some("i") => {
            let (spec, status) = instance::find(tables, account, id)?;
            if life::state_of(&spec, status.as_deref()).is_final() {
                return Err(instance::not_found(&[id]));
            }
            let mut new = (*spec.value).clone();
            if let Some(agent_spec) = &mut new.spec {
                agent_spec.tags = apply(&agent_spec.tags)?;
            }
            // The host tells tags to the guest.
            new.generation = new.generation.saturating_add(1);
            let key = keys::instance_spec(account, id);
            Ok(txn.compare_mod_revision(&key, spec.revision).put(&key, encode(&new)))
        }
        Some("ami") => {
            let spec = super::image::find_own(tables, account, id)?;
            let mut new = (*spec.value).clone();
            new.tags = apply(&new.tags)?;
            let key = keys::image_spec(account, id);
            Ok(txn.compare_mod_revision(&key, spec.revision).put(&key, encode(&new)))
        }
        Some("vol") => {
            let spec = volume::find(tables, account, id)?;
            let mut new = (*spec.value).clone();
            new.tags = apply(&new.tags)?;
            let key = keys::volume(account, id);
            Ok(txn.compare_mod_revision(&key, spec.revision).put(&key, encode(&new)))
        }
        Some("snap") => {
            let (spec, _) = snapshot::find(tables, account, id)?;
            let mut new = (*spec.value).clone();
            new.tags = apply(&new.tags)?;
            let key = keys::snapshot_spec(account, id);
            Ok(txn.compare_mod_revision(&key, spec.revision).put(&key, encode(&new)))
        }
        Some("key") => {
            let found = key_pair::find(tables, account, id).filter(|key| key.key_pair_id == id);
            let key = found.ok_or_else(|| ApiError::not_found("InvalidKeyPair.NotFound", "key pair", &[id]))?;
            let mut new = (*key.value).clone();
            new.tags = apply(&new.tags)?;
            let record = keys::key_pair(account, id);
            Ok(txn.compare_mod_revision(&record, key.revision).put(&record, encode(&new)))
        }
        _ => Err(ApiError::new(
            tonic::Code::InvalidArgument,
            "InvalidID",
            format!(
                "'{id}' is not the id of an instance (i-), an image (ami-), a volume (vol-), a snapshot (snap-) or a key pair (key-)"
            ),
        )),
    }
}

/// Every tag of an account, sorted by resource id and key.
fn all_tags(tables: &Tables, account: &str) -> Vec<v1::TaggedResource> {
    let mut all = Vec::new();
    let mut add = |id: &str, kind: &str, tags: &[v1::Tag]| {
        all.extend(tags.iter().map(|tag| v1::TaggedResource {
            resource_id: id.to_owned(),
            resource_type: kind.to_owned(),
            tag: Some(tag.clone()),
        }));
    };
    for (id, entry) in &tables.instances {
        if let Some(spec) = entry.spec.as_ref().filter(|spec| account_of(spec) == account) {
            add(id, "instance", spec.spec.as_ref().map_or(&[], |s| &s.tags));
        }
    }
    for (id, entry) in &tables.images {
        if let Some(spec) = entry.spec.as_ref().filter(|spec| spec.account_id == account && !spec.deregistered) {
            add(id, "image", &spec.tags);
        }
    }
    for (id, spec) in tables.volumes.iter().filter(|(_, spec)| spec.account_id == account) {
        add(id, "volume", &spec.tags);
    }
    for (id, entry) in &tables.snapshots {
        if let Some(spec) = entry.spec.as_ref().filter(|spec| spec.account_id == account && !spec.deleted) {
            add(id, "snapshot", &spec.tags);
        }
    }
    for (id, key) in tables.key_pairs.iter().filter(|(_, key)| key.account_id == account) {
        add(id, "key-pair", &key.tags);
    }
    let key = |tagged: &v1::TaggedResource| tagged.tag.as_ref().map(|tag| tag.key.clone());
    all.sort_by_cached_key(|tagged| (tagged.resource_id.clone(), key(tagged)));
    all
}

impl Api {
    async fn update_tags(
        &self,
        account: &str,
        ids: &[String],
        change: impl Fn(&[v1::Tag]) -> Vec<v1::Tag>,
    ) -> ApiResult<()> {
        let ids = check::ids("resource_ids", ids)?;
        if ids.len() > MAX_RESOURCES {
            let message = format!("{} resources, at most {MAX_RESOURCES} in one call", ids.len());
            return Err(ApiError::invalid("resource_ids", message));
        }
        self.core
            .update(|tables| {
                let txn = ids.iter().try_fold(Txn::new(), |txn, id| change_tags(tables, account, id, txn, &change))?;
                if txn.size() > super::run::MAX_TXN_BYTES {
                    let message = "too many resources with much user data at once; tag fewer in one call";
                    return Err(ApiError::invalid("resource_ids", message));
                }
                Ok((Some(txn), ()))
            })
            .await
    }
}

#[tonic::async_trait]
impl v1::tag_service_server::TagService for Api {
    async fn create_tags(
        &self,
        request: Request<v1::CreateTagsRequest>,
    ) -> Result<Response<v1::CreateTagsResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        let request = request.into_inner();
        if request.tags.is_empty() {
            return Err(ApiError::missing("tags").into());
        }
        check::tags(&request.tags)?;
        let added = request.tags;
        self.update_tags(&account, &request.resource_ids, |tags| {
            let kept = tags.iter().filter(|tag| added.iter().all(|new| new.key != tag.key));
            kept.chain(&added).cloned().collect()
        })
        .await?;
        Ok(Response::new(v1::CreateTagsResponse {}))
    }

    async fn delete_tags(
        &self,
        request: Request<v1::DeleteTagsRequest>,
    ) -> Result<Response<v1::DeleteTagsResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        let request = request.into_inner();
        if request.tags.len() > hearth_types::tag::MAX_TAGS {
            return Err(ApiError::invalid("tags", format!("at most {}", hearth_types::tag::MAX_TAGS)).into());
        }
        let deleted = request.tags;
        self.update_tags(&account, &request.resource_ids, |tags| {
            let hit = |tag: &v1::Tag| {
                deleted.iter().any(|d| d.key == tag.key && d.value.as_ref().is_none_or(|value| *value == tag.value))
            };
            // Without tags, all go: EC2's rule.
            tags.iter().filter(|tag| !deleted.is_empty() && !hit(tag)).cloned().collect()
        })
        .await?;
        Ok(Response::new(v1::DeleteTagsResponse {}))
    }

    async fn list_tags(&self, request: Request<v1::ListTagsRequest>) -> Result<Response<v1::ListTagsResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        let mut request = request.into_inner();
        let page = request.page.take();
        let pager = Pager::new(&self.core, "ListTags", &account, &request, page.as_ref())?;
        let filters = check::filters(&request.filters, &FILTERS)?;
        let all = all_tags(&self.core.tables(), &account);
        let keyed: Vec<(String, v1::TaggedResource)> = all
            .into_iter()
            .filter(|tagged| {
                let tag = tagged.tag.clone().unwrap_or_default();
                filters.matches(|name| {
                    vec![match name {
                        "key" => tag.key.clone().into(),
                        "value" => tag.value.clone().into(),
                        "resource-id" => tagged.resource_id.clone().into(),
                        _ => std::borrow::Cow::from(tagged.resource_type.clone()),
                    }]
                })
            })
            .map(|tagged| {
                let key = tagged.tag.as_ref().map_or("", |tag| tag.key.as_str());
                (format!("{}\0{key}", tagged.resource_id), tagged)
            })
            .filter(|(key, _)| pager.wants(key))
            .collect();
        let (tags, page) = pager.collect(keyed.iter().map(|(key, tagged)| (key.as_str(), tagged.clone())));
        Ok(Response::new(v1::ListTagsResponse { tags, page }))
    }
}
