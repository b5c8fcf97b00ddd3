//! The object store as the control plane sees it: where it is, the keys of what is in it, and the records that the garbage
//! collector goes by.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_snapshot::{
    ChunkStore, Epoch, KeyDomain, KeyDomainId, Ledger, LedgerError, LiveRoot, ManifestSource, ManifestSpec,
    ManifestWriter, ObjectStore, Roots, SnapshotKey, SnapshotUpload, UploadProgress,
};
use hearth_store::Txn;
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::api_error::{ApiError, ApiResult};
use crate::core::{Commit, Core, encode};
use crate::data_keys::KeyWrap;
use crate::keys;
use crate::service::task;
use crate::tables::{SCHEMA_VERSION, Tables};

/// Key domain of all snapshots that are not encrypted: equal content is stored once for all accounts.
pub(crate) const PLAIN_DOMAIN: &str = "plain";

/// Key domain of an account's encrypted snapshots: nobody else can tell what they have in common with others.
pub(crate) fn account_domain(account: &str) -> String {
    format!("account-{account}")
}

/// Whether a manifest is of an encrypted snapshot or volume.
pub(crate) fn is_encrypted(base: &v1::BaseSnapshot) -> bool {
    name_of_domain(base) != PLAIN_DOMAIN
}

/// Name of the key domain that a manifest is in.
pub(crate) fn name_of_domain(base: &v1::BaseSnapshot) -> &str {
    base.key_domain.as_ref().map_or(PLAIN_DOMAIN, |domain| domain.name.as_str())
}

/// The object store and the key that all others come from.
pub(crate) struct Storage {
    /// Where it is, for operators.
    pub url: String,
    pub objects: Arc<dyn ObjectStore>,
    key: Vec<u8>,
}

impl Storage {
    pub fn new(url: String, objects: Arc<dyn ObjectStore>, key: Vec<u8>) -> Self {
        Self { url, objects, key }
    }

    /// 32 bytes that only this cluster can know.
    fn secret(&self, domain: &str) -> [u8; 32] {
        self.derived(b"hearth key domain\0", domain)
    }

