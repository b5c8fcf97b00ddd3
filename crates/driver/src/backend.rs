//! A volume backend: a place for volumes that hosts reach over the network, under the name that an operator gave it.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use tokio::runtime::Handle;

use crate::DriverError;
use crate::provisioner::Provisioner;
use crate::rbd::{Cluster, Export, Name};
use crate::server::Server;
use crate::tls::Tls;

/// How long a cluster's program, a provisioner or a server may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest name of a backend.
const MAX_NAME_BYTES: usize = 32;
/// The name of volumes on the hosts' own disks.
const LOCAL: &str = "local";
/// What stands for the volume's id in a URI.
const VOLUME: &str = "{volume}";
/// A storage daemon that is younger cannot be one that the VMM gave up for its silence, which takes it 60 seconds.
const YOUNG: Duration = Duration::from_secs(45);
const GENERATION: &str = "generation";

/// A pool of a Ceph cluster.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RbdSettings {
    /// Name of the backend.
    pub name: String,
    /// Pool.
    pub pool: String,
    /// Namespace in it; absent: the default one.
    pub namespace: Option<String>,
    /// `ceph.conf`; absent: Ceph's default.
    pub conf: Option<PathBuf>,
    /// Ceph user without `client.`; absent: Ceph's default.
    pub user: Option<String>,
}

/// An NBD server whose exports a program of the operator makes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NbdSettings {
    /// Name of the backend.
    pub name: String,
    /// NBD URI of a volume's export, with `{volume}` for the volume's id.
    pub uri: String,
    /// The program that makes and deletes exports; see docs/storage.md.
    pub provisioner: PathBuf,
    /// PEM file with the authorities of the server's certificate, for `nbds`.
    pub tls_authority: Option<PathBuf>,
    /// PEM file with this host's certificate, if the server asks for one.
    pub tls_certificate: Option<PathBuf>,
    /// PEM file with its key.
    pub tls_key: Option<PathBuf>,
}

/// A backend as an operator describes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum BackendSettings {
    /// Ceph.
    Rbd(RbdSettings),
    /// NBD.
    Nbd(NbdSettings),
}

#[derive(Debug)]
enum Kind {
    Rbd(Cluster),
    Nbd { uri: String, provisioner: Provisioner, tls: Option<Tls> },
}

/// See the module. All methods block, but never much longer than a minute for each step; call them outside of the runtime's own
/// threads. For one volume one at a time.
#[derive(Debug)]
pub struct Backend {
    name: String,
    kind: Kind,
    runtime: Handle,
}

fn check_name(name: &str) -> Result<(), &'static str> {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(good) || name.starts_with('-') {
        return Err("its name must be 1 to 32 lower-case letters, digits and hyphens, the first no hyphen");
    }
    if name == LOCAL { Err("that name belongs to volumes on the hosts' own disks") } else { Ok(()) }
}

impl Backend {
    /// Checks the settings and reads the files that they name. TLS is spoken by tasks of `runtime`.
    ///
    /// # Errors
    /// What cannot be.
    pub fn new(settings: &BackendSettings, runtime: Handle) -> Result<Self, DriverError> {
        let name = match settings {
            BackendSettings::Rbd(rbd) => &rbd.name,
            BackendSettings::Nbd(nbd) => &nbd.name,
        };
        let refuse = |why: String| DriverError::Settings { backend: name.clone(), why };
        check_name(name).map_err(|why| refuse(why.to_owned()))?;
        let kind = match settings {
            BackendSettings::Rbd(rbd) => {
                let parse = |text: &String| text.parse::<Name>().map_err(|error| refuse(error.to_string()));
                Kind::Rbd(Cluster {
                    conf: rbd.conf.clone(),
                    user: rbd.user.as_ref().map(parse).transpose()?,
                    pool: parse(&rbd.pool)?,
                    namespace: rbd.namespace.as_ref().map(parse).transpose()?,
                    patience: PATIENCE,
                })
            }
            BackendSettings::Nbd(nbd) => {
                if !nbd.uri.contains(VOLUME) {
                    return Err(refuse(format!("uri lacks {VOLUME}: every volume needs an export of its own")));
                }
                let example: Server = nbd.uri.replace(VOLUME, "vol-0").parse()?;
                let identity = match (&nbd.tls_certificate, &nbd.tls_key) {
                    (None, None) => None,
                    (Some(certificate), Some(key)) => Some((certificate.as_path(), key.as_path())),
                    _ => return Err(refuse("tls-certificate and tls-key go together".to_owned())),
                };
                let tls = match (&example.tls_name, &nbd.tls_authority) {
                    (Some(_), Some(authority)) => Some(Tls::new(authority, identity)?),
                    (Some(_), None) => return Err(refuse("an nbds uri needs tls-authority".to_owned())),
                    (None, None) if identity.is_none() => None,
                    (None, _) => return Err(refuse("TLS needs an nbds uri".to_owned())),
                };
                if !nbd.provisioner.is_absolute() {
                    return Err(refuse("provisioner must be an absolute path".to_owned()));
                }
                let provisioner = Provisioner { program: nbd.provisioner.clone(), patience: PATIENCE };
                Kind::Nbd { uri: nbd.uri.clone(), provisioner, tls }
            }
        };
        Ok(Self { name: name.clone(), kind, runtime })
    }

