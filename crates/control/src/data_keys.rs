//! Keys of encrypted volumes, as the records hold them: wrapped with AES-256-GCM under a key that comes from the cluster's storage
//! key, each bound to its volume.
//!
//! ```text
//! offset  size  field
//!      0    12  nonce, random
//!     12    64  the AES-256-XTS key of the volume: data key then tweak key, sealed
//!     76    16  tag; the volume's id is its additional data
//! ```

use bytes::Bytes;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use thiserror::Error;

/// Bytes of a data key.
const KEY_BYTES: usize = 64;

/// Why a key cannot be made or read.
#[derive(Debug, Error)]
pub(crate) enum DataKeyError {
    #[error(
        "the data key of volume {0} does not open with this cluster's storage key; was it restored without its state?"
    )]
    Closed(String),
    #[error("no random bytes for a data key")]
    Random,
    #[error("a data key cannot be wrapped")]
    Wrap,
}

/// Wraps and unwraps.
pub(crate) struct KeyWrap(LessSafeKey);

impl KeyWrap {
    /// Under `key`; `None` never happens with 32 bytes.
    pub fn new(key: &[u8; 32]) -> Option<Self> {
        Some(Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).ok()?)))
    }

    /// A new volume's key.
    pub fn generate(&self, volume_id: &str) -> Result<Bytes, DataKeyError> {
        let mut key = [0; KEY_BYTES];
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut key).and_then(|()| getrandom::fill(&mut nonce)).map_err(|_| DataKeyError::Random)?;
        let mut sealed = key.to_vec();
        key.fill(0);
        let with = (Nonce::assume_unique_for_key(nonce), Aad::from(volume_id.as_bytes()));
        self.0.seal_in_place_append_tag(with.0, with.1, &mut sealed).map_err(|_| DataKeyError::Wrap)?;
        Ok([nonce.as_slice(), &sealed].concat().into())
    }

    /// The volume's key, for its host.
    pub fn unwrap(&self, volume_id: &str, wrapped: &[u8]) -> Result<Bytes, DataKeyError> {
        let closed = || DataKeyError::Closed(volume_id.to_owned());
        let (nonce, sealed) = wrapped.split_first_chunk::<NONCE_LEN>().ok_or_else(closed)?;
        let mut sealed = sealed.to_vec();
        let with = (Nonce::assume_unique_for_key(*nonce), Aad::from(volume_id.as_bytes()));
        let key = self.0.open_in_place(with.0, with.1, &mut sealed).map_err(|_| closed())?;
        if key.len() == KEY_BYTES { Ok(Bytes::copy_from_slice(key)) } else { Err(closed()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_opens_for_its_volume_and_cluster_alone() {
        let (ours, others) = (KeyWrap::new(&[1; 32]).unwrap(), KeyWrap::new(&[2; 32]).unwrap());
        let (one, two) = (ours.generate("vol-1").unwrap(), ours.generate("vol-1").unwrap());
        let key = ours.unwrap("vol-1", &one).unwrap();
        assert_eq!(key.len(), KEY_BYTES);
        assert_ne!(key, ours.unwrap("vol-1", &two).unwrap(), "every volume has its own");
        assert!(!one.windows(8).any(|window| key.windows(8).any(|part| part == window)), "the record has it wrapped");
        let error = ours.unwrap("vol-2", &one).unwrap_err();
        assert!(error.to_string().contains("vol-2"), "{error}");
        assert!(others.unwrap("vol-1", &one).is_err());
    }

    proptest! {
        #[test]
        fn nothing_else_opens(wrapped in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..92, bit in 0u8..8) {
            let wrap = KeyWrap::new(&[1; 32]).unwrap();
            prop_assert!(wrap.unwrap("vol-1", &wrapped).is_err());
            let mut damaged = wrap.generate("vol-1").unwrap().to_vec();
            damaged[at] ^= 1 << bit;
            prop_assert!(wrap.unwrap("vol-1", &damaged).is_err());
        }
    }
}
