//! TLS to the control plane.

use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1::agent_service_client::AgentServiceClient;
use hearth_proto::v1::object_service_client::ObjectServiceClient;
use hearth_types::CONTROL_SERVER_NAME;
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use super::{Identity, LinkError};

/// How long the control plane's machine may take to accept a connection; its kernel does that, however busy the rest is.
const CONNECT: Duration = Duration::from_secs(5);
/// How long TLS and HTTP/2 may take after that. A machine on which many guests boot can be slow: giving up early would begin the
/// same work anew, and never end.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// How often a quiet connection is probed, and how long the answer may take.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(15));
/// Largest message taken: everything that a host with thousands of instances should have.
const MAX_MESSAGE: usize = 256 << 20;
/// Largest message with an object: chunks have 512 KiB, prefetch lists and roots a few MiB at most.
const MAX_OBJECT: usize = 64 << 20;

/// Calls to the control plane's agent service.
pub type Client = AgentServiceClient<Channel>;
/// Calls to its object service.
pub type ObjectClient = ObjectServiceClient<Channel>;

/// A connection to the control plane.
#[derive(Clone, Debug)]
pub struct Connection(Channel);

impl Connection {
    /// For calls of the agent service.
    pub fn agent(&self) -> Client {
        Client::new(self.0.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// For calls of the object service.
    pub fn objects(&self) -> ObjectClient {
        ObjectClient::new(self.0.clone()).max_decoding_message_size(MAX_OBJECT).max_encoding_message_size(MAX_OBJECT)
    }
}

/// TLS with this host's certificate, towards servers of its own cluster only.
pub fn mutual(identity: &Identity) -> Result<Arc<ClientConfig>, LinkError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.authority()?).map_err(LinkError::crypto("reading the cluster's authority"))?;
    let config = builder()?
        .with_root_certificates(roots)
        .with_client_auth_cert(identity.certificates(), identity.private_key())
        .map_err(LinkError::crypto("reading the host's certificate"))?;
    Ok(with_http2(config))
}

/// TLS towards the one cluster whose authority has this fingerprint; for enrolment.
pub fn pinned(ca_sha256: [u8; 32]) -> Result<Arc<ClientConfig>, LinkError> {
    let verifier = PinnedAuthority { ca_sha256, provider: Arc::new(ring::default_provider()) };
    let config = builder()?.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth();
    Ok(with_http2(config))
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, LinkError> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(LinkError::crypto("setting up TLS"))
}

fn with_http2(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Trusts the certificate in the server's chain that has the wanted fingerprint, and what it signed for the control plane.
#[derive(Debug)]
struct PinnedAuthority {
    ca_sha256: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| Sha256::digest(certificate.as_ref()).as_slice() == self.ca_sha256)
            .ok_or_else(|| rustls::Error::General("this is not the cluster that the join token is for".into()))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects to the first endpoint that answers.
pub async fn connect(endpoints: &[String], tls: &Arc<ClientConfig>) -> Result<Connection, LinkError> {
    let mut last = LinkError::NotEnrolled;
    for endpoint in endpoints {
        match connect_one(endpoint, tls.clone()).await {
            Ok(channel) => return Ok(Connection(channel)),
            Err(reason) => last = LinkError::Connect { endpoint: endpoint.clone(), reason },
        }
    }
    Err(last)
}

async fn connect_one(endpoint: &str, tls: Arc<ClientConfig>) -> Result<Channel, String> {
    let uri: http::Uri = endpoint.parse().map_err(|error| format!("not a URL: {error}"))?;
    let (Some("https"), Some(host)) = (uri.scheme_str(), uri.host()) else {
        return Err("not a URL like https://HOST:PORT".into());
    };
    let address = format!("{host}:{}", uri.port_u16().unwrap_or(443));
    let connector = tower::service_fn(move |_: http::Uri| {
        let (address, tls) = (address.clone(), tls.clone());
        async move {
            let accepted = tokio::time::timeout(CONNECT, TcpStream::connect(&address)).await;
            let stream = accepted.map_err(|_| {
                std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no connection within {CONNECT:?}"))
            })??;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(CONTROL_SERVER_NAME).map_err(std::io::Error::other)?;
            Ok::<_, std::io::Error>(TokioIo::new(TlsConnector::from(tls).connect(name, stream).await?))
        }
    });
    // The connector does TLS itself, with a check that tonic's own does not have: to tonic this is plain HTTP/2.
    let endpoint = Endpoint::from_shared(format!("http://{CONTROL_SERVER_NAME}")).map_err(|error| error.to_string())?;
    let endpoint = endpoint
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true)
        .user_agent(concat!("hearth-agent/", env!("CARGO_PKG_VERSION")))
        .map_err(|error| error.to_string())?;
    let connecting = tokio::time::timeout(CONNECT + HANDSHAKE, endpoint.connect_with_connector(connector));
    match connecting.await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(with_causes(&error)),
        Err(_) => Err(format!("connected, but no TLS session within {HANDSHAKE:?}")),
    }
}

/// tonic says "transport error"; what happened is in the causes.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
