//! Typed in-memory tables of everything in the store. They are loaded once and then fed by the store's watch alone; every read
//! of the API is served from them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use hearth_proto::record::v1 as rec;
use hearth_store::{Event, EventKind, KeyValue, Revision};
use prost::Message;

use crate::error::ControlError;
use crate::keys::Key;

/// Version of the records that this release writes; it reads all up to it.
pub(crate) const SCHEMA_VERSION: u32 = 1;

/// A record with the revision of its last change, for compares.
#[derive(Clone, Debug)]
pub(crate) struct Versioned<T> {
    pub value: Arc<T>,
    pub revision: Revision,
}

impl<T> std::ops::Deref for Versioned<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

/// Spec and status of one object.
#[derive(Clone, Debug)]
pub(crate) struct Entry<S, T> {
    pub spec: Option<Versioned<S>>,
    pub status: Option<Versioned<T>>,
}

impl<S, T> Default for Entry<S, T> {
    fn default() -> Self {
        Self { spec: None, status: None }
    }
}

impl<S, T> Entry<S, T> {
    fn is_empty(&self) -> bool {
        self.spec.is_none() && self.status.is_none()
    }
}

pub(crate) type InstanceEntry = Entry<rec::InstanceSpec, rec::InstanceStatus>;
pub(crate) type ImageEntry = Entry<rec::ImageSpec, rec::ImageStatus>;
pub(crate) type SnapshotEntry = Entry<rec::SnapshotSpec, rec::SnapshotStatus>;
pub(crate) type HostEntry = Entry<rec::HostSpec, rec::HostStatus>;

/// All tables.
#[derive(Default)]
pub(crate) struct Tables {
    pub cluster: Option<Versioned<rec::Cluster>>,
    pub accounts: BTreeMap<String, Versioned<rec::Account>>,
    pub api_tokens: HashMap<String, Versioned<rec::ApiToken>>,
    pub join_tokens: HashMap<String, Versioned<rec::JoinToken>>,
    /// By key.
    pub client_tokens: HashMap<String, Versioned<rec::ClientToken>>,
    pub key_pairs: BTreeMap<String, Versioned<rec::KeyPair>>,
    pub images: BTreeMap<String, ImageEntry>,
    pub volumes: BTreeMap<String, Versioned<rec::VolumeSpec>>,
    /// By host that holds the data.
    pub volumes_on: HashMap<String, BTreeSet<String>>,
    pub snapshots: BTreeMap<String, SnapshotEntry>,
    pub tasks: BTreeMap<String, Versioned<rec::Task>>,
    pub storage_epoch: Option<Versioned<rec::StorageEpoch>>,
    pub hosts: BTreeMap<String, HostEntry>,
    pub instances: BTreeMap<String, InstanceEntry>,
    /// By host.
    pub instances_on: HashMap<String, BTreeSet<String>>,
    /// By account.
    pub instances_of: HashMap<String, BTreeSet<String>>,
    /// By host, then instance.
    pub evictions: HashMap<String, BTreeMap<String, Versioned<rec::Eviction>>>,
    /// By host.
    pub addresses: HashMap<String, HashSet<String>>,
    pub macs: HashSet<String>,
}

/// What a batch of changes touched.
#[derive(Default, Debug)]
pub(crate) struct Touched {
    pub instances: BTreeSet<String>,
    /// Hosts whose desired state may have changed.
    pub hosts: BTreeSet<String>,
    pub images: bool,
    pub volumes: BTreeSet<String>,
    pub snapshots: BTreeSet<String>,
}

trait Record: Message + Default {
    fn version(&self) -> u32;
}

macro_rules! records {
    ($($name:ident),*) => { $(impl Record for rec::$name { fn version(&self) -> u32 { self.schema_version } })* };
}
records!(
    Cluster,
    Account,
    ApiToken,
    JoinToken,
    ClientToken,
    KeyPair,
    ImageSpec,
    ImageStatus,
    VolumeSpec,
    SnapshotSpec,
    SnapshotStatus,
    Task,
    StorageEpoch,
    HostSpec,
    HostStatus,
    InstanceSpec,
    InstanceStatus,
    Eviction
);

