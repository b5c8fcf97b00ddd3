//! Bundles: disks of instance-store-backed images, as manifest and parts in the object store. Those of images are made here, those
//! of instances by their hosts.
//! Sources: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_BundleInstance.html>, `API_DescribeBundleTasks`,
//! `API_CancelBundleTask`.

use std::borrow::Cow;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_snapshot::{BundleManifest, BundleSpec, ManifestSource, StorageError, load_bundle, write_bundle};
use hearth_store::Txn;
use hearth_types::InstanceState;
use object_store::path::Path;
use object_store::{Error, ObjectStoreExt};
use rec::TaskState;
use rec::task::Kind;
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::idempotency::ClientToken;
use super::{Api, image, instance, snapshot, task};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Commit, Core, encode};
use crate::keys;
use crate::life;
use crate::listing::Listing;
use crate::storage;
use crate::tables::Tables;

pub(crate) const PREFIX: &str = "bun";
/// Folder of all bundles in the object store.
pub(crate) const FOLDER: &str = "bundle";
const MANIFEST: &str = ".manifest.json";
const FILTERS: [&str; 6] = ["bundle-id", "instance-id", "image-id", "state", "start-time", "update-time"];
const MAX_PREFIX_CHARS: usize = 200;
/// Parts that are looked for at a time.
const PARALLEL_LOOKS: usize = 16;

/// Key of the manifest of a bundle.
fn location(job: &rec::BundleJob) -> String {
    format!("{}/{}{MANIFEST}", job.prefix, job.name)
}

fn is_plain(part: &str) -> bool {
    (1..=64).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// Folder in the object store of what an account calls `prefix`.
pub(crate) fn folder(root: &str, account: &str, prefix: &str) -> ApiResult<String> {
    let prefix = prefix.trim_matches('/');
    if prefix.is_empty() {
        return Ok(format!("{root}/{account}"));
    }
    if prefix.len() > MAX_PREFIX_CHARS || !prefix.split('/').all(is_plain) {
        let message = "must be names of 1 to 64 letters, digits, '-' and '_', separated by '/'";
        return Err(ApiError::invalid("prefix", message));
    }
    Ok(format!("{root}/{account}/{prefix}"))
}

fn job(task: &rec::Task) -> Option<&rec::BundleJob> {
    match &task.kind {
        Some(Kind::Bundle(job)) => Some(job),
        _ => None,
    }
}

/// Bundles that a host is to make.
pub(crate) fn desired<'a>(tables: &'a Tables, host: &'a str) -> impl Iterator<Item = v1::DesiredBundle> + 'a {
    task::open(tables).filter(move |task| task.host_id == host).filter_map(|task| {
        let job = job(task)?;
        Some(v1::DesiredBundle {
            bundle_id: task.task_id.clone(),
            instance_id: job.instance_id.clone(),
            prefix: job.prefix.clone(),
            name: job.name.clone(),
            attributes_json: job.attributes_json.clone(),
        })
    })
}

/// Whether an object belongs to a bundle called so.
fn is_part_of(key: &str, prefix: &str, name: &str) -> bool {
    let file = key.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('/'));
    let rest = file.and_then(|file| file.strip_prefix(name));
    rest.is_some_and(|rest| rest == MANIFEST || is_part_suffix(rest))
}