    /// The operator's name for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The NBD export that a VMM has to ask for.
    ///
    /// # Errors
    /// The volume's name does not fit into the URI.
    pub fn export(&self, volume: &Name) -> Result<String, DriverError> {
        match &self.kind {
            Kind::Rbd(_) => Ok(Export::NAME.to_owned()),
            Kind::Nbd { uri, .. } => Ok(server(uri, volume)?.export),
        }
    }

    /// Makes a blank volume. One that is there already is taken for it, at least as long.
    pub fn create(&self, volume: &Name, bytes: u64) -> Result<(), DriverError> {
        match &self.kind {
            Kind::Rbd(cluster) => match cluster.create(volume, bytes) {
                Err(DriverError::Exists { .. }) => grow(cluster, volume, bytes),
                made => made,
            },
            Kind::Nbd { provisioner, .. } => provisioner.create(volume, bytes),
        }
    }

    /// Deletes a volume, if it is there. Nobody may have it attached; a host that went on with it although it should not is
    /// shut out. `folder` as for [`open`](Self::open).
    pub fn delete(&self, volume: &Name, folder: &Path) -> Result<(), DriverError> {
        close(folder, u64::MAX)?;
        match &self.kind {
            Kind::Rbd(cluster) => {
                let removed = match cluster.remove(volume) {
                    Err(DriverError::InUse { .. }) => {
                        cluster.fence(volume)?;
                        cluster.remove(volume)
                    }
                    removed => removed,
                };
                match removed {
                    Err(DriverError::NotFound { .. }) => Ok(()),
                    removed => removed,
                }
            }
            Kind::Nbd { provisioner, .. } => provisioner.delete(volume),
        }
    }

    /// Takes a volume for the attachment with this generation, sees to it that it is `bytes` long, and connects to its server.
    /// Whatever was connected before is not served any more. `folder` is the volume's own on this host, gone with the host's boot.
    ///
    /// # Errors
    /// There is no such volume (it is not made), or there is a later attachment of it.
    pub fn open(&self, volume: &Name, bytes: u64, generation: u64, folder: &Path) -> Result<OwnedFd, DriverError> {
        match &self.kind {
            Kind::Rbd(cluster) => {
                if let Some(theirs) = self::generation(folder).filter(|theirs| *theirs > generation) {
                    return Err(DriverError::Fenced { image: volume.to_string(), ours: generation, theirs });
                }
                grow(cluster, volume, bytes)?;
                note_generation(folder, generation)?;
                let export = Export::start(cluster, volume, generation, false, folder)?;
                let socket = export.connect();
                export.leave();
                socket
            }
            Kind::Nbd { uri, provisioner, tls } => {
                provisioner.attach(volume, generation, bytes)?;
                let server = server(uri, volume)?;
                match tls {
                    Some(tls) => self.runtime.block_on(tls.connect(&server, PATIENCE)),
                    None => server.endpoint.connect(PATIENCE),
                }
            }
        }
    }

    /// Another connection for the attachment that has the volume open, after it lost the one before. A storage daemon of this
    /// host that may hang is started anew.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn reconnect(&self, volume: &Name, bytes: u64, generation: u64, folder: &Path) -> Result<OwnedFd, DriverError> {
        if let Kind::Rbd(_) = &self.kind
            && self::generation(folder) == Some(generation)
            && let Some(export) = Export::adopt(folder)?
            && export.started().is_some_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < YOUNG))
        {
            return export.connect();
        }
        self.open(volume, bytes, generation, folder)
    }
}

/// Ends what serves a volume on this host, unless that is for a later attachment. Needs no backend: whoever changed the settings
/// meanwhile can still detach.
///
/// # Errors
/// It does not end.
pub fn close(folder: &Path, generation: u64) -> Result<(), DriverError> {
    if self::generation(folder).is_some_and(|noted| noted > generation) {
        return Ok(());
    }
    if let Some(export) = Export::adopt(folder)? {
        export.stop()?;
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(DriverError::io(format!("remove {}", folder.display()))(error))
        }
        _ => Ok(()),
    }
}

fn server(uri: &str, volume: &Name) -> Result<Server, DriverError> {
    uri.replace(VOLUME, volume.as_str()).parse()
}

fn grow(cluster: &Cluster, volume: &Name, bytes: u64) -> Result<(), DriverError> {
    if cluster.info(volume)?.size_bytes < bytes { cluster.grow(volume, bytes) } else { Ok(()) }
}

fn note_generation(folder: &Path, generation: u64) -> Result<(), DriverError> {
    let write = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let new = folder.join(".generation");
        fs::write(&new, generation.to_string())?;
        fs::rename(&new, folder.join(GENERATION))
    };
    write().map_err(DriverError::io(format!("write the generation in {}", folder.display())))
}

/// The attachment that was opened last out of a volume's folder.
pub fn generation(folder: &Path) -> Option<u64> {
    fs::read_to_string(folder.join(GENERATION)).ok()?.parse().ok()
}

#[cfg(test)]
#[path = "backend_test.rs"]
mod tests;
