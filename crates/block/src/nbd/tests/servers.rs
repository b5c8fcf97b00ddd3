//! Against qemu-storage-daemon and nbdkit, as Debian packages them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::Seen;
use super::workload::{Plan, one, read_all, run};
use crate::nbd::{NbdOptions, NbdVolume, UnixConnector};
use crate::{Operation, Volume};

pub(super) const SIZE: u64 = 4 << 20;

/// A server process; killed at the end.
pub(super) struct Server {
    child: Child,
    command: Vec<String>,
    pub(super) socket: PathBuf,
}

impl Server {
    fn start(socket: &Path, command: Vec<String>) -> Self {
        let child = spawn(&command);
        let server = Self { child, command, socket: socket.to_owned() };
        server.wait_for_socket();
        server
    }

    pub(super) fn wait_for_socket(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            assert!(Instant::now() < until, "{:?} does not listen", self.command);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// kill -9, and another one on the same socket.
    fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(&self.socket).unwrap();
    }

    pub(super) fn restart(&mut self) {
        self.child = spawn(&self.command);
    }

    fn open(&self, options: NbdOptions) -> (NbdVolume, Arc<Seen>) {
        let seen = Seen::new();
        let connector = Box::new(UnixConnector { path: self.socket.clone() });
        (NbdVolume::open(connector, seen.clone(), options).unwrap(), seen)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &[String]) -> Child {
    Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap_or_else(
        |error| panic!("cannot start {} (Debian packages nbdkit and qemu-system-common): {error}", command[0]),
    )
}

pub(super) fn nbdkit(folder: &TempDir, filters: &[&str], plugin: &[&str]) -> Server {
    let socket = folder.path().join("nbdkit.sock");
    let mut command = vec!["nbdkit".to_owned(), "-f".to_owned(), "-U".to_owned(), socket.display().to_string()];
    command.extend(filters.iter().map(|filter| format!("--filter={filter}")));
    command.extend(plugin.iter().map(|word| (*word).to_owned()));
    Server::start(&socket, command)
}

pub(super) fn storage_daemon(folder: &TempDir, file: &Path) -> Server {
    let socket = folder.path().join("qsd.sock");
    let command = [
        "qemu-storage-daemon",
        "--blockdev",
        &format!("driver=file,node-name=disk,filename={},discard=unmap", file.display()),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={}", socket.display()),
        "--export",
        "type=nbd,id=export,node-name=disk,name=volume,writable=on",
    ];
    Server::start(&socket, command.map(str::to_owned).to_vec())
}

pub(super) fn disk(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("disk");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn named() -> NbdOptions {
    NbdOptions { export: "volume".to_owned(), ..NbdOptions::default() }
}

fn content(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn qemu_storage_daemon_serves_what_was_written() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let server = storage_daemon(&folder, &file);
    let (volume, seen) = server.open(named());
    let export = *volume.export();
    assert!(export.flush && export.fua && export.trim && export.write_zeroes && export.structured, "{export:?}");
    assert_eq!(volume.size_bytes(), SIZE);
    let outcome = run(&volume, &Plan { requests: 5000, queues: 3, ..Plan::default() }, |_| {});
    volume.sync().unwrap();
    outcome.check(&read_all(&volume));
    outcome.check(&content(&file));
    assert_eq!(seen.lost(), 0);
}

#[test]
fn nbdkit_serves_what_was_written() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let plugin = ["file", file.to_str().unwrap()];
    let log = folder.path().join("log");
    let mut words: Vec<&str> = plugin.to_vec();
    let log_file = format!("logfile={}", log.display());
    words.push(&log_file);
    let server = nbdkit(&folder, &["log"], &words);
    let (volume, seen) = server.open(NbdOptions::default());
    assert!(volume.export().multi_conn && volume.export().structured, "{:?}", volume.export());
    let outcome = run(&volume, &Plan { requests: 5000, queues: 3, seed: 2, ..Plan::default() }, |_| {});
    volume.sync().unwrap();
    outcome.check(&read_all(&volume));
    outcome.check(&content(&file));
    assert_eq!(seen.lost(), 0);
    // Every queue had a connection of its own, and all kinds of requests arrived as such.
    let log = String::from_utf8(content(&log)).unwrap();
    for word in ["connection=3", " Read ", " Write ", " Flush ", " Trim ", " Zero "] {
        assert!(log.contains(word), "the server's log lacks {word:?}");
    }
}

#[test]
fn nbdkit_with_simple_replies_and_without_optional_commands() {
    let folder = TempDir::new().unwrap();
    let server = nbdkit(&folder, &["nozero"], &["--no-sr", "memory", "4M"]);
    let (volume, _) = server.open(NbdOptions::default());
    assert!(!volume.export().structured && !volume.export().write_zeroes);
    assert_eq!(volume.limits().max_write_zeroes_bytes, 0);
    let plan = Plan { zeroes: false, queues: 2, seed: 3, ..Plan::default() };
    let outcome = run(&volume, &plan, |_| {});
    outcome.check(&read_all(&volume));
    let mut queue = volume.open_queue(1).unwrap();
    let zero = Operation::WriteZeroes { may_unmap: true };
    let error = one(&mut *queue, zero, 0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EOPNOTSUPP));
}

