//! TLS for NBD (`NBD_OPT_STARTTLS` in
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>).
//!
//! A VMM holds no keys and knows no TLS. NBD begins TLS inside its negotiation, so the negotiation is led up to there here, and begun anew
//! with the VMM on one end of a socket pair: it gets the server's own greeting, and everything after that is relayed. The relay is a task
//! of this process. When it ends, the VMM sees a lost connection.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::DriverError;
use crate::server::{Endpoint, Server};

/// `NBDMAGIC` and `IHAVEOPT`, with which a server begins.
const GREETING: [u8; 16] = *b"NBDMAGICIHAVEOPT";
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
const OPT_STARTTLS: u32 = 5;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REP_ACK: u32 = 1;
/// Longest error text of a server that is read.
const MAX_TEXT_BYTES: u32 = 4096;
/// What is relayed at once, in bytes: the data of a large request.
const RELAY_BYTES: usize = 256 << 10;
/// How long saying goodbye may take.
const GOODBYE: Duration = Duration::from_secs(5);

/// Whom to trust and who we are.
#[derive(Clone, Debug)]
pub struct Tls(Arc<ClientConfig>);

fn refuse(path: &Path) -> impl Fn(String) -> DriverError {
    let server = path.display().to_string();
    move |why| DriverError::Tls { server: server.clone(), why }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, DriverError> {
    let refuse = refuse(path);
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| refuse(error.to_string()))?.collect();
    let found = found.map_err(|error| refuse(error.to_string()))?;
    if found.is_empty() { Err(refuse("the file holds no certificate".to_owned())) } else { Ok(found) }
}

impl Tls {
    /// Trusts servers whose certificate one of those in the PEM file `authority` has signed; `identity` = PEM files with our
    /// own certificate (and those that lead to its authority) and its key, for servers that ask for one.
    ///
    /// # Errors
    /// A file cannot be read, or is not what it should be.
    pub fn new(authority: &Path, identity: Option<(&Path, &Path)>) -> Result<Self, DriverError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(authority)? {
            roots.add(certificate).map_err(|error| refuse(authority)(error.to_string()))?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| refuse(authority)(error.to_string()))?
            .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| refuse(key)(error.to_string()))?;
                let chain_of = certificates(chain)?;
                builder.with_client_auth_cert(chain_of, secret).map_err(|error| refuse(chain)(error.to_string()))?
            }
        };
        Ok(Self(Arc::new(config)))
    }

    /// A connection to a server that wants TLS, for a client that knows none: the other end begins the negotiation as the server
    /// would. Ends with the server's, and the other way round.
    ///
    /// # Errors
    /// The server is not reached, is no NBD server, wants no TLS or is not the one that it should be; or not within `patience`.
    pub async fn connect(&self, server: &Server, patience: Duration) -> Result<OwnedFd, DriverError> {
        let refuse = |why: String| DriverError::Tls { server: server.endpoint.to_string(), why };
        let text = server.tls_name.clone().unwrap_or_default();
        let name = ServerName::try_from(text.clone()).map_err(|_| refuse(format!("{text:?} is no server's name")))?;
        let begin = async {
            let stream = connect(&server.endpoint, patience).await?;
            self.begin(stream, name).await.map_err(|error| refuse(error.to_string()))
        };
        let silent = |_| refuse(format!("no answer within {patience:?}"));
        let (stream, flags) = tokio::time::timeout(patience, begin).await.map_err(silent)??;
        let pair = std::os::unix::net::UnixStream::pair();
        let prepared = pair.and_then(|(ours, theirs)| {
            ours.set_nonblocking(true)?;
            theirs.set_nonblocking(true)?;
            Ok((UnixStream::from_std(ours)?, theirs))
        });
        let (ours, theirs) = prepared.map_err(DriverError::io("make a pair of sockets"))?;
        let endpoint = server.endpoint.to_string();
        tokio::spawn(async move {
            if let Err(error) = relay(ours, stream, flags).await {
                tracing::debug!(server = endpoint, %error, "a TLS connection has ended");
            }
        });
        Ok(theirs.into())
    }

    /// Leads the negotiation up to the end of the TLS handshake; answers the server's flags too.
    async fn begin(&self, mut stream: Stream, name: ServerName<'static>) -> io::Result<(TlsStream<Stream>, u16)> {
        let mut greeting = [0; GREETING.len()];
        stream.read_exact(&mut greeting).await?;
        if greeting != GREETING {
            return Err(io::Error::other("this is no NBD server with the newstyle negotiation"));
        }
        let flags = stream.read_u16().await?;
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(io::Error::other("the server lacks NBD_FLAG_FIXED_NEWSTYLE"));
        }
        let mut option = Vec::new();
        option.extend(client_flags(flags).to_be_bytes());
        option.extend(b"IHAVEOPT");
        option.extend(OPT_STARTTLS.to_be_bytes());
        option.extend(0u32.to_be_bytes());
        stream.write_all(&option).await?;
        let (magic, to) = (stream.read_u64().await?, stream.read_u32().await?);
        let (kind, length) = (stream.read_u32().await?, stream.read_u32().await?);
        if magic != OPTION_REPLY_MAGIC || to != OPT_STARTTLS || length > MAX_TEXT_BYTES {
            return Err(io::Error::other("the server's answer to STARTTLS is none"));
        }
        let mut text = vec![0; length as usize];
        stream.read_exact(&mut text).await?;
        // What follows must be encrypted: nothing may come before (RFC 3207, section 6, tells of a similar protocol why).
        if kind != REP_ACK || length != 0 {
            let text = String::from_utf8_lossy(&text).into_owned();
            return Err(io::Error::other(format!("the server takes no TLS (answer {kind:#x}) {text}")));
        }
        let stream = TlsConnector::from(self.0.clone()).connect(name, stream).await?;
        Ok((stream, flags))
    }
}