fn is_part_suffix(text: &str) -> bool {
    text.strip_prefix(".part.").is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a host makes the bundle that this object is of.
pub(crate) fn is_written_by(tables: &Tables, host: &str, key: &str) -> bool {
    let mut jobs = task::open(tables).filter(|task| task.host_id == host).filter_map(|task| job(task));
    jobs.any(|job| is_part_of(key, &job.prefix, &job.name))
}

/// Whether a host has an instance whose root disk is made of the bundle that this object is of.
pub(crate) fn is_read_by(tables: &Tables, host: &str, key: &str) -> bool {
    let mut here = tables.instances_on.get(host).into_iter().flatten().filter_map(|id| tables.instance(id));
    here.any(|(spec, _)| {
        let root = spec.spec.as_ref().and_then(|spec| spec.bundle_root.as_ref());
        let name = root.and_then(|root| root.manifest_location.strip_suffix(MANIFEST)?.rsplit_once('/'));
        name.is_some_and(|(prefix, name)| is_part_of(key, prefix, name))
    })
}

fn view(core: &Core, task: &rec::Task, job: &rec::BundleJob) -> v1::BundleTask {
    let state = task.state();
    v1::BundleTask {
        bundle_id: task.task_id.clone(),
        instance_id: job.instance_id.clone(),
        image_id: job.image_id.clone(),
        state: match state {
            TaskState::Complete => v1::BundleTaskState::Complete,
            TaskState::Failed => v1::BundleTaskState::Failed,
            TaskState::Running => v1::BundleTaskState::Storing,
            TaskState::Pending | TaskState::Unspecified => v1::BundleTaskState::Pending,
        }
        .into(),
        state_reason: task.reason.clone(),
        progress: if state == TaskState::Complete { 100 } else { core.live.percent(&task.task_id) },
        image_location: if state == TaskState::Complete { location(job) } else { String::new() },
        start_time: clock::rfc3339(task.created_ms),
        update_time: clock::rfc3339(task.updated_ms),
    }
}

fn filter_values<'a>(task: &'a v1::BundleTask, name: &str) -> Vec<Cow<'a, str>> {
    let text = match name {
        "bundle-id" => task.bundle_id.as_str(),
        "instance-id" => &task.instance_id,
        "image-id" => &task.image_id,
        "state" => match task.state() {
            v1::BundleTaskState::Complete => "complete",
            v1::BundleTaskState::Failed => "failed",
            v1::BundleTaskState::Storing => "storing",
            v1::BundleTaskState::Pending | v1::BundleTaskState::Unspecified => "pending",
        },
        "start-time" => &task.start_time,
        _ => &task.update_time,
    };
    vec![text.into()]
}

fn not_found(ids: &[&str]) -> ApiError {
    ApiError::not_found("InvalidBundleID.NotFound", "bundle task", ids)
}

fn find<'a>(tables: &'a Tables, account: &str, id: &str) -> ApiResult<(&'a rec::Task, &'a rec::BundleJob)> {
    task::check_id(PREFIX, id)?;
    let found = tables.tasks.get(id).filter(|task| task.account_id == account);
    found.and_then(|task| Some((&*task.value, job(task)?))).ok_or_else(|| not_found(&[id]))
}

/// What the manifest tells about the disk, for who registers it.
fn attributes(root_device_name: &str, cmdline: &str, extra_cmdline: &str) -> String {
    let mut map = serde_json::Map::new();
    map.insert("architecture".to_owned(), "x86_64".into());
    for (name, value) in
        [("root_device_name", root_device_name), ("cmdline", cmdline), ("extra_cmdline", extra_cmdline)]
    {
        if !value.is_empty() {
            map.insert(name.to_owned(), value.into());
        }
    }
    serde_json::Value::Object(map).to_string()
}

/// A complete bundle.
pub(crate) struct Found {
    pub location: String,
    pub sha256: String,
    pub manifest: BundleManifest,
}

impl Found {
    /// An attribute that is a text.
    pub fn attribute(&self, name: &str) -> &str {
        self.manifest.attributes.get(name).and_then(serde_json::Value::as_str).unwrap_or_default()
    }
}

fn invalid(message: String) -> ApiError {
    ApiError::new(Code::InvalidArgument, "InvalidManifest", message)
}

/// Folder and name of the account's bundle with its manifest at this place.
fn parse(account: &str, asked: &str) -> ApiResult<(String, String)> {
    let own = format!("{FOLDER}/{account}/");
    let location = if asked.starts_with(&own) { asked.to_owned() } else { format!("{own}{asked}") };
    let named = location.strip_suffix(MANIFEST).and_then(|rest| rest.rsplit_once('/'));
    let Some((prefix, name)) = named.filter(|(_, name)| is_plain(name)) else {
        return Err(invalid(format!("'{asked:.200}' must end in NAME{MANIFEST}")));
    };
    let prefix = folder(FOLDER, account, prefix.strip_prefix(own.trim_end_matches('/')).unwrap_or_default())?;
    Ok((prefix, name.to_owned()))
}

