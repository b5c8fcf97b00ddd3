//! Keys of this host's volumes and of the snapshots that they are made from.
//!
//! Whatever the control plane sends passes through here first, and goes on without its keys: what the agent writes to disk has
//! none. They are kept in memory and, so that an agent that is started again has them at once, in a file below the folder of
//! what ends with the host's boot (a tmpfs). After a boot of the host they come anew with the first session.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use hearth_block::XtsKey;
use hearth_proto::v1;
use hearth_snapshot::{ChunkStore, KeyDomain, KeyDomainId, ObjectStore};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::state::{Layout, read_if_exists, write_atomically};

/// Why there is no key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// It comes with a session.
    #[error("the key of {0} has not come from the control plane yet")]
    Missing(String),
    /// What came is none.
    #[error("the key of {0} is not a proper key")]
    Malformed(String),
    /// What the control plane says makes no sense.
    #[error("the key domain: {0}")]
    Domain(String),
}

impl KeyError {
    /// Whether trying again later may help without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Missing(_))
    }
}

/// A key as it is kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Secret(#[serde(with = "secret_as_hex")] Zeroizing<Vec<u8>>);

mod secret_as_hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use zeroize::Zeroizing;

    pub fn serialize<S: Serializer>(secret: &Zeroizing<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(hex::encode(secret.as_slice())))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Zeroizing<Vec<u8>>, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        hex::decode(text.as_str()).map(Zeroizing::new).map_err(D::Error::custom)
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Kept {
    volumes: BTreeMap<String, Secret>,
    domains: BTreeMap<String, Secret>,
}

impl Kept {
    /// Whether that was news.
    fn volume(&mut self, volume: Option<&mut v1::HostVolume>) -> bool {
        let Some(volume) = volume else { return false };
        let key = std::mem::take(&mut volume.data_key);
        let changed = learn(&mut self.volumes, &volume.volume_id, &key);
        self.base(volume.base.as_mut()) | changed
    }

    fn base(&mut self, base: Option<&mut v1::BaseSnapshot>) -> bool {
        base.is_some_and(|base| self.domain(base.key_domain.as_mut()))
    }

    fn domain(&mut self, domain: Option<&mut v1::KeyDomain>) -> bool {
        let Some(domain) = domain else { return false };
        let secret = std::mem::take(&mut domain.secret);
        learn(&mut self.domains, &domain.name, &secret)
    }
}

fn learn(kept: &mut BTreeMap<String, Secret>, name: &str, key: &[u8]) -> bool {
    if key.is_empty() {
        return false;
    }
    let secret = Secret(Zeroizing::new(key.to_vec()));
    if kept.get(name) == Some(&secret) {
        return false;
    }
    kept.insert(name.to_owned(), secret);
    true
}

/// See the module.
pub struct Keyring {
    path: PathBuf,
    kept: Mutex<Kept>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keyring(..)")
    }
}

