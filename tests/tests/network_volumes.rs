//! Volumes that a volume backend keeps: an NBD server in the network, with TLS, that serves the files of a folder; and a pool of a real
//! Ceph cluster.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hearth_tests::cloud::{Cloud, Shape, kill_now, wait_until};
use hearth_tests::console::{Console, PATIENCE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// Where the server listens: the hosts' network of the test.
const ADDRESS: &str = "10.99.0.254";

/// What an operator writes for such a server.
const PROVISIONER: &str = r#"#!/bin/sh
set -eu
folder=$(dirname "$0")
export=$folder/exports/$2 generation=$folder/exports/.$2
case $1 in
create)
    [ -e "$export" ] || truncate -s "$3" "$export"
    ;;
attach)
    [ -e "$export" ] || { echo "there is no $2" >&2; exit 1; }
    [ "$(cat "$generation" 2>/dev/null || echo 0)" -le "$3" ] || { echo "$2 is attached elsewhere" >&2; exit 1; }
    echo "$3" >"$generation"
    [ "$(stat -c %s "$export")" -ge "$4" ] || truncate -s "$4" "$export"
    ;;
delete)
    rm -f "$export" "$generation"
    ;;
esac
"#;

/// Makes the server's folder with program and certificates; the agents' configuration.
fn prepare(folder: &Path) -> String {
    let san = folder.join("san");
    std::fs::create_dir_all(san.join("exports")).unwrap();
    std::fs::write(san.join("provision"), PROVISIONER).unwrap();
    std::fs::set_permissions(san.join("provision"), PermissionsExt::from_mode(0o755)).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "storage");
    std::fs::write(san.join("ca-cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    for who in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![ADDRESS.to_owned()]).unwrap();
        std::fs::write(san.join(format!("{who}-cert.pem")), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        std::fs::write(san.join(format!("{who}-key.pem")), key.serialize_pem()).unwrap();
    }
    let san = san.display();
    format!(
        "[[volume-backend]]\nname = 'san'\nkind = 'nbd'\nuri = 'nbds://{ADDRESS}/{{volume}}'\nprovisioner = '{san}/provision'\n\
         tls-authority = '{san}/ca-cert.pem'\ntls-certificate = '{san}/client-cert.pem'\ntls-key = '{san}/client-key.pem'\n"
    )
}

struct Server {
    folder: PathBuf,
    child: Option<Child>,
}

impl Server {
    fn start(cloud: &Cloud) -> Self {
        let mut server = Self { folder: cloud.path("san"), child: None };
        server.restart();
        server
    }

    fn restart(&mut self) {
        let child = Command::new("nbdkit")
            .args(["-f", "-i", ADDRESS, "--tls=require", "--tls-verify-peer"])
            .arg(format!("--tls-certificates={}", self.folder.display()))
            .arg("file")
            .arg(format!("dir={}", self.folder.join("exports").display()))
            .stdin(Stdio::null())
            .spawn();
        self.child = Some(child.unwrap());
        let listens = || TcpStream::connect((ADDRESS, 10809)).is_ok();
        assert!(wait_until(PATIENCE, listens), "nbdkit does not listen");
    }

    fn kill(&mut self) {
        kill_now(&mut self.child.take().unwrap());
    }

    /// Names of what it keeps.
    fn exports(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.join("exports")).unwrap().flatten();
        entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            kill_now(child);
        }
    }
}

fn shell(cloud: &Cloud, name: &str) -> Console {
    let mut console = cloud.console(name);
    console.wait_for_shell();
    console
}

/// Waits until the guest has a volume; its device.
fn disk(console: &mut Console, volume: &str) -> String {
    let serial = volume.replace('-', "");
    let look =
        format!("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = {serial} ] && echo /dev/${{d##*/}}; done; true");
    let mut found = String::new();
    assert!(
        wait_until(PATIENCE, || {
            found = console.run(&look);
            !found.is_empty()
        }),
        "the guest does not see {volume}"
    );
    found
}

/// What fills 4 MiB at a MiB of a disk with bytes that tell of `word`.
fn writing(device: &str, at_mib: u32, word: &str) -> String {
    format!("yes {word} | head -c 4194304 | dd of={device} bs=1M seek={at_mib} conv=fsync,notrunc 2>/dev/null")
}

/// Whether a disk holds that.
fn holds(console: &mut Console, device: &str, at_mib: u32, word: &str) -> bool {
    let wanted = console.run(&format!("yes {word} | head -c 4194304 | md5sum"));
    // Read from the disk, not from the guest's memory.
    console.run("echo 3 >/proc/sys/vm/drop_caches");
    console.run(&format!("dd if={device} bs=1M skip={at_mib} count=4 2>/dev/null | md5sum")) == wanted
}

