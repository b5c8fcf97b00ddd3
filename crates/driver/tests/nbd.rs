//! An NBD backend against nbdkit, as Debian packages it, which serves the files of a folder; with TLS and without.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hearth_block::nbd::{Connector, NbdError, NbdEvents, NbdOptions, NbdVolume};
use hearth_block::{Operation, Request, Volume, VolumeQueue};
use hearth_driver::{Backend, BackendSettings, Name, NbdSettings};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

const PROVISIONER: &str = r#"#!/bin/sh
set -eu
folder=$(dirname "$0")
export=$folder/exports/$2 generation=$folder/$2.generation
case $1 in
create)
    [ -e "$export" ] || truncate -s "$3" "$export"
    ;;
attach)
    [ -e "$export" ] || { echo "there is no $2" >&2; exit 1; }
    seen=$(cat "$generation" 2>/dev/null || echo 0)
    [ "$seen" -le "$3" ] || { echo "generation $seen has been here" >&2; exit 1; }
    echo "$3" >"$generation"
    [ "$(stat -c %s "$export")" -ge "$4" ] || truncate -s "$4" "$export"
    ;;
delete)
    rm -f "$export" "$generation"
    ;;
*)
    exit 64
    ;;
esac
"#;

struct Site {
    folder: TempDir,
    runtime: Runtime,
    server: Option<Child>,
    tls: Vec<String>,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Site {
    fn new(tls: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("exports")).unwrap();
        let program = folder.path().join("provision");
        std::fs::write(&program, PROVISIONER).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        authority(folder.path());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let here = folder.path().display().to_string();
        let tls = tls.iter().map(|word| word.replace("HERE", &here)).collect();
        let mut site = Self { folder, runtime, server: None, tls };
        site.start();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&mut self) {
        let socket = self.path("nbd.sock");
        let child = Command::new("nbdkit")
            .args(["-f", "-U"])
            .arg(&socket)
            .args(&self.tls)
            .arg("file")
            .arg(format!("dir={}", self.path("exports").display()))
            .stdin(Stdio::null())
            .spawn();
        self.server =
            Some(child.unwrap_or_else(|error| panic!("cannot start nbdkit (Debian package nbdkit): {error}")));
        let end = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < end, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// kill -9.
    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
            let _ = std::fs::remove_file(self.path("nbd.sock"));
        }
    }

    fn settings(&self) -> NbdSettings {
        let (scheme, more) =
            if self.tls.is_empty() { ("nbd+unix", "") } else { ("nbds+unix", "&tls-hostname=san.test") };
        let with_tls = |name: &str| (!self.tls.is_empty()).then(|| self.path(name));
        NbdSettings {
            name: "san".into(),
            uri: format!("{scheme}:///{{volume}}?socket={}{more}", self.path("nbd.sock").display()),
            provisioner: self.path("provision"),
            tls_authority: with_tls("ca-cert.pem"),
            tls_certificate: with_tls("client-cert.pem"),
            tls_key: with_tls("client-key.pem"),
        }
    }

    fn backend(&self, settings: NbdSettings) -> Arc<Backend> {
        Arc::new(Backend::new(&BackendSettings::Nbd(settings), self.runtime.handle().clone()).unwrap())
    }

    fn holds(&self, volume: &Name, offset: u64, byte: u8) -> bool {
        let content = std::fs::read(self.path("exports").join(volume.as_str())).unwrap();
        content[offset as usize..][..4096].iter().all(|there| *there == byte)
    }
}