/// The flags that a client of this server sends.
fn client_flags(server: u16) -> u32 {
    u32::from(server & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
}

trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}
type Stream = Box<dyn Duplex>;

async fn connect(endpoint: &Endpoint, patience: Duration) -> Result<Stream, DriverError> {
    let to = endpoint.clone();
    let connected = tokio::task::spawn_blocking(move || to.connect(patience)).await;
    let fd = connected.map_err(|error| DriverError::io("connect")(io::Error::other(error)))??;
    let adopt = || -> io::Result<Stream> {
        Ok(match endpoint {
            Endpoint::Unix(_) => {
                let stream = std::os::unix::net::UnixStream::from(fd);
                stream.set_nonblocking(true)?;
                Box::new(UnixStream::from_std(stream)?)
            }
            Endpoint::Tcp { .. } => {
                let stream = std::net::TcpStream::from(fd);
                stream.set_nonblocking(true)?;
                Box::new(TcpStream::from_std(stream)?)
            }
        })
    };
    adopt().map_err(DriverError::io(format!("use the connection to {endpoint}")))
}

/// Stands between a client without TLS and a server with it, until either has ended.
async fn relay(mut client: UnixStream, server: TlsStream<Stream>, flags: u16) -> io::Result<()> {
    client.write_all(&GREETING).await?;
    client.write_u16(flags).await?;
    // The server has them already.
    if client.read_u32().await? != client_flags(flags) {
        return Err(io::Error::other("the client sent other flags than the server was told"));
    }
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let up = async {
        pump(&mut from_client, &mut to_server).await?;
        tokio::time::timeout(GOODBYE, to_server.shutdown()).await?
    };
    tokio::select! {
        ended = up => ended,
        ended = pump(&mut from_server, &mut to_client) => ended,
    }
}

async fn pump(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; RELAY_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(buffer.get(..length).unwrap_or_default()).await?;
        // TLS keeps what the socket did not take at once.
        to.flush().await?;
    }
}