    fn derived(&self, purpose: &[u8], name: &str) -> [u8; 32] {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.key) else { return [0; 32] };
        mac.update(purpose);
        mac.update(name.as_bytes());
        mac.finalize().into_bytes().into()
    }

    fn key_wrap(&self) -> ApiResult<KeyWrap> {
        let wrap = KeyWrap::new(&self.derived(b"hearth data keys\0", ""));
        wrap.ok_or_else(|| ApiError::internal("no cipher for data keys"))
    }

    /// The key of a new encrypted volume, wrapped as its record holds it.
    pub fn new_data_key(&self, volume_id: &str) -> ApiResult<Bytes> {
        self.key_wrap()?.generate(volume_id).map_err(|error| ApiError::internal(error.to_string()))
    }

    /// The name with the secret, for a host.
    pub fn domain_for_host(&self, name: &str) -> v1::KeyDomain {
        let secret = self.secret(name).to_vec().into();
        v1::KeyDomain { name: name.to_owned(), secret, encrypt_on_hosts: name != PLAIN_DOMAIN }
    }

    /// The chunks of one key domain.
    pub fn chunks(&self, domain: &str) -> ApiResult<ChunkStore> {
        let id = KeyDomainId::new(domain).map_err(|error| ApiError::internal(error.to_string()))?;
        Ok(ChunkStore::new(self.objects.clone(), KeyDomain::new(id, &self.secret(domain))))
    }

    fn complete_base(&self, base: Option<&mut v1::BaseSnapshot>) {
        if let Some(base) = base {
            let name = base.key_domain.take().map_or_else(|| PLAIN_DOMAIN.to_owned(), |domain| domain.name);
            base.key_domain = Some(self.domain_for_host(&name));
        }
    }

    /// Adds the secrets, which no record holds, to what a host is told.
    pub fn complete(&self, volume: Option<&mut v1::HostVolume>) {
        let Some(volume) = volume else { return };
        self.complete_base(volume.base.as_mut());
        if !volume.encrypted {
            return;
        }
        let wrapped = std::mem::take(&mut volume.data_key);
        let Ok(wrap) = self.key_wrap() else { return };
        match wrap.unwrap(&volume.volume_id, &wrapped) {
            Ok(key) => volume.data_key = key,
            // Without its key the host waits, and says so.
            Err(error) => tracing::error!(%error, "a volume cannot be used"),
        }
    }

    /// [`Self::complete`] for all volumes of an instance.
    pub fn complete_instance(&self, desired: &mut v1::DesiredInstance) {
        for attached in desired.spec.iter_mut().flat_map(|spec| &mut spec.volumes) {
            self.complete(attached.volume.as_mut());
        }
    }

    /// What the host of a volume that is to leave it is told.
    pub fn desired_volume(&self, spec: &rec::VolumeSpec) -> v1::DesiredVolume {
        let mut volume = spec.volume.clone();
        let mut parent = parent_of(spec);
        self.complete(volume.as_mut());
        self.complete_base(parent.as_mut());
        let wish = match (spec.deleting, spec.creating) {
            (true, _) => v1::VolumeWish::Deleted,
            (false, true) => v1::VolumeWish::Created,
            (false, false) => v1::VolumeWish::Released,
        };
        v1::DesiredVolume {
            volume,
            generation: spec.generation,
            wish: wish.into(),
            key_domain: Some(self.domain_for_host(&domain_of(spec))),
            epoch: spec.release_epoch,
            manifest_id: release_manifest_id(spec),
            parent,
        }
    }

    /// What a host is told of snapshots that it is to have whole.
    pub fn desired_fills(&self, wanted: &[v1::BaseSnapshot]) -> v1::DesiredFills {
        let mut snapshots = wanted.to_vec();
        snapshots.iter_mut().for_each(|base| self.complete_base(Some(base)));
        v1::DesiredFills { snapshots }
    }

    /// What the host of a snapshot in the making is told.
    pub fn desired_snapshot(&self, spec: &rec::SnapshotSpec) -> v1::DesiredSnapshot {
        let (mut volume, mut parent) = (spec.volume.clone(), spec.parent.clone());
        self.complete(volume.as_mut());
        self.complete_base(parent.as_mut());
        v1::DesiredSnapshot {
            snapshot_id: spec.snapshot_id.clone(),
            volume,
            parent,
            key_domain: Some(self.domain_for_host(&spec.key_domain)),
            epoch: spec.epoch,
        }
    }
}

/// Id of the manifest that a volume leaves its host with.
pub(crate) fn release_manifest_id(spec: &rec::VolumeSpec) -> String {
    format!("{}-r{}", spec.volume_id, spec.generation)
}

/// Key domain of a volume's snapshots.
pub(crate) fn domain_of(spec: &rec::VolumeSpec) -> String {
    if spec.encrypted { account_domain(&spec.account_id) } else { PLAIN_DOMAIN.to_owned() }
}

/// Whether a snapshot is in another key domain than what it builds on, so that all of its content is stored anew.
pub(crate) fn changes_domain(spec: &rec::SnapshotSpec) -> bool {
    spec.parent.as_ref().is_some_and(|parent| name_of_domain(parent) != spec.key_domain)
}

/// What the next snapshot of a volume builds on.
pub(crate) fn parent_of(spec: &rec::VolumeSpec) -> Option<v1::BaseSnapshot> {
    spec.last_snapshot.clone().or_else(|| spec.volume.as_ref()?.base.clone())
}

/// The zone that a new volume is in: the one that is named, else the only one there is.
pub(crate) fn zone(tables: &Tables, wanted: &str) -> ApiResult<String> {
    let mut zones: Vec<&str> = tables
        .hosts
        .values()
        .filter_map(|entry| entry.status.as_ref())
        .map(|status| status.availability_zone.as_str())
        .collect();
    zones.sort_unstable();
    zones.dedup();
    match (wanted, zones.as_slice()) {
        ("", [only]) => Ok((*only).to_owned()),
        ("", []) => Err(ApiError::wrong_state("IncorrectState", "there is no host yet, so no availability zone")),
        ("", several) => Err(ApiError::invalid("availability_zone", format!("must be given: {}", several.join(", ")))),
        (wanted, zones) if zones.contains(&wanted) => Ok(wanted.to_owned()),
        (wanted, zones) => {
            let message = format!("'{wanted:.40}' does not exist; there are: {}", zones.join(", "));
            Err(ApiError::new(tonic::Code::NotFound, "InvalidZone.NotFound", message))
        }
    }
}