#[test]
fn zeroes_that_may_not_be_unmapped_keep_their_space() {
    use std::os::unix::fs::MetadataExt;
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let server = storage_daemon(&folder, &file);
    let (volume, _) = server.open(named());
    let mut queue = volume.open_queue(1).unwrap();
    let mut bytes = vec![7; 1 << 20];
    one(&mut *queue, Operation::Write, 0, &mut bytes).unwrap();
    one(&mut *queue, Operation::WriteZeroes { may_unmap: false }, 0, &mut bytes).unwrap();
    volume.sync().unwrap();
    let kept = std::fs::metadata(&file).unwrap().blocks() * 512;
    assert!(kept >= 1 << 20, "{kept} bytes allocated");
    one(&mut *queue, Operation::Discard, 0, &mut bytes).unwrap();
    volume.sync().unwrap();
    let left = std::fs::metadata(&file).unwrap().blocks() * 512;
    assert!(left < kept, "{left} of {kept} bytes allocated after a discard");
    assert_eq!(&read_all(&volume)[..1 << 20], &vec![0; 1 << 20][..]);
}

#[test]
fn errors_of_the_server_reach_their_requests_only() {
    let folder = TempDir::new().unwrap();
    let words = ["memory", "4M", "error=EIO", "error-rate=20%"];
    let server = nbdkit(&folder, &["error"], &words);
    let (volume, seen) = server.open(NbdOptions::default());
    let plan = Plan { may_fail: true, queues: 2, seed: 4, ..Plan::default() };
    let outcome = run(&volume, &plan, |_| {});
    assert!(!outcome.failed.is_empty());
    assert!(outcome.failed.iter().all(|error| error.source.raw_os_error() == Some(libc::EIO)));
    assert!(outcome.failed.len() < plan.requests);
    assert_eq!(seen.lost(), 0, "an error of a request is none of the connection");
}

#[test]
fn a_full_server_says_so() {
    let folder = TempDir::new().unwrap();
    let server = nbdkit(&folder, &[], &["full", "4M"]);
    let (volume, _) = server.open(NbdOptions::default());
    let mut queue = volume.open_queue(1).unwrap();
    let error = one(&mut *queue, Operation::Write, 0, &mut [1; 4096]).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn answers_that_come_late_are_waited_for() {
    let folder = TempDir::new().unwrap();
    let server = nbdkit(&folder, &["cow", "delay"], &["memory", "4M", "rdelay=3ms", "wdelay=5ms"]);
    let (volume, seen) = server.open(NbdOptions::default());
    // With these filters nbdkit does not offer WRITE_ZEROES.
    let plan = Plan { zeroes: volume.export().write_zeroes, requests: 500, queues: 2, seed: 5, ..Plan::default() };
    let outcome = run(&volume, &plan, |_| {});
    outcome.check(&read_all(&volume));
    assert_eq!(seen.lost(), 0);
}

#[test]
fn a_silent_server_is_given_up_and_asked_again() {
    let folder = TempDir::new().unwrap();
    let server = nbdkit(&folder, &["delay"], &["memory", "4M", "rdelay=100000"]);
    let options = NbdOptions {
        reply_timeout: Duration::from_millis(50),
        close_timeout: Duration::from_millis(50),
        ..NbdOptions::default()
    };
    let (volume, seen) = server.open(options);
    let mut queue = volume.open_queue(1).unwrap();
    let mut buffer = [0u8; 512];
    let buffers = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 512 }];
    let request = crate::Request { operation: Operation::Read, offset: 0, length: 0, buffers: &buffers, token: 1 };
    // SAFETY: the buffer outlives the queue, which is dropped below.
    unsafe { queue.submit(request).unwrap() };
    queue.kick().unwrap();
    while seen.lost() < 3 {
        super::workload::sleep(&[&*queue]);
        queue.drain(&mut |_| panic!("nobody answered")).unwrap();
    }
    // Called off: no wait for the server.
    drop(queue);
}