fn decode<T: Record>(kv: &KeyValue) -> Result<Versioned<T>, ControlError> {
    let refuse = |reason: String| ControlError::Record { key: kv.key.clone(), reason };
    let value = T::decode(kv.value.clone()).map_err(|error| refuse(error.to_string()))?;
    match value.version() {
        1..=SCHEMA_VERSION => Ok(Versioned { value: Arc::new(value), revision: kv.mod_revision }),
        0 => Err(refuse("has no schema version".to_owned())),
        newer => Err(refuse(format!(
            "has schema version {newer}, this release reads up to {SCHEMA_VERSION}; start the newer release"
        ))),
    }
}

impl Tables {
    /// Applies the store's state at the start.
    pub fn load(kvs: &[KeyValue]) -> Result<Self, ControlError> {
        let mut tables = Self::default();
        let mut touched = Touched::default();
        for kv in kvs {
            tables.put(kv, &mut touched)?;
        }
        Ok(tables)
    }

    /// Applies the changes of one revision.
    pub fn apply(&mut self, events: &[Event], touched: &mut Touched) -> Result<(), ControlError> {
        for event in events {
            match &event.kind {
                EventKind::Put(kv) => self.put(kv, touched)?,
                EventKind::Delete { key } => self.delete(key, touched),
            }
        }
        Ok(())
    }

    fn put(&mut self, kv: &KeyValue, touched: &mut Touched) -> Result<(), ControlError> {
        match Key::parse(&kv.key) {
            Key::Cluster => self.cluster = Some(decode(kv)?),
            Key::Account(id) => _ = self.accounts.insert(id.to_owned(), decode(kv)?),
            Key::ApiToken(hash) => _ = self.api_tokens.insert(hash.to_owned(), decode(kv)?),
            Key::JoinToken(hash) => _ = self.join_tokens.insert(hash.to_owned(), decode(kv)?),
            Key::ClientToken => _ = self.client_tokens.insert(kv.key.clone(), decode(kv)?),
            Key::Pair(id) => _ = self.key_pairs.insert(id.to_owned(), decode(kv)?),
            Key::ImageSpec(id) => {
                touched.images = true;
                self.images.entry(id.to_owned()).or_default().spec = Some(decode(kv)?);
            }
            Key::ImageStatus(id) => {
                touched.images = true;
                self.images.entry(id.to_owned()).or_default().status = Some(decode(kv)?);
            }
            Key::Volume(id) => {
                let spec: Versioned<rec::VolumeSpec> = decode(kv)?;
                self.touch_volume(id, touched);
                self.volumes_on.entry(spec.host_id.clone()).or_default().insert(id.to_owned());
                self.volumes.insert(id.to_owned(), spec);
                self.touch_users(id, touched);
            }
            Key::SnapshotSpec(id) => {
                self.snapshots.entry(id.to_owned()).or_default().spec = Some(decode(kv)?);
                self.touch_snapshot(id, touched);
            }
            Key::SnapshotStatus(id) => {
                self.snapshots.entry(id.to_owned()).or_default().status = Some(decode(kv)?);
                self.touch_snapshot(id, touched);
            }
            Key::Task(id) => {
                let task: Versioned<rec::Task> = decode(kv)?;
                touched.hosts.extend(Some(task.host_id.clone()).filter(|host| !host.is_empty()));
                self.tasks.insert(id.to_owned(), task);
            }
            Key::StorageEpoch => self.storage_epoch = Some(decode(kv)?),
            Key::HostSpec(id) => {
                touched.hosts.insert(id.to_owned());
                self.hosts.entry(id.to_owned()).or_default().spec = Some(decode(kv)?);
            }
            Key::HostStatus(id) => {
                touched.hosts.insert(id.to_owned());
                self.hosts.entry(id.to_owned()).or_default().status = Some(decode(kv)?);
            }
            Key::InstanceSpec(id) => self.put_instance_spec(id, decode(kv)?, touched),
            Key::InstanceStatus(id) => {
                let entry = self.instances.entry(id.to_owned()).or_default();
                entry.status = Some(decode(kv)?);
                touched.instances.insert(id.to_owned());
                touched.hosts.extend(entry.spec.as_ref().map(|spec| spec.host_id.clone()));
                self.touch_volumes_of(id, touched);
            }
            Key::Eviction(host, instance) => {
                touched.hosts.insert(host.to_owned());
                self.evictions.entry(host.to_owned()).or_default().insert(instance.to_owned(), decode(kv)?);
            }
            Key::Address(host, address) => {
                self.addresses.entry(host.to_owned()).or_default().insert(address.to_owned());
            }
            Key::Mac(mac) => _ = self.macs.insert(mac.to_owned()),
            Key::Other => {}
            Key::Unknown => tracing::warn!(key = kv.key, "a key in the store is of no known kind; it is left alone"),
        }
        Ok(())
    }