/// The current epoch of the object store.
pub(crate) fn epoch(tables: &Tables) -> u32 {
    tables.storage_epoch.as_ref().map_or(0, |record| record.epoch)
}

/// An upload is opened in the epoch that was read: this makes it so.
pub(crate) fn guard_epoch(txn: Txn, tables: &Tables) -> Txn {
    txn.compare_mod_revision(keys::STORAGE_EPOCH, tables.storage_epoch.as_ref().map_or(0, |record| record.revision))
}

/// Uploads that are going on: the id of each one's manifest, its epoch and what it builds on.
fn open_uploads(tables: &Tables) -> Vec<(String, u32, Option<v1::BaseSnapshot>)> {
    let snapshots = tables.snapshots.values().filter_map(|entry| {
        let spec = entry.spec.as_ref()?;
        let state = entry.status.as_ref().map(|status| status.state()).unwrap_or_default();
        let pending = matches!(state, v1::SnapshotState::Pending | v1::SnapshotState::Unspecified);
        pending.then(|| (spec.snapshot_id.clone(), spec.epoch, spec.parent.clone()))
    });
    let releases = tables.volumes.values().filter(|spec| spec.releasing && !spec.deleting);
    snapshots.chain(releases.map(|spec| (release_manifest_id(spec), spec.release_epoch, parent_of(spec)))).collect()
}

/// Manifests that something stands on.
pub(crate) fn needed_manifests(tables: &Tables) -> Vec<v1::BaseSnapshot> {
    let mut needed: Vec<v1::BaseSnapshot> =
        open_uploads(tables).into_iter().filter_map(|(_, _, parent)| parent).collect();
    needed.extend(task::open(tables).flat_map(|task| task::sources(task)));
    for volume in tables.volumes.values() {
        needed.extend(volume.volume.as_ref().and_then(|volume| volume.base.clone()));
        needed.extend(volume.last_snapshot.clone());
        needed.extend(volume.older_snapshots.iter().cloned());
    }
    needed
}

/// A manifest that stands whole in the object store.
pub(crate) struct Published {
    /// Hash of its root, hex.
    pub root: String,
    /// Bytes of content.
    pub full_bytes: u64,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
}

/// Looks for the manifest that was to be published under `id`. The root is written last, once, so one that is there is complete.
pub(crate) async fn published(core: &Core, id: &str) -> ApiResult<Option<Published>> {
    let key = SnapshotKey::new(id).map_err(|error| ApiError::internal(error.to_string()))?;
    match hearth_snapshot::Manifest::load(&*core.storage.objects, &key, None).await {
        Ok(manifest) => Ok(Some(Published {
            root: manifest.root_hash().to_string(),
            full_bytes: manifest.present_chunks() * hearth_snapshot::CHUNK_BYTES as u64,
            disk_bytes: manifest.size_bytes(),
        })),
        Err(hearth_snapshot::StorageError::Missing { .. }) => Ok(None),
        Err(error) => Err(ApiError::unavailable(format!("look for the manifest {id}: {error}"))),
    }
}

/// Publishes the manifest of a snapshot that is exactly its parent (or blank). Answers root and bytes of content.
pub(crate) async fn write_manifest(core: &Arc<Core>, spec: &rec::SnapshotSpec) -> ApiResult<(String, u64)> {
    let failed = |error: hearth_snapshot::StorageError| ApiError::internal(format!("write the manifest: {error}"));
    let store = core.storage.chunks(&spec.key_domain)?;
    let parent = match &spec.parent {
        Some(parent) => Some(load_manifest(core, parent).await?),
        None => None,
    };
    let manifest_spec = ManifestSpec {
        id: SnapshotKey::new(&spec.snapshot_id).map_err(failed)?,
        size_bytes: spec.volume_bytes,
        epoch: Epoch(spec.epoch),
    };
    if let (Some(parent), true) = (&spec.parent, changes_domain(spec)) {
        return reseal(core, spec, parent, manifest_spec).await;
    }
    let writer = ManifestWriter::new(manifest_spec, parent.as_ref()).map_err(failed)?;
    let committed = writer.commit(&store).await.map_err(failed)?;
    Ok((committed.root_hash.to_string(), committed.present_chunks * hearth_snapshot::CHUNK_BYTES as u64))
}

