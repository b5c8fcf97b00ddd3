//! Volumes that a volume backend keeps: an NBD server in the network, with TLS, that serves the files of a folder.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hearth_tests::cloud::{Cloud, Shape, kill_now, wait_until};
use hearth_tests::console::{Console, PATIENCE};
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
    let status = |cloud: &Cloud| cloud.json(&["volume", "describe", "data"])["status"].clone();

    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let first_host = cloud.instance("a")["host_id"].as_str().unwrap().to_owned();
    let hosts = cloud.json(&["host", "list"]);
    let names: Vec<_> = hosts.as_array().unwrap().iter().map(|host| (&host["host_id"], &host["name"])).collect();
    let first = names.iter().find(|(id, _)| **id == first_host.as_str()).unwrap().1.as_str().unwrap();
    let agent: usize = first.trim_start_matches("host").parse().unwrap();
    let mut guest = shell(&cloud, "a");
    cloud.hearth(&["volume", "attach", "data", "a", "--wait"]);
    let device = disk(&mut guest, &data);
    guest.run(&writing(&device, 10, "first"));
    assert!(holds(&mut guest, &device, 10, "first"));

    // The server dies: the guest waits and everybody can see why. Then it goes on.
    server.kill();
    guest.run(&format!("({}; touch /tmp/second) >/dev/null 2>&1 & true", writing(&device, 20, "second")));
    assert!(wait_until(PATIENCE, || status(&cloud) == "impaired"), "{}", status(&cloud));
    assert_eq!(guest.try_run("test -e /tmp/second").1, 1, "it was written nowhere");
    server.restart();
    assert!(wait_until(PATIENCE, || guest.try_run("test -e /tmp/second").1 == 0), "the guest's disk stands still");
    assert!(wait_until(PATIENCE, || status(&cloud) == "ok"), "{}", status(&cloud));

    // The agent dies, and with it its end of TLS; the next one connects the guest's disk again.
    cloud.kill_agent(agent);
    drop(guest);
    cloud.start_agent(agent);
    cloud.wait_for_hosts(2);
    let mut guest = shell(&cloud, "a");
    guest.run(&writing(&device, 30, "third"));
    cloud.hearth(&["volume", "modify", "data", "--size", "2G", "--wait"]);
    let size = format!("cat /sys/block/{}/size", &device[5..]);
    assert!(wait_until(PATIENCE, || guest.run(&size) == (4 << 20).to_string()), "the guest does not see that it grew");
    guest.run(&writing(&device, 2040, "end"));

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
    let written = [(10, "first"), (20, "second"), (30, "third"), (2040, "end")];
    for (at, word) in written {
        assert!(holds(&mut guest, &device, at, word), "at {at} MiB");
    }

    // Another host has it at once: nothing is copied.
    cloud.hearth(&["volume", "detach", "data", "--yes", "--wait"]);
    cloud.hearth(&["host", "drain", &first_host]);
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "b", "--wait"]);
    assert_ne!(cloud.instance("b")["host_id"], *first_host);
    let mut other = shell(&cloud, "b");
    cloud.hearth(&["volume", "attach", "data", "b", "--wait"]);
    let device = disk(&mut other, &data);
    for (at, word) in written {
        assert!(holds(&mut other, &device, at, word), "at {at} MiB, on the other host");
    }
    drop((guest, other));
    cloud.hearth(&["instance", "terminate", "a", "b", "--yes", "--wait"]);
    let available = || cloud.json(&["volume", "describe", "data"])["state"] == "available";
    assert!(wait_until(PATIENCE, available), "{:#}", cloud.json(&["volume", "describe", "data"]));
    cloud.hearth(&["volume", "delete", "data", "--yes", "--wait"]);
    assert_eq!(server.exports(), Vec::<String>::new());
    cloud.assert_nothing_left();
    let run = |host: usize| format!("/run/hearth-test-{}-{host}/.network", std::process::id());
    let left: Vec<_> = (0..2).filter_map(|host| std::fs::read_dir(run(host)).ok()).flatten().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}
