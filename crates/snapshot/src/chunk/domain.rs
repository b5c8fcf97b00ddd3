//! Key domains: who may share chunks with whom.

use std::fmt;
use std::sync::Arc;

use super::hash::ChunkHash;
use crate::objects::StorageError;

/// Name of a key domain, a part of its objects' names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyDomainId(Arc<str>);

impl KeyDomainId {
    /// # Errors
    /// [`StorageError::Name`] unless it is 1 to 64 of a-z, 0-9 and '-'.
    pub fn new(id: impl AsRef<str>) -> Result<Self, StorageError> {
        let id = id.as_ref();
        if crate::objects::is_plain_name(id) {
            Ok(Self(id.into()))
        } else {
            Err(StorageError::Name { what: "key domain", name: id.to_owned() })
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyDomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A key domain with its keys. Equal content is one object inside a domain; between domains nothing is shared and nobody can
/// tell that two have the same content.
#[derive(Clone)]
pub struct KeyDomain {
    id: KeyDomainId,
    keys: Arc<Keys>,
}

struct Keys {
    name: [u8; 32],
    content: [u8; 32],
    nonce: [u8; 32],
    on_hosts: [u8; 32],
}

impl fmt::Debug for KeyDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyDomain").field("id", &self.id).finish_non_exhaustive()
    }
}

impl KeyDomain {
    /// A domain whose keys all come from one `secret` (BLAKE3's key derivation, one context per use). Whoever has the secret
    /// can read everything in the domain; without it the content is lost.
    pub fn new(id: KeyDomainId, secret: &[u8; 32]) -> Self {
        let keys = Keys {
            name: blake3::derive_key("hearth 2026-11-23 names of chunks", secret),
            content: blake3::derive_key("hearth 2026-11-23 content keys of chunks", secret),
            nonce: blake3::derive_key("hearth 2026-11-23 nonces of chunks", secret),
            on_hosts: blake3::derive_key("hearth 2026-11-24 keys of content on hosts", secret),
        };
        Self { id, keys: Arc::new(keys) }
    }

    /// Its name.
    pub fn id(&self) -> &KeyDomainId {
        &self.id
    }

    /// The name of a chunk's content.
    pub fn name_of(&self, content: &[u8]) -> ChunkHash {
        ChunkHash(*blake3::keyed_hash(&self.keys.name, content).as_bytes())
    }

    /// 64 bytes of key material for a host's own copy of the manifest with this root (hex).
    pub fn key_on_hosts(&self, root: &str) -> [u8; 64] {
        let mut key = [0; 64];
        blake3::Hasher::new_keyed(&self.keys.on_hosts).update(root.as_bytes()).finalize_xof().fill(&mut key);
        key
    }

    /// The AES-256 key of the chunk with this name.
    pub(crate) fn content_key(&self, name: &ChunkHash) -> [u8; 32] {
        *blake3::keyed_hash(&self.keys.content, name.as_bytes()).as_bytes()
    }

    /// The nonce for a payload. It depends on the payload: another version of the compressor may pack the same content in
    /// another way, and one key must never see two payloads under one nonce.
    pub(crate) fn nonce(&self, payload: &[u8]) -> [u8; 12] {
        let hash = blake3::keyed_hash(&self.keys.nonce, payload);
        let mut nonce = [0; 12];
        nonce.copy_from_slice(hash.as_bytes().get(..12).unwrap_or(&[0; 12]));
        nonce
    }
}