    fn put_instance_spec(&mut self, id: &str, spec: Versioned<rec::InstanceSpec>, touched: &mut Touched) {
        self.unindex_instance(id, touched);
        touched.instances.insert(id.to_owned());
        touched.hosts.insert(spec.host_id.clone());
        self.instances_on.entry(spec.host_id.clone()).or_default().insert(id.to_owned());
        self.instances_of.entry(account_of(&spec).to_owned()).or_default().insert(id.to_owned());
        self.instances.entry(id.to_owned()).or_default().spec = Some(spec);
        self.touch_volumes_of(id, touched);
    }

    /// What is seen of an instance's volumes depends on the instance.
    fn touch_volumes_of(&self, instance: &str, touched: &mut Touched) {
        let spec = self.instances.get(instance).and_then(|entry| entry.spec.as_ref());
        let volumes = spec.iter().filter_map(|spec| spec.spec.as_ref()).flat_map(|spec| &spec.volumes);
        touched.volumes.extend(volumes.filter_map(|attached| Some(attached.volume.as_ref()?.volume_id.clone())));
    }

    /// Takes a volume out of the index; those who watch it or hold it look again.
    fn touch_volume(&mut self, id: &str, touched: &mut Touched) {
        self.touch_users(id, touched);
        if let Some(old) = self.volumes.get(id) {
            remove_indexed(&mut self.volumes_on, &old.host_id, id);
        }
    }

    fn touch_users(&self, id: &str, touched: &mut Touched) {
        touched.volumes.insert(id.to_owned());
        let Some(volume) = self.volumes.get(id) else { return };
        for (set, user) in [(&mut touched.hosts, &volume.host_id), (&mut touched.instances, &volume.instance_id)] {
            if !user.is_empty() {
                set.insert(user.clone());
            }
        }
    }

    fn touch_snapshot(&self, id: &str, touched: &mut Touched) {
        touched.snapshots.insert(id.to_owned());
        let spec = self.snapshots.get(id).and_then(|entry| entry.spec.as_ref());
        touched.hosts.extend(spec.map(|spec| spec.host_id.clone()).filter(|host| !host.is_empty()));
    }

    fn unindex_instance(&mut self, id: &str, touched: &mut Touched) {
        let Some(old) = self.instances.get(id).and_then(|entry| entry.spec.as_ref()) else { return };
        touched.hosts.insert(old.host_id.clone());
        remove_indexed(&mut self.instances_on, &old.host_id, id);
        remove_indexed(&mut self.instances_of, account_of(old), id);
    }