/// One at a time works on what is at a place: no bundle is written over, none goes that is being registered.
pub(crate) async fn turn(core: &Core, account: &str, asked: &str) -> ApiResult<Option<OwnedMutexGuard<()>>> {
    let (prefix, name) = parse(account, asked)?;
    let place = format!("{prefix}/{name}{MANIFEST}");
    let turn = ClientToken::new(account, "BundleAt", &place, &v1::ListBundleTasksRequest::default());
    Ok(match &turn {
        Some(turn) => Some(core.token_locks.lock(turn).await),
        None => None,
    })
}

/// The account's bundle with its manifest at this place, all parts of which are there.
pub(crate) async fn open(core: &Core, account: &str, asked: &str) -> ApiResult<Found> {
    let (prefix, name) = parse(account, asked)?;
    let location = format!("{prefix}/{name}{MANIFEST}");
    let objects = &*core.storage.objects;
    let (manifest, sha256) = load_bundle(objects, &location, None).await.map_err(|error| match error {
        StorageError::Objects { .. } => ApiError::unavailable(error.to_string()),
        error => invalid(error.to_string()),
    })?;
    let parts: Vec<(Path, u64)> =
        manifest.parts.iter().map(|part| (Path::from(format!("{prefix}/{}", part.object)), part.bytes)).collect();
    let looks = parts.into_iter().map(|(path, bytes)| async move {
        match objects.head(&path).await {
            Ok(meta) if meta.size == bytes => Ok(()),
            Ok(meta) => Err(format!("part {path} has {} bytes instead of {bytes}", meta.size)),
            Err(error) => Err(format!("part {path}: {error}")),
        }
    });
    let looked = futures::stream::iter(looks).buffer_unordered(PARALLEL_LOOKS).try_collect::<()>().await;
    looked.map_err(invalid)?;
    Ok(Found { location, sha256, manifest })
}

impl Api {
    pub(crate) async fn do_create_bundle(
        &self,
        account: String,
        mut request: v1::CreateBundleRequest,
    ) -> ApiResult<v1::BundleTask> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let account = account.as_str();
        let token = ClientToken::new(account, "CreateBundle", &token_text, &request);
        if !is_plain(&request.name) {
            return Err(ApiError::invalid("name", "must be 1 to 64 letters, digits, '-' and '_'"));
        }
        let prefix = folder(FOLDER, account, &request.prefix)?;
        if request.instance_id.is_empty() == request.image_id.is_empty() {
            return Err(ApiError::invalid("instance_id", "exactly one of instance_id and image_id must be given"));
        }
        let new = rec::BundleJob { prefix, name: request.name.clone(), ..Default::default() };
        let place = location(&new);
        let _turn = turn(&self.core, account, &place).await?;
        for _ in 0..super::MAX_ATTEMPTS {
            let replayed = token.as_ref().map(|token| token.replay(&self.core.tables())).transpose()?.flatten();
            if let Some(ids) = replayed {
                let tables = self.core.tables();
                let (task, job) = find(&tables, account, ids.first().map_or("", String::as_str))?;
                return Ok(view(&self.core, task, job));
            }
            let taken = |what: &str| {
                ApiError::duplicate("InvalidBundleName.Duplicate", format!("{what} at {place}; choose another name"))
            };
            match self.core.storage.objects.head(&Path::from(place.as_str())).await {
                Err(Error::NotFound { .. }) => {}
                Ok(_) => return Err(taken("there is a bundle")),
                Err(error) => return Err(ApiError::unavailable(format!("object store: {error}"))),
            }
            let (task, txn) = {
                let tables = self.core.tables();
                if task::open(&tables).filter_map(|task| job(task)).any(|job| location(job) == place) {
                    return Err(taken("a bundle is being made"));
                }
                let (kind, host_id, txn) = match request.image_id.as_str() {
                    "" => of_instance(&tables, account, &request.instance_id, new.clone())?,
                    id => of_image(&tables, account, id, new.clone())?,
                };
                let task = rec::Task { host_id, ..task::new(account, PREFIX, &token_text, kind)? };
                let txn = txn.put(keys::task(account, &task.task_id), encode(&task));
                let ids = std::slice::from_ref(&task.task_id);
                let txn = token.as_ref().map_or(txn.clone(), |token| token.record(txn, ids));
                (task, txn)
            };
            if self.core.commit(txn).await? == Commit::Done {
                let job = job(&task).cloned().unwrap_or_default();
                tracing::info!(task = task.task_id, place, "a bundle is asked for");
                return Ok(view(&self.core, &task, &job));
            }
        }
        Err(ApiError::unavailable("too many changes at the same time; try again"))
    }

    pub(crate) fn do_list_bundle_tasks(
        &self,
        account: &str,
        mut request: v1::ListBundleTasksRequest,
    ) -> ApiResult<v1::ListBundleTasksResponse> {
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListBundleTasks", account, &request, page.as_ref())?
            .ids("bundle_ids", &request.bundle_ids, |id| task::check_id(PREFIX, id))?
            .filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        listing.all_known(|id| find(&tables, account, id).is_ok(), not_found)?;
        let found: Vec<v1::BundleTask> = tables
            .tasks
            .iter()
            .filter(|(id, task)| task.account_id == account && listing.wants(id))
            .filter_map(|(_, task)| Some(view(&self.core, task, job(task)?)))
            .filter(|task| listing.matches(|name| filter_values(task, name)))
            .collect();
        let (tasks, page) = listing.page(&found, |found| &found.bundle_id);
        Ok(v1::ListBundleTasksResponse { tasks, page })
    }

    pub(crate) async fn do_cancel_bundle(&self, account: &str, id: &str) -> ApiResult<v1::BundleTask> {
        find(&self.core.tables(), account, id)?;
        if !give_up(&self.core, id, task::reason(task::CANCELLED, "it was called off")).await? {
            let message = format!("bundle task {id} has ended");
            return Err(ApiError::wrong_state("IncorrectState", message).with("bundle_id", id));
        }
        let tables = self.core.tables();
        let (task, job) = find(&tables, account, id)?;
        Ok(view(&self.core, task, job))
    }
}