/// The same as a job of the guest's own that ends with a file of this name.
fn in_background(command: &str, done: &str) -> String {
    format!("({command}; touch /tmp/{done}) >/dev/null 2>&1 & true")
}

/// Waits until it is there.
fn is_done(guest: &mut Console, done: &str) -> bool {
    wait_until(PATIENCE, || guest.try_run(&format!("test -e /tmp/{done}")).1 == 0)
}

fn status(cloud: &Cloud) -> serde_json::Value {
    cloud.json(&["volume", "describe", "data"])["status"].clone()
}

/// Runs an instance; the number of its host's agent, and the host's id.
fn run(cloud: &Cloud, name: &str) -> (usize, String) {
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", name, "--wait"]);
    let id = cloud.instance(name)["host_id"].as_str().unwrap().to_owned();
    let hosts = cloud.json(&["host", "list"]);
    let host = hosts.as_array().unwrap().iter().find(|host| host["host_id"] == *id).unwrap();
    (host["name"].as_str().unwrap().trim_start_matches("host").parse().unwrap(), id)
}

/// What [`grow`] writes.
const END: (u32, &str) = (2040, "end");

/// Makes the volume larger under its guest, which uses what is new.
fn grow(cloud: &Cloud, guest: &mut Console, device: &str) {
    cloud.hearth(&["volume", "modify", "data", "--size", "2G", "--wait"]);
    let size = format!("cat /sys/block/{}/size", &device[5..]);
    assert!(wait_until(PATIENCE, || guest.run(&size) == (4 << 20).to_string()), "the guest does not see that it grew");
    guest.run(&writing(device, END.0, END.1));
}