/// An authority, and what it says of a server and a client, under the names that GnuTLS's programs look for.
fn authority(folder: &Path) {
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "an authority");
    write("ca-cert.pem", params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for (who, name, purpose) in [
        ("server", "san.test", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", "host.test", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        write(&format!("{who}-cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        write(&format!("{who}-key.pem"), key.serialize_pem());
    }
}

/// Connects as an agent does for its VMM.
#[derive(Debug)]
struct Reconnect {
    backend: Arc<Backend>,
    volume: Name,
    bytes: u64,
    generation: u64,
    folder: PathBuf,
}

fn nonblocking(fd: OwnedFd) -> OwnedFd {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    fd
}

impl Connector for Reconnect {
    fn connect(&self) -> io::Result<OwnedFd> {
        let made = self.backend.reconnect(&self.volume, self.bytes, self.generation, &self.folder);
        made.map(nonblocking).map_err(io::Error::other)
    }
}

#[derive(Default)]
struct Seen(AtomicUsize);

impl NbdEvents for Seen {
    fn lost(&self, error: &NbdError) {
        eprintln!("lost: {error}");
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn recovered(&self) {}
}

struct Disk {
    volume: NbdVolume,
    queue: Box<dyn VolumeQueue>,
    seen: Arc<Seen>,
}

impl Disk {
    fn open(connector: Reconnect) -> Result<Self, NbdError> {
        let seen = Arc::new(Seen::default());
        let export = connector.backend.export(&connector.volume).unwrap();
        let options = NbdOptions { export, ..NbdOptions::default() };
        let volume = NbdVolume::open(Box::new(connector), seen.clone(), options)?;
        let queue = volume.open_queue(8).unwrap();
        Ok(Self { volume, queue, seen })
    }

    fn one(&mut self, operation: Operation, offset: u64, buffer: &mut [u8]) {
        let buffers = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
        let request = Request { operation, offset, length: buffer.len() as u64, buffers: &buffers, token: 1 };
        // SAFETY: the buffer lives until the completion was seen below.
        unsafe { self.queue.submit(request).unwrap() };
        self.queue.kick().unwrap();
        let end = Instant::now() + PATIENCE;
        let mut done = None;
        while done.is_none() {
            assert!(Instant::now() < end, "no answer");
            let timeout = PollTimeout::try_from(Duration::from_secs(1)).unwrap();
            poll(&mut [PollFd::new(self.queue.completion_fd(), PollFlags::POLLIN)], timeout).unwrap();
            self.queue.drain(&mut |completion| done = Some(completion.result)).unwrap();
        }
        done.unwrap().unwrap();
    }

    fn write(&mut self, offset: u64, byte: u8, length: usize) {
        self.one(Operation::Write, offset, &mut vec![byte; length]);
    }

    fn flush(&mut self) {
        self.one(Operation::Flush, 0, &mut []);
    }

    fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let mut found = vec![0xee; length];
        self.one(Operation::Read, offset, &mut found);
        found
    }
}

/// The whole life of a volume: made, attached, its server killed, grown, attached by another host, deleted.
fn life(tls: &[&str]) {
    let mut site = Site::new(tls);
    let backend = site.backend(site.settings());
    let volume: Name = "vol-0123456789abcdef0".parse().unwrap();
    let connector = |bytes, generation| Reconnect {
        backend: backend.clone(),
        volume: volume.clone(),
        bytes,
        generation,
        folder: site.path("vol"),
    };
    let folder = site.path("vol");
    let missing = backend.open(&volume, 8 * MIB, 1, &folder).unwrap_err().to_string();
    assert!(missing.contains("there is no vol-0123456789abcdef0"), "{missing}");
    for _ in 0..2 {
        backend.create(&volume, 8 * MIB).unwrap();
    }
    let (first, later, grown) = (connector(8 * MIB, 1), connector(16 * MIB, 2), connector(16 * MIB, 1));
    let mut disk = Disk::open(first).unwrap();
    assert_eq!(disk.volume.size_bytes(), 8 * MIB);
    disk.write(4096, 7, 4096);
    disk.write(2 * MIB, 8, 3 << 20);
    disk.flush();
    assert!(site.holds(&volume, 4096, 7) && site.holds(&volume, 5 * MIB - 4096, 8));
    assert!(disk.read(2 * MIB, 3 << 20).iter().all(|byte| *byte == 8));

    // A server that dies is a pause.
    site.stop();
    site.start();
    disk.write(0, 9, 4096);
    disk.flush();
    assert!(site.holds(&volume, 0, 9));
    assert!(disk.seen.0.load(Ordering::Relaxed) > 0, "the server was killed, and nobody noticed");

    drop(backend.open(&volume, 16 * MIB, 1, &folder).unwrap());
    disk.volume.grow(16 * MIB).unwrap();
    disk.write(16 * MIB - 4096, 5, 4096);
    disk.flush();
    drop(disk);

    let mut elsewhere = Disk::open(later).unwrap();
    assert_eq!(elsewhere.volume.size_bytes(), 16 * MIB);
    assert!(elsewhere.read(16 * MIB - 4096, 4096).iter().all(|byte| *byte == 5));
    // The earlier attachment does not come back.
    let late = grown.connect().unwrap_err().to_string();
    assert!(late.contains("generation 2 has been here"), "{late}");
    drop(elsewhere);
    for _ in 0..2 {
        backend.delete(&volume, &folder).unwrap();
    }
    assert!(!site.path("exports").join(volume.as_str()).exists());
}

#[test]
fn a_volume_lives_at_an_nbd_server() {
    life(&[]);
}

const REQUIRE: [&str; 3] = ["--tls=require", "--tls-certificates=HERE", "--tls-verify-peer"];

#[test]
fn a_volume_lives_at_an_nbd_server_with_tls() {
    life(&REQUIRE);
}

#[test]
fn only_the_right_servers_and_clients_speak_tls() {
    let volume: Name = "vol-1".parse().unwrap();
    let open = |site: &Site, settings: NbdSettings| {
        let backend = site.backend(settings);
        backend.create(&volume, MIB).unwrap();
        let folder = site.path("vol");
        let connector = Reconnect { backend, volume: volume.clone(), bytes: MIB, generation: 1, folder };
        Disk::open(connector).map(|mut disk| disk.read(0, 4096)).map_err(|error| error.to_string())
    };
    let site = Site::new(&REQUIRE);
    assert_eq!(open(&site, site.settings()).unwrap(), vec![0; 4096]);
    // Another name than the certificate's.
    let uri = site.settings().uri.replace("san.test", "other.test");
    let error = open(&site, NbdSettings { uri, ..site.settings() }).unwrap_err();
    assert!(error.contains("certificate"), "{error}");
    // Another authority.
    let stranger = Site::new(&[]);
    let tls_authority = Some(stranger.path("ca-cert.pem"));
    let error = open(&site, NbdSettings { tls_authority, ..site.settings() }).unwrap_err();
    assert!(error.contains("certificate"), "{error}");
    // No certificate of ours: with TLS 1.3 the server says so when the handshake is over for us.
    let anonymous = NbdSettings { tls_certificate: None, tls_key: None, ..site.settings() };
    open(&site, anonymous).unwrap_err();
    // A server without TLS.
    let uri =
        site.settings().uri.replace(&site.path("").display().to_string(), &stranger.path("").display().to_string());
    let error =
        open(&stranger, NbdSettings { uri, provisioner: stranger.path("provision"), ..site.settings() }).unwrap_err();
    assert!(error.contains("takes no TLS"), "{error}");
    // A client without TLS.
    let uri = site.settings().uri.replace("nbds+unix", "nbd+unix").replace("&tls-hostname=san.test", "");
    let plain = NbdSettings { uri, tls_authority: None, tls_certificate: None, tls_key: None, ..site.settings() };
    open(&site, plain).unwrap_err();
}