impl Api {
    pub(crate) async fn do_delete_bundle(&self, account: String, asked: String) -> ApiResult<()> {
        let _turn = turn(&self.core, &account, &asked).await?;
        let (prefix, name) = parse(&account, &asked)?;
        let gone = rec::BundleJob { prefix, name, ..Default::default() };
        let place = location(&gone);
        check_unused(&self.core.tables(), &place)?;
        let failed = |error: Error| ApiError::unavailable(format!("object store: {error}"));
        let objects = &*self.core.storage.objects;
        let path = Path::from(place.as_str());
        let is_there = match objects.head(&path).await {
            Ok(_) => true,
            Err(Error::NotFound { .. }) => false,
            Err(error) => return Err(failed(error)),
        };
        // Without its manifest it is no bundle any more; what a crash leaves of it goes with the next try.
        if is_there {
            objects.delete(&path).await.map_err(failed)?;
        }
        match remove_parts(&self.core, &gone).await {
            0 if !is_there => Err(ApiError::not_found("InvalidBundle.NotFound", "bundle", &[&place])),
            _ => Ok(()),
        }
    }
}

/// Whether nothing needs the bundle at this place.
fn check_unused(tables: &Tables, place: &str) -> ApiResult<()> {
    let in_use = |what: &str, id: &str| {
        let message = format!("{what} {id} needs the bundle at {place}");
        Err(ApiError::wrong_state("InvalidBundle.InUse", message).with("resource_id", id))
    };
    let mut images = tables.images.iter().filter_map(|(id, entry)| Some((id, entry.spec.as_ref()?)));
    if let Some((id, _)) = images.find(|(_, spec)| spec.image_location == place && !spec.deregistered) {
        return in_use("image", id);
    }
    let mut instances = tables.instances.keys().filter_map(|id| tables.instance(id));
    let starting = instances.find(|(spec, status)| {
        let root = spec.spec.as_ref().and_then(|spec| spec.bundle_root.as_ref());
        let is_pending = life::state_of(spec, status.as_deref()) == InstanceState::Pending;
        is_pending && root.is_some_and(|root| root.manifest_location == place)
    });
    if let Some((spec, _)) = starting {
        return in_use("instance", &spec.instance_id);
    }
    match task::open(tables).find(|task| job(task).is_some_and(|job| location(job) == place)) {
        Some(task) => in_use("task", &task.task_id),
        None => Ok(()),
    }
}

