//! Who this host is: kept in `identity.json`, readable by root alone.

use std::fmt;

use hearth_types::HostId;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::LinkError;
use crate::state::{Layout, read_if_exists, write_atomically};

/// Host id, key and certificates.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Given at enrolment.
    pub host_id: HostId,
    /// Where the control plane was when the host enrolled.
    pub endpoints: Vec<String>,
    /// PKCS#8, DER, hex.
    #[serde(with = "hex")]
    pub key: Vec<u8>,
    /// DER, hex: leaf first, the cluster's authority last.
    pub chain: Vec<HexBytes>,
}

/// Bytes that are hex digits in JSON.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HexBytes(#[serde(with = "hex")] pub Vec<u8>);

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("host_id", &self.host_id)
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the identity, if the host has one.
    pub fn load(layout: &Layout) -> Result<Option<Self>, LinkError> {
        let path = layout.identity();
        let failed = |source| LinkError::File { path: path.clone(), source };
        let Some(text) = read_if_exists(&path).map_err(failed)? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|error| failed(error.into()))
    }

    /// Makes it durable.
    pub fn save(&self, layout: &Layout) -> Result<(), LinkError> {
        let path = layout.identity();
        let failed = |source| LinkError::File { path: path.clone(), source };
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        write_atomically(&path, &text, 0o600).map_err(failed)
    }

    /// The private key.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }

    /// Leaf first.
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        self.chain.iter().map(|bytes| CertificateDer::from(bytes.0.clone())).collect()
    }

    /// The cluster's certificate authority.
    pub fn authority(&self) -> Result<CertificateDer<'static>, LinkError> {
        self.certificates().pop().ok_or(LinkError::Crypto {
            action: "reading the identity",
            reason: "it holds no certificates; remove it and join again".into(),
        })
    }
}