impl Keyring {
    /// The keys that an earlier agent has left since the host's boot.
    pub fn open(layout: &Layout) -> Self {
        let path = layout.keyring();
        let kept = read_if_exists(&path).ok().flatten().map(Zeroizing::new);
        let kept = kept.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, kept: Mutex::new(kept) }
    }

    fn learn(&self, take: impl FnOnce(&mut Kept) -> bool) {
        let mut kept = self.kept.lock();
        if take(&mut kept) {
            self.save(&kept);
        }
    }

    fn save(&self, kept: &Kept) {
        let written = serde_json::to_vec(kept).map_err(std::io::Error::from).map(Zeroizing::new);
        // In memory they are anyway; an agent that is started again waits for the first session then.
        if let Err(error) = written.and_then(|text| write_atomically(&self.path, &text, 0o600)) {
            tracing::warn!(path = %self.path.display(), %error, "keys cannot be kept for the next agent");
        }
    }

    /// Takes the keys out of what is wanted of the whole host.
    pub fn take_host(&self, desired: &mut v1::DesiredHost) {
        self.learn(|kept| {
            let mut news = false;
            for instance in &mut desired.instances {
                news |= take_instance(kept, instance);
            }
            for volume in &mut desired.volumes {
                news |= take_volume(kept, volume);
            }
            for set in &mut desired.snapshot_sets {
                news |= take_set(kept, set);
            }
            for base in desired.fills.iter_mut().flat_map(|fills| &mut fills.snapshots) {
                news |= kept.base(Some(base));
            }
            news
        });
    }

    /// Takes the keys out of what is wanted of an instance.
    pub fn take_instance(&self, desired: &mut v1::DesiredInstance) {
        self.learn(|kept| take_instance(kept, desired));
    }

    /// Takes the keys out of what is wanted of a volume that leaves.
    pub fn take_volume(&self, desired: &mut v1::DesiredVolume) {
        self.learn(|kept| take_volume(kept, desired));
    }

    /// Takes the keys out of what is wanted of snapshots.
    pub fn take_set(&self, desired: &mut v1::DesiredSnapshotSet) {
        self.learn(|kept| take_set(kept, desired));
    }

    /// Takes the keys out of what the host is to have whole.
    pub fn take_fills(&self, desired: &mut v1::DesiredFills) {
        self.learn(|kept| desired.snapshots.iter_mut().fold(false, |news, base| kept.base(Some(base)) | news));
    }

    /// Forgets a volume's key.
    pub fn forget_volume(&self, id: &str) {
        let mut kept = self.kept.lock();
        if kept.volumes.remove(id).is_some() {
            self.save(&kept);
        }
    }

    /// The key of a volume's files; `None` when they are in clear.
    pub fn volume(&self, wanted: &v1::HostVolume) -> Result<Option<XtsKey>, KeyError> {
        if !wanted.encrypted {
            return Ok(None);
        }
        let what = || format!("volume {}", wanted.volume_id);
        let secret = self.kept.lock().volumes.get(&wanted.volume_id).cloned();
        let secret = secret.ok_or_else(|| KeyError::Missing(what()))?;
        let key = secret.0.as_slice().try_into().ok().and_then(XtsKey::new);
        key.map(Some).ok_or_else(|| KeyError::Malformed(what()))
    }

    /// The key domain with this name.
    pub fn domain(&self, name: &str) -> Result<KeyDomain, KeyError> {
        let what = || format!("key domain {name}");
        let secret = self.kept.lock().domains.get(name).cloned().ok_or_else(|| KeyError::Missing(what()))?;
        let secret: &[u8; 32] = secret.0.as_slice().try_into().map_err(|_| KeyError::Malformed(what()))?;
        let id = KeyDomainId::new(name).map_err(|error| KeyError::Domain(error.to_string()))?;
        Ok(KeyDomain::new(id, secret))
    }

    /// The chunks of a key domain.
    pub fn chunk_store(
        &self,
        objects: &Arc<dyn ObjectStore>,
        domain: Option<&v1::KeyDomain>,
    ) -> Result<ChunkStore, KeyError> {
        let domain = domain.ok_or_else(|| KeyError::Domain("none is named".to_owned()))?;
        Ok(ChunkStore::new(objects.clone(), self.domain(&domain.name)?))
    }
}

fn take_instance(kept: &mut Kept, desired: &mut v1::DesiredInstance) -> bool {
    let volumes = desired.spec.iter_mut().flat_map(|spec| &mut spec.volumes);
    volumes.fold(false, |news, attached| kept.volume(attached.volume.as_mut()) | news)
}

fn take_volume(kept: &mut Kept, desired: &mut v1::DesiredVolume) -> bool {
    kept.volume(desired.volume.as_mut()) | kept.base(desired.parent.as_mut()) | kept.domain(desired.key_domain.as_mut())
}

fn take_set(kept: &mut Kept, desired: &mut v1::DesiredSnapshotSet) -> bool {
    desired.snapshots.iter_mut().fold(false, |news, wanted| {
        kept.volume(wanted.volume.as_mut())
            | kept.base(wanted.parent.as_mut())
            | kept.domain(wanted.key_domain.as_mut())
            | news
    })
}

#[cfg(test)]
impl Keyring {
    /// One that knows these key domains.
    pub(crate) fn of_domains(layout: &Layout, domains: &[v1::KeyDomain]) -> Arc<Self> {
        let keyring = Self { path: layout.keyring(), kept: Mutex::default() };
        let mut kept = keyring.kept.lock();
        domains.iter().for_each(|domain| {
            learn(&mut kept.domains, &domain.name, &domain.secret);
        });
        drop(kept);
        Arc::new(keyring)
    }
}

#[cfg(test)]
#[path = "keyring_test.rs"]
mod tests;