#[test]
fn nbdkit_block_size_limits_are_kept() {
    let folder = TempDir::new().unwrap();
    let policy = ["memory", "4M", "blocksize-minimum=4096", "blocksize-preferred=8192", "blocksize-maximum=64K"];
    let mut words = policy.to_vec();
    words.push("blocksize-error-policy=error");
    let server = nbdkit(&folder, &["blocksize-policy"], &words);
    let (volume, seen) = server.open(NbdOptions::default());
    assert_eq!(volume.limits().logical_block_bytes, 4096);
    assert_eq!(volume.limits().optimal_io_bytes, 8192);
    assert_eq!(volume.export().max_payload_bytes, 64 << 10);
    let mut queue = volume.open_queue(2).unwrap();
    let mut bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 4096) as u8).collect();
    one(&mut *queue, Operation::Write, 8192, &mut bytes).unwrap();
    let mut again = vec![0; 1 << 20];
    one(&mut *queue, Operation::Read, 8192, &mut again).unwrap();
    assert!(bytes == again);
    let error = one(&mut *queue, Operation::Read, 512, &mut [0; 512]).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EINVAL));
    assert_eq!(seen.lost(), 0);
}

#[test]
fn an_export_that_is_not_there_is_named() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let server = storage_daemon(&folder, &file);
    let connector = Box::new(UnixConnector { path: server.socket.clone() });
    let options = NbdOptions { export: "other".to_owned(), ..NbdOptions::default() };
    let error = NbdVolume::open(connector, Seen::new(), options).unwrap_err().to_string();
    assert!(error.contains("\"other\""), "{error}");
}

#[test]
fn a_read_only_volume_refuses_changes() {
    let folder = TempDir::new().unwrap();
    let server = nbdkit(&folder, &[], &["-r", "memory", "4M"]);
    let (volume, _) = server.open(NbdOptions::default());
    assert!(volume.read_only());
    let mut queue = volume.open_queue(1).unwrap();
    let error = one(&mut *queue, Operation::Write, 0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EROFS));
    one(&mut *queue, Operation::Flush, 0, &mut []).unwrap();
}

#[test]
fn a_larger_export_is_found_by_growing() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let server = nbdkit(&folder, &[], &["file", file.to_str().unwrap()]);
    let (volume, _) = server.open(NbdOptions::default());
    let mut queue = volume.open_queue(1).unwrap();
    one(&mut *queue, Operation::Write, 0, &mut [3; 512]).unwrap();
    assert!(volume.grow(2 * SIZE).is_err(), "the export is not longer yet");
    assert_eq!(volume.size_bytes(), SIZE);
    File::options().write(true).open(&file).unwrap().set_len(2 * SIZE).unwrap();
    volume.grow(2 * SIZE).unwrap();
    assert_eq!(volume.size_bytes(), 2 * SIZE);
    one(&mut *queue, Operation::Write, 2 * SIZE - 512, &mut [4; 512]).unwrap();
    let mut found = [0; 512];
    one(&mut *queue, Operation::Read, 0, &mut found).unwrap();
    assert_eq!(found, [3; 512]);
    one(&mut *queue, Operation::Read, 2 * SIZE - 512, &mut found).unwrap();
    assert_eq!(found, [4; 512]);
}

fn killed_mid_traffic(mut server: Server, file: &Path, options: NbdOptions, plan: &Plan) {
    let (volume, seen) = server.open(options);
    let mut kills = 0;
    let outcome = run(&volume, plan, |number| {
        if number % 500 == 499 {
            server.kill_and_restart();
            kills += 1;
        }
    });
    assert!(kills >= 5 && seen.lost() >= kills && seen.recovered() >= 1, "{kills} kills, {seen:?}");
    volume.sync().unwrap();
    outcome.check(&read_all(&volume));
    outcome.check(&content(file));
}

#[test]
fn qemu_storage_daemon_killed_mid_traffic() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let plan = Plan { requests: 4000, queues: 2, seed: 6, ..Plan::default() };
    killed_mid_traffic(storage_daemon(&folder, &file), &file, named(), &plan);
}

#[test]
fn nbdkit_killed_mid_traffic() {
    let folder = TempDir::new().unwrap();
    let file = disk(&folder);
    let plan = Plan { requests: 4000, queues: 3, seed: 7, ..Plan::default() };
    let server = nbdkit(&folder, &[], &["file", file.to_str().unwrap()]);
    killed_mid_traffic(server, &file, NbdOptions::default(), &plan);
}