/// The root disk of an instance, as it is.
fn of_instance(tables: &Tables, account: &str, id: &str, new: rec::BundleJob) -> ApiResult<(Kind, String, Txn)> {
    let (spec, status) = instance::find(tables, account, id)?;
    let agent_spec = spec.spec.clone().unwrap_or_default();
    if agent_spec.bundle_root.is_none() {
        let message = format!("instance {id} has an EBS root device; make an image of it and bundle that");
        return Err(ApiError::wrong_state("UnsupportedOperation", message).with("instance_id", id));
    }
    let state = life::state_of(&spec, status.as_deref());
    if state != InstanceState::Running {
        return Err(super::lifecycle::wrong_state(id, state, "bundled"));
    }
    if task::open(tables).filter_map(|task| job(task)).any(|job| job.instance_id == id) {
        let message = format!("instance {id} is being bundled");
        return Err(ApiError::wrong_state("BundlingInProgress", message).with("instance_id", id));
    }
    let boot = agent_spec.boot.unwrap_or_default();
    let attributes_json = attributes(&agent_spec.root_device_name, &boot.cmdline, &boot.extra_cmdline);
    let key = keys::instance_spec(account, id);
    let txn = Txn::new().compare_mod_revision(&key, spec.revision);
    let job = rec::BundleJob { instance_id: id.to_owned(), attributes_json, ..new };
    Ok((Kind::Bundle(job), spec.host_id.clone(), txn))
}

/// The root disk of an image.
fn of_image(tables: &Tables, account: &str, id: &str, new: rec::BundleJob) -> ApiResult<(Kind, String, Txn)> {
    let (spec, status) = image::find(tables, account, id)?;
    if status.is_none_or(|status| status.state() != v1::ImageState::Available) {
        let message = format!("image {id} is not available");
        return Err(ApiError::wrong_state("InvalidAMIID.Unavailable", message).with("image_id", id));
    }
    let root = image::root_device_name(spec);
    let source = image::root_snapshot(spec).ok_or_else(|| ApiError::invalid("image_id", "has no EBS root volume"))?;
    let source = snapshot::find_completed(tables, account, source)?;
    let base = source.base();
    if storage::is_encrypted(&base) {
        let message = format!("snapshot {} is encrypted; a bundle would have it in clear", base.snapshot_id);
        return Err(ApiError::wrong_state("UnsupportedOperation", message).with("snapshot_id", &base.snapshot_id));
    }
    if base.size_bytes > hearth_snapshot::MAX_BUNDLE_DISK_BYTES {
        let most = hearth_snapshot::MAX_BUNDLE_DISK_BYTES;
        let message = format!("its root disk has {} bytes, a bundle at most {most}", base.size_bytes);
        return Err(ApiError::invalid("image_id", message));
    }
    let boot = spec.boot.clone().unwrap_or_default();
    let attributes_json = attributes(&root, &boot.cmdline, &boot.extra_cmdline);
    let job = rec::BundleJob { image_id: id.to_owned(), attributes_json, source: Some(base), ..new };
    Ok((Kind::Bundle(job), String::new(), source.pin(Txn::new())))
}

/// Works in what a host tells of a bundle that it makes.
pub(crate) async fn apply_report(core: &Arc<Core>, host: &str, report: v1::BundleReport) -> ApiResult<()> {
    let id = report.bundle_id.as_str();
    let known = core.tables().tasks.get(id).cloned();
    let Some(known) = known.filter(|task| task.host_id == host && task::is_open(task)) else { return Ok(()) };
    let Some(job) = job(&known) else { return Ok(()) };
    match report.state() {
        v1::ObservedBundle::Storing => {
            task::begin(core, id).await?;
            core.live.set_percent(id, Some(percent(report.done_bytes, report.total_bytes)));
            Ok(())
        }
        v1::ObservedBundle::Complete => {
            let there = load_bundle(&*core.storage.objects, &location(job), Some(&report.manifest_sha256)).await;
            match there {
                Ok((_, sha256)) => complete(core, id, &sha256).await,
                Err(StorageError::Objects { action, path, source }) => {
                    Err(ApiError::unavailable(format!("cannot {action} object {path}: {source}")))
                }
                Err(error) => give_up(core, id, task::failure(error.to_string())).await.map(|_| ()),
            }
        }
        v1::ObservedBundle::Failed => {
            let message: String = report.error.chars().take(1000).collect();
            give_up(core, id, task::failure(message)).await.map(|_| ())
        }
        v1::ObservedBundle::Unspecified => Ok(()),
    }
}

