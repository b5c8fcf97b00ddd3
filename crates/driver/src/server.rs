//! NBD servers and how the agent reaches them.
//!
//! A VMM has neither a network nor paths: the agent connects, and passes the socket. Addresses are NBD URIs
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>).

use std::fmt;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use url::{Host, Url};

use crate::DriverError;

/// The port IANA gave NBD.
const NBD_PORT: u16 = 10809;
/// Longest export name (the protocol's limit).
const MAX_EXPORT_BYTES: usize = 4096;
/// A peer that acknowledges nothing for so long is gone. Shorter than a VMM's own patience with a server.
const PEER_PATIENCE: Duration = Duration::from_secs(20);
const KEEPALIVE_IDLE_SECONDS: u32 = 10;
const KEEPALIVE_INTERVAL_SECONDS: u32 = 5;
const KEEPALIVE_PROBES: u32 = 3;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// On a socket of this host.
    Unix(PathBuf),
    /// In the network.
    Tcp {
        /// A name, or an address without brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

/// An export of a server: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`; `nbds` and `nbds+unix` with TLS. The
/// parameter `tls-hostname` is the name that the server's certificate must have, when it is not HOST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Name of the export; the empty one is the server's default.
    pub export: String,
    /// With TLS: the name or address that the server's certificate must have.
    pub tls_name: Option<String>,
}

impl FromStr for Server {
    type Err = DriverError;

    fn from_str(text: &str) -> Result<Self, DriverError> {
        let refuse = |why: String| DriverError::Address { address: text.to_owned(), why };
        let url = Url::parse(text).map_err(|error| refuse(error.to_string()))?;
        if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
            return Err(refuse("it has a user, a password or a fragment".to_owned()));
        }
        let (mut socket, mut tls_name) = (None, None);
        for (key, value) in url.query_pairs() {
            let known = match key.as_ref() {
                "socket" => &mut socket,
                "tls-hostname" => &mut tls_name,
                _ => return Err(refuse(format!("the parameter {key} is not known"))),
            };
            if known.replace(value.into_owned()).is_some() {
                return Err(refuse(format!("the parameter {key} is there twice")));
            }
        }
        let socket = socket.map(PathBuf::from);
        let (scheme, tls) = match url.scheme() {
            "nbds" => ("nbd", true),
            "nbds+unix" => ("nbd+unix", true),
            scheme => (scheme, false),
        };
        if !tls && tls_name.is_some() {
            return Err(refuse("tls-hostname is for nbds and nbds+unix".to_owned()));
        }
        let path = url.path();
        let export = decode(path.strip_prefix('/').unwrap_or(path))
            .ok_or_else(|| refuse("the export's name is not UTF-8".to_owned()))?;
        if export.len() > MAX_EXPORT_BYTES || export.contains('\0') {
            return Err(refuse("the export's name is too long or has a NUL".to_owned()));
        }
        let endpoint = match (scheme, socket) {
            ("nbd+unix", Some(socket)) if url.host().is_none() && socket.is_absolute() => Endpoint::Unix(socket),
            ("nbd+unix", _) => return Err(refuse("it needs ?socket= with an absolute path, and no host".to_owned())),
            ("nbd", Some(_)) => return Err(refuse("only nbd+unix has a socket".to_owned())),
            ("nbd", None) => {
                let host = match url.host() {
                    Some(Host::Domain(name)) if !name.is_empty() => name.to_owned(),
                    Some(Host::Ipv4(address)) => address.to_string(),
                    Some(Host::Ipv6(address)) => address.to_string(),
                    // An unknown scheme's host is not parsed as an address.
                    _ => return Err(refuse("it has no host".to_owned())),
                };
                Endpoint::Tcp { host, port: url.port().unwrap_or(NBD_PORT) }
            }
            (scheme, _) => return Err(refuse(format!("{scheme} is none of nbd, nbd+unix, nbds and nbds+unix"))),
        };
        let tls_name = match (tls, tls_name, &endpoint) {
            (false, ..) => None,
            (true, Some(name), _) => Some(name),
            (true, None, Endpoint::Tcp { host, .. }) => Some(host.clone()),
            (true, None, Endpoint::Unix(_)) => return Err(refuse("it needs tls-hostname=".to_owned())),
        };
        Ok(Self { endpoint, export, tls_name })
    }
}