/// Takes the volume from instance `a` to an instance on the other host, which has it at once since nothing is copied; then deletes
/// all.
fn move_and_delete(cloud: &Cloud, guest: Console, first_host: &str, data: &str, written: &[(u32, &str)]) {
    cloud.hearth(&["volume", "detach", "data", "--yes", "--wait"]);
    cloud.hearth(&["host", "drain", first_host]);
    let (_, second_host) = run(cloud, "b");
    assert_ne!(first_host, second_host);
    let mut other = shell(cloud, "b");
    cloud.hearth(&["volume", "attach", "data", "b", "--wait"]);
    let device = disk(&mut other, data);
    for (at, word) in written {
        assert!(holds(&mut other, &device, *at, word), "at {at} MiB, on the other host");
    }
    drop((guest, other));
    cloud.hearth(&["instance", "terminate", "a", "b", "--yes", "--wait"]);
    let available = || cloud.json(&["volume", "describe", "data"])["state"] == "available";
    assert!(wait_until(PATIENCE, available), "{:#}", cloud.json(&["volume", "describe", "data"]));
    cloud.hearth(&["volume", "delete", "data", "--yes", "--wait"]);
    cloud.assert_nothing_left();
    let left: Vec<_> = (0..2).flat_map(|host| served(cloud, host)).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Folders of what serves volumes on a host.
fn served(cloud: &Cloud, host: usize) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(cloud.run_dir(host).join(".network")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn a_volume_at_a_backend_outlives_its_server_its_agent_and_its_host() {
    let mut cloud = Cloud::start_with(Shape::Hosts(2), prepare);
    let mut server = Server::start(&cloud);
    cloud.import_tiny();
    let (code, said) = cloud.try_hearth(&["volume", "create", "--size", "1G", "--backend", "tape"]);
    assert_ne!(code, Some(0), "{said}");
    assert!(said.contains("local, san"), "{said}");
    let create = ["volume", "create", "--size", "1G", "--backend", "san", "--name", "data", "--wait", "-o", "id"];
    let data = cloud.hearth(&create).trim().to_owned();
    assert!(server.exports().contains(&data), "{:?}", server.exports());
    let (agent, first_host) = run(&cloud, "a");
    let mut guest = shell(&cloud, "a");
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    guest.run(&writing(&device, 10, "first"));
    assert!(holds(&mut guest, &device, 10, "first"));

    // The server dies: the guest waits and everybody can see why. Then it goes on.
    server.kill();
    guest.run(&in_background(&writing(&device, 20, "second"), "second"));
    assert!(wait_until(PATIENCE, || status(&cloud) == "impaired"), "{}", status(&cloud));
    assert_eq!(guest.try_run("test -e /tmp/second").1, 1, "it was written nowhere");
    server.restart();
    assert!(is_done(&mut guest, "second"), "the guest's disk stands still");
    assert!(wait_until(PATIENCE, || status(&cloud) == "ok"), "{}", status(&cloud));

    // The agent dies, and with it its end of TLS; the next one connects the guest's disk again.
    cloud.kill_agent(agent);
    drop(guest);
    cloud.start_agent(agent);
    cloud.wait_for_hosts(2);
    let mut guest = shell(&cloud, "a");
    guest.run(&writing(&device, 30, "third"));
    grow(&cloud, &mut guest, &device);

    let (code, said) = cloud.try_hearth(&["snapshot", "create", "data", "--name", "s"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("UnsupportedOperation"), "{said}");

    // A stopped instance keeps it and has it again.
    guest.run("sync");
    drop(guest);
    cloud.hearth(&["instance", "stop", "a", "--wait"]);
    cloud.hearth(&["instance", "start", "a", "--wait"]);
    let mut guest = shell(&cloud, "a");
    let device = disk(&mut guest, &data);
    let written = [(10, "first"), (20, "second"), (30, "third"), END];
    for (at, word) in written {
        assert!(holds(&mut guest, &device, at, word), "at {at} MiB");
    }

    // Another host has it at once: nothing is copied.
    move_and_delete(&cloud, guest, &first_host, &data, &written);
    assert_eq!(server.exports(), Vec::<String>::new());
}

/// The storage daemons of a cloud's hosts, which would outlive a test that fails.
struct StorageDaemons([PathBuf; 2]);

impl StorageDaemons {
    fn of(cloud: &Cloud) -> Self {
        Self([0, 1].map(|host| cloud.run_dir(host).join(".network")))
    }

    /// The one that serves a volume on a host; `None` when none does.
    fn find(&self, host: usize, volume: &str) -> Option<Pid> {
        let pid: i32 = std::fs::read_to_string(self.0[host].join(volume).join("pid")).ok()?.trim().parse().ok()?;
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        comm.starts_with("qemu-storage").then(|| Pid::from_raw(pid))
    }

    fn kill(&self, host: usize, volume: &str) -> Pid {
        let pid = self.find(host, volume).expect("a storage daemon serves the volume");
        kill(pid, Signal::SIGKILL).unwrap();
        pid
    }
}

impl Drop for StorageDaemons {
    fn drop(&mut self) {
        for (host, folder) in self.0.iter().enumerate() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if let Some(pid) = self.find(host, &entry.file_name().to_string_lossy()) {
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
        }
    }
}

/// Names of the pool's images.
fn images(conf: &str, pool: &str) -> Vec<String> {
    let output = Command::new("rbd").args(["--conf", conf, "ls", pool, "--format", "json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
#[ignore = "needs a Ceph cluster: scripts/test-ceph"]
fn an_rbd_volume_outlives_its_storage_daemon_its_agent_and_its_host() {
    let env = |key: &str| std::env::var(key).unwrap_or_else(|_| panic!("{key} is not set: run scripts/test-ceph"));
    let (conf, pool) = (env("HEARTH_TEST_CEPH_CONF"), env("HEARTH_TEST_CEPH_POOL"));
    let settings = format!("[[volume-backend]]\nname = 'ceph'\nkind = 'rbd'\npool = '{pool}'\nconf = '{conf}'\n");
    let mut cloud = Cloud::start_with(Shape::Hosts(2), |_| settings);
    let daemons = StorageDaemons::of(&cloud);
    cloud.connect_to_outside();
    cloud.import_tiny();
    let create = ["volume", "create", "--size", "1G", "--backend", "ceph", "--name", "data", "--wait", "-o", "id"];
    let data = cloud.hearth(&create).trim().to_owned();
    assert!(images(&conf, &pool).contains(&data), "{:?}", images(&conf, &pool));

    let (agent, first_host) = run(&cloud, "a");
    let mut guest = shell(&cloud, "a");
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    guest.run(&writing(&device, 10, "first"));
    assert!(holds(&mut guest, &device, 10, "first"));

    // Its storage daemon dies while the guest writes; the agent starts another one.
    guest.run(&in_background(&writing(&device, 20, "second"), "second"));
    let killed = daemons.kill(agent, &data);
    assert!(is_done(&mut guest, "second"), "the guest's disk stands still");
    assert!(daemons.find(agent, &data).is_some_and(|pid| pid != killed));
    assert!(wait_until(PATIENCE, || status(&cloud) == "ok"), "{}", status(&cloud));

    // The agent dies while the guest writes, and then the storage daemon, so that the guest waits for the next agent.
    guest.run(&in_background(&writing(&device, 30, "third"), "third"));
    cloud.kill_agent(agent);
    drop(guest);
    assert_ne!(daemons.kill(agent, &data), killed);
    cloud.start_agent(agent);
    cloud.wait_for_hosts(2);
    let mut guest = shell(&cloud, "a");
    assert!(is_done(&mut guest, "third"), "the guest's disk stands still");
    grow(&cloud, &mut guest, &device);
    let written = [(10, "first"), (20, "second"), (30, "third"), END];
    for (at, word) in written {
        assert!(holds(&mut guest, &device, at, word), "at {at} MiB");
    }
    move_and_delete(&cloud, guest, &first_host, &data, &written);
    assert!(!images(&conf, &pool).contains(&data));
}