/// Stores the content of `parent` anew, in the snapshot's key domain, and publishes its manifest.
async fn reseal(
    core: &Arc<Core>,
    spec: &rec::SnapshotSpec,
    parent: &v1::BaseSnapshot,
    manifest_spec: ManifestSpec,
) -> ApiResult<(String, u64)> {
    let failed = |error: hearth_snapshot::StorageError| {
        ApiError::internal(format!("copy {} into {}: {error}", parent.snapshot_id, spec.key_domain))
    };
    let manifest = Arc::new(load_manifest(core, parent).await?);
    let source = ManifestSource::new(core.storage.chunks(name_of_domain(parent))?, manifest).map_err(failed)?;
    let (told, id) = (core.clone(), spec.snapshot_id.clone());
    let progress = Arc::new(move |progress: UploadProgress| {
        if told.live.set_percent(&id, Some(u32::from(progress.percent()))) {
            told.announce_snapshot(&id);
        }
    });
    let upload = SnapshotUpload::new(core.storage.chunks(&spec.key_domain)?, manifest_spec, None);
    let uploaded = upload.with_progress(progress).run(&source).await;
    core.live.set_percent(&spec.snapshot_id, None);
    let uploaded = uploaded.map_err(failed)?.manifest;
    Ok((uploaded.root_hash.to_string(), uploaded.present_chunks * hearth_snapshot::CHUNK_BYTES as u64))
}

/// Reads a manifest that the records know.
pub(crate) async fn load_manifest(core: &Core, base: &v1::BaseSnapshot) -> ApiResult<hearth_snapshot::Manifest> {
    let failed = |error: String| ApiError::internal(format!("read the manifest of {}: {error}", base.snapshot_id));
    let id = SnapshotKey::new(&base.snapshot_id).map_err(|error| failed(error.to_string()))?;
    let root = base.root.parse().map_err(|_| failed(format!("'{}' is no root hash", base.root)))?;
    let manifest = hearth_snapshot::Manifest::load(&*core.storage.objects, &id, Some(&root)).await;
    manifest.map_err(|error| failed(error.to_string()))
}

/// The control plane's records, for the garbage collector.
pub(crate) struct Records(pub Arc<Core>);

#[async_trait]
impl Ledger for Records {
    async fn epoch(&self) -> Result<Epoch, LedgerError> {
        Ok(Epoch(epoch(&self.0.tables())))
    }

    async fn advance(&self) -> Result<Epoch, LedgerError> {
        loop {
            let (current, txn) = {
                let tables = self.0.tables();
                let current = epoch(&tables);
                if open_uploads(&tables).iter().any(|(_, epoch, _)| *epoch < current) {
                    return Ok(Epoch(current));
                }
                let next = Epoch(current).next().ok_or("all epochs are used up")?;
                let record = rec::StorageEpoch { schema_version: SCHEMA_VERSION, epoch: next.0 };
                // Every opening of an upload compares this record, so none can slip into an older epoch.
                (next, guard_epoch(Txn::new(), &tables).put(keys::STORAGE_EPOCH, encode(&record)))
            };
            if self.0.commit(txn).await.map_err(|error| error.to_string())? == Commit::Done {
                return Ok(current);
            }
        }
    }

    async fn roots(&self) -> Result<Roots, LedgerError> {
        let tables = self.0.tables();
        let mut live = Vec::new();
        for entry in tables.snapshots.values() {
            let (Some(spec), Some(status)) = (&entry.spec, &entry.status) else { continue };
            if status.state() == v1::SnapshotState::Completed && !spec.deleted {
                live.push((spec.snapshot_id.clone(), status.root.clone()));
            }
        }
        live.extend(needed_manifests(&tables).into_iter().map(|base| (base.snapshot_id, base.root)));
        live.sort();
        live.dedup();
        let live = live
            .into_iter()
            .map(|(id, root)| Ok(LiveRoot { id: SnapshotKey::new(&id)?, root_hash: Some(root.parse()?) }))
            .collect::<Result<_, LedgerError>>()?;
        let open = open_uploads(&tables)
            .into_iter()
            .map(|(id, _, _)| Ok(SnapshotKey::new(&id)?))
            .collect::<Result<_, LedgerError>>()?;
        Ok(Roots { live, open })
    }
}