/// Percent-decoding (RFC 3986, section 2.1).
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        let (high, low) = (digit()?, digit()?);
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).ok()
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl Endpoint {
    /// A new connection to pass to a VMM. A network that swallows packets ends it after 20 to 25 seconds.
    ///
    /// # Errors
    /// Nobody listens there, or does not answer within `patience`.
    pub fn connect(&self, patience: Duration) -> Result<OwnedFd, DriverError> {
        let failed = || DriverError::io(format!("connect to the NBD server at {self}"));
        match self {
            Self::Unix(path) => Ok(UnixStream::connect(path).map_err(failed())?.into()),
            Self::Tcp { host, port } => {
                let addresses = (host.as_str(), *port).to_socket_addrs().map_err(failed())?;
                let mut last = std::io::ErrorKind::NotFound.into();
                for address in addresses {
                    match TcpStream::connect_timeout(&address, patience) {
                        Ok(stream) => {
                            prepare(&stream).map_err(failed())?;
                            return Ok(stream.into());
                        }
                        Err(error) => last = error,
                    }
                }
                Err(failed()(last))
            }
        }
    }
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &(PEER_PATIENCE.as_millis() as u32))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> Server {
        Server { endpoint: Endpoint::Tcp { host: host.into(), port }, export: export.into(), tls_name: None }
    }

    #[test]
    fn addresses_are_understood() {
        assert_eq!("nbd://storage.lan/disk%201".parse::<Server>().unwrap(), tcp("storage.lan", 10809, "disk 1"));
        assert_eq!("nbd://192.0.2.7:4711".parse::<Server>().unwrap(), tcp("192.0.2.7", 4711, ""));
        assert_eq!("nbd://[2001:db8::7]:4711/a/b".parse::<Server>().unwrap(), tcp("2001:db8::7", 4711, "a/b"));
        let unix = Server { endpoint: Endpoint::Unix("/run/a b".into()), export: "x".into(), tls_name: None };
        assert_eq!("nbd+unix:///x?socket=/run/a%20b".parse::<Server>().unwrap(), unix);
        let with_tls = |name: &str, server: Server| Server { tls_name: Some(name.into()), ..server };
        let parsed = |text: &str| text.parse::<Server>().unwrap();
        assert_eq!(parsed("nbds://storage.lan/x"), with_tls("storage.lan", tcp("storage.lan", 10809, "x")));
        assert_eq!(parsed("nbds://192.0.2.7/x?tls-hostname=nas"), with_tls("nas", tcp("192.0.2.7", 10809, "x")));
        assert_eq!(parsed("nbds+unix:///x?socket=/run/a%20b&tls-hostname=nas"), with_tls("nas", unix));
        for bad in [
            "nbd:///x",
            "nbd://h/x?socket=/a",
            "nbd://u@h/x",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=relative",
            "nbd+unix://h/x?socket=/a",
            "nbd+unix:///x?socket=/a&socket=/b",
            "nbd://h/%ff",
            "nbds+unix:///x?socket=/a",
            "nbd://h/x?tls-hostname=h",
            "nbds://h/x?tls-hostname=h&tls-hostname=i",
            "http://h/x",
            "h",
        ] {
            assert!(matches!(bad.parse::<Server>(), Err(DriverError::Address { .. })), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_does_harm(text in ".*", tail in "[a-z/%?=&:@\\[\\]0-9]*") {
            let _ = text.parse::<Server>();
            let _ = format!("nbd://{tail}").parse::<Server>();
            let _ = format!("nbd+unix://{tail}").parse::<Server>();
        }
    }

    #[test]
    fn a_connection_reaches_its_server_or_says_why_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let endpoint = Endpoint::Tcp { host: "127.0.0.1".into(), port };
        let mut ours = TcpStream::from(endpoint.connect(Duration::from_secs(10)).unwrap());
        let (mut theirs, _) = listener.accept().unwrap();
        theirs.write_all(b"hello").unwrap();
        let mut found = [0; 5];
        ours.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"hello");
        drop(listener);
        let error = endpoint.connect(Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains(&format!("127.0.0.1:{port}")), "{error}");
        let error = Endpoint::Unix("/no/such".into()).connect(Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.contains("/no/such"), "{error}");
    }
}
