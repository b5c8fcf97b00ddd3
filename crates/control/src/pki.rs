//! The cluster's certificate authority: made at the first start, kept in `<state>/pki` (key mode 0600), signs the server's
//! certificate and those of agents. Who an agent is stands in its certificate as `spiffe://<cluster>/agent/<host id>`.

use std::net::IpAddr;
use std::path::Path;

use hearth_types::HostId;
use hearth_types::enrolment::CONTROL_SERVER_NAME;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, string::Ia5String,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

use crate::error::ControlError;
use crate::files;

/// Validity of the authority's certificate.
const CA_DAYS: i64 = 3650;
/// Validity of a server certificate; a new one is made at each start.
const SERVER_DAYS: i64 = 825;
/// Validity of an agent's certificate; agents renew theirs long before.
const AGENT_DAYS: i64 = 30;
/// Clocks of hosts may be behind by this much.
const CLOCK_SKEW: Duration = Duration::hours(1);
/// Longest accepted certificate request in bytes.
pub(crate) const MAX_REQUEST_BYTES: usize = 16 * 1024;

/// The authority.
pub(crate) struct Pki {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    ca_der: Vec<u8>,
    cluster_id: String,
}

/// Certificate and key of the server, PEM.
pub(crate) struct ServerIdentity {
    /// Leaf, then the authority's certificate.
    pub chain_pem: String,
    /// PKCS#8.
    pub key_pem: String,
}

fn pki_error(what: &str) -> impl FnOnce(rcgen::Error) -> ControlError + '_ {
    move |error| ControlError::Pki(format!("{what}: {error}"))
}

fn validity(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + Duration::days(days);
}

fn common_name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

impl Pki {
    /// Loads the authority from `folder`, or makes it.
    pub fn open(folder: &Path, cluster_id: &str) -> Result<Self, ControlError> {
        let key_path = folder.join("ca.key");
        let certificate_path = folder.join("ca.pem");
        let key = match files::read_if_exists(&key_path)? {
            Some(pem) => KeyPair::from_pem(&pem).map_err(pki_error("ca.key"))?,
            None => {
                let key = KeyPair::generate().map_err(pki_error("make the CA key"))?;
                files::write_atomically(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
                key
            }
        };
        let ca_pem = match files::read_if_exists(&certificate_path)? {
            Some(pem) => pem,
            None => {
                let pem = ca_certificate(&key, cluster_id)?.pem();
                files::write_atomically(&certificate_path, pem.as_bytes(), 0o644)?;
                pem
            }
        };
        let (_, block) = x509_parser::pem::parse_x509_pem(ca_pem.as_bytes())
            .map_err(|error| ControlError::Pki(format!("ca.pem: {error}")))?;
        let ca_der = block.contents;
        let issuer =
            Issuer::from_ca_cert_der(&CertificateDer::from(ca_der.as_slice()), key).map_err(pki_error("ca.pem"))?;
        Ok(Self { issuer, ca_pem, ca_der, cluster_id: cluster_id.to_owned() })
    }

    /// The authority's certificate.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// SHA-256 of the authority's certificate in DER.
    pub fn ca_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.ca_der).into()
    }

    /// Makes a server certificate for these DNS names and addresses.
    pub fn server_identity(&self, names: &[String]) -> Result<ServerIdentity, ControlError> {
        let mut params = CertificateParams::default();
        validity(&mut params, SERVER_DAYS);
        params.distinguished_name = common_name(CONTROL_SERVER_NAME);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(ia5(name)?),
            });
        }
        let key = KeyPair::generate().map_err(pki_error("make the server's key"))?;
        let leaf = params.signed_by(&key, &self.issuer).map_err(pki_error("sign the server's certificate"))?;
        Ok(ServerIdentity { chain_pem: format!("{}{}", leaf.pem(), self.ca_pem), key_pem: key.serialize_pem() })
    }

    /// Signs an agent's request (PKCS#10, DER) whatever names it asks for: it becomes `host`. Returns the chain, leaf first.
    pub fn sign_agent(&self, request: &[u8], host: &HostId) -> Result<Vec<Vec<u8>>, String> {
        if request.len() > MAX_REQUEST_BYTES {
            return Err(format!("has {} bytes, at most {MAX_REQUEST_BYTES}", request.len()));
        }
        let parsed = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(|error| format!("not a PKCS#10 request: {error}"))?;
        let mut params = CertificateParams::default();
        validity(&mut params, AGENT_DAYS);
        params.distinguished_name = common_name(host.as_str());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let uri = self.agent_uri(host);
        params.subject_alt_names = vec![SanType::URI(ia5(&uri).map_err(|error| error.to_string())?)];
        let leaf =
            params.signed_by(&parsed.public_key, &self.issuer).map_err(|error| format!("cannot be signed: {error}"))?;
        Ok(vec![leaf.der().to_vec(), self.ca_der.clone()])
    }

    fn agent_uri(&self, host: &HostId) -> String {
        format!("spiffe://{}/agent/{host}", self.cluster_id)
    }

    /// Which host a client certificate stands for. The TLS layer has already checked that this authority signed it and that
    /// it is valid now.
    pub fn agent_of(&self, certificate: &[u8]) -> Option<HostId> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let prefix = format!("spiffe://{}/agent/", self.cluster_id);
        let mut found = None;
        for extension in certificate.extensions() {
            let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() else { continue };
            for name in &names.general_names {
                match (name, &found) {
                    (GeneralName::URI(uri), None) => found = Some(uri.strip_prefix(&prefix)?.parse().ok()?),
                    // SPIFFE allows one URI and nothing that could be taken for a second identity.
                    _ => return None,
                }
            }
        }
        found
    }
}

