//! Joining a cluster, and a new certificate before the old one ends.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hearth_proto::v1::{EnrollRequest, RenewCertificateRequest};
use hearth_types::JoinToken;
use rcgen::{CertificateParams, KeyPair};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::connect::{Client, connect, pinned};
use super::identity::HexBytes;
use super::{Identity, LinkError};

/// How long one call may take.
const CALL: Duration = Duration::from_secs(30);

struct Request {
    key: KeyPair,
    csr: Vec<u8>,
}

fn request() -> Result<Request, LinkError> {
    let key = KeyPair::generate().map_err(LinkError::crypto("making a key"))?;
    let params = CertificateParams::default();
    let csr = params.serialize_request(&key).map_err(LinkError::crypto("making a certificate request"))?;
    Ok(Request { csr: csr.der().to_vec(), key })
}

fn call<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL);
    request
}

/// Trades a join token for an identity.
pub async fn enroll(endpoints: &[String], token: &JoinToken, host_name: &str) -> Result<Identity, LinkError> {
    let tls = pinned(token.ca_sha256)?;
    let mut client = connect(endpoints, &tls).await?.agent();
    let Request { key, csr } = request()?;
    let message =
        EnrollRequest { token: token.reveal(), certificate_request: csr.into(), host_name: host_name.to_owned() };
    let answer = client.enroll(call(message)).await.map_err(|status| LinkError::status(&status))?.into_inner();
    let host_id = answer.host_id.parse().map_err(LinkError::crypto("reading the host id"))?;
    Ok(Identity {
        host_id,
        endpoints: endpoints.to_vec(),
        key: key.serialize_der(),
        chain: answer.certificate_chain.into_iter().map(|der| HexBytes(der.to_vec())).collect(),
    })
}

/// A fresh key and certificate for the same host.
pub async fn renew(client: &mut Client, identity: &Identity) -> Result<Identity, LinkError> {
    let Request { key, csr } = request()?;
    let message = RenewCertificateRequest { certificate_request: csr.into() };
    let answer = client.renew_certificate(call(message)).await.map_err(|status| LinkError::status(&status))?;
    let chain = answer.into_inner().certificate_chain.into_iter().map(|der| HexBytes(der.to_vec())).collect();
    Ok(Identity { key: key.serialize_der(), chain, ..identity.clone() })
}

/// How long until two thirds of the certificate's life are over.
pub fn renewal_due(identity: &Identity) -> Result<Duration, LinkError> {
    let leaf = identity.chain.first().map(|bytes| bytes.0.as_slice()).unwrap_or_default();
    let (_, certificate) =
        X509Certificate::from_der(leaf).map_err(LinkError::crypto("reading the host's certificate"))?;
    let validity = certificate.validity();
    let (from, to) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    let due = from.saturating_add(to.saturating_sub(from) / 3 * 2);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    Ok(Duration::from_secs(u64::try_from(due).unwrap_or(0).saturating_sub(now)))
}