    fn delete(&mut self, key: &str, touched: &mut Touched) {
        match Key::parse(key) {
            Key::Cluster => self.cluster = None,
            Key::Account(id) => _ = self.accounts.remove(id),
            Key::ApiToken(hash) => _ = self.api_tokens.remove(hash),
            Key::JoinToken(hash) => _ = self.join_tokens.remove(hash),
            Key::ClientToken => _ = self.client_tokens.remove(key),
            Key::Pair(id) => _ = self.key_pairs.remove(id),
            Key::ImageSpec(id) => {
                touched.images = true;
                clear(&mut self.images, id, |entry| entry.spec = None);
            }
            Key::ImageStatus(id) => {
                touched.images = true;
                clear(&mut self.images, id, |entry| entry.status = None);
            }
            Key::Volume(id) => {
                self.touch_volume(id, touched);
                self.volumes.remove(id);
            }
            Key::SnapshotSpec(id) => {
                self.touch_snapshot(id, touched);
                clear(&mut self.snapshots, id, |entry| entry.spec = None);
            }
            Key::SnapshotStatus(id) => {
                self.touch_snapshot(id, touched);
                clear(&mut self.snapshots, id, |entry| entry.status = None);
            }
            Key::Task(id) => _ = self.tasks.remove(id),
            Key::StorageEpoch => self.storage_epoch = None,
            Key::HostSpec(id) => {
                touched.hosts.insert(id.to_owned());
                clear(&mut self.hosts, id, |entry| entry.spec = None);
            }
            Key::HostStatus(id) => {
                touched.hosts.insert(id.to_owned());
                clear(&mut self.hosts, id, |entry| entry.status = None);
            }
            Key::InstanceSpec(id) => {
                touched.instances.insert(id.to_owned());
                self.unindex_instance(id, touched);
                clear(&mut self.instances, id, |entry| entry.spec = None);
            }
            Key::InstanceStatus(id) => {
                touched.instances.insert(id.to_owned());
                clear(&mut self.instances, id, |entry| entry.status = None);
            }
            Key::Eviction(host, instance) => {
                touched.hosts.insert(host.to_owned());
                if let Some(of_host) = self.evictions.get_mut(host) {
                    of_host.remove(instance);
                    if of_host.is_empty() {
                        self.evictions.remove(host);
                    }
                }
            }
            Key::Address(host, address) => {
                if let Some(of_host) = self.addresses.get_mut(host) {
                    of_host.remove(address);
                    if of_host.is_empty() {
                        self.addresses.remove(host);
                    }
                }
            }
            Key::Mac(mac) => _ = self.macs.remove(mac),
            Key::Other | Key::Unknown => {}
        }
    }

    /// Spec and status of an instance; the status is the default one until the host has reported.
    pub fn instance(&self, id: &str) -> Option<(Versioned<rec::InstanceSpec>, Option<Versioned<rec::InstanceStatus>>)> {
        let entry = self.instances.get(id)?;
        Some((entry.spec.clone()?, entry.status.clone()))
    }

    /// Spec and status of a snapshot; the status is the default one at first.
    pub fn snapshot(&self, id: &str) -> Option<(Versioned<rec::SnapshotSpec>, Option<Versioned<rec::SnapshotStatus>>)> {
        let entry = self.snapshots.get(id)?;
        Some((entry.spec.clone()?, entry.status.clone()))
    }

    /// A host that has not been removed.
    pub fn host(&self, id: &str) -> Option<(Versioned<rec::HostSpec>, Option<Versioned<rec::HostStatus>>)> {
        let entry = self.hosts.get(id)?;
        Some((entry.spec.clone()?, entry.status.clone()))
    }
}

/// The account of an instance.
pub(crate) fn account_of(spec: &rec::InstanceSpec) -> &str {
    spec.spec.as_ref().map_or("", |spec| spec.account_id.as_str())
}

fn remove_indexed(index: &mut HashMap<String, BTreeSet<String>>, of: &str, id: &str) {
    if let Some(ids) = index.get_mut(of) {
        ids.remove(id);
        if ids.is_empty() {
            index.remove(of);
        }
    }
}

fn clear<S, T>(table: &mut BTreeMap<String, Entry<S, T>>, id: &str, change: impl FnOnce(&mut Entry<S, T>)) {
    if let Some(entry) = table.get_mut(id) {
        change(entry);
        if entry.is_empty() {
            table.remove(id);
        }
    }
}