fn ia5(text: &str) -> Result<Ia5String, ControlError> {
    Ia5String::try_from(text).map_err(|_| ControlError::Pki(format!("'{text}' is not an ASCII name")))
}

fn ca_certificate(key: &KeyPair, cluster_id: &str) -> Result<Certificate, ControlError> {
    let mut params = CertificateParams::default();
    validity(&mut params, CA_DAYS);
    params.distinguished_name = common_name(&format!("hearth cluster {cluster_id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params.self_signed(key).map_err(pki_error("make the CA certificate"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn request() -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["spiffe://other/agent/h-00000000000000000".to_owned()]).unwrap();
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    #[test]
    fn an_authority_outlives_its_process_and_keeps_its_key_private() {
        let dir = tempfile::tempdir().unwrap();
        let first = Pki::open(dir.path(), "c1").unwrap();
        let again = Pki::open(dir.path(), "c1").unwrap();
        assert_eq!(first.ca_sha256(), again.ca_sha256());
        let mode = std::fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_certificate_names_the_host_that_was_asked_for_and_only_in_its_own_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), "c1").unwrap();
        let host = HostId::generate().unwrap();
        let chain = pki.sign_agent(&request(), &host).unwrap();
        assert_eq!(pki.agent_of(&chain[0]), Some(host));
        assert_eq!(pki.agent_of(&chain[1]), None, "the CA itself is no agent");
        let other = Pki::open(tempfile::tempdir().unwrap().path(), "c2").unwrap();
        assert_eq!(other.agent_of(&chain[0]), None);
    }

    #[test]
    fn garbage_requests_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), "c1").unwrap();
        let host = HostId::generate().unwrap();
        let good = request();
        assert!(pki.sign_agent(b"", &host).is_err());
        assert!(pki.sign_agent(&good[..good.len() / 2], &host).is_err());
        assert!(pki.sign_agent(&vec![0x30; MAX_REQUEST_BYTES + 1], &host).is_err());
        let mut forged = good.clone();
        let middle = forged.len() / 3;
        forged[middle] ^= 1;
        assert!(pki.sign_agent(&forged, &host).is_err(), "the request's own signature must hold");
        assert_eq!(pki.agent_of(b"garbage"), None);
    }
}