fn percent(done: u64, total: u64) -> u32 {
    done.min(total).saturating_mul(100).checked_div(total).and_then(|percent| u32::try_from(percent).ok()).unwrap_or(0)
}

async fn complete(core: &Core, id: &str, sha256: &str) -> ApiResult<()> {
    let done = task::change(core, id, |task| {
        task.set_state(TaskState::Complete);
        if let Some(Kind::Bundle(job)) = &mut task.kind {
            job.manifest_sha256 = sha256.to_owned();
        }
    });
    if done.await? {
        tracing::info!(task = id, "bundle complete");
    }
    core.live.set_percent(id, None);
    Ok(())
}

/// Ends the task and removes what was stored; `false` when it had ended.
pub(crate) async fn give_up(core: &Core, id: &str, why: v1::StateReason) -> ApiResult<bool> {
    let job = core.tables().tasks.get(id).and_then(|task| job(task).cloned());
    let first = task::fail(core, id, why).await?;
    if let Some(job) = job.filter(|_| first) {
        remove_parts(core, &job).await;
    }
    Ok(first)
}

/// Removes the parts of a bundle without a manifest; answers how many. What a writer that has not heard of it yet adds is removed when the task is
/// forgotten.
pub(crate) async fn remove_parts(core: &Core, job: &rec::BundleJob) -> usize {
    let objects = &*core.storage.objects;
    let removed = async {
        match objects.head(&Path::from(location(job))).await {
            Err(Error::NotFound { .. }) => {}
            other => return other.map(|_| 0),
        }
        let folder = Path::from(job.prefix.as_str());
        let listed = objects.list_with_delimiter(Some(&folder)).await?;
        let dead = listed
            .objects
            .into_iter()
            .map(|meta| meta.location)
            .filter(|path| is_part_of(path.as_ref(), &job.prefix, &job.name));
        let mut count = 0;
        for path in dead {
            objects.delete(&path).await?;
            count += 1;
        }
        Ok::<usize, Error>(count)
    };
    match removed.await {
        Ok(0) => 0,
        Ok(parts) => {
            tracing::info!(prefix = job.prefix, name = job.name, parts, "parts of a bundle without a manifest removed");
            parts
        }
        Err(error) => {
            tracing::warn!(prefix = job.prefix, name = job.name, %error, "parts of a bundle stay");
            0
        }
    }
}

/// Makes the bundle of an image; called again after a restart it begins anew.
pub(crate) async fn make(core: &Arc<Core>, id: &str, job: &rec::BundleJob, called_off: &CancellationToken) {
    let made = tokio::select! {
        made = write(core, id, job) => made,
        () = called_off.cancelled() => return,
        () = core.stop.cancelled() => return,
    };
    let noted = match made {
        Ok(sha256) => complete(core, id, &sha256).await,
        Err(error) => give_up(core, id, task::failure(error.to_string())).await.map(|_| ()),
    };
    if let Err(error) = noted {
        tracing::warn!(task = id, %error, "the end of a task could not be noted; it is done again");
    }
}

async fn write(core: &Arc<Core>, id: &str, job: &rec::BundleJob) -> ApiResult<String> {
    let failed = |error: StorageError| ApiError::internal(format!("bundle: {error}"));
    let Some(base) = &job.source else { return Err(ApiError::internal("a bundle of nothing")) };
    task::begin(core, id).await?;
    let manifest = Arc::new(storage::load_manifest(core, base).await?);
    let store = core.storage.chunks(storage::name_of_domain(base))?;
    let attributes = serde_json::from_str(&job.attributes_json).unwrap_or_default();
    let spec = BundleSpec {
        prefix: job.prefix.clone(),
        name: job.name.clone(),
        disk_bytes: manifest.size_bytes(),
        attributes,
    };
    let source = ManifestSource::new(store, manifest).map_err(failed)?;
    let (live, task_id) = (core.clone(), id.to_owned());
    let progress = Arc::new(move |done: u64, total: u64| {
        live.live.set_percent(&task_id, Some(percent(done, total)));
    });
    let made = write_bundle(&*core.storage.objects, spec, &source, progress).await.map_err(failed)?;
    Ok(made.manifest_sha256)
}
